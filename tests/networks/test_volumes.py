"""Networks of Med-LSDM: published figures, and what its defects would break."""

import pytest
import torch

from medldm.diffusion.condition import Condition
from medldm.diffusion.conditioner import SpatialConditioner
from medldm.diffusion.encoders import SegConv
from medldm.errors import InputError
from medldm.networks.discriminator import PatchDiscriminator
from medldm.networks.factorised import (
    DepthAttention,
    FactorisedAttention,
    Rotary,
    distance_buckets,
    linear_attention,
)
from medldm.networks.layers import ResBlock, Upsample
from medldm.networks.norms import group_norm
from medldm.networks.unet import UNet
from tests.helpers import compose_part, num_parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*missing `_self_`")
DECODERS = {None: 948_417, 3: 2_012_865, 31: 2_303_169, 37: 2_365_377}


@pytest.mark.parametrize("preset", ["vqgan3d", "vqgan3d_published"])
@pytest.mark.parametrize(("num_classes", "count"), DECODERS.items())
def test_vqgan_matches_the_published_counts(preset, num_classes, count):
    with torch.device("meta"):
        network = compose_part(f"network/{preset}")(3, image_channels=1, decoder_map_channels=num_classes)
    encoder = (network.stem, network.encoder, network.encoder_norm)
    decoder = (network.decoder_entry_norm, network.decoder, network.head)
    assert sum(map(num_parameters, encoder)) == 441_568
    assert sum(map(num_parameters, decoder)) == count
    assert (num_parameters(network.pre_quantizer), num_parameters(network.post_quantizer)) == (520, 576)
    assert network.quantizer.codebook.shape == (16_384, 8)


@pytest.mark.parametrize(("spatial_dims", "count"), [(2, 2_764_481), (3, 11_049_665)])
def test_discriminators_match_the_published_counts(spatial_dims, count):
    with torch.device("meta"):
        network = PatchDiscriminator(
            spatial_dims, channels=[64, 128, 256, 512], strides=[2, 2, 2, 1], norm="batch", padding=2,
            bias_before_norm=True,
        )  # fmt: skip
    assert num_parameters(network) == count


def test_anisotropic_strides_halve_each_axis_as_often_as_asked():
    build = compose_part("network/vqgan3d")
    network = build(3, image_channels=1, strides=[2, [1, 2, 2], [1, 2, 2]], channels=[16, 16, 16])
    assert network.downsampling == (2, 8, 8)
    x = torch.randn(1, 1, 4, 16, 16)
    assert network.encode(x).shape == (1, 8, 2, 2, 2)
    assert network.decode(network.encode(x)).shape == x.shape


def test_replicated_borders_leave_a_constant_volume_constant():
    up = Upsample(3, 2, 3, stride=(1, 2, 2), padding_mode="replicate")
    out = up(torch.ones(1, 2, 3, 4, 4))
    assert out.shape == (1, 3, 3, 8, 8)
    # The taps of each phase (two an axis) see ones everywhere, so every second voxel repeats.
    torch.testing.assert_close(out[..., ::2, ::2], out[..., :1, :1].expand(-1, -1, -1, 4, 4))


