"""Every kind of model keeps the contract of `medldm.models.protocols`."""

import pytest

from medldm.build import MODELS, load_module, module_class
from medldm.errors import InputError
from medldm.models.protocols import Predictive, Sampleable, Trainable
from medldm.sampling import predictor_of

OUTPUTS = {  # fixture -> names of what `medldm sample` may take from it
    "first_stage": ["autoencoder"],
    "diffusion": ["diffusion"],
    "translator": ["spade", "autoencoder"],
}


def members(protocol: type) -> set[str]:
    """Names of a protocol's attributes and methods, inherited ones too."""
    bases = protocol.__mro__[:-3]  # without Protocol, Generic and object
    names = {name for base in bases for name in (*vars(base), *base.__dict__.get("__annotations__", ()))}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("kind", MODELS)
def test_a_kind_of_model_states_its_batch_keys_and_metrics(kind):
    module = MODELS[kind].module
    missing = {name for name in members(Trainable) if not hasattr(module, name)}
    assert missing <= {"description", "facts", "conditioner", "sampler", "first_stage"}  # of an instance


@pytest.mark.parametrize("fixture", OUTPUTS)
def test_a_trained_model_has_all_that_commands_ask_for(fixture, request):
    module = load_module(request.getfixturevalue(fixture))
    predictor = predictor_of(module)
    wanted = members(Trainable) | members(Predictive)
    wanted |= members(Sampleable) if predictor.is_generative else set()
    assert {name for name in wanted if not hasattr(module, name)} == set()
    assert list(module.outputs) == OUTPUTS[fixture]


def test_an_unknown_kind_of_model_ends_in_one_line():
    with pytest.raises(InputError, match="model.kind=gan is none of autoencoder, diffusion"):
        module_class({"kind": "gan"})


@pytest.mark.parametrize(
    ("model", "keys", "cached"),
    [
        ({"kind": "autoencoder", "decoder_sees_map": False}, ("image",), ("image",)),
        ({"kind": "autoencoder", "decoder_sees_map": True}, ("image", "mask"), ("image", "mask")),
        ({"kind": "autoencoder", "reconstructs": "mask"}, ("mask",), ("mask",)),
        ({"kind": "segmentation"}, ("image", "mask"), ("image", "mask")),
        ({"kind": "regression"}, ("image", "source"), ("image", "source")),
        ({"kind": "translation", "objective": {}}, ("image", "source"), ("latent", "source_latent")),
        ({"kind": "diffusion", "conditioner": {}}, ("image",), ("latent",)),
        (
            {"kind": "diffusion", "conditioner": {"use_mask": True, "use_edges": True}},
            ("image", "mask", "edges"),
            ("latent", "mask", "edges"),
        ),
        (
            {"kind": "diffusion", "conditioner": {"latents": ["spade"]}},
            ("image", "source"),
            ("latent", "source_latent"),
        ),
        ({"kind": "variational", "conditioner": {"use_label": True}}, ("image",), ("image",)),
    ],
)
def test_batches_hold_what_the_model_reads(model, keys, cached):
    given = (module_class(model).batch_keys(model, is_cached=is_cached) for is_cached in (False, True))
    assert list(given) == [keys, cached]
