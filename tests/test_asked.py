"""Settings of preparation on the command line of commands that read prepared data."""

import pytest
from omegaconf import OmegaConf

from medldm.asked import refuse_other_recipe
from medldm.data import build_datamodule
from medldm.errors import InputError
from tests.helpers import compose_config


def ask(root, *typed):
    cfg = compose_config("train", "experiment=cardiac2d/vqvae", f"data.root={root}", *typed)
    data = OmegaConf.to_container(cfg.data, resolve=True)
    refuse_other_recipe(cfg.data, build_datamodule(data, keys=("image",), seed=0).index, typed)


@pytest.mark.parametrize(
    ("typed", "was"),
    [
        ("data.image_size=100", r"\[64, 64\]"),
        ("data.preprocess.intensity.percentiles=[0,100]", r"\[0.5, 99.5\]"),
        ("data.preprocess.edges.sigma=0.5", "0.38"),
        ("+data.preprocess.labels.mapping={0:0,1:1,2:1,3:2}", "None"),
    ],
)
def test_what_would_need_another_preparation_is_refused(prepared, typed, was):
    key = typed.lstrip("+").split("=")[0]
    with pytest.raises(InputError, match=rf"{key}=.*was prepared with {was}; run `medldm prepare`"):
        ask(prepared, typed)


def test_what_equals_the_preparation_is_taken(prepared):
    ask(prepared)
    ask(
        prepared,
        "data.image_size=64",
        "data.preprocess.intensity.percentiles=[0.5,99.5]",
        "data.flip_prob=0.5",
    )
    ask(prepared, "data.image_size=[64,64]", "data.preprocess.edges.sigma=0.38")
