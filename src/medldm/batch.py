"""What a batch holds, and the only helpers that know about dimensions."""

from typing import TypedDict

import torch
from torch import Tensor

from medldm.devices import is_on_host
from medldm.errors import InputError

NO_CLASS = torch.iinfo(torch.int64).min  # a number that no class map holds


class Batch(TypedDict, total=False):
    """One collated batch; `*S` is (H, W) or (D, H, W). Which keys exist depends on the dataset and
    on what the model reads.
    """

    image: Tensor  # (B, C, *S) float32 in [-1, 1]: always what is generated
    latent: Tensor  # (B, Cz, *S/f) float32, unscaled pre-quantisation latent from `medldm encode`
    mask: Tensor  # (B, 1, *S) int64 class map
    edges: Tensor  # (B, 1, *S) float32 {0, 1}
    label: (
        Tensor  # (B,) int64 class of `image` (target modality, finding); `attributes.UNKNOWN` if not stated
    )
    labels: Tensor  # (B, K) float32, 1 for each class that `image` has, where several may hold at once
    view: Tensor  # (B,) int64, 0 short axis, 1 long axis, UNKNOWN
    phase: Tensor  # (B,) int64, 0 end-diastole, 1 end-systole, UNKNOWN
    slice_position: Tensor  # (B,) float32 in [0, 1], place of the slice in its stack; NaN without a stack
    source: Tensor  # (B, C, *S) translation input on the same grid
    source_label: Tensor  # (B,) int64
    spacing: Tensor  # (B, len(S)) float32, mm
    affine: Tensor  # (B, 4, 4) float64
    case_id: list[str]


def spatial_shape(x: Tensor) -> tuple[int, ...]:
    """The `*S` of a (B, C, *S) tensor."""
    return tuple(x.shape[2:])


def expand_as(v: Tensor, x: Tensor) -> Tensor:
    """View a per-sample (B,) or scalar `v` so that it broadcasts over the trailing axes of `x`."""
    return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


def check_labels(mask: Tensor, num_classes: int) -> None:
    """InputError for a class that the model does not know. Looks on the host alone: a device would wait."""
    if is_on_host(mask) and mask.numel():
        low, high = (int(value) for value in mask.aminmax())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise InputError(
                f"mask: holds class {wrong}, but the model knows 0 to {num_classes - 1}; "
                "map it with data.preprocess.labels.mapping"
            )


def check_stated(label: Tensor) -> None:
    """InputError for an unknown class where a model has no null for it. Looks on the host alone."""
    if is_on_host(label) and label.numel() and int(label.min()) < 0:
        raise InputError(
            "label: unknown for an image of the batch, and this model has no null for it; state the label of "
            "every image in the data, or leave those without one out"
        )


def one_hot(mask: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 1, *S) int64 class map -> (B, K, *S) of 0 and 1, in the memory layout of the map."""
    check_labels(mask, num_classes)
    return class_planes(mask, num_classes, dtype)


def class_planes(mask: Tensor, num_classes: int, dtype: torch.dtype, dropped: Tensor | None = None) -> Tensor:
    """As `one_hot`; all planes are 0 where the map holds a number that is no class, and everywhere in samples
    that `dropped` (B,) marks.
    """
    classes = torch.arange(num_classes, device=mask.device)[None]  # (1, K), or (B, K) for each sample
    if dropped is not None:
        classes = torch.where(dropped[:, None], NO_CLASS, classes)
    shape = (len(mask), num_classes, *spatial_shape(mask))
    if mask.stride(1) == 1:  # channels_last, as far as one channel can tell
        planes = torch.empty((shape[0], *shape[2:], num_classes), dtype=dtype, device=mask.device)
        among = classes.reshape(len(classes), *(1,) * len(shape[2:]), num_classes)
        return torch.eq(mask.movedim(1, -1), among, out=planes).movedim(-1, 1)
    planes = torch.empty(shape, dtype=dtype, device=mask.device)
    return torch.eq(mask, expand_as(classes, mask), out=planes)


def to_uint8(x: Tensor) -> Tensor:
    """Values in [-1, 1] to 0..255: clamped, and rounded to the nearest, not truncated."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
