"""scripts/head_to_head: the loop that other libraries are trained by, with a library of two tiny networks."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "head_to_head"))

import peer
from medlat_peer import Medlat
from medlatents_peer import Medlatents
from monai_peer import Monai


class Tiny(peer.Peer):
    stages = ("tiny: first", "tiny: second")

    def __init__(self, side: int, width: int) -> None:
        self.side, self.first, self.second = side, nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def reconstruction(self, x: Tensor) -> Tensor:
        return (self.first(x) - x).square().mean()

    def measure(self, x: Tensor) -> None:
        self.shape = self.first(x).shape[1:]
        assert not torch.is_grad_enabled()
        assert not self.first.training

    def denoising(self, x: Tensor) -> Tensor:
        return self.second(torch.randn_like(x)).square().mean()

    def generate(self, num: int, num_steps: int) -> Tensor:
        return num_steps * self.second(torch.randn(num, *self.shape))


def run(folder: Path, num_steps: int = 3) -> Tensor:
    images = torch.linspace(-1, 1, 20 * 64).reshape(20, 1, 8, 8)
    return peer.run(Tiny, folder, images, 18, 0.4, torch.device("cpu"), 256, num_steps)


def test_a_peer_trains_both_stages_for_half_the_time_and_is_continued(tmp_path, capsys):
    made = run(tmp_path)
    first_said = capsys.readouterr().out
    assert made.shape == (18, 1, 8, 8)
    assert made.abs().max() <= 1
    states = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("first", "second")]
    for state, stage in zip(states, Tiny.stages, strict=True):
        assert state["num_updates"] > 1
        assert f"{stage}: {state['num_updates']} updates\n" in first_said
    again = run(tmp_path)
    assert capsys.readouterr().out.count("(kept)") == 2
    assert torch.equal(again, made)  # what is drawn does not depend on how long it took to come here


@pytest.mark.parametrize("build", [Monai])
def test_a_library_of_the_comparison_trains_and_samples(build, tmp_path):
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = peer.run(build, tmp_path, images, 2, 0.02, torch.device("cpu"), 64, 2)
    assert made.shape == (2, 1, 32, 32)
    assert made.isfinite().all()
    assert made.std() > 0


@pytest.mark.parametrize(("build", "package"), [(Medlatents, "medlatents"), (Medlat, "medlat")])
def test_a_library_that_is_not_installed_says_so(build, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        build(32, 64)
