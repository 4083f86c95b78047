"""Blocks: shapes, precision."""

import pytest
import torch

from medldm.networks.discriminator import PatchDiscriminator
from medldm.networks.layers import Downsample, Upsample, attend, sinusoidal_embedding
from medldm.networks.norms import GroupNorm
from tests.helpers import num_parameters


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


@pytest.mark.parametrize(
    ("strides", "padding", "smallest"),
    [
        ([2, 2, 2], 1, 16),
        ([2, 2, 2, 1], 1, 24),
        ([2, 2, 1], 1, 12),
        ([2, 1], 2, 1),
        ([1], 0, 7),
        ([2, 2], 0, 22),
    ],
)
def test_the_smallest_image_of_a_discriminator_is_that_from_which_logits_come(strides, padding, smallest):
    network = PatchDiscriminator(
        2, channels=[2] * len(strides), strides=strides, norm="none", padding=padding
    )
    assert network.smallest_size == smallest
    assert network(torch.zeros(1, 1, smallest, smallest))[-1].numel() > 0
    if smallest > 1:
        with pytest.raises(RuntimeError, match="size"):
            network(torch.zeros(1, 1, smallest, smallest - 1))
