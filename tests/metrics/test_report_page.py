"""The report as its readers meet it: hostile names, accessibility, and slices that move in a browser."""

import csv
import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser

import cv2
import h5py
import numpy as np
import pytest
from synthetic_folders import smooth_images, smooth_volumes, write_case, write_prepared_volumes, write_sample

from medldm.commands import evaluate, report
from medldm.evaluation.browsing import averaged, evenly, read_browser, tiled
from medldm.reporting.files import filmstrip
from medldm.reporting.page import ASSETS, script_data

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
QUICK = ("metrics.bootstrap.num_resamples=20", "panel_rows=1", "metrics.features=[]", "metrics.lpips=null")
SHAPE = (12, 14, 16)
VOID = {"img", "input", "meta", "link", "br", "hr"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a 2D run of hostile names, and that of two evaluations of volumes compared."""
    folder = tmp_path_factory.mktemp("report")
    return {"run": page_of_images(folder / "flat"), "comparison": page_of_volumes(folder / "volumes")}


def call(command, config: str, *overrides: str) -> None:
    from tests.helpers import compose_config

    command.task(compose_config(config, *overrides))


def page_of_images(folder):
    root, run = folder / "data", folder / "run"
    cases = []
    for i, name in enumerate(("<script>window.hacked=1", "002", "003")):
        images = smooth_images(6, 32, seed=i)
        write_case(root / "cases" / f"{name}.h5", images)
        write_case(folder / "samples" / f"{name}.h5", 0.9 * images)
        cases.append({"id": name, "subject": name, "file": f"cases/{name}.h5", "num_slices": 6})
    write_case(root / "cases" / "train.h5", smooth_images(6, 32, seed=9))
    cases.append({"id": "train", "subject": "train", "file": "cases/train.h5", "num_slices": 6})
    index = {"schema_version": 1, "dataset": HOSTILE, "spatial_dims": 2, "cases": cases}
    index |= {"view_names": [HOSTILE, "LA"], "phase_names": ["ED", "ES"]}
    (root / "index.json").write_text(json.dumps(index))
    subjects = [case["subject"] for case in cases]
    splits = {"default": {"train": subjects[3:], "test": subjects[:3]}}
    (root / "splits.json").write_text(json.dumps(splits))
    made = {"checkpoint_sha256": HOSTILE, "command": f"medldm sample '{HOSTILE}'"}
    (folder / "samples" / "provenance.json").write_text(json.dumps(made))
    write_gif(folder / "samples" / "trajectory" / "<script>window.hacked=1.gif", num_frames=20)
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"experiment_name": HOSTILE, "seed": 7}))
    (run / "commands.txt").write_text(f"2026-01-01 00:00:00 medldm train '{HOSTILE}'\n")
    with open(run / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([["step", f"train/{HOSTILE}"], *([i, 1 / (i + 1)] for i in range(9))])
    (run / "samples").mkdir()
    for step in (10, 20):
        cv2.imwrite(str(run / "samples" / f"step_{step:07d}.png"), np.full((8, 16), step, np.uint8))
    names = (f"generated={folder}/samples", f"reference={root}", f"train={root}", f"output={folder}/out")
    call(evaluate, "evaluate", *names, *QUICK)
    call(report, "report", f"run={run}", f"evaluation={folder}/out")
    return folder / "out" / "report.html"


def write_gif(path, num_frames: int) -> None:
    from PIL import Image

    frames = [Image.fromarray(np.full((6, 8), 10 * i, np.uint8)) for i in range(num_frames)]
    path.parent.mkdir(parents=True)
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def page_of_volumes(folder):
    images = smooth_volumes(2, SHAPE, seed=0)
    cases = {f"v{i}": (image, image > 0.2) for i, image in enumerate(images)}
    write_prepared_volumes(folder / "data", cases, orientation="SPL")
    for run, shade in (("a", 0.1), ("b", 0.3)):
        for name, (image, _) in cases.items():
            write_sample(folder / run, name, np.clip(image + shade, -1, 1).astype(np.float32))
            with h5py.File(folder / run / f"{name}.h5", "a") as file:
                file.attrs["spacing"] = [2.0, 1.0, 1.0]
        names = (f"generated={folder}/{run}", f"reference={folder}/data", f"output={folder}/out_{run}")
        call(evaluate, "evaluate", *names, *QUICK)
    pair = f"[{folder}/out_a,{folder}/out_b]"
    call(
        evaluate, "evaluate", f"compare={pair}", f"output={folder}/both", "metrics.bootstrap.num_resamples=20"
    )
    call(report, "report", f"comparison={folder}/both")
    return folder / "both" / "report.html"


class Outline(HTMLParser):
    """The elements of a page outside its drawings, in order, each with its attributes and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
        assert not self.open, f"not closed: {self.open[-1]}"

    def handle_starttag(self, tag, attributes):
        entry = {"tag": tag, "text": "", "inside": [e["tag"] for e in self.open], **dict(attributes)}
        self.elements.append(entry)
        if tag not in VOID:
            self.open.append(entry)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1]["text"] += data

    def all(self, *tags: str) -> list[dict]:
        return [element for element in self.elements if element["tag"] in tags]


