import math
from dataclasses import replace

import pytest
import torch
from tests.helpers import stated

from medldm.diffusion.condition import Condition, concatenate
from medldm.diffusion.conditioner import NullConditioner, SpatialConditioner
from medldm.diffusion.encoders import SPATIAL_ENCODERS, stage_strides, unshuffle
from medldm.errors import InputError

ENCODERS = ["nearest_1x1", "rescaler", "unshuffle", "strided_cnn"]
LATTICES = [((8, 8), (32, 24)), ((4, 4, 4), (8, 12, 8)), ((2, 4, 8), (4, 8, 16)), ((1, 4, 4), (3, 8, 8))]


def build(encoder="strided_cnn", downsampling=(8, 8), **kwargs):
    torch.manual_seed(0)
    return SpatialConditioner(
        4, downsampling=downsampling, encoder=encoder, parity=encoder == "nearest_1x1", **kwargs
    )


def batch(shape=(32, 24), size=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "edges": (torch.rand(size, 1, *shape, generator=generator) < 0.1).float(),
        "mask": torch.randint(4, (size, 1, *shape), generator=generator),
        "view": torch.tensor([0, 1, -1])[:size],
        "phase": torch.tensor([1, 0, 1])[:size],
        "label": torch.tensor([0, 1, 2])[:size],
        "slice_position": torch.tensor([0.0, 0.5, 1.0])[:size],
    }


ATTRIBUTES = {
    "use_view": True,
    "use_phase": True,
    "use_label": True,
    "use_slice_position": True,
    "known": stated(num_views=2, num_phases=2, num_labels=3),
    "embedding_dim": 16,
}


