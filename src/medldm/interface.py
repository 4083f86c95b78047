"""Trained models in Python: `medldm.load(checkpoint)`, then `sample`, `reconstruct` or `translate`.

    model = medldm.load("runs/ldm/checkpoints/best.ckpt")
    conditions = model.conditions("DATA", "subject_1")
    images = model.sample(conditions, seed=1, num_steps=50)     # (N, C, *S) float32 in [-1, 1]

The same code runs in `medldm sample` and `medldm translate`: the same checkpoint, conditions, names and seed
give the same images.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medldm.attributes import TABLES, UNKNOWN, names_of
from medldm.build import load_module
from medldm.conditions import check_facts, embedded, number_as_trained
from medldm.data.case import stem_of
from medldm.data.loading.datamodule import CaseDataModule
from medldm.devices import choose_loop, find_hardware, inference_precision, pick_device
from medldm.diffusion.condition import check_drop
from medldm.diffusion.sampler import check_guidance, override_sampler
from medldm.errors import InputError
from medldm.files import safe_name
from medldm.inference import autocast
from medldm.models.protocols import Request
from medldm.sampling import compile_networks, predictor_of
from medldm.translating import choose_targets, prepare_source, translate


def load(
    checkpoint: str | Path,
    *,
    weights: str = "ema",
    device: str = "auto",
    precision: str = "auto",
    compile: bool | str = False,
) -> "Model":
    """The trained model in a checkpoint of `medldm train`, on a device.

    `weights` are the moving average's ("ema", where there is one) or those of the last update ("raw").
    `device` is "auto", "cpu", "cuda" or "cuda:N"; `precision` is "auto" (bf16 on a GPU that multiplies it),
    "bf16-mixed" or "32-true". `compile` True compiles the network that a sampler calls at every step, on a
    GPU as a CUDA graph, for each new shape at its first step, which takes minutes; "auto" does so on GPUs.
    InputError for a file that is no checkpoint, and where `compile` is True and nothing is sampled. Nothing
    in the file is executed.
    """
    place = pick_device(device)
    hardware = find_hardware(place.type)
    inference_precision(precision, place)  # these name what is unknown before anything is read
    choose_loop(compile, hardware=hardware)
    module = load_module(checkpoint, weights=weights).to(place)
    compile_networks(module, next(iter(module.outputs.values()), None), compile, hardware=hardware)
    return Model(module, str(checkpoint), precision)


class Model:
    """A trained model of any kind. Images are (N, C, *S) float32 in [-1, 1] on the grid of the prepared data:
    S is (H, W) for slices and (D, H, W) for volumes.

    `module` is the Lightning module, `facts` what it knows of its training data: names of classes, views,
    phases and labels, the image size, how images were prepared.
    """

    def __init__(self, module: Any, checkpoint: str, precision: str = "auto") -> None:
        self.module, self.checkpoint, self.precision = module, checkpoint, precision
        self.facts: Mapping[str, Any] = module.facts

    def __repr__(self) -> str:
        outputs = ", ".join(self.module.outputs) or "no images"
        return f"Model({self.checkpoint!r}: {type(self.module).__name__}, gives {outputs})"

    # ---- conditions and samples ----

    def conditions(self, root: str | Path, case: str) -> dict[str, Any]:
        """The conditions of a case of a prepared folder, for `sample`: all slices of a subject, or a volume.

        `case` is an id of the folder's index.json. Views, phases and labels come in the model's own numbers.
        InputError for a case that is not there, and for data that the model does not fit.
        """
        keys = predictor_of(self.module).keys
        data = CaseDataModule(root, batch_size=1, keys=keys, pairs="all" if "source" in keys else None)
        check_facts(self.module.facts, data.facts, self.checkpoint, str(root))
        dataset = data.dataset("all").as_cases()
        positions = [i for i, item in enumerate(dataset.items) if dataset.cases[item.case]["id"] == case]
        if not positions:
            raise InputError(f"{root}: has no case '{case}'; see the ids in its index.json")
        number_as_trained(dataset, self.module.facts, *embedded(self.module, keys))
        return dict(dataset.__getitems__([(0, position) for position in positions]))

    def sample(
        self,
        conditions: Mapping[str, Any] | None = None,
        *,
        count: int | None = None,
        seed: int = 0,
        drop: Sequence[str] = (),
        batch_size: int = 8,
        **sampler: Any,
    ) -> np.ndarray:
        """One new image for each item of `conditions`, or `count` of them from a model without conditions.

        `conditions` come from the method of that name, or are your own: `mask` (N, *S) of class numbers,
        `edges` (N, *S) of 0 and 1, `view`, `phase`, `label` as names or numbers, `slice_position` in [0, 1];
        one value stands for all N. An attribute that is left out counts as unknown, where training had
        unknown ones. `case_id`, a list of N names, and `seed` decide the noise of each image.
        `drop` withholds conditions ("edges", "mask", "attributes"); `sampler` holds what differs from the
        sampler of training, such as num_steps=50, guidance_scale=2.0 or kind="ddim".
        InputError for a model that draws no samples, and for conditions that do not fit it.
        """
        predictor = predictor_of(self.module)
        if not predictor.is_generative:
            raise InputError(f"{self.checkpoint}: draws no samples; call reconstruct or translate")
        batch = self.batch_of(conditions or {}, predictor.keys, count)
        size = tuple(batch[predictor.keys[0]].shape[2:])
        check_drop(self.module.conditioner, tuple(drop))
        request = Request(seed, tuple(drop), precision=self.precision)
        with self.changed_sampler(tuple(drop), sampler):
            parts = [predictor(part, size, request) for part in parts_of(batch, batch_size)]
        return torch.cat(parts).numpy()

    def reconstruct(self, images: Any, mask: Any = None, *, batch_size: int = 8) -> np.ndarray:
        """Images (N, C, *S) or (N, *S) in [-1, 1], or the path of a volume, through the model's autoencoder.

        `mask` (N, *S) is needed where the decoder sees the class map. A file is prepared as the training data
        were. InputError for a model without an autoencoder of images.
        """
        x = self.images_of(images)
        batch = {"image": x, "case_id": [""] * len(x)}
        if mask is not None:
            batch["mask"] = plane(mask, torch.int64)
        parts = [self.through_autoencoder(part) for part in parts_of(batch, batch_size)]
        return torch.cat(parts).numpy()

    def through_autoencoder(self, batch: dict[str, Any]) -> Tensor:
        """(N, C, *S) on the host: reconstructions by the model or by the first stage that it holds."""
        if self.module.encodes == "image":
            predictor = predictor_of(self.module)
            if "mask" in predictor.keys and "mask" not in batch:
                raise InputError(f"mask: the decoder of {self.checkpoint} sees it; give it too")
            return predictor(batch, tuple(batch["image"].shape[2:]), Request(precision=self.precision))
        decoder = self.module.image_decoder
        if decoder is None:
            raise InputError(
                f"{self.checkpoint}: holds no autoencoder of images; nothing to reconstruct with"
            )
        if decoder.decoder_map_channels is not None:
            raise InputError(
                f"{self.checkpoint}: its decoder sees the map; load the first stage's checkpoint"
            )
        image = batch["image"].to(self.module.device)
        with torch.no_grad(), autocast(self.module.device, self.precision):
            return self.module.first_stage.reconstruct(image).float().clamp(-1, 1).cpu()

    def translate(
        self,
        source: Any,
        source_modality: str,
        targets: Sequence[str] | None = None,
        *,
        fast: bool = False,
        seed: int = 0,
        name: str | None = None,
        **sampler: Any,
    ) -> dict[str, np.ndarray]:
        """Other modalities of one volume: target -> (1, D, H, W) in [-1, 1] on the prepared grid.

        `source` is a prepared volume (D, H, W) or (1, D, H, W) in [-1, 1], or the path of a volume as
        acquired, which is prepared as the training data were. `targets` are all other modalities where they
        are not given. `fast` leaves out the diffusion. `seed` and `name` (the file's without it) decide the
        noise. InputError for a model that translates nothing, and for unknown modalities.
        """
        if self.module.translation is None:
            raise InputError(f"{self.checkpoint}: translates nothing; load one of ALDM's msspade or ldm")
        chosen = choose_targets(self.facts.get("label_values"), source_modality, targets and list(targets))
        stem = name or (stem_of(source) if isinstance(source, str | Path) else "source")
        names = [safe_name(f"{stem}_{source_modality}_to_{target}") for target in chosen]
        request = Request(seed, precision=self.precision)
        x = self.images_of(source)
        with self.changed_sampler((), sampler):
            made = translate(self.module, x, source_modality, chosen, names=names, fast=fast, request=request)
        return dict(zip(chosen, made.numpy(), strict=True))

    # ---- from what people hold to what models take ----

    @contextmanager
    def changed_sampler(self, drop: tuple[str, ...], changes: dict[str, Any]) -> Iterator[None]:
        """The model's sampler with `changes`, for the time of the context."""
        before = self.module.sampler
        if before is None and changes:
            raise InputError(f"{min(changes)}: this model has no sampler; leave it out")
        if before is not None:
            chosen = override_sampler(before, {"kind": None} | changes)
            check_guidance(chosen, self.module.conditioner, drop)
            self.module.sampler = chosen
        try:
            yield
        finally:
            if before is not None:
                self.module.sampler = before

    def images_of(self, images: Any) -> Tensor:
        """(N, C, *S) float32 of arrays, or of the volume in a file."""
        dims = self.facts["spatial_dims"]
        if isinstance(images, str | Path):
            if dims == 2:
                raise InputError(f"{images}: a model of slices takes arrays (N, H, W) in [-1, 1]; give these")
            return torch.from_numpy(prepare_source(str(images), self.facts).image).float()[None]
        x = torch.as_tensor(np.asarray(images)).float()
        if x.ndim == dims:
            x = x[None]
        if x.ndim == dims + 1:
            x = x[:, None] if self.facts["image_channels"] == 1 else x[None]
        if x.ndim != dims + 2 or x.shape[1] != self.facts["image_channels"]:
            raise InputError(
                f"images: shape {tuple(x.shape)}; give (N, {self.facts['image_channels']}, *S) with "
                f"{dims} axes of space"
            )
        if x.abs().max() > 1 + 1e-3:
            raise InputError(f"images: values up to {float(x.abs().max()):.4g}; scale them to [-1, 1]")
        return x

    def batch_of(self, conditions: Mapping[str, Any], keys: Sequence[str], count: int | None) -> dict:
        """A batch of N for a model that needs `keys`, with the attributes that it embeds."""
        batch: dict[str, Any] = {}
        for key in keys:
            if key in conditions:
                batch[key] = plane(conditions[key], torch.int64 if key == "mask" else torch.float32)
            elif tuple(keys) == ("image",):
                batch[key] = self.blank(count or 1)
            else:
                raise InputError(
                    f"conditions: without '{key}', which the model needs; give it, with 0 for none"
                )
        n = len(batch[keys[0]])
        kinds, nulls = self.module.conditioner.attributes, self.module.conditioner.null_attributes
        for kind in dict.fromkeys((*kinds, *(k for k in ("source_label",) if k in conditions))):
            batch[kind] = self.attribute(kind, conditions.get(kind), n, may_lack=kind in nulls)
        if "labels" in conditions:  # several of one image at once
            batch["labels"] = torch.as_tensor(np.asarray(conditions["labels"]), dtype=torch.float32)
        names = conditions.get("case_id") or [f"sample_{i}" for i in range(n)]
        if len(names) != n:
            raise InputError(f"case_id: {len(names)} names for {n} images; give one each")
        return batch | {"case_id": list(names)}

    def blank(self, count: int) -> Tensor:
        """Images that tell an unconditional model how many to draw, and on which grid."""
        size = self.facts.get("image_size")
        if not size or None in size:
            raise InputError("conditions: images of training had several sizes; give `image`, zeros (N, *S)")
        return torch.zeros(count, self.facts["image_channels"], *size)

    def attribute(self, kind: str, given: Any, n: int, *, may_lack: bool) -> Tensor:
        """(n,) numbers of an attribute, from the name or number of all, or of each."""
        names = names_of(self.facts, "label" if kind == "source_label" else kind) or []
        is_number = not names and kind not in (*TABLES, "source_label")
        dtype = torch.float32 if is_number else torch.int64
        if given is None:
            if not may_lack:
                raise InputError(f"conditions: without '{kind}', and no training image lacked it; give it")
            return torch.full((n,), torch.nan if is_number else UNKNOWN, dtype=dtype)
        values = [given] * n if isinstance(given, str | int | float) else list(given)
        for value in values:
            if isinstance(value, str) and value not in names:
                raise InputError(f"{kind}: '{value}' is none of {', '.join(map(str, names)) or 'no names'}")
        numbers = [names.index(value) if isinstance(value, str) else float(value) for value in values]
        return torch.tensor(numbers, dtype=torch.float64).to(dtype)


def plane(array: Any, dtype: torch.dtype) -> Tensor:
    """(N, 1, *S) of an array (N, *S) or (N, 1, *S)."""
    x = torch.as_tensor(np.asarray(array)).to(dtype)
    return x if x.ndim > 2 and x.shape[1] == 1 else x[:, None]


def parts_of(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """The batch in parts of at most `size`, in order."""
    count = len(batch["case_id"])
    for start in range(0, count, size):
        yield {key: value[start : start + size] for key, value in batch.items()}
