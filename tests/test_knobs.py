"""Every setting of a model has an effect, or is refused in one line."""

import copy
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from medldm.build import build_module, module_class
from medldm.errors import InputError
from medldm.knobs import look_up, refuse_idle, typed_keys
from medldm.shrinking import shrink
from tests.helpers import compose_config


@cache
def composed(*overrides: str) -> dict:
    cfg = compose_config("train", *overrides, "data.root=-")
    parts = {name: OmegaConf.to_container(cfg[name]) for name in ("data", "callbacks")}
    return parts | {"model": OmegaConf.to_container(cfg.model, resolve=True)}


def refuse(base: tuple[str, ...], *typed: str, dims: int = 2, groups: tuple[str, ...] = ("mask",)) -> None:
    """What `medldm train` does with these overrides; experiments and choices are in `base`."""
    config = copy.deepcopy(composed(*base))
    for override in typed:
        key, _, value = override.lstrip("+").partition("=")
        if "/" not in key:
            put(config, key, yaml.safe_load(value))
    options = {name: config[name] for name in ("data", "callbacks")}
    kind = module_class(config["model"])
    has_average = kind.ema_modules is not None and "pixel_weight" not in (
        config["model"].get("objective") or {}
    )
    refuse_idle(
        config["model"], dims, groups, has_average=has_average, options=options, typed=typed_keys(typed)
    )


def put(config: dict, key: str, value) -> None:
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    config[last] = value


VQ, LDM, VDM = "experiment=cardiac2d/vqvae", "experiment=cardiac2d/ldm", "experiment=medvdm/chestxray_conv"
VECTORS = "experiment=medvdm/colab"
VOLUME, JOINT = "experiment=medlsdm/folder_vqgan", "experiment=aldm/brats_joint"
CONTROL, SEGMENTED = "experiment=cardiac2d/control", "experiment=cardiac2d/ldm_seg"
UNET, NNET = (LDM, "model/network=unet_block"), (LDM, "model/schedule=learned_nnet")
IDLE = {  # what is typed last is refused
    "model.perceptual_weight=1": ((VQ,), "model.perceptual=null"),
    "model.perceptual.network=lpips_alex": ((VQ,), "model.perceptual_weight=0"),
    "model.perceptual.network=medicalnet_10": ((VQ,),),
    "model.objective.perceptual_weight=1": ((JOINT,), "model.objective.perceptual=null"),
    "model.slice_axes=[1]": ((VQ,),),
    "model.autoencoder.spade_kernel=3": ((VOLUME,),),
    "model.autoencoder.num_heads=4": ((VQ,), "model.autoencoder.mid=[res]"),
    "model.autoencoder.dropout=0.1": ((VQ,), "model.autoencoder.shortcut=none"),
    "+model.autoencoder.quantizer.codebook_weight=0.5": ((VQ,),),
    "++model.autoencoder.quantizer.codebook_weight=0.5": (
        (VQ,),
        "model.autoencoder.quantizer.ema_decay=null",
        "+model.autoencoder.quantizer.legacy_beta=true",
    ),
    "model.adversarial.kind=multiclass": ((VQ,),),
    "model.adversarial.adaptive=true": ((VQ,), "model.adversarial.weight=0"),
    "callbacks.ema.decay=0.9": ((VQ,),),
    "callbacks.ema.every_n_steps=2": ((JOINT,),),
    "data.flip_prob=0.2": ((VQ,),),
    "data.worker_context=spawn": ((VQ,), "data.num_workers=0"),
    "model.conditioner.out_channels=4": ((LDM,), "model.conditioner.encoder=null"),
    "+model.conditioner.spade_out_channels=4": ((LDM,), "+model.conditioner.spade=planes"),
    "+model.network.spade_kernel=5": ((LDM,),),
    "+model.network.num_heads=4": (UNET,),
    "+model.network.up_channels=[1]": (UNET,),
    "+model.network.num_mid_units=1": (UNET,),
    "model.schedule.interior=bound": (NNET,),
    "model.schedule.endpoints=fixed": (NNET,),
    "model/schedule=learned_scalar": ((LDM, "model/schedule=learned_scalar"),),
    "model.first_stage.latent=quant": ((LDM,), "model.first_stage.checkpoint=null"),
    "model.gradient_power=2": ((VDM,),),
    "model.gradient_is_signed=true": ((VDM,),),
    "model.mse_weight=1": ((VDM, "model/codec=pixel"),),
    "model.gradient_weight=1": ((VDM, "model/codec=pixel"),),
    "model.adapter.conditioner.out_channels=3": (
        (CONTROL,),
        "model.adapter.conditioner.encoder=area",
    ),
    "model.segmenter.temperature=0.2": ((SEGMENTED,),),
    "model.segmenter.checkpoint=other.ckpt": ((SEGMENTED,), "model.kind=distillation"),
    "model.cosine_final=0.1": ((VDM,), "model.cosine_steps=null"),
}


