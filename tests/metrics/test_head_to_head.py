"""scripts/head_to_head: the loop that other libraries are trained by, with a library of two tiny networks."""

import json
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medldm.data.records import read_images

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "head_to_head"))

import peer
from medlat_peer import Medlat
from medlatents_peer import Medlatents
from monai_peer import Monai

import head_to_head
from head_to_head import options_of, write_image


class Tiny(peer.Peer):
    stages = ("tiny: first", "tiny: second")

    def __init__(self, size: Sequence[int], width: int) -> None:
        self.size, self.first, self.second = size, nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def reconstruction(self, x: Tensor) -> Tensor:
        return (self.first(x) - x).square().mean()

    def rebuilt(self, x: Tensor) -> Tensor:
        return self.first(x)

    def measure(self, x: Tensor) -> None:
        self.shape = self.first(x).shape[1:]
        assert not torch.is_grad_enabled()
        assert not self.first.training

    def denoising(self, x: Tensor) -> Tensor:
        return self.second(torch.randn_like(x)).square().mean()

    def generate(self, num: int, num_steps: int) -> Tensor:
        return num_steps * self.second(torch.randn(num, *self.shape))


def run(folder: Path) -> tuple[Tensor, Tensor]:
    images = torch.linspace(-1, 1, 20 * 64).reshape(20, 1, 8, 8)
    settings = peer.Settings(seconds=0.4, device=torch.device("cpu"), num_steps=3)
    return peer.run(Tiny, folder, images, images[:18], settings)


def test_a_peer_trains_both_stages_for_half_the_time_and_is_continued(tmp_path, capsys):
    rebuilt, made = run(tmp_path)
    first_said = capsys.readouterr().out
    assert rebuilt.shape == made.shape == (18, 1, 8, 8)
    assert made.abs().max() <= 1
    states = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("first", "second")]
    for state, stage in zip(states, Tiny.stages, strict=True):
        assert state["num_updates"] > 1
        assert f"{stage}: {state['num_updates']} updates\n" in first_said
    network = states[0]["network"]
    images = torch.linspace(-1, 1, 20 * 64).reshape(20, 1, 8, 8)[:18]
    assert torch.allclose(rebuilt, (network["weight"] * images + network["bias"]).clamp(-1, 1), atol=1e-6)
    again = run(tmp_path)
    assert capsys.readouterr().out.count("(kept)") == 2
    # What is drawn does not depend on how long it took to come here.
    assert torch.equal(again[0], rebuilt)
    assert torch.equal(again[1], made)


def test_updates_see_as_many_images_as_are_asked_for():
    settings = peer.Settings(seconds=1, device=torch.device("cpu"), batch_size=3)
    data = peer.batches(torch.arange(7).float().reshape(7, 1, 1, 1), settings, seed=0)
    epoch = [next(data) for _ in range(3)]
    assert [len(batch) for batch in epoch] == [3, 3, 1]
    assert sorted(torch.cat(epoch).flatten().tolist()) == list(range(7))


@pytest.mark.parametrize("size", [(32, 32), (16, 32, 16)])
def test_monai_trains_rebuilds_and_samples_pictures_and_volumes(size, tmp_path):
    images = torch.rand(4, 1, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = peer.Settings(seconds=0.02, device=torch.device("cpu"), width=64, num_steps=2)
    for found in peer.run(Monai, tmp_path, images, images[:2], settings):
        assert found.shape == (2, 1, *size)
        assert found.isfinite().all()
        assert found.std() > 0


def test_sizes_that_a_library_has_no_networks_for_are_told():
    with pytest.raises(peer.NotOfferedError, match=r"multiples of 16, not \[40, 48, 32\]"):
        Monai((40, 48, 32), 64)


@pytest.mark.parametrize(("build", "package"), [(Medlatents, "medlatents"), (Medlat, "medlat")])
def test_a_library_that_is_not_installed_says_so(build, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        build((32, 32), 64)


def test_options_of_one_stage_carry_its_name():
    options = "seed=3 first:model.cosine_steps=5 second:model/conditioner=none model.x=a:b"
    assert options_of("first", options) == ["seed=3", "model.cosine_steps=5", "model.x=a:b"]
    assert options_of("second", options) == ["seed=3", "model/conditioner=none", "model.x=a:b"]


@pytest.mark.parametrize("name", ["a_000.png", "a.h5"])
def test_images_of_a_peer_are_read_back_by_their_names(name, tmp_path):
    size = (8, 8) if name.endswith("png") else (4, 8, 8)
    image = np.linspace(-1, 1, prod(size), dtype=np.float32).reshape(1, *size)
    write_image(tmp_path / "samples" / name, image)
    [record] = read_images(tmp_path / "samples")
    assert record.id == name.split(".")[0]
    assert record.image.shape == image.shape
    assert np.abs(record.image - image).max() <= (1 / 255 + 1e-6 if name.endswith("png") else 0)


def test_rows_of_other_libraries_stay_in_the_table(tmp_path, monkeypatch, capsys):
    def evaluated(task, folder):
        score = {"fid": {"value": float(len(folder.name)), "n": 5}}
        rows = {"reconstruction": {"psnr": {"mean": 20.0}}}
        return {"distribution": {"generated": score}, "memorization": {}, "rows": rows}

    monkeypatch.setattr(
        head_to_head, "CONTESTANTS", dict.fromkeys(("one", "three"), lambda task, folder: None)
    )
    monkeypatch.setattr(head_to_head, "evaluated", evaluated)
    for name in ("one", "three"):
        monkeypatch.setattr(sys, "argv", ["", f"data={tmp_path}", f"output={tmp_path}", f"peers={name}"])
        head_to_head.main()
    table = json.loads((tmp_path / "head_to_head.json").read_text())["peers"]
    assert {name: row["fid"]["value"] for name, row in table.items()} == {"one": 3, "three": 5}
    assert [row["settings"]["peers"] for row in table.values()] == ["one", "three"]
    assert "three: fid 5 (n = 5), psnr of the first stage 20" in capsys.readouterr().out


def test_what_was_made_with_other_settings_is_not_taken_for_these(tmp_path):
    head_to_head.check_same_settings(tmp_path, {"peer_lr": "1e-4", "peers": "monai"})
    head_to_head.check_same_settings(tmp_path, {"peer_lr": "1e-4", "peers": "medlat"})
    with pytest.raises(SystemExit, match=r"was made with peer_lr=1e-4, not 5e-4; give another output"):
        head_to_head.check_same_settings(tmp_path, {"peer_lr": "5e-4", "peers": "monai"})
