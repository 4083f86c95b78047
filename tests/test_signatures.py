"""Values of a config are of the types that the parts which take them state, or are told by their key."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import nn

from medldm.build import build_module
from medldm.errors import InputError
from medldm.signatures import check_arguments
from tests.helpers import CONFIG_DIR, compose_config
from tests.training import LDM, VQVAE


class Base:
    def __init__(self, *, rate: float = 1.0, network: nn.Module | None = None) -> None: ...


class Taker(Base):
    def __init__(
        self, num: int, widths: Sequence[int] = (), pair: tuple[float, float] = (0, 1), *, is_on: bool = True,
        kind: Literal["a", "b"] | None = None, path: str | Path = "", table: Mapping[str, Any] | None = None,
        make: Callable = print, anything: Any = None, **others: Any,
    ) -> None: ...  # fmt: skip


GOOD: list[tuple[str, Any]] = [
    ("num", 3), ("rate", 2), ("rate", 0.5), ("widths", [1, 2]), ("widths", ()), ("pair", [0, 0.5]),
    ("is_on", False), ("kind", "b"), ("kind", None), ("path", "x"), ("table", {"a": 1}), ("network", None),
    ("network", {"_target_": "x"}), ("make", {"_target_": "x"}), ("anything", "x"), ("unknown", object()),
]  # fmt: skip
BAD: list[tuple[str, Any, str]] = [
    ("num", "3", "num=3: give a whole number"),
    ("num", 3.0, "num=3.0: give a whole number"),
    ("num", True, "num=True: give a whole number"),
    ("num", None, "num=None: give a whole number"),
    ("rate", "fast", "rate=fast: give a number"),
    ("rate", [1], r"rate=\[1\]: give a number"),
    ("widths", 64, "widths=64: give a list of whole numbers"),
    ("widths", "64", "widths=64: give a list of whole numbers"),
    ("widths", [0.5], r"widths=\[0.5\]: give a list of whole numbers"),
    ("pair", [1], r"pair=\[1\]: give a list of numbers"),
    ("is_on", 1, "is_on=1: give true or false"),
    ("kind", "c", "kind=c: give one of a, b or null"),
    ("table", [1], r"table=\[1\]: give keys and values or null"),
    ("network", "unet", "network=unet: give a part with a _target_ or null"),
    ("make", 3, "make=3: give a part with a _target_"),
]
# swirl is drawn, not prepared
DATASETS = sorted({path.stem for path in CONFIG_DIR.glob("data/*.yaml")} - {"common", "swirl"})


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_a_value_of_the_stated_type_passes(name, value):
    check_arguments(Taker, {name: value})


@pytest.mark.parametrize(("name", "value", "line"), BAD)
def test_a_value_of_another_type_is_told_with_what_to_give(name, value, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        check_arguments(Taker, {name: value})


@pytest.mark.parametrize(
    ("experiment", "override", "line"),
    [
        (VQVAE, "model.optimizer.betas=3", "model.optimizer.betas=3: give a list"),
        (VQVAE, "model.optimizer._partial_=null", "model.optimizer._partial_=None: give true or false"),
        (
            VQVAE,
            "model.discriminators.image.channels=3",
            "discriminators.image.channels=3: give a list",
        ),
        (VQVAE, "model.discriminators.image=x", "model.discriminators.image=x: give a part"),
        (
            VQVAE,
            "model.autoencoder.quantizer.restart_threshold=null",
            "_threshold=None: give a number",
        ),
        (VQVAE, "model.autoencoder.latent_channels='4'", "model.autoencoder.latent_channels=4: give a whole"),
        (VQVAE, "model.cosine_steps=[1]", "model.cosine_steps=[1]: give a whole number or null"),
        (VQVAE, "model.kind=[]", "model.kind=[] is none of"),
        (LDM, "model.network.num_res_blocks={a:1}", "model.network.num_res_blocks={'a': 1}: give a whole"),
        (LDM, "model.conditioner=x", "model.conditioner=x: give a part with a _target_"),
    ],
)
def test_a_model_is_not_built_from_other_types(experiment, override, line):
    from omegaconf import OmegaConf

    words = (experiment, "debug=tiny", "data.root=x", override)
    if experiment == LDM:
        words += ("model/first_stage=pixel",)
    model = OmegaConf.to_container(compose_config("train", *words).model, resolve=True)
    facts = {"spatial_dims": 2, "image_channels": 1, "num_classes": 4}
    with pytest.raises(InputError) as told:
        build_module(model, facts)
    assert line in str(told.value)


@pytest.mark.parametrize("dataset", DATASETS)
def test_prepare_takes_the_types_of_every_shipped_dataset(dataset):
    from omegaconf import OmegaConf

    from medldm.commands.prepare import OPTIONS
    from medldm.data.preparation.prepare import prepare_dataset

    cfg = compose_config("prepare", f"data={dataset}", "data.raw=x", "data.root=x")
    data = OmegaConf.to_container(cfg.data, resolve=True)
    check_arguments(prepare_dataset, {key: data[key] for key in OPTIONS})


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("data.splits=null", "data.splits=None: give keys and values"),
        ("data.modalities=3", "data.modalities=3: give a list of texts or null"),
        (
            "data.image_size=big",
            "data.image_size=big: give a whole number or a list of whole numbers and nulls or null",
        ),
    ],
)
def test_prepare_tells_a_value_of_another_type_before_it_writes(word, line, tmp_path):
    from medldm.commands import prepare

    words = [f"data.raw={tmp_path}", f"data.root={tmp_path / 'data'}", word]
    with pytest.raises(InputError, match=f"^{line}$"):
        prepare.task(compose_config("prepare", "data=folder", *words))
    assert not (tmp_path / "data").exists()
