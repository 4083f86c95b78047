"""Blocks: shapes, precision, SPADE's cache."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medldm.networks.discriminator import PatchDiscriminator
from medldm.networks.layers import Downsample, GroupNorm, Upsample, attend, sinusoidal_embedding
from medldm.networks.spade import SPADE
from medldm.networks.unet import UNet
from tests.helpers import compose_part, num_parameters


@pytest.mark.parametrize("kind", ["conv4", "conv3", "conv3_end"])
@pytest.mark.parametrize(("spatial_dims", "stride"), [(2, 2), (3, (1, 2, 2)), (3, 2)])
def test_resampling_changes_exactly_the_strided_axes(kind, spatial_dims, stride):
    size = (6, 8, 10)[-spatial_dims:]
    strides = (stride,) * spatial_dims if isinstance(stride, int) else stride
    x = torch.randn(1, 2, *size)
    down = Downsample(spatial_dims, 2, 3, stride=stride, kind=kind)(x)
    assert down.shape[2:] == tuple(s // f for s, f in zip(size, strides, strict=True))
    assert Upsample(spatial_dims, 3, 2, stride=stride, kind=kind)(down).shape == x.shape


def test_group_norm_keeps_bfloat16_under_autocast():
    norm = GroupNorm(2, 4)
    x = torch.randn(1, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16
    expected = torch.nn.functional.group_norm(x, 2, eps=norm.eps)
    torch.testing.assert_close(norm(x), expected)


def test_attention_equals_its_formula():
    q, k, v = torch.randn(3, 2, 5, 8).unbind()
    per_head = [
        torch.softmax(a @ b.transpose(1, 2) / 2, -1) @ c  # head width 4
        for a, b, c in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True)
    ]
    torch.testing.assert_close(attend(q, k, v, 2), torch.cat(per_head, -1))


def test_time_embedding_is_sines_then_cosines():
    embedding = sinusoidal_embedding(torch.tensor([0.0, 3.0]), 6)
    frequencies = 10_000.0 ** (-torch.arange(3) / 3)
    torch.testing.assert_close(embedding[1], torch.cat([(3 * frequencies).sin(), (3 * frequencies).cos()]))
    torch.testing.assert_close(embedding[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_spade_computes_the_maps_of_a_static_condition_once():
    layer = SPADE(2, 4, map_channels=3, hidden_channels=8, keeps_maps=True).eval()
    calls = []
    layer.shared.register_forward_hook(lambda *_: calls.append(1))
    spade, other = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        first = layer(torch.ones(1, 4, 8, 8) * torch.arange(8.0), spade)
        layer(torch.randn(1, 4, 8, 8), spade)
        assert len(calls) == 1
        layer(torch.randn(1, 4, 8, 8), other)
        assert len(calls) == 2
        layer.gamma.weight.mul_(2)
        layer(torch.randn(1, 4, 8, 8), other)
        assert len(calls) == 3
    layer.train()(torch.randn(1, 4, 8, 8), spade)
    assert len(calls) == 4
    assert first.shape == (1, 4, 8, 8)


class LiveElements(TorchDispatchMode):
    """Counts the elements of all tensors made inside that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x._base is None and not func.is_view:
                self.now, size = self.now + x.numel(), x.numel()
                weakref.finalize(x, self.release, size)
        self.peak = max(self.peak, self.now)
        return out

    def release(self, size: int) -> None:
        self.now -= size


def test_a_decoder_keeps_no_maps_and_a_denoiser_does():
    """A decode uses each once: kept they would be the larger part of its memory."""
    options = {"stem_channels": 8, "channels": [8, 16], "norm_groups": 4, "spade_hidden_channels": 8}
    decoder = compose_part("network/vqgan3d")(3, image_channels=1, decoder_map_channels=3, **options).eval()
    norms = [part for part in decoder.modules() if isinstance(part, SPADE)]
    z, planes, peaks, images = torch.randn(1, 8, 4, 4, 4), torch.rand(1, 3, 16, 16, 16), [], []
    for keeps in (True, norms[0].keeps_maps):
        for norm in norms:
            norm.keeps_maps = keeps
        with torch.no_grad(), LiveElements() as live:
            images.append(decoder.decode(z, planes))
        peaks.append(live.peak)
        held = sum(x.numel() for norm in norms for entry in norm._kept.values() for x in entry[2])
        assert bool(held) == keeps
        for norm in norms:
            norm._kept.clear()
    assert torch.equal(*images) and peaks[1] < 0.6 * peaks[0], peaks
    unet = UNet(
        3, in_channels=2, out_channels=2, stem_channels=8, channels=[8], num_heads=2, spade_channels=3
    )
    assert all(part.keeps_maps for part in unet.modules() if isinstance(part, SPADE))


@pytest.mark.parametrize(("in_channels", "out_channels", "count"), [(1, 1, 2_771_873), (4, 5, 2_843_557)])
def test_patch_discriminator_reproduces_the_aldm_counts(in_channels, out_channels, count):
    network = PatchDiscriminator(
        3,
        channels=[32, 64, 128, 256],
        strides=[2, 2, 2, 1],
        norm="group",
        in_channels=in_channels,
        out_channels=out_channels,
    )
    assert num_parameters(network) == count


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_discriminator_returns_features_and_logits(spatial_dims):
    network = PatchDiscriminator(spatial_dims, channels=[4, 8], strides=[2, 2], norm="group")
    features = network(torch.randn(2, 1, *(16,) * spatial_dims))
    assert [f.shape[1] for f in features] == [4, 8, 1]
