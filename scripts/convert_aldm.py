"""Converts the released autoencoders of ALDM (Kim and Park 2024; jongdory/ALDM) to medldm checkpoints.

python scripts/convert_aldm.py RELEASED.ckpt DATA OUT.ckpt    # DATA: `medldm prepare data=brats_r3` (or r1)

Sizes are read from the tensors: widths, blocks, latent channels, codes, and whether blocks have a second
convolution. A release that holds MS-SPADE too becomes a translator's checkpoint, which `medldm translate
fast=true` and aldm/brats_ldm_* take; that of November 2024 has one more convolution beside each of its
blocks, known by its shape. Every tensor is either placed or named as left out (discriminator, perceptual
network). The names are those of the published code. No released file was at hand, so this has not been tried
on one.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from medldm.build import build_module
from medldm.checkpoints import describe
from medldm.commands import CONFIG_DIR, mistakes_in_one_line
from medldm.data import build_datamodule
from medldm.errors import InputError
from medldm.files import replacing
from medldm.fingerprints import file_sha256

LEFT_OUT = ("loss.",)  # the discriminator and the perceptual network, which training alone needs
BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "shortcut"}
SPADE_BLOCK = {"conv_0": "conv1", "conv_1": "conv2", "conv_s": "shortcut"}
SPADE_NORM = {"norm_0": "norm1", "norm_1": "norm2", "norm_s": "shortcut_norm"}
State = dict[str, Tensor]


def read_release(path: Path) -> State:
    """The tensors of a released file. InputError where it holds other objects, which are never executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give the released checkpoint") from error
    except Exception as error:
        raise InputError(
            f"{path}: holds more than tensors, or is damaged; save its state_dict alone where you trust it"
        ) from error
    state = content.get("state_dict", content)
    return {key: x for key, x in state.items() if isinstance(x, Tensor) and not key.startswith(LEFT_OUT)}


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """The number of different numbers that stand in the place of `#` of a pattern."""
    found = (re.match(pattern.replace(".", r"\.").replace("#", r"(\d+)") + r"\.", key) for key in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The autoencoder's config keys that its tensors decide. InputError where it is no ALDM autoencoder."""
    levels = count(state, "encoder.down.#")
    if not levels or "quantize.embedding.weight" not in state or "quant_conv.weight" not in state:
        raise InputError("no encoder.down.0, quant_conv and quantize.embedding: not an autoencoder of ALDM")
    blocks = [count(state, f"{part}.0.block.#") for part in ("encoder.down", "decoder.up")]
    return {
        "latent_channels": len(state["quant_conv.weight"]),
        "stem_channels": len(state["encoder.conv_in.weight"]),
        "channels": [len(state[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels)],
        "strides": [
            2 if f"encoder.down.{level}.downsample.conv.weight" in state else 1 for level in range(levels)
        ],
        "num_res_blocks": blocks,
        "shortcut": "auto" if "encoder.down.0.block.0.conv2.weight" in state else "none",
    }


def stages(state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(published, ours) prefixes of the blocks of encoder and decoder, in the order of the plan `res_up`."""
    levels = range(len(sizes["channels"]))
    encoder, decoder = [], ["decoder.mid.block_1"]
    for level in levels:
        encoder += [f"encoder.down.{level}.block.{i}" for i in range(sizes["num_res_blocks"][0])]
        encoder += [f"encoder.down.{level}.downsample"] if sizes["strides"][level] > 1 else []
    for level in reversed(levels):
        decoder += [f"decoder.up.{level}.block.{i}" for i in range(sizes["num_res_blocks"][1])]
        decoder += [f"decoder.up.{level}.upsample"] if level else []
    encoder.append("encoder.mid.block_1")
    for part, names in (("encoder", encoder), ("decoder", decoder)):
        for i, name in enumerate(names):
            if name.endswith("sample"):
                yield f"{name}.conv", f"{part}.{i}.conv"
                continue
            for published, own in BLOCK.items():
                yield f"{name}.{published}", f"{part}.{i}.{own}"


def autoencoder_names(state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> dict[str, str]:
    """Published name -> our name of every tensor of the autoencoder."""
    prefixes = dict(stages(state, sizes)) | {
        "encoder.conv_in": "stem",
        "encoder.norm_out": "encoder_norm",
        "encoder.conv_out": "to_latent",
        "quant_conv": "pre_quantizer",
        "post_quant_conv": "post_quantizer",
        "decoder.conv_in": "from_latent",
        "decoder.norm_out": "decoder_norm",
        "decoder.conv_out": "head",
    }
    names = {f"{old}.{kind}": f"{new}.{kind}" for old, new in prefixes.items() for kind in ("weight", "bias")}
    return {key: name for key, name in names.items() if key in state} | {
        "quantize.embedding.weight": "quantizer.codebook"
    }


def translator_state(state: State) -> tuple[State, set[str], dict[str, Any]]:
    """MS-SPADE's tensors as ours, the published names they came from, and the sizes that they decide.

    Our network holds the switched convolutions of all classes in one tensor, in which gamma and beta of a
    class follow each other.
    """
    num_blocks, num_classes = count(state, "spade.block.#"), count(state, "spade.block.0.norm_0.spades.#")
    for name in (f"spade.block.{i}.conv_{k}.weight" for i in range(num_blocks) for k in (0, 1)):
        if name not in state:
            raise InputError(f"the release lacks {name}; not a release that is known")
    made, used = {}, set()

    def take(key: str) -> Tensor:
        used.add(key)
        return state[key]

    for i in range(num_blocks):
        for kind in ("weight", "bias"):
            for old, new in SPADE_BLOCK.items():
                if f"spade.block.{i}.{old}.{kind}" in state:
                    made[f"blocks.{i}.{new}.{kind}"] = take(f"spade.block.{i}.{old}.{kind}")
            for old, new in SPADE_NORM.items():
                spades = [f"spade.block.{i}.{old}.spades.{k}" for k in range(num_classes)]
                if f"{spades[0]}.mlp_gamma.{kind}" not in state:
                    continue
                shared = [take(f"{name}.mlp_shared.0.{kind}") for name in spades]
                pairs = [
                    take(f"{name}.{part}.{kind}") for name in spades for part in ("mlp_gamma", "mlp_beta")
                ]
                made[f"blocks.{i}.{new}.shared.{kind}"] = torch.cat(shared)
                made[f"blocks.{i}.{new}.modulation.{kind}"] = torch.cat(pairs)
    widths = [len(state[f"spade.block.{i}.conv_1.weight"]) for i in range(num_blocks)]
    hidden = len(state["spade.block.0.norm_0.spades.0.mlp_shared.0.weight"])
    skips = skip_convolutions(state, used, num_blocks)
    for i, name in enumerate(skips):
        made |= {f"blocks.{i}.skip.{kind}": take(f"{name}.{kind}") for kind in ("weight", "bias")}
    has_third = any(".norm_s." in key for key in state)
    sizes = {
        "channels": widths[:-1],
        "hidden_channels": hidden,
        "norm_on_shortcut": has_third,
        "conv_skip": bool(skips),
    }
    return made, used, sizes


def skip_convolutions(state: State, used: set[str], num_blocks: int) -> list[str]:
    """The published prefixes of the convolutions of kernel 3 beside the blocks, which the release of November
    2024 has, in the order of the blocks; [] where there are none.

    Their names are unknown, so that their shapes decide: the tensors of MS-SPADE that have no place yet must
    be one convolution for each block, from the width of its input to that of its output. A release with other
    tensors is refused.
    """
    left = {key.rpartition(".")[0] for key in state if key.startswith("spade.") and key not in used}
    found = []
    for i in range(num_blocks):
        c_in, c_out = (
            state[f"spade.block.{i}.conv_0.weight"].shape[1],
            len(state[f"spade.block.{i}.conv_1.weight"]),
        )
        weight = (c_out, c_in, 3, 3, 3)
        fits = [
            name
            for name in left
            if f"{name}.bias" in state and getattr(state.get(f"{name}.weight"), "shape", None) == weight
        ]
        found += fits if len(fits) == 1 else [""]
    return found if set(found) == left and len(left) == num_blocks else []


def place(module: torch.nn.Module, made: State) -> None:
    """Loads the tensors. InputError names the first one whose shape differs or that the release lacks."""
    own = module.state_dict()
    for name, x in made.items():
        if name not in own or own[name].shape != x.shape:
            wanted = "no tensor of that name" if name not in own else f"shape {tuple(own[name].shape)}"
            raise InputError(
                f"{name}: {tuple(x.shape)} in the release, {wanted} here; not a release that is known"
            )
    parameters = {name for name, _ in module.named_parameters()} | {"quantizer.codebook"} & own.keys()
    if missing := sorted(parameters - made.keys()):
        raise InputError(
            f"the release lacks {missing[0]} and {len(missing) - 1} more; not a release that is known"
        )
    module.load_state_dict(own | made)


def model_config(experiment: str, part: str, sizes: Mapping[str, Any], *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", overrides=[f"experiment={experiment}", *overrides])
    model = OmegaConf.to_container(cfg.model, resolve=True)
    model[part] |= sizes
    return model


def convert(release: Path, data: Path, out: Path) -> list[str]:
    """Writes `out`, and returns the published names that were left out. InputError where a tensor has no
    place.
    """
    state = read_release(release)
    sizes = sizes_of(state)
    facts = build_datamodule({"root": str(data), "batch_size": 1}, keys=("image",), seed=0).facts
    names = autoencoder_names(state, sizes)
    model = model_config("aldm/brats_vqgan_r3", "autoencoder", sizes)
    model["autoencoder"]["quantizer"]["num_codes"] = len(state["quantize.embedding.weight"])
    module = build_module(model, facts)
    place(module.autoencoder, {names[key]: x for key, x in state.items() if key in names})
    used, description = set(names), describe(model, facts, module)
    if any(key.startswith("spade.") for key in state):
        made, more, widths = translator_state(state)
        autoencoder, first = module.autoencoder.state_dict(), description | {"sha256": file_sha256(release)}
        stage = model_config(
            "aldm/brats_msspade_r3", "translator", widths, "model.first_stage.checkpoint=converted"
        )
        module = build_module(stage, facts, first)
        module.first_stage.autoencoder.load_state_dict(autoencoder)
        place(module.translator, made)
        used, description = used | more, describe(stage, facts, module)
    if unplaced := sorted(state.keys() - used):
        raise InputError(
            f"{release}: {unplaced[0]} and {len(unplaced) - 1} more have no place; not a known release"
        )
    content = {"medldm": description, "state_dict": module.state_dict(), "global_step": 0}
    with replacing(out) as aside:
        torch.save(content, aside)
    everything = torch.load(release, map_location="cpu", weights_only=True)
    return sorted(key for key in everything.get("state_dict", everything) if key.startswith(LEFT_OUT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("release", "data", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    with mistakes_in_one_line("convert_aldm"):
        left_out = convert(given.release, given.data, given.out)
        print(
            f"{given.out}: every tensor placed, {len(left_out)} of {', '.join(LEFT_OUT)} left out",
            file=sys.stderr,
        )
        print(given.out)


if __name__ == "__main__":
    main()