@pytest.fixture(scope="module", params=["run", "comparison"])
def outline(pages, request):
    return Outline(pages[request.param].read_text())


def test_names_of_users_become_text_and_nothing_else(pages):
    for path in pages.values():
        found = Outline(path.read_text())
        scripts = found.all("script")
        assert [s.get("type") for s in scripts] == ["application/json", None]
        assert scripts[1]["text"] == (ASSETS / "browser.js").read_text()
        assert not [e for e in found.elements if any(key.startswith("on") for key in e)]
        assert all(e["src"].startswith("data:image/png;base64,") for e in found.all("img"))
    text = pages["run"].read_text()
    assert "<script>window" not in text and "&lt;script&gt;window.hacked=1" in text
    heading = Outline(text).all("h1")[0]
    assert heading["text"] == HOSTILE


def test_data_for_scripts_cannot_leave_its_element():
    markup = str(script_data({"name": HOSTILE}))
    assert markup.count("<") == 2 and json.loads(re.search(r">(.*)<", markup)[1]) == {"name": HOSTILE}


def test_the_policy_lets_nothing_load_and_no_other_script_run(outline):
    policy = next(e["content"] for e in outline.all("meta") if "Policy" in e.get("http-equiv", ""))
    assert policy.startswith("default-src 'none'; img-src data:; ") and "script-src 'sha256-" in policy
    assert "http" not in policy and "unsafe-inline'; script" in policy
    links = [e.get("href", "#") + e.get("src", "data:") for e in outline.elements]
    assert all(re.match(r"(#|data:)", link) for link in links)


def test_the_page_is_accessible(outline):
    assert outline.all("html")[0]["lang"] == "en" and outline.all("title")[0]["text"]
    levels = [int(e["tag"][1]) for e in outline.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(e["alt"].strip() for e in outline.all("img"))
    assert all(e["aria-label"] and e["role"] == "img" for e in outline.all("canvas"))
    ids = [e["id"] for e in outline.elements if "id" in e]
    assert len(ids) == len(set(ids))
    labels = {e["for"] for e in outline.all("label") if "for" in e}
    for field in outline.all("input", "select"):
        assert field.get("id") in labels or "label" in field["inside"]
    for anchor in outline.all("a"):
        assert anchor["href"][1:] in ids
    assert {e["scope"] for e in outline.all("th")} == {"row", "col"}
    assert len(outline.all("caption")) >= 1 and outline.all("main")
    groups = [e for e in outline.elements if e.get("class") in ("panes", "card scroll")]
    assert groups and all(e["tabindex"] == "0" and e["aria-label"] for e in groups)  # scroll by keys


def luminance(colour: str) -> float:
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_text_stands_out_from_its_background():
    """WCAG 2.1, 1.4.3: 4.5 to 1, on light and dark alike."""
    for scheme in re.findall(r":root \{([^}]*)\}", (ASSETS / "page.css").read_text()):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        pairs = [(ink, back) for ink in ("ink", "dim", "accent") for back in ("page", "card", "soft")]
        for ink, back in [*pairs, ("warn", "warnbg")]:
            low, high = sorted(luminance(colours[name]) for name in (ink, back))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, back)


def test_pictures_of_the_run_are_all_there(pages):
    text = pages["run"].read_text()
    assert text.count('alt="newest: step 20"') == 1 and text.count("from the first to the last step") == 2
    assert re.search(r"and training image train_00\d: correlation", text)
    rows = [e["text"] for e in Outline(text).all("code")]
    assert f"medldm sample '{HOSTILE}'" in rows and f"medldm train '{HOSTILE}'" in rows
    assert "A - B" in pages["comparison"].read_text()


def test_layers_hold_the_images_to_half_a_grey_level(pages):
    folder = pages["comparison"].parent.parent
    image = smooth_volumes(2, SHAPE, seed=0)[0, 0].astype(np.float16).astype(np.float32)
    (first, _), (other, _) = (read_browser(folder / f"out_{name}") for name in "ab")
    assert first["shape"] == list(SHAPE) and first["extent"] == [24.0, 14.0, 16.0]
    assert first["ids"] == other["ids"] == ["v0"] and first["planes"] == ["axial", "coronal", "sagittal"]
    layers = {
        layer["name"]: cv2.imdecode(np.frombuffer(layer["png"], np.uint8), 0) for layer in first["layers"]
    }
    tiles = {
        name: layers[name].reshape(3, 14, 4, 16).swapaxes(1, 2).reshape(SHAPE) for name in ("real", "map")
    }
    upright = image[::-1]  # SPL: the first axis runs towards the head
    assert np.abs(tiles["real"] - (upright + 1) * 127.5).max() <= 0.5
    assert np.array_equal(tiles["map"], smooth_volumes(2, SHAPE, seed=0)[0, 0][::-1] > 0.2)


