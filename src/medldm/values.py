"""Checks the values of a config: switches must be true or false, and numbers must be within their ranges.

Commands do so first, so that a typing error ends in one line, before anything is written. The tables are by
the last part of a key. Parts from other packages are not checked here, since they may give keys other
meanings.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from medldm.bounds import check_number
from medldm.errors import InputError

OURS = ("medldm.", "torch.", "monai.", "pytorch_lightning.")  # the packages whose parts are checked
SWITCHES = {
    "adaptive", "allow_training_subjects", "antialias", "antithetic", "balance_views", "benchmark",
    "bias_before_norm", "body_mask", "clean_last_step", "clip", "clip_overshoot", "conv_skip",
    "crop_foreground", "decoder_sees_map", "enable_progress_bar", "every_epoch", "fast", "fused",
    "gradient_is_signed", "l2_gradient", "legacy_beta", "log_model", "mask_out", "measure",
    "norm_on_shortcut", "offline", "parity", "pin_memory", "png", "relative_bias", "remove_artifacts",
    "requantize", "scale_shift", "translation", "untrained_null", "use_checkpoint", "use_edges", "use_mask",
    "zero_init_last",
}  # fmt: skip
SWITCHES_OR_AUTO = {"channels_last", "compile"}  # switches whose default, auto, depends on the device
MAPPINGS = {
    "adversarial", "autoencoder", "bootstrap", "callbacks", "checkpoints", "conditioner", "data",
    "discriminators", "ema", "first_stage", "interpolate", "intensity", "kernel", "map_stage", "metrics",
    "model", "objective",
    "optimizer", "paths", "perceptual", "pictures", "preprocess", "quantizer", "resize", "sampler",
    "schedule", "select", "splits", "trainer", "windows",
}  # fmt: skip
ONE_PATH = {
    "raw", "root", "run_dir", "output", "checkpoint", "init_from", "generated", "reference", "reconstruction",
    "segmenter", "synthetic", "label_dir", "spade", "regression", "resume", "comparison", "utility",
}  # fmt: skip
ONE_TEXT = {"data.latents", "select.split"}
ONE_OR_SEVERAL = {"run", "evaluation"}  # paths
ONLY_LISTS = {  # lists, by the ends of their keys; words in their place are told by what reads them
    "drop", "targets", "compare", "windows.size", "select.classes", "metrics.image", "metrics.features",
    "metrics.baselines", "metrics.regions", "metrics.fid_features", "metrics.edge_tolerances",
}  # fmt: skip
PARTS_LIKE_PATHS = {"model.segmenter"}  # parts of a model that are called as a path is elsewhere
LISTS = {"channels", "crop_size", "image_size", "min_size", "num_blocks", "num_res_blocks", "spacing"}
WORDS = ("spacing",)  # keys that are numbers in one part and words in another; their readers check them
SHARE, NATURAL = (0.0, 1.0, False), (0, 2**31, True)
POSITIVE, DEPTH, WIDTH = (1, 2**31, True), (1, 1024, True), (1, 2**17, True)
WEIGHT = (0.0, 1e9, False)
MOST_IN_MEMORY = 100_000  # at most so many where each is held in memory from the beginning
RANGES_OF: dict[str, tuple[float, float, bool]] = {  # lowest, highest, whether it must be whole
    **dict.fromkeys(
        ("dropout", "decay", "ema_decay", "train_fraction", "overlap", "time", "cosine_final", "level",
         "guidance_rescale", "splits.val", "splits.test"),
        SHARE,
    ),
    **dict.fromkeys(
        ("ms_ssim_pairs", "panel_rows", "warmup_steps", "ramp", "start", "num_sanity_val_steps", "padding"),
        NATURAL,
    ),
    **dict.fromkeys(("trajectory", "interpolate.count", "measure_steps"), (0, MOST_IN_MEMORY, True)),
    **dict.fromkeys(
        ("num_timesteps", "num_steps", "num_samples", "num_resamples", "num_subsets"),
        (1, MOST_IN_MEMORY, True),
    ),
    **dict.fromkeys(
        ("limit", "max_slices", "every_n_steps", "every_n_validations", "num_subjects", "subset_size",
         "num_points", "num_levels", "num_codes", "num_features", "accumulate_grad_batches",
         "log_every_n_steps", "check_val_every_n_epoch", "num_nodes"),
        POSITIVE,
    ),
    **dict.fromkeys(
        ("num_res_blocks", "num_blocks", "num_res_units", "num_heads", "keep_best", "keep_last"),
        DEPTH,
    ),
    "num_mid_units": (0, 1024, True),
    **dict.fromkeys(
        ("channels", "embedding_channels", "encoder_channels", "decoder_channels", "head_channels",
         "hidden_channels", "latent_channels", "mid_channels", "middle_channels", "out_channels",
         "sinusoidal_channels", "spade_hidden_channels", "spade_out_channels", "stem_channels", "norm_groups",
         "batch_size", "divisible_by", "in_plane_size", "image_size", "crop_size", "min_size", "tile"),
        WIDTH,
    ),
    **dict.fromkeys(("max_steps", "max_epochs"), (-1, 2**31, True)),
    "num_workers": (0, 1024, True),
    "seed": (0, 2**32 - 1, True),
    "lr": (0.0, 1e6, False),
    **dict.fromkeys(("weight", "weight_decay", "restart_threshold", "gradient_clip_val"), WEIGHT),
    "spacing": (1e-4, 1e4, False),
    "guidance_scale": (-1e6, 1e6, False),
    "eta": (0.0, 1e3, False),
    **dict.fromkeys(("eps", "norm_eps"), (0.0, 1.0, False)),
    "max_images": POSITIVE,
}  # fmt: skip


def check_values(config: Mapping[str, Any]) -> None:
    """InputError that names the first key with an impossible value: a number that is not finite or out of its
    range, or a word in the place of true or false.
    """
    for key, value in values_of(config):
        last = key.rpartition(".")[2]
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key}={value}: give a finite number")
        if last in SWITCHES and not isinstance(value, bool):
            raise InputError(f"{key}={value!s:.80}: give true or false")
        if last in SWITCHES_OR_AUTO and not (isinstance(value, bool) or value == "auto"):
            raise InputError(f"{key}={value!s:.80}: give true, false or auto")
        bounds = range_of(key, last)
        if bounds is not None and not (last in WORDS and isinstance(value, str)):
            low, high, whole = bounds
            check_number(key, value, low, high, whole=whole)


def values_of(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value that is stated, and of every element of a list. Left out are values
    that are not given yet or follow from another key, and parts from other packages.
    """
    if isinstance(config, Mapping):
        target = config.get("_target_")
        if isinstance(target, str) and not target.startswith(OURS):
            return
        for name, part in config.items():
            place = f"{key}.{name}" if key else str(name)
            check_kind(place, str(name), part)
            yield from values_of(part, place)
    elif isinstance(config, list | tuple):
        for part in config:
            yield from values_of(part, key)
    elif config is not None and not is_open(config):
        yield key, config