@pytest.mark.parametrize(("downsampling", "shape"), LATTICES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_maps_planes_to_the_latent_grid(encoder, downsampling, shape):
    conditioner = build(encoder, downsampling, out_channels=5, spatial_dims=len(shape))
    got = conditioner(batch(shape))
    latent = tuple(size // factor for size, factor in zip(shape, downsampling, strict=True))
    assert got.concat.shape == (3, 5, *latent)
    assert conditioner.concat_channels == 5
    assert got._replace(concat=None) == Condition()
    assert (conditioner.spade_channels, conditioner.embedding_dim, conditioner.context_dim) == (0, 0, 0)


@pytest.mark.parametrize(("downsampling", "shape"), [((8, 8), (16, 16)), ((2, 4, 4), (4, 8, 8))])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_single_edge_pixel_reaches_the_latent_grid_except_with_nearest(encoder, downsampling, shape):
    conditioner = build(encoder, downsampling).double()
    num_pixels = torch.Size(shape).numel()
    planes = torch.zeros(num_pixels + 1, 5, num_pixels, dtype=torch.float64)
    planes[1:, 0] = torch.eye(num_pixels)  # the first image has no edge, each other one a single pixel
    out = conditioner.encoder(planes.unflatten(2, shape))
    changed = (out[1:] - out[:1]).abs().flatten(1).amax(1) > 1e-9
    seen = changed.double().mean().item()
    cell = torch.Size(downsampling).numel()
    assert seen == (1 / cell if encoder == "nearest_1x1" else 1)


def test_nearest_refuses_edges_unless_asked_for():
    with pytest.raises(ValueError, match="parity=true"):
        SpatialConditioner(4, downsampling=(8, 8), encoder="nearest_1x1")
    SpatialConditioner(4, downsampling=(8, 8), encoder="nearest_1x1", use_edges=False)
    with pytest.raises(ValueError, match="parity"):
        SpatialConditioner(4, downsampling=(8, 8), parity=True)


def test_rescaler_is_three_bilinear_halvings_then_a_projection():
    conditioner = build("rescaler", out_channels=2)
    planes = torch.rand(2, 5, 16, 16)
    means = torch.nn.functional.avg_pool2d(planes, 8)  # three 2x2 means are the 8x8 mean
    torch.testing.assert_close(conditioner.encoder(planes), conditioner.encoder.project(means))
    assert conditioner.encoder.project.bias is None


def test_unshuffle_equals_torch_in_2d_and_loses_nothing_in_3d():
    x = torch.rand(2, 3, 8, 12)
    assert torch.equal(unshuffle(x, (4, 4)), torch.nn.functional.pixel_unshuffle(x, 4))
    volume = torch.rand(2, 3, 4, 4, 8)
    cells = unshuffle(volume, (1, 2, 4))
    assert cells.shape == (2, 24, 4, 2, 2)
    assert torch.equal(cells[:, 0, 1, 1, 1], volume[:, 0, 1, 2, 4])
    assert torch.equal(cells.flatten(1).sort(1).values, volume.flatten(1).sort(1).values)


def test_strides_multiply_to_the_downsampling():
    assert stage_strides((1, 4, 8)) == [(1, 2, 2), (1, 2, 2), (1, 1, 2)]
    assert stage_strides((1, 1)) == []
    with pytest.raises(ValueError, match="powers of two"):
        stage_strides((3, 4))


@pytest.mark.parametrize("shape", [(16, 8), (4, 8, 8)])
def test_planes_are_edges_then_one_hot_classes(shape):
    data = batch(shape)
    conditioner = build(downsampling=(4,) * len(shape))
    planes = conditioner.planes(data, {})
    assert planes.dtype == torch.float32
    assert torch.equal(planes[:, :1], data["edges"])
    assert torch.equal(planes[:, 1:].sum(1, keepdim=True), torch.ones_like(data["edges"]))
    assert torch.equal(planes[:, 1:].argmax(1, keepdim=True), data["mask"])
    without_edges = build(downsampling=(4,) * len(shape), use_edges=False)
    assert torch.equal(without_edges.planes({"mask": data["mask"]}, {}), planes[:, 1:])


def test_dropping_zeroes_the_planes_of_that_sample_and_group():
    conditioner, data = build(**ATTRIBUTES), batch()
    assert conditioner.groups == ("edges", "mask", "attributes")
    full = conditioner.planes(data, {})
    drop = torch.tensor([[True, False, False], [False, True, False], [True, True, True]])
    got = conditioner.planes(data, dict(zip(conditioner.groups, drop.unbind(1), strict=True)))
    assert got[0, 0].abs().sum() == 0 and torch.equal(got[0, 1:], full[0, 1:])
    assert got[1, 1:].abs().sum() == 0 and torch.equal(got[1, 0], full[1, 0])
    assert got[2].abs().sum() == 0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_null_does_not_depend_on_the_batch_and_training_drops_to_it(encoder):
    conditioner = build(encoder, **ATTRIBUTES, spade="planes", drop_all_prob=1.0)
    first, second = batch(), batch()
    second = {key: value.flip(0) for key, value in second.items()}
    null = conditioner(first, drop=conditioner.drop_groups(3))
    trained = conditioner(second, drop=conditioner.sample_drop(3))
    for a, b in zip(null[:3], trained[:3], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, a[:1].expand_as(a))
    assert null.spade.abs().sum() == 0
    assert not torch.equal(conditioner(first).embedding, null.embedding)
    whole = conditioner(first, drop=torch.ones(3, dtype=torch.bool))
    assert torch.equal(whole.concat, null.concat)


def test_keeping_everything_equals_no_drop():
    conditioner, data = build(**ATTRIBUTES), batch()
    kept = conditioner(data, drop=conditioner.drop_groups(3, ()))
    assert torch.equal(kept.concat, conditioner(data).concat)
    assert torch.equal(kept.embedding, conditioner(data).embedding)


def test_drop_frequencies_are_independent_with_a_joint_part():
    conditioner = build(drop_edges_prob=0.1, drop_mask_prob=0.2, drop_all_prob=0.3)
    drop = conditioner.sample_drop(40_000, torch.Generator().manual_seed(0))
    edges, mask = drop.unbind(1)
    tolerance = 4 * 0.5 / 200  # four standard errors at most
    assert edges.float().mean().item() == pytest.approx(1 - 0.7 * 0.9, abs=tolerance)
    assert mask.float().mean().item() == pytest.approx(1 - 0.7 * 0.8, abs=tolerance)
    assert (edges & mask).float().mean().item() == pytest.approx(0.3 + 0.7 * 0.1 * 0.2, abs=tolerance)


def test_joint_dropping_takes_all_or_nothing():
    drop = build(drop_all_prob=0.5, **ATTRIBUTES).sample_drop(100, torch.Generator().manual_seed(0))
    assert drop.any() and not drop.all() and (drop.all(1) == drop.any(1)).all()


def test_drop_groups_can_name_one_condition():
    conditioner = build()
    assert conditioner.drop_groups(2, ("mask",)).tolist() == [[False, True]] * 2
    with pytest.raises(InputError, match="no condition text"):
        conditioner.drop_groups(2, ("text",))


def test_embeddings_differ_by_attribute_and_unknown_is_null():
    conditioner = build(**ATTRIBUTES)
    assert conditioner.embedding_dim == 16
    data = batch()
    base = conditioner(data).embedding
    assert base.shape == (3, 16)
    for key, value in {"view": 1, "phase": 0, "label": 2, "slice_position": 0.7}.items():
        changed = {**data, key: torch.full_like(data[key], value)}
        assert not torch.equal(conditioner(changed).embedding[0], base[0]), key
    unknown = {key: torch.full((1,), -1) for key in ("view", "phase", "label")}
    unknown["slice_position"] = torch.zeros(1)
    null = conditioner.embed(unknown, torch.ones(1, dtype=torch.bool))
    assert torch.equal(null, sum(e.weight[:1] for e in conditioner.embeddings.values()))


def test_unknown_attributes_enter_as_the_null_and_never_as_class_0():
    conditioner = build(**ATTRIBUTES, drop_all_prob=0.1)
    data = batch()
    data |= {"label": torch.tensor([-1, 0, 2]), "slice_position": torch.tensor([math.nan, 0.25, math.nan])}
    mixed = conditioner.embed(data, None)
    tables = conditioner.embeddings
    rows = sum(tables[kind].weight[data[kind] + 1] for kind in ("view", "phase", "label"))
    position = conditioner.position(torch.tensor([[0.25]]))
    assert torch.equal(mixed[0], rows[0]) and torch.equal(mixed[2], rows[2])
    torch.testing.assert_close(mixed[1:2], rows[1:2] + position)
    null, first = tables["label"].weight[0], tables["label"].weight[1]
    difference = mixed[0] - conditioner.embed({**data, "label": torch.tensor([0, 0, 2])}, None)[0]
    torch.testing.assert_close(difference, null - first)
    everything = {kind: torch.full((1,), -1) for kind in tables} | {
        "slice_position": torch.tensor([math.nan])
    }
    dropped = conditioner.embed({**everything, "label": torch.tensor([2])}, torch.tensor([True]))
    assert torch.equal(conditioner.embed(everything, None), dropped)


def test_several_labels_enter_as_the_sum_of_their_embeddings():
    conditioner = build(use_label=True, known=stated(num_labels=3), embedding_dim=16)
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    null, *rows = conditioner.embeddings["label"].weight
    got = conditioner.embed({"labels": labels}, None)
    torch.testing.assert_close(
        got, torch.stack([rows[0] + rows[2], rows[1], null, rows[0] + rows[1] + rows[2]])
    )
    single = conditioner.embed({"label": torch.tensor([1])}, None)
    assert torch.equal(got[1:2], single) and torch.equal(got[2], null)
    drop = torch.tensor([True, False, True, False])
    dropped = conditioner.embed({"labels": labels}, drop)
    assert torch.equal(dropped[0], null) and torch.equal(dropped[3], got[3])


def test_a_null_counts_as_trained_where_training_dropped_or_met_the_unknown():
    some_unstated = replace(ATTRIBUTES["known"], unstated=("label", "text"))
    assert build(**ATTRIBUTES).null_attributes == ()
    assert build(**ATTRIBUTES | {"known": some_unstated}).null_attributes == ("label",)
    names = ("view", "phase", "label", "slice_position")
    assert build(**ATTRIBUTES, drop_all_prob=0.1).null_attributes == names == build(**ATTRIBUTES).attributes
    old = build(
        **ATTRIBUTES | {"known": replace(ATTRIBUTES["known"], lone_position=0.5)}
    )  # trained when a slice alone stood in the middle
    assert old.null_attributes == ("slice_position",)
    places = [{**batch(), "slice_position": torch.full((3,), place)} for place in (math.nan, 0.5)]
    assert torch.equal(*(old.embed(data, None) for data in places))


def test_auto_embeds_what_the_dataset_states():
    auto = dict.fromkeys(["use_view", "use_phase", "use_label", "use_slice_position"], "auto")
    conditioner = build(**{**ATTRIBUTES, **auto, "known": stated(num_views=2, num_phases=2)})
    assert set(conditioner.embeddings) == {"view", "phase"}
    data = batch()
    with_position = conditioner(data).embedding
    del data["slice_position"]
    assert not torch.equal(conditioner(data).embedding, with_position)
    nothing = build(**{**auto, "embedding_dim": 16})
    assert nothing(data).embedding is None


@pytest.mark.parametrize(("spade", "channels", "grid"), [("planes", 4, (32, 24)), ("unshuffle", 7, (4, 3))])
def test_spade_map_is_the_planes_or_encoded(spade, channels, grid):
    conditioner = build(None, spade=spade, spade_out_channels=7, use_edges=False)
    got = conditioner(batch())
    assert got.concat is None and conditioner.concat_channels == 0
    assert got.spade.shape == (3, channels, *grid)
    assert conditioner.spade_channels == channels


def test_null_conditioner_gives_nothing_whatever_it_is_built_with():
    conditioner = NullConditioner(num_classes=4, downsampling=(8, 8), spatial_dims=2, embedding_dim=9)
    drop = conditioner.sample_drop(3)
    assert conditioner({}, drop=drop) == Condition()
    assert drop.shape == conditioner.drop_groups(3).shape == (3, 0)
    assert conditioner.concat_channels == conditioner.embedding_dim == 0


def test_concatenation_doubles_the_batch_field_by_field():
    conditioner, data = build(**ATTRIBUTES, spade="planes"), batch()
    both = concatenate(conditioner(data), conditioner(data, drop=conditioner.drop_groups(3)))
    assert both.concat.shape[0] == both.embedding.shape[0] == both.spade.shape[0] == 6
    assert both.context is None


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"encoder": "odd"}, "encoder"),
        ({"drop_all_prob": 1.5}, "drop_all_prob"),
        ({"use_edges": False, "drop_edges_prob": 0.1}, "drop_edges_prob"),
        ({"use_view": True}, "use_view"),
        (
            {"attributes": {"age": True}},
            r"age=true but the dataset has no age \(it declares none\)",
        ),
        ({"attributes": {"age": "maybe"}}, "attributes.age=maybe is none of true, false, auto"),
        ({"use_age": True}, "use_age=True: there is no such option"),
        ({"use_edges": False, "use_mask": False}, "encoder=null"),
    ],
)
def test_bad_keys_are_the_users_mistake(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SpatialConditioner(4, downsampling=(8, 8), **kwargs)


def test_a_dataset_without_masks_and_a_batch_without_edges_are_told_apart():
    with pytest.raises(ValueError, match="no masks"):
        SpatialConditioner(None, downsampling=(8, 8))
    data = batch()
    del data["edges"]
    with pytest.raises(InputError, match="`edges`"):
        build()(data)
    with pytest.raises(InputError, match="crop or pad"):
        build()(batch((20, 24)))


@pytest.mark.parametrize("name", SPATIAL_ENCODERS)
def test_encoders_state_the_channels_that_they_give(name):
    encoder = SPATIAL_ENCODERS[name](5, 3, (4, 4))
    assert encoder.out_channels == encoder(torch.zeros(1, 5, 8, 8)).shape[1] == (5 if name == "area" else 3)


def test_the_weights_of_earlier_checkpoints_have_the_same_names():
    conditioner = build(**ATTRIBUTES, spade="segconv", spade_out_channels=2)
    names = {key.split(".")[0] for key in conditioner.state_dict()}
    assert names == {"encoder", "spade_encoder", "embeddings", "position"}
    kept = [key for key in conditioner.state_dict() if key.startswith(("embeddings", "position"))]
    assert kept == [
        *(f"embeddings.{kind}.weight" for kind in ("view", "phase", "label")),
        *(f"position.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")),
    ]
