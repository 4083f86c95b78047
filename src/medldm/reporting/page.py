"""The report's HTML: small pieces of markup and the page around them, with nothing loaded from elsewhere.

Markup is `markupsafe.Markup`; whatever else meets it, every name and text of a user's, is escaped on the way.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

ASSETS = Path(__file__).parent / "assets"


def joined_markup(parts: Iterable[str]) -> Markup:
    """Pieces one after another; those that are no markup are escaped."""
    return Markup("").join(parts)


def element(name: str, content: object, **attributes: object) -> Markup:
    """`content` is escaped unless it is markup, attribute values are always. `class_` stands for class, and
    `data_x` for data-x.
    """
    marks = joined_markup(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), str(value))
        for key, value in attributes.items()
    )
    return Markup("<{}{}>{}</{}>").format(Markup(name), marks, content, Markup(name))


def paragraph(text: object, **attributes: str) -> Markup:
    return element("p", text, **attributes)


def section(title: str, *content: str, anchor: str) -> Markup:
    return element("section", element("h2", title) + joined_markup(content), id=anchor)


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", marked: Sequence[str] = ()
) -> Markup:
    """A table whose first column heads its rows; rows whose first cell is in `marked` stand out."""
    lines = []
    for first, *rest in rows:
        cells = element("th", first, scope="row") + joined_markup(element("td", cell) for cell in rest)
        lines.append(element("tr", cells, **({"class_": "mark"} if first in marked else {})))
    header = joined_markup(element("th", name, scope="col") if name else element("td", "") for name in head)
    title = element("caption", caption) if caption else Markup("")
    body = element("thead", element("tr", header)) + element("tbody", joined_markup(lines))
    return element("div", element("table", title + body), class_="card scroll", tabindex="0", role="group",
                   aria_label=caption or "table")  # fmt: skip


def tiles(facts: Sequence[tuple[str, str]]) -> Markup:
    """(what, value) pairs as a row of large numbers."""
    cells = (element("b", value) + element("span", what) for what, value in facts)
    return element(
        "div", joined_markup(element("div", cell, class_="tile") for cell in cells), class_="tiles"
    )


def facts_list(facts: Sequence[tuple[str, object]]) -> Markup:
    terms = joined_markup(element("dt", name) + element("dd", value) for name, value in facts)
    return element("div", element("dl", terms), class_="card")


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def picture(png: bytes, caption: str) -> Markup:
    """A PNG inside the page itself."""
    image = Markup('<img src="{}" alt="{}">').format(data_uri(png), caption)
    return element("figure", image + element("figcaption", caption))


def chart(svg: Markup, title: str) -> Markup:
    """An inline drawing, which is told as one image of this name."""
    return element("div", svg, class_="card", role="img", aria_label=title)


def folded(title: str, text: str) -> Markup:
    return element("details", element("summary", title) + element("pre", text, tabindex="0"))


def script_data(data: object) -> Markup:
    """Data for a script of the page, which no text in it can leave."""
    return element("script", htmlsafe_json_dumps(data, dumps=json.dumps), type="application/json")


@cache
def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def page(title: str, subtitle: str, links: Sequence[tuple[str, str]], content: str) -> str:
    """The whole document; `links` are (anchor, text).

    Its content security policy lets it load nothing, and run no script but its own, by that one's digest.
    """
    script = asset("browser.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(
        title=title, subtitle=subtitle, links=links, content=content, script_digest=digest,
        style=Markup(asset("page.css")), script=Markup(script),
    )  # fmt: skip