def check_kind(key: str, name: str, value: Any) -> None:
    """InputError for a single value in the place of a mapping or a list, for a list in the place of a single
    value, and for a number in that of a text.
    """
    if name in MAPPINGS and not (value is None or isinstance(value, Mapping) or is_open(value)):
        raise InputError(f"{key}={value!s:.80}: has keys of its own; give those, as {key}.KEY=VALUE")
    is_several = isinstance(value, list | tuple | Mapping)
    if is_several and name in (RANGES_OF.keys() | SWITCHES | SWITCHES_OR_AUTO) - LISTS:
        raise InputError(f"{key}={value!s:.80}: give one value")
    ends, is_number = {name, ".".join(key.split(".")[-2:])}, isinstance(value, int | float)
    is_text = value is None or isinstance(value, str)
    if ends & (ONE_PATH | ONE_TEXT) and key not in PARTS_LIKE_PATHS and not is_text:
        raise InputError(f"{key}={value!s:.80}: give one {'text' if ends & ONE_TEXT else 'path'}")
    texts = value if isinstance(value, list) else [value]
    if key in ONE_OR_SEVERAL and not all(text is None or isinstance(text, str) for text in texts):
        raise InputError(f"{key}={value!s:.80}: give one path or a list of paths")
    if ends & ONLY_LISTS and is_number:
        raise InputError(f"{key}={value!s:.80}: give a list, as {key}=[A,B]")


def is_open(value: Any) -> bool:
    """Whether a value is not given yet, or follows from another key."""
    return isinstance(value, str) and ("${" in value or value == "???")


def range_of(key: str, last: str) -> tuple[float, float, bool] | None:
    by_end = ".".join(key.split(".")[-2:])
    if by_end in RANGES_OF:
        return RANGES_OF[by_end]
    if last.endswith("_prob"):
        return SHARE
    return WEIGHT if last.endswith("_weight") else RANGES_OF.get(last)