@pytest.mark.parametrize("override", IDLE)
def test_a_setting_that_nothing_reads_is_refused_by_its_name(override):
    base, *before = IDLE[override]
    with pytest.raises(InputError) as caught:
        refuse(base, *before, override)
    key, message = override.lstrip("+").split("=")[0], str(caught.value)
    assert key.removesuffix(".decay").removesuffix(".every_n_steps").removesuffix(".network") in message
    assert "no effect" in message or "choose" in message or "set it to" in message


def test_conditions_that_the_dataset_lacks_leave_nothing_to_drop():
    for key in ("model.conditioner.drop_all_prob=0.3", "model.codec.film=scale_shift"):
        refuse((VECTORS,), key)
        with pytest.raises(InputError, match=key.split("=")[0]):
            refuse((VECTORS,), key, groups=())


def test_typed_keys_are_those_that_set_a_value():
    assert typed_keys(["a.b=1", "+c=2", "++d.e=f=g", "~h", "model/x=y"]) == ["a.b", "c", "d.e", "model/x"]
    assert look_up({"a": {"b": 1}}, "a.b") == 1 and look_up({"a": None}, "a.b") is None


# ---- every key changes something ----------------------------------------------------------------------

FACTS = {
    "spatial_dims": 2, "image_channels": 1, "num_classes": 4, "num_views": 2, "num_phases": 2,
    "num_labels": 2, "label_values": ["t1", "t2"], "image_size": [16, 16],
}  # fmt: skip
NARROW = ("model.network.channels=[16,32]", "model.network.up_channels=[16,16]")
GUIDED = ("model.sampler.guidance_scale=2",)
CODES = (
    "model.autoencoder.quantizer.init=uniform",
    "model.autoencoder.quantizer.restart_threshold=0.995",
)
CPU, EXTRA = "experiment=medvdm/chestxray_cpu", ("model.mse_weight=1", "model.gradient_weight=1")
STUDIES = {
    "autoencoder": (VQ, *CODES, "model.adversarial.feature_matching_weight=1"),
    "volumes": ("experiment=medlsdm/phantom_vqgan", *CODES, "model.decoder_sees_map=true"),
    "diffusion": (LDM, *NARROW, *GUIDED),
    "translation": ("experiment=aldm/brats_msspade",),
    "variational": (CPU, "model/conditioner=label", *EXTRA, *GUIDED),
    "vectors": (VECTORS, "model.mse_weight=1", *GUIDED),
}
# What changes memory, speed or where a file is looked for, and no number.
NO_NUMBER = (
    "_target_", "_partial_", "kind", "fused", "use_checkpoint", "weights_dir", "checkpoint", "map_stage",
    "layout",  # of widths: all are one when narrow
    "seed",  # the run's
    "discriminators.patch.norm",  # narrow latents leave room for one stage, which has none
    "reconstructs",  # what is reconstructed: a model of its own
)  # fmt: skip
OTHERS = {  # a string or null -> another value
    "l1": "l2", "l2": "l1", "hinge": "lsgan", "multiclass": "hinge", "group": "none", "auto": "always",
    "conv3": "conv4", "conv4": "conv3", "zeros": "replicate", "none": "tanh", "data": "uniform",
    "up_res": "res_up", "res_up": "up_res", "strided": "res_up", "random_conv": "lpips_alex",
    "prequant": "quant", "quant": "prequant", "std": "none", "level": "block", "block": "output",
    "strided_cnn": "unshuffle", "velocity": "noise", "logsnr": "linspace", "trailing": "linspace",
    "learned": "fixed", "variance": "bound", "shift": "scale_shift", "gelu": "swish", "soft": "threshold",
    "conv3_end": "conv4", "uniform": "normal", "res": "attn", "dynamic": "soft",
}  # fmt: skip
NULLS = {
    "cosine_steps": 5, "clamp": 0.05, "clamp_percentile": 0.5, "attention_levels": [0], "latent_kernel": 3,
    "perceptual": {}, "num_timesteps": 7, "fourier": [0, 2],
}  # fmt: skip


def leaves(part: dict, prefix: str = ""):
    for key, value in part.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif not {key, f"{prefix}{key}"} & {*NO_NUMBER} and (value is not None or key in NULLS):
            yield f"{prefix}{key}", value


def another(key: str, value):
    """A value of the same kind that differs."""
    name = key.rpartition(".")[2]
    if value is None:
        return NULLS[name]
    if name.startswith("use_"):
        return value is False
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value if name.endswith("channels") else value + 2
    if isinstance(value, float):
        return 0.5 * value if value else 0.25
    if isinstance(value, list):
        return [*value[:-1], another(key, value[-1])] if value else [0]
    return OTHERS[value]


