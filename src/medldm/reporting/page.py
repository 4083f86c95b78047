"""The report's HTML: small pieces of markup and the page around them, with nothing loaded from elsewhere."""

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --dim: #5f6b7a; --line: #dfe4ea;
  --page: #f4f6f8; --card: #ffffff; --soft: #eef2f7; --accent: #2563c9; --warn: #9a5b00; --warnbg: #fff4df; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6eaf0; --dim: #97a3b4; --line: #2c3642;
  --page: #11161c; --card: #19212a; --soft: #212b36; --accent: #74a7ff;
  --warn: #f0b75b; --warnbg: #33291a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1300px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; letter-spacing: -.02em; margin: 0 0 4px; }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 52px 0 12px; }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 6px 0 12px; max-width: 78ch; }
.dim, caption, figcaption { color: var(--dim); }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
nav { margin: 14px 0 0; display: flex; flex-wrap: wrap; gap: 6px 18px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  margin: 12px 0; }
.tiles { display: grid; gap: 12px; margin: 22px 0;
  grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; }
.tile b { display: block; font-size: 25px; font-weight: 620; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: 13px; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 8px; }
th, td { padding: 7px 8px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.text { text-align: left; white-space: normal; }
thead th { color: var(--dim); font-weight: 560; font-size: 12.5px; }
tbody tr:last-child td { border-bottom: 0; }
tr.mark td { background: var(--soft); font-weight: 600; }
small.ci { color: var(--dim); font-weight: 400; display: block; font-size: 11px; }
.note { background: var(--warnbg); color: var(--warn); border-radius: 10px; padding: 10px 14px;
  margin: 10px 0;  font-size: 13.5px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px; }
.charts svg, .wide svg { width: 100%; height: auto; display: block; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 12px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 10px; }
figure img { width: 100%; display: block; border-radius: 6px; background: #fff; }
figcaption { font-size: 12.5px; padding: 8px 4px 0; }
figure + figure { margin-top: 0; } .stack figure { margin: 12px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; font-size: 13.5px; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--dim); font-size: 13.5px; }
pre { background: var(--soft); border-radius: 10px; padding: 14px; overflow: auto; font-size: 12px;
  max-height: 460px; }
@media print { body { background: #fff; } .card, .tile, figure { break-inside: avoid; } }
"""


def escape(value: object) -> str:
    return html.escape(str(value))


def element(name: str, content: str, **attributes: str) -> str:
    """`content` is markup already; attribute values are escaped. `class_` stands for class."""
    marks = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{marks}>{content}</{name}>"


def paragraph(text: object, **attributes: str) -> str:
    return element("p", escape(text), **attributes)


def section(title: str, *content: str, anchor: str) -> str:
    return element("section", element("h2", escape(title)) + "".join(content), id=anchor)


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", marked: Sequence[str] = ()
) -> str:
    """A table whose cells are markup; rows whose first cell is in `marked` stand out."""
    lines = []
    for row in rows:
        cells = "".join(element("td", cell) for cell in row)
        lines.append(f'<tr class="mark">{cells}</tr>' if row[0] in marked else f"<tr>{cells}</tr>")
    header = "".join(element("th", escape(name)) for name in head)
    title = element("caption", escape(caption)) if caption else ""
    body = f"<thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return element("div", element("table", title + body), class_="card scroll")


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """(what, value) pairs as a row of large numbers."""
    cells = (element("b", escape(value)) + element("span", escape(what)) for what, value in facts)
    return element("div", "".join(element("div", cell, class_="tile") for cell in cells), class_="tiles")


def facts_list(facts: Sequence[tuple[str, object]]) -> str:
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return element("div", element("dl", terms), class_="card")


def picture(png: bytes, caption: str) -> str:
    """A PNG inside the page itself."""
    data = base64.b64encode(png).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
    return element("figure", image + element("figcaption", escape(caption)))


def folded(title: str, text: str) -> str:
    return element("details", element("summary", escape(title)) + element("pre", escape(text)))


def page(title: str, subtitle: str, links: Sequence[tuple[str, str]], content: str) -> str:
    """The whole document; `links` are (anchor, text)."""
    nav = element("nav", "".join(f'<a href="#{escape(a)}">{escape(text)}</a>' for a, text in links))
    header = element("header", element("h1", escape(title)) + paragraph(subtitle, class_="dim") + nav)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{header}{content}</main></body></html>\n"
    )
