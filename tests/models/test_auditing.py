"""How much of the latents survives decoding and encoding, against closed forms."""

import json

import pytest
import torch

from medldm.auditing import surviving_shares
from medldm.commands import encode
from tests.helpers import compose_config


@pytest.mark.parametrize("shape", [(8, 1, 60, 50), (2, 1, 20, 20, 30)])
@pytest.mark.parametrize(
    ("change", "share"),
    [
        (lambda h, noise: h, 1.0),
        (lambda h, noise: 0 * h + 3, 0.0),  # all that is left is the mean
        (lambda h, noise: h + 1, 1 - 1 / 4),  # by a half of the deviation
        (lambda h, noise: h + 2 * noise, 0.0),  # as much noise as signal
        (lambda h, noise: 3 + 2 * noise, -1.0),  # another latent altogether
    ],
)
def test_shares_of_variance(shape, change, share):
    h, noise = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 3 + 2 * (h - h.mean()) / h.std(correction=0)
    pairs = [(h[:1], change(h, noise)[:1]), (h[1:], change(h, noise)[1:])]
    assert surviving_shares(pairs).tolist() == pytest.approx([share], abs=0.04)


def test_channels_are_told_apart():
    h = torch.randn(4, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    again = h.clone()
    again[:, 1] = 0
    again[:, 2] *= 0.5
    assert surviving_shares([(h, again)]).tolist() == pytest.approx([1, 0, 0.75], abs=0.02)


def test_encode_writes_the_audit(prepared, first_stage, caplog):
    options = (f"checkpoint={first_stage}", f"data.root={prepared}", "data.num_workers=0", "device=cpu")
    encode.task(compose_config("encode", *options, "audit=3"))
    facts = max(prepared.glob("latents/*/latents.json"), key=lambda path: path.stat().st_mtime)
    audit = json.loads(facts.read_text())["audit"]
    assert audit["num_images"] == 3 and len(audit["surviving_variance"]) == 4
    assert all(share <= 1 for share in audit["surviving_variance"])