def changed(model: dict, key: str) -> dict:
    model = copy.deepcopy(model)
    has_steps = "num_timesteps" in model.get("schedule", {}) or model.get("objective", {}).get(
        "num_timesteps"
    )
    times = "continuous" if has_steps else "discrete"
    put(model, key, times if key.endswith(".times") else another(key, look_up(model, key)))
    return model


def study(*overrides: str) -> tuple[dict, dict]:
    model = shrink(composed(*overrides)["model"])
    if "sampler" in model:
        model["sampler"]["num_steps"] = 3
    return model, FACTS | {"spatial_dims": 3 if "medlsdm" in overrides[0] else 2}


def stage_description() -> dict:
    model = shrink(composed("experiment=cardiac2d/demo_vqvae")["model"])
    return {"model": model, "facts": FACTS, "stage": "autoencoder"}


def batch_for(dims: int) -> dict:
    draw = torch.Generator().manual_seed(0)
    grid = (1, *((16, 16) if dims == 2 else (8, 8, 8)))
    batch = {key: torch.rand(2, *grid, generator=draw) * 2 - 1 for key in ("image", "source")}
    batch["mask"] = torch.randint(4, (2, *grid), generator=draw)
    batch["edges"] = torch.randint(2, (2, *grid), generator=draw).float()
    index = torch.tensor([0, 1])
    names = ("view", "phase", "label", "source_label")
    return batch | dict.fromkeys(names, index) | {"slice_position": torch.tensor([0.2, 0.9])}


def built(model: dict, facts: dict):
    torch.manual_seed(0)
    stage = None
    if model["kind"] in ("diffusion", "translation"):
        stage = stage_description() | {"facts": facts}
    module = build_module(model, facts, stage)
    if stage:
        module.first_stage.fit([torch.randn(4, module.first_stage.latent_channels, 4, 4)])
    draw = torch.Generator().manual_seed(1)
    for parameter in module.parameters():  # what starts at zero would hide what comes after it
        if parameter.abs().max() == 0:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return module


def structure(module) -> tuple:
    """Parts, sizes, optimisers and rates: whatever differs here has been read."""
    optimisers, rates = module.configure_optimizers()
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimisers]
    rate = rates[0]["scheduler"] if isinstance(rates[0], dict) else rates[0]
    curve = [rate.lr_lambdas[0](step) for step in (0, 1, 4, 300)]
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    adversarial = getattr(module, "adversarial", None)
    factors = [adversarial.factor(n) for n in range(4)] if adversarial else []
    times = module.schedule.gamma(torch.linspace(0, 1, 7)).tolist() if hasattr(module, "schedule") else []
    drop = torch.zeros(0)
    if getattr(module, "conditioner", None) is not None:
        drop = module.conditioner.sample_drop(500, torch.Generator().manual_seed(0)).sum(0)
    return repr(module), shapes, repr(groups), curve, factors, times, drop.tolist()


def numbers(module, batch: dict, dims: int) -> list[torch.Tensor]:
    """Losses, gradients, one sample and, of stage one, the codebook of a training step."""
    module.trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=1, fit_loop=SimpleNamespace(total_batch_idx=3)
    )
    module.train()
    if hasattr(module, "adversarial"):
        step = module.generator_step(batch, 0, 1.0)
        losses = dict(step.losses)
        if module.adversarial is not None:
            parts = (step.real, step.fake.detach(), step.slices, step.label)
            losses["discriminator"] = module.discriminator_loss(*parts)
    else:
        losses = module.losses(batch, 3)
    torch.manual_seed(0)
    losses["loss"].backward()
    out = [value.detach() for value in losses.values()] + list(module.buffers())
    out += [p.grad for p in module.parameters() if p.grad is not None]
    if hasattr(module, "sample"):
        shape = module.latent_shape(tuple(batch["image"].shape[2:]))
        out.append(module.eval().sample(batch, ["a", "b"], shape))
    if hasattr(module, "translated"):
        out += module.eval().translated(batch)
    return out


def differs(first: list, second: list) -> bool:
    return len(first) != len(second) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("name", STUDIES)
def test_every_key_of_a_model_changes_what_is_built_trained_or_drawn(name):
    model, facts = study(*STUDIES[name])
    dims = facts["spatial_dims"]
    batch, base = batch_for(dims), built(model, facts)
    shape, values = structure(base), numbers(base, batch, dims)
    groups = () if base.conditioner is None else base.conditioner.groups
    idle = []
    for key, _ in leaves(model):
        other = changed(model, key)
        try:
            refuse_idle(other, dims, groups, typed=[f"model.{key}"])
            module = built(other, facts)
            is_read = structure(module) != shape or differs(values, numbers(module, batch, dims))
        except Exception:
            continue  # refused, or read and found not to fit
        if not is_read:
            idle.append(key)
    assert not idle
