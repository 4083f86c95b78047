"""What provenance.json says about conditions decides what is matched and how edges are read."""

import pytest
from tests.helpers import stated

from medldm.diffusion.conditioner import NullConditioner, SpatialConditioner
from medldm.evaluation.conditions import Conditions, read_conditions


@pytest.mark.parametrize(
    ("provenance", "matchable", "edges"),
    [
        ({}, (), None),
        ({"condition": ["mask", "edges"]}, (), True),
        ({"condition": ["mask", "edges"], "attributes": ["label", "view"]}, ("view", "label"), True),
        ({"condition": ["edges"], "attributes": ["age", "label"]}, ("label", "age"), True),
        ({"condition": ["edges"], "attributes": ["view"], "dropped": ["attributes"]}, (), True),
        ({"condition": ["edges"], "attributes": ["view"], "dropped": ["edges"]}, ("view",), False),
        ({"condition": ["source"], "attributes": ["label"], "dropped": ["label"]}, (), False),
        ({"condition": ["image"], "attributes": []}, (), False),
        ({"condition": None, "attributes": []}, (), False),
    ],
)
def test_conditions_are_those_that_the_model_was_told(provenance, matchable, edges):
    conditions = read_conditions(provenance)
    assert conditions.matchable == matchable and conditions.given("edges") is edges


def test_the_image_is_no_condition():
    """A model without conditions reads images for their size alone."""
    assert read_conditions({"condition": ["image"]}) == Conditions(arrays=())


def test_conditioners_name_their_attributes():
    options = {"downsampling": (4, 4), "known": stated(num_views=2, num_labels=3), "embedding_dim": 8}
    told = SpatialConditioner(3, **options, use_view=True, use_label="auto", use_slice_position=True)
    assert told.attributes == ("view", "label", "slice_position")
    assert SpatialConditioner(3, **options).attributes == ()
    assert NullConditioner().attributes == ()