def semantic_unet(**options):
    build = compose_part("network/unet_semantic")
    sizes = {"stem_channels": 8, "channels": [8, 16], "sinusoidal_channels": 8, "embedding_channels": 16}
    network = build(3, in_channels=3, out_channels=3, spade_channels=4, **sizes, **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_semantic_unet_mixes_slices_by_attention_along_depth_alone(monkeypatch):
    monkeypatch.setattr(
        torch.nn.functional, "group_norm", lambda x, *_: x
    )  # its statistics are of all slices
    network = semantic_unet()
    for parameter in network.parameters():
        parameter.data *= 0.5
    z, t = torch.randn(1, 3, 6, 4, 4), torch.tensor([5.0])
    condition = Condition(spade=torch.randn(1, 4, 6, 4, 4))
    changed = z.clone()
    changed[:, :, 0] += 1

    def reached() -> list[bool]:
        difference = network(changed, t, condition) - network(z, t, condition)
        return (difference.abs().amax((0, 1, 3, 4)) > 0).tolist()

    assert reached() == [True] * 6
    for part in network.modules():
        if isinstance(part, DepthAttention):
            torch.nn.init.zeros_(part.out.weight)
    assert reached() == [True] + [False] * 5
    assert network.downsampling == (1, 2, 2)


def test_every_block_of_the_semantic_unet_sees_the_time():
    """Med-LSDM's middle did not."""
    blocks = [m for m in semantic_unet().modules() if isinstance(m, ResBlock)]
    assert len(blocks) == 2 + 2 + 2 + 1 and all(block.embedding is not None for block in blocks)


def test_maps_enter_in_the_middle_and_on_the_way_up():
    network = semantic_unet()
    kinds = {name: type(part).__name__ for name, part in network.named_modules() if name.endswith("norm1")}
    assert {name.split(".")[0] for name, kind in kinds.items() if kind == "SPADE"} == {"mid", "up"}
    assert {name.split(".")[0] for name, kind in kinds.items() if kind == "GroupNorm"} == {"down", "last"}


def test_linear_attention_equals_its_definition():
    q, k, v = torch.randn(3, 2, 7, 8).unbind()
    out = linear_attention(q, k, v, 2)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part].softmax(-1) / 2) @ k[..., part].softmax(1).transpose(1, 2)  # (B, L, L)
        torch.testing.assert_close(out[..., part], weights @ v[..., part])


def test_rotary_products_depend_on_distances_not_on_places():
    q, k = (torch.randn(1, 1, 1, 4).expand(1, 9, 1, 4) for _ in range(2))
    rotary = Rotary(4)
    products = torch.einsum("blhc,bmhc->lm", rotary(q), rotary(k))
    for offset in range(-3, 4):
        values = products.diagonal(offset)
        torch.testing.assert_close(values, values[:1].expand_as(values))
    assert products[0].std() > 1e-3


def test_near_distances_have_buckets_of_their_own():
    places = torch.arange(40)
    buckets = distance_buckets(places - places[:, None], 32)
    assert buckets.min() == 0 and buckets.max() == 31
    assert buckets[0, :8].tolist() == [0, 17, 18, 19, 20, 21, 22, 23]
    assert buckets[:8, 0].tolist() == list(range(8))


@pytest.mark.parametrize("downsampling", [(4, 4, 4), (1, 4, 8), (2, 8, 8), (4, 4)])
def test_segconv_lies_on_the_latent_grid(downsampling):
    """Med-LSDM's lost the alignment in depth: 11 slices for 8, the first of them padding."""
    encoder = SegConv(3, 5, downsampling)
    shape = tuple(4 * factor for factor in downsampling)
    planes = torch.zeros(1, 3, *shape)
    assert encoder(planes).shape[2:] == (4,) * len(downsampling)
    if len(downsampling) == 3:
        changed = planes.clone()
        changed[:, :, downsampling[0]] = 1  # the first slice of the second block
        moved = (encoder(changed) - encoder(planes)).abs().amax((0, 1, 3, 4)) > 0
        assert moved.tolist() == [False, True, False, False]


@pytest.mark.parametrize(("spade", "channels", "grid"), [("planes", 3, 8), ("area", 3, 2), ("segconv", 6, 2)])
def test_map_paths(spade, channels, grid):
    conditioner = SpatialConditioner(
        3, downsampling=(4, 4, 4), encoder=None, spade=spade, spade_out_channels=6, use_edges=False
    )
    assert conditioner.spade_channels == channels
    mask = torch.randint(0, 3, (2, 1, 8, 8, 8))
    condition = conditioner({"mask": mask})
    assert condition.spade.shape == (2, channels, grid, grid, grid)
    if spade == "area":
        shares = torch.nn.functional.one_hot(mask[:, 0], 3).movedim(-1, 1).double()
        torch.testing.assert_close(condition.spade.double().mean((2, 3, 4)), shares.mean((2, 3, 4)))


