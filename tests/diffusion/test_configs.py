from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tests.helpers import stated

from medldm.diffusion.condition import Condition
from medldm.diffusion.objective import guided

pytestmark = pytest.mark.filterwarnings("ignore:.*missing `_self_`")
GROUPS = Path(__file__).parents[2] / "configs" / "model"
DERIVED = {
    "num_classes": 4,
    "downsampling": (4, 4),
    "spatial_dims": 2,
    "embedding_dim": 16,
    "known": stated(num_views=2, num_phases=2),
}


def members(group):
    return [pytest.param(path, id=path.stem) for path in sorted((GROUPS / group).glob("*.yaml"))]


def make(path, **kwargs):
    with initialize_config_dir(str(path.parent), version_base="1.3"):
        return instantiate(compose(path.stem), **kwargs)


def predict(z_t, t, condition):
    return 0.1 * z_t


@pytest.mark.parametrize("schedule", members("schedule"))
@pytest.mark.parametrize("objective", members("objective"))
def test_every_objective_trains_and_samples_on_every_schedule(schedule, objective):
    is_refused = schedule.stem in ("flow", "edm") and objective.stem.startswith("variational")
    has_network = schedule.stem == "learned" or schedule.stem.startswith("learned_nnet")
    schedule = make(schedule, **({"num_features": 8} if has_network else {}))
    objective = make(objective)
    if is_refused:
        with pytest.raises(ValueError, match="preserves the variance"):
            objective.check_schedule(schedule)  # a builder asks, and names the key
        with pytest.raises(ValueError, match="preserves the variance"):
            objective(predict, schedule, torch.randn(2, 3, 4, 4), Condition())
        return
    losses = objective(predict, schedule, torch.randn(2, 3, 4, 4), Condition())
    assert losses["loss"].isfinite()
    sampler = make(GROUPS / "sampler" / "dpm_solver.yaml", num_steps=3)
    null = Condition()
    denoise = guided(objective, predict, schedule, null, null, scale=sampler.guidance_scale)
    assert sampler(denoise, schedule, torch.randn(2, 3, 4, 4)).isfinite().all()


@pytest.mark.parametrize("sampler", members("sampler"))
def test_every_sampler_reads_the_keys_users_override(sampler):
    sampler = make(sampler, num_steps=4, guidance_scale=2.0, clamp=1.0, clamp_percentile=0.9)
    schedule = make(GROUPS / "schedule" / "cosine.yaml")
    assert sampler.guidance_scale == 2
    assert sampler(lambda z, t: z, schedule, torch.randn(2, 3, 4, 4)).isfinite().all()


# those of translation need a first stage: test_translation.py
SPATIAL = [member for member in members("conditioner") if not member.id.startswith("translation")]


@pytest.mark.parametrize("conditioner", SPATIAL)
def test_every_conditioner_is_built_from_derived_values(conditioner):
    from_map_stage = {"map_latent_channels": 8} if conditioner.stem == "map_latent" else {}
    conditioner = make(conditioner)(**DERIVED, **from_map_stage)
    index = torch.zeros(2, dtype=torch.int64)
    batch = {"view": index, "phase": index, "slice_position": torch.zeros(2)}
    batch |= {"edges": torch.zeros(2, 1, 8, 8), "mask": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}
    batch["map_latent"] = torch.zeros(2, 8, 2, 2)
    condition = conditioner(batch, drop=conditioner.sample_drop(2))
    assert (condition.concat is not None) == bool(conditioner.concat_channels)
    assert (condition.spade is not None) == bool(conditioner.spade_channels)
    assert (condition.embedding is not None) == bool(conditioner.embedding_dim)