def test_large_volumes_are_averaged_to_the_stated_bound():
    volume = np.arange(8 * 4 * 4, dtype=np.float32).reshape(8, 4, 4)
    small = averaged(volume, 4, is_map=False)
    assert (
        np.array_equal(small, volume.reshape(4, 2, 4, 4).mean(1))
        and averaged(volume, 8, is_map=False) is volume
    )
    assert set(np.unique(averaged(volume, 4, is_map=True))) <= set(range(128))
    assert tiled(np.ones((5, 2, 3), np.uint8)).shape == (2 * 2, 3 * 3)
    assert evenly(10, 4) == [0, 3, 6, 9] and evenly(2, 4) == [0, 1] and evenly(0, 3) == []


def test_a_filmstrip_has_the_first_and_the_last_frame(tmp_path):
    write_gif(tmp_path / "gif" / "a.gif", num_frames=20)
    strip = cv2.imdecode(np.frombuffer(filmstrip(tmp_path / "gif" / "a.gif"), np.uint8), 0)
    assert strip.shape == (6, 8 * 8 + 7 * 4) and strip[0, 0] == 0 and strip[0, -1] == 190


@pytest.fixture(scope="module")
def chromium():
    """A headless browser that reaches nothing; without one the tests of the markup above remain."""
    driver_path = shutil.which("chromedriver")
    if shutil.which("chromium") is None or driver_path is None:
        pytest.skip(
            "no chromium and chromium-driver here: the pages' markup was checked, not their behaviour"
        )
    assert importlib.util.find_spec("selenium"), (
        "run `make install`: selenium is among the development packages"
    )
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for name in (
        "--headless=new",
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(name)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver_path)) as driver:
        yield driver


def opened(driver, path):
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(path.as_uri())
    ready = "return document.querySelector('.browser').dataset.ready"
    WebDriverWait(driver, 20).until(lambda found: found.execute_script(ready))


def errors(driver) -> list[dict]:
    """What the console told; reading canvases back, as this test does, is warned of."""
    return [entry for entry in driver.get_log("browser") if "readback" not in entry["message"]]


PIXELS = """
const canvas = document.querySelector(`[data-plane="${arguments[0]}"] [data-layer="${arguments[1]}"] canvas`);
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
return [canvas.height, canvas.width, ...data];"""


def pixels(driver, plane: int, layer: str) -> np.ndarray:
    height, width, *values = driver.execute_script(PIXELS, plane, layer)
    return np.array(values).reshape(height, width, 4)[..., :3]


def test_sliders_keys_and_clicks_move_the_slices(pages, chromium):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    opened(chromium, pages["comparison"])
    image = smooth_volumes(2, SHAPE, seed=0)[0, 0].astype(np.float16).astype(np.float32)
    volume = np.clip(np.round((image[::-1] + 1) * 127.5), 0, 255)  # towards the feet, the back, the left
    assert np.array_equal(pixels(chromium, 0, "real")[..., 0], volume[6])
    assert np.array_equal(pixels(chromium, 1, "real")[..., 0], volume[:, 7])
    assert np.array_equal(pixels(chromium, 2, "real")[..., 0], volume[:, :, 8])
    slider = chromium.find_element("css selector", '[data-plane="0"] input')
    slider.send_keys(Keys.ARROW_RIGHT)
    assert np.array_equal(pixels(chromium, 0, "real")[..., 0], volume[7])
    output = chromium.find_element("css selector", '[data-plane="0"] output')
    assert output.text == "axial slice 8 of 12"
    panes = chromium.find_elements("css selector", ".panes")
    panes[1].send_keys(Keys.ARROW_DOWN)
    assert np.array_equal(pixels(chromium, 1, "real")[..., 0], volume[:, 6])
    panes[2].send_keys(Keys.END)
    assert np.array_equal(pixels(chromium, 2, "real")[..., 0], volume[:, :, 15])
    # A and B are 0.1 and 0.3 brighter: the difference is -25 or -26 grey levels, doubled, blue.
    blue = pixels(chromium, 0, "A - B")
    assert (blue[..., 2] == 255).all() and 255 - 52 <= np.median(blue[..., 0]) <= 255 - 50
    frame = chromium.find_element("css selector", '[data-plane="0"] .frame')
    ActionChains(chromium).move_to_element_with_offset(
        frame, 0, -frame.size["height"] // 2 + 1
    ).click().perform()
    assert np.array_equal(pixels(chromium, 1, "real")[..., 0], volume[:, 0])
    assert not errors(chromium)


def test_a_page_of_hostile_names_runs_none_of_them(pages, chromium):
    opened(chromium, pages["run"])
    assert chromium.execute_script("return [window.hacked ?? null, document.title]") == [None, HOSTILE]
    label = chromium.find_element("css selector", '[data-plane="0"] output').text
    assert label.startswith(("002_000", "<script>window.hacked=1_000"))
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    chromium.set_window_size(500, 900)
    assert chromium.execute_script(overflow) <= 0
    assert not errors(chromium)