@pytest.mark.parametrize("spade", ["planes", "area", "segconv", "map_latent"])
def test_the_null_of_guidance_is_what_training_dropped_to(spade):
    derived = {"map_latent_channels": 5} if spade == "map_latent" else {}
    conditioner = SpatialConditioner(
        3, downsampling=(4, 4, 4), encoder=None, spade=spade, use_edges=False, drop_all_prob=1.0, **derived
    )
    batch = {"mask": torch.randint(0, 3, (2, 1, 8, 8, 8)), "map_latent": torch.randn(2, 5, 2, 2, 2)}
    dropped = conditioner(batch, drop=conditioner.sample_drop(2))
    null = conditioner(batch, drop=conditioner.drop_groups(2))
    torch.testing.assert_close(dropped.spade, null.spade, rtol=0, atol=0)
    other = {"mask": torch.zeros(2, 1, 8, 8, 8, dtype=torch.long), "map_latent": torch.ones(2, 5, 2, 2, 2)}
    elsewhere = conditioner(other, drop=conditioner.drop_groups(2))
    torch.testing.assert_close(elsewhere.spade, null.spade, rtol=0, atol=0)
    assert not torch.equal(conditioner(batch).spade, null.spade)


def test_a_class_out_of_range_is_named_in_one_line():
    conditioner = SpatialConditioner(3, downsampling=(4, 4), encoder=None, spade="planes", use_edges=False)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    mask[..., 0, 0] = 3
    with pytest.raises(InputError, match="holds class 3, but the model knows 0 to 2"):
        conditioner({"mask": mask})


def test_scale_shift_scales_and_shifts_the_second_norm():
    block = ResBlock(3, 4, 4, norm=group_norm, embedding_channels=2, scale_shift=True)
    torch.nn.init.zeros_(block.embedding.weight)
    x, e = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 2)
    block.embedding.bias.data = torch.tensor([-1.0] * 4 + [0.5] * 4)  # scale 1 - 1, shift 0.5
    flat = torch.nn.functional.silu(torch.full_like(x, 0.5))
    torch.testing.assert_close(block(x, e), x + block.conv2(flat))


def test_factorised_attention_refuses_images():
    with pytest.raises(ValueError, match="for volumes"):
        FactorisedAttention(8)(torch.randn(1, 8, 4, 4))


def test_output_skips_concatenate_widths_that_fit():
    network = UNet(
        2, in_channels=3, out_channels=3, stem_channels=8, channels=[16, 24, 32], skips="output",
        num_res_blocks=2, num_heads=2, sinusoidal_channels=8, embedding_channels=16,
    )  # fmt: skip
    assert network(torch.randn(1, 3, 8, 8), torch.tensor([1.0]), Condition()).shape == (1, 3, 8, 8)
    assert network.downsampling == (4, 4)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_network_of_unit_grey_levels_sees_and_gives_signed_ones(dims):
    options = {"stem_channels": 8, "channels": [8, 16], "norm_groups": 4, "strides": [2, 2]}
    signed, unit = (
        compose_part("network/vqgan_aldm")(dims, **options, image_range=name).eval()
        for name in ("signed", "unit")
    )
    unit.load_state_dict(signed.state_dict())
    x, z = torch.rand(1, 1, *(16,) * dims) * 2 - 1, torch.randn(1, 4, *(4,) * dims)
    torch.testing.assert_close(unit.encode(x), signed.encode((x + 1) / 2))
    torch.testing.assert_close(unit.decode(z), 2 * signed.decode(z) - 1)
    assert not torch.allclose(unit.encode(x), signed.encode(x))
