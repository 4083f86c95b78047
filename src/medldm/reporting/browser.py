"""The slice browser: stacks of images through which a reader moves, in all planes and layers together."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from medldm.evaluation.panels import PLANES
from medldm.reporting.page import data_uri, element, joined_markup, paragraph, script_data, section

DIFFERENCES = (("generated", "real"),)
HOW = (
    "The sliders, or the arrow keys, Page Up, Page Down, Home and End on a line of pictures, move through "
    "the slices; a click into a volume moves all its planes there. Differences are red where the first is "
    "brighter and blue where it is darker, in full colour at half of the range."
)


def about(stack: Mapping) -> str:
    """The sizes of a stack, as they are and as they are shown."""
    shown, full = (" x ".join(map(str, stack[key])) for key in ("shape", "original"))
    if stack["labels"]:
        shown, full = (" x ".join(map(str, stack[key][1:])) for key in ("shape", "original"))
    kept = "" if shown == full else f", averaged to {shown} to keep this page small"
    if stack["labels"]:
        return f"{stack['shape'][0]} images of {full} pixels{kept}; 8 bit."
    return f"{full} voxels{kept}; 8 bit. From the head down, front up, the patient's left on the right."


def layers_of(stack: Mapping, differences: Sequence[tuple[str, str]]) -> list[dict]:
    layers = [
        {"name": layer["name"], "kind": layer["kind"], "png": data_uri(layer["png"])}
        for layer in stack["layers"]
    ]
    names = {layer["name"] for layer in layers}
    return layers + [
        {"name": f"{a} - {b}", "kind": "difference", "of": [a, b]} for a, b in differences if {a, b} <= names
    ]


def merged(first: Sequence[Mapping], second: Sequence[Mapping]) -> list[Mapping]:
    """Stacks of two evaluations that hold the same images, the generated ones as `A` and `B`."""
    others = {(tuple(stack["ids"]), tuple(stack["shape"])): stack for stack in second}
    both = []
    for stack in first:
        other = others.get((tuple(stack["ids"]), tuple(stack["shape"])))
        if other is None:
            continue
        layers = [layer for layer in stack["layers"] if layer["name"] not in ("generated", "reconstruction")]
        for name, found in (("A", stack), ("B", other)):
            layers += [layer | {"name": name} for layer in found["layers"] if layer["name"] == "generated"]
        labels = stack["labels"] and [
            f"{label} (A), {after(label_b)} (B)"
            for label, label_b in zip(stack["labels"], other["labels"], strict=True)
        ]
        name = stack["name"] if labels else f"{stack['name']} (A), {after(other['name'])} (B)"
        both.append({**stack, "layers": layers, "labels": labels, "name": name})
    return both


def after(caption: str) -> str:
    """The score of 'case: metric 0.5'."""
    return caption.rpartition(": ")[2]


def pane(layer: str) -> Markup:
    frame = element("canvas", "", role="img", aria_label=layer)
    frame += element("i", "", class_="across") + element("i", "", class_="down")
    return element(
        "figure",
        element("figcaption", layer) + element("div", frame, class_="frame"),
        class_="pane",
        data_layer=layer,
    )


def plane_group(number: int, names: Sequence[str], prefix: str) -> Markup:
    """A slider and a line of pictures: one plane of every layer."""
    slider = f"{prefix}-slice{number}"
    field = Markup('<input type="range" id="{}" min="0" max="0" step="1" value="0">').format(slider)
    label = element("label", element("span", PLANES[number]) + field, for_=slider)
    controls = element("div", label + element("output", "", for_=slider), class_="controls")
    panes = element(
        "div",
        joined_markup(map(pane, names)),
        class_="panes",
        tabindex="0",
        role="group",
        aria_label=f"pictures, plane {number + 1}: arrow keys move the slice",
    )
    return element("div", controls + panes, data_plane=number)


def browser_section(
    stacks: Sequence[Mapping],
    differences: Sequence[tuple[str, str]] = DIFFERENCES,
    *,
    title: str = "Slices",
    anchor: str = "slices",
) -> Markup:
    """A section with the browser of these stacks (`evaluation.browsing.read_browser`)."""
    data = [
        {key: stack[key] for key in ("name", "shape", "extent", "planes", "labels")}
        | {"layers": layers_of(stack, differences), "about": about(stack)}
        for stack in stacks
    ]
    names = list(dict.fromkeys(layer["name"] for stack in data for layer in stack["layers"]))
    options = joined_markup(element("option", stack["name"]) for stack in data)
    choice = element(
        "label",
        joined_markup(["case", element("select", options, id=f"{anchor}-case")]),
        for_=f"{anchor}-case",
    )
    lines = Markup('<label><input type="checkbox" name="lines" checked>lines where the planes cross</label>')
    planes = joined_markup(
        plane_group(i, names, anchor) for i in range(max(len(stack["planes"]) for stack in data))
    )
    content = [
        element("div", choice + lines, class_="controls"),
        paragraph("", class_="about dim"),
        planes,
        element("noscript", "The slices need JavaScript; the pictures of this page do not."),
        script_data(data),
    ]
    return section(
        title,
        paragraph(HOW, class_="dim"),
        element("div", joined_markup(content), class_="card browser"),
        anchor=anchor,
    )
