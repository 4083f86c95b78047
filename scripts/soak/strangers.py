"""Checkpoints that anyone may have written: trained ones whose archive, weights, description or state of the
training was changed at random by a seed.
"""

import copy
import random
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
NO_TENSORS = (None, "x", 3, [1.0, 2.0], {}, {"a": torch.zeros(2)})
BAD_ENTRIES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 3, 7, 2**20, 2**31, 10**12, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "x", "3", "1e999", "é" * 300, "\0", "../../x", "${oc.env:HOME}", "???", [], [[]], [None], [1, 2, 3],
    [-1, -1], [10**9] * 3, [0] * 5000, {}, {"a": 1}, {"_args_": [1]},
    {"_target_": "os.system", "command": "true"},
    {"_target_": "medldm.networks.unet.UNet"}, {"_target_": "torch.optim.Adam"}, {"_target_": 3},
    {"_target_": "medldm.diffusion.sampler.DDIMSampler", "_partial_": True},
)  # fmt: skip
DEPTH = 200  # of a list inside a list, and so on


def nested() -> Any:
    tree: Any = 1
    for _ in range(DEPTH):
        tree = [tree]
    return tree


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every entry of plain data, tensors not entered."""
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield tree, key
        yield from places(value)


def change_entry(tree: Any, rng: random.Random) -> None:
    """Replace, remove or add one entry anywhere in plain data, each entry as likely as any other."""
    every = list(places(tree))
    if not every:
        return
    holder, key = rng.choice(every)
    what = rng.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.25 and isinstance(holder, dict):
        holder[rng.choice(("x", "_target_", "_recursive_", 3, f"{key}s"))] = copy.deepcopy(
            rng.choice(BAD_ENTRIES)
        )
    else:
        holder[key] = nested() if what > 0.98 else copy.deepcopy(rng.choice(BAD_ENTRIES))


def change_tensor(weights: dict[str, Any], rng: random.Random) -> None:
    """Another type, shape, value or name for one of the weights."""
    name = rng.choice(list(weights))
    other = rng.choice(list(weights))
    value = weights[name]
    if not isinstance(value, torch.Tensor):
        return
    with_one = (
        value.reshape(-1),
        value[None],
        value[..., None],
        value.transpose(0, -1) if value.ndim else value,
    )
    choices = {
        "dtype": lambda: weights.update({name: value.to(rng.choice(DTYPES))}),
        "shape": lambda: weights.update({name: rng.choice(with_one).clone()}),
        "cut": lambda: weights.update({name: value.reshape(-1)[: rng.randrange(value.numel() + 1)].clone()}),
        "nan": lambda: weights.update(
            {name: torch.full_like(value.float(), rng.choice((float("nan"), 1e38)))}
        ),
        "swap": lambda: weights.update({name: weights[other], other: value}),
        "remove": lambda: weights.pop(name),
        "rename": lambda: weights.update({f"{name}.x": weights.pop(name)}),
        "no tensor": lambda: weights.update({name: copy.deepcopy(rng.choice(NO_TENSORS))}),
        "sparse": lambda: weights.update({name: value.float().to_sparse()}),
        "expanded": lambda: weights.update({name: torch.zeros(()).expand(value.shape)}),
        "meta": lambda: weights.update({name: torch.empty(value.shape, device="meta")}),
    }
    rng.choice(list(choices.values()))()


def change_archive(source: Path, target: Path, rng: random.Random, mutate: Any) -> None:
    """The archive with one file in it changed and its checksum renewed, as no accident would leave it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        names = [entry.filename for entry in old.infolist()]
        pickled = [name for name in names if name.endswith(".pkl")]
        chosen = rng.choice(pickled) if rng.random() < 0.7 else rng.choice(names)
        for name in names:
            data = old.read(name)
            new.writestr(name, mutate(data, rng) if name == chosen else data)


class Strangers:
    """Changed checkpoints after those in `sources`, written to one file in `folder`."""

    def __init__(self, folder: Path, rng: random.Random, sources: list[Path], mutate: Any) -> None:
        self.path, self.rng, self.sources, self.mutate = folder / "a.ckpt", rng, sources, mutate
        self.contents: dict[Path, dict[str, Any]] = {}

    def content(self, source: Path) -> dict[str, Any]:
        if source not in self.contents:
            self.contents[source] = torch.load(source, map_location="cpu", weights_only=True)
        return self.contents[source]

    def for_loading(self) -> tuple[Path, Path]:
        """A changed checkpoint, and the one that it was made from."""
        source = self.rng.choice(self.sources)
        what = self.rng.random()
        if what < 0.1:
            self.path.write_bytes(self.mutate(source.read_bytes(), self.rng))
        elif what < 0.3:
            change_archive(source, self.path, self.rng, self.mutate)
        else:
            content = self.content(source)
            kept = {key: content[key] for key in ("medldm", "state_dict", "ema") if key in content}
            if what < 0.55:
                part = self.rng.choice([key for key in ("state_dict", "ema") if kept.get(key)])
                kept[part] = dict(kept[part])
                change_tensor(kept[part], self.rng)
            else:
                kept["medldm"] = copy.deepcopy(kept["medldm"])
                for _ in range(self.rng.choice((1, 1, 2))):
                    change_entry(kept["medldm"], self.rng)
            torch.save(kept, self.path)
        return self.path, source

    def for_resuming(self) -> tuple[Path, Path]:
        """A checkpoint with another state of its training, and the one that it was made from."""
        source = self.rng.choice(self.sources)
        content = copy.deepcopy(self.content(source))
        state = {key: value for key, value in content.items() if key not in ("medldm", "state_dict")}
        for _ in range(self.rng.choice((1, 1, 2))):
            change_state(state, self.rng)
        torch.save({key: content[key] for key in ("medldm", "state_dict")} | state, self.path)
        return self.path, source


def change_state(state: dict[str, Any], rng: random.Random) -> None:
    """An entry of one part of the state, each part as likely: optimisers have most entries by far."""
    part = rng.choice(list(state))
    if rng.random() < 0.3 and part == "optimizer_states" and isinstance(state[part], list):
        moments = [m for s in state[part] for m in s["state"].values()]
        if moments:
            return change_tensor(rng.choice(moments), rng)
    if isinstance(state[part], dict | list) and state[part] and rng.random() < 0.85:
        return change_entry(state[part], rng)
    if rng.random() < 0.3:
        del state[part]
    else:
        state[part] = copy.deepcopy(rng.choice(BAD_ENTRIES))
    return None
