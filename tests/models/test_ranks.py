"""What processes share: N of them compute what one does with N times the batch."""

import pytest
import torch
from torch import nn

from medldm.data.loading.sampler import ResumableSampler
from medldm.diffusion.condition import Condition
from medldm.diffusion.latent import FirstStage
from medldm.diffusion.objective import DenoisingObjective
from medldm.diffusion.schedule import learned_nnet_schedule
from medldm.diffusion.variational import VariationalObjective
from medldm.models.common import fit_first_stage
from medldm.ranks import any_rank, host_group
from tests.processes import run_ranks

OBJECTIVES = {
    "variational": lambda: VariationalObjective(),
    "noise": lambda: DenoisingObjective("noise"),
    "velocity": lambda: DenoisingObjective("velocity", min_snr_gamma=5.0),
}


def schedule_gradient(kind: str, part: slice) -> torch.Tensor:
    """The gradient of the weights of a learned schedule's share, from some samples of one fixed batch whose
    losses differ widely.
    """
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(8, 3, generator=generator) for _ in range(2))
    x = x * torch.logspace(-2, 1, 8)[:, None]
    t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    torch.manual_seed(0)
    schedule = learned_nnet_schedule(-8.0, 5.0, interior="variance")
    for parameter in schedule.curve.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter)
    losses = OBJECTIVES[kind]()(
        lambda z, t, condition: 0.3 * z, schedule, x[part], Condition(), t=t[part], noise=noise[part]
    )
    losses["loss"].backward()
    return torch.cat([p.grad.flatten() for p in schedule.parameters() if p.ndim])


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_learned_schedule_gets_the_gradient_of_the_global_batch(kind, tmp_path):
    halves = [slice(0, 4), slice(4, 8)]
    parts = run_ranks(lambda rank: schedule_gradient(kind, halves[rank]), tmp_path)
    averaged = torch.stack(parts).mean(0)  # as DistributedDataParallel does
    whole = schedule_gradient(kind, slice(0, 8))
    assert nn.functional.cosine_similarity(averaged, whole, dim=0) > 0.9999
    torch.testing.assert_close(averaged, whole, rtol=1e-4, atol=1e-6)


class Encoder(nn.Module):
    """Stands in for an autoencoder of three channels."""

    spatial_dims, latent_channels, downsampling = 2, 3, (1, 1)
    quantizer = None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1.0, 2.0, 0.0])[:, None, None] + 1


@pytest.mark.parametrize("count", [1, 11, 16])
def test_latent_statistics_are_those_of_the_whole_set_on_every_rank(count, tmp_path):
    images = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)

    def fitted(rank: int, world_size: int) -> torch.Tensor:
        stage, encoded = FirstStage(Encoder()), []
        stage.autoencoder.encode = lambda x: encoded.extend(x) or Encoder.encode(stage.autoencoder, x)
        sampler = ResumableSampler(count, 2, 0, False, rank, world_size, equal_shares=False)
        batches = ({"image": images[[i for _, i in batch]]} for batch in sampler)
        fit_first_stage(stage, batches, torch.device("cpu"))
        return torch.cat([stage.shift, stage.scale, torch.tensor([len(encoded) * 1.0])])

    alone = fitted(0, 1)
    found = run_ranks(lambda rank: fitted(rank, 2), tmp_path)
    assert sum(x[-1] for x in found) == count  # each image once
    for x in found:
        torch.testing.assert_close(x[:-1], alone[:-1], rtol=1e-6, atol=1e-6)


def test_one_rank_s_signal_is_heard_by_all(tmp_path):
    answers = run_ranks(lambda rank: [any_rank(rank == 1, host_group()), any_rank(False)], tmp_path)
    assert answers == [[True, False]] * 2
    assert any_rank(True) and not any_rank(False)
