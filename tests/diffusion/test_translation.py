"""The condition of diffusion between modalities, and ALDM's published figures."""

from functools import partial

import pytest
import torch
from tests.helpers import compose_part, num_parameters
from torch import nn

from medldm.diffusion.sampler import DDIMSampler
from medldm.diffusion.translation import TranslationConditioner

SIZES = {"latent_channels": 4, "num_labels": 3, "embedding_dim": 16}


class Stage(nn.Module):
    """A first stage whose latents say what was done to them."""

    def encode(self, x):
        return torch.full((len(x), 4, 2, 2, 2), 1.0)

    def normalize(self, h):
        return h + 10

    def translate(self, z, label):
        return z + 100 * (1 + label.reshape(-1, 1, 1, 1, 1))


BATCH = {"source": torch.zeros(2, 1, 8, 8, 8), "label": torch.tensor([0, 2])}
CACHED = {"source_latent": torch.zeros(2, 4, 2, 2, 2), "label": torch.tensor([0, 2])}


@pytest.mark.parametrize("preset", ["vqgan_aldm", "vqgan_aldm_r3"])
def test_the_autoencoder_of_r3_has_its_counts(preset):
    with torch.device("meta"):
        network = compose_part(f"network/{preset}")(spatial_dims=3, image_channels=1)
    encoder = (network.stem, network.encoder, network.encoder_norm, network.to_latent)
    decoder = (network.from_latent, network.decoder, network.decoder_norm, network.head)
    assert [sum(map(num_parameters, half)) for half in (encoder, decoder)] == [2_238_340, 4_230_721]
    assert num_parameters(network.pre_quantizer) + num_parameters(network.post_quantizer) == 40
    assert network.quantizer.codebook.shape == (8192, 4) and network.downsampling == (4, 4, 4)


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ({}, [14_205_699, 36_770_689]),  # printed as 14.2M, 36.8M
        ({"channels": [128, 128, 256], "num_res_blocks": [2, 3]}, [7_106_563, 12_417_025]),  # 7.1M, 12.4M
    ],
)
def test_the_truncated_autoencoder_of_r1_has_its_counts(sizes, counts):
    build = compose_part("network/vqgan_aldm_r1")
    with torch.device("meta"):
        network = partial(build, **sizes)(spatial_dims=3, image_channels=1)
    encoder = (network.stem, network.encoder, network.encoder_norm, network.to_latent)
    decoder = (network.from_latent, network.decoder, network.decoder_norm, network.head)
    assert [sum(map(num_parameters, half)) for half in (encoder, decoder)] == counts


def test_legacy_beta_is_a_quarter_on_the_codebook_term():
    build = compose_part("network/vqgan_aldm_r3")
    quantizer = build.keywords["quantizer"](code_dim=4)
    h = torch.randn(1, 4, 3, 3, 3, requires_grad=True)
    quantized = quantizer(h)
    error = (quantized.z - h).square().mean()
    torch.testing.assert_close(quantized.loss, 1.25 * error)
    quantized.loss.backward()
    torch.testing.assert_close(h.grad, 2 * (h - quantized.z).detach() / h.numel())  # commitment weight 1


@pytest.mark.parametrize("num_labels", [3, 4])
def test_the_unet_of_r3_has_its_count_with_class_embedding(num_labels):
    conditioner = compose_part("conditioner/translation")(
        latent_channels=4, num_labels=num_labels, embedding_dim=512
    )
    assert conditioner.concat_channels == 8 and not conditioner.context_dim
    with torch.device("meta"):
        network = compose_part("network/unet_aldm")(
            3, in_channels=4 + conditioner.concat_channels, out_channels=4
        )
    assert num_parameters(network) + num_parameters(conditioner) == 33_195_268 + 512 * num_labels


@pytest.mark.parametrize(("latents", "count"), [(["spade"], 38_184_195), (["source", "spade"], 38_194_563)])
def test_the_unets_of_r1_and_r2_have_their_counts_with_cross_attention(latents, count):
    build = partial(compose_part("conditioner/translation_r1"), latents=latents)
    conditioner = build(latent_channels=3, num_labels=4, embedding_dim=512)
    with torch.device("meta"):
        network = compose_part("network/unet_aldm")(
            3,
            in_channels=3 + conditioner.concat_channels,
            out_channels=3,
            context_channels=conditioner.context_dim,
        )
    assert num_parameters(network) + num_parameters(conditioner) == count


def test_the_schedule_and_ddim_steps_are_the_published_ones():
    schedule = compose_part("schedule/sqrt_linear")
    t = torch.tensor([1, 250, 500, 750, 1000], dtype=torch.float64) / 1000
    alpha_bar = torch.sigmoid(-schedule.gamma(t))
    expected = torch.tensor([0.9985, 0.5105, 0.1158, 0.00844, 1.423e-4]).double()
    torch.testing.assert_close(alpha_bar.double(), expected, atol=0, rtol=6e-4)
    sampler = compose_part("sampler/ddim_parity")
    steps = (sampler.time_grid(schedule).times * 1000).round().long() - 1  # counted from 0, as published
    assert isinstance(sampler, DDIMSampler) and (sampler.num_steps, sampler.eta) == (200, 1.0)
    assert steps.tolist() == list(range(996, 0, -5))


def test_source_and_translation_are_concatenated_in_this_order():
    condition = TranslationConditioner(**SIZES)(BATCH, Stage())
    source, spade = condition.concat.chunk(2, dim=1)
    assert (source == 1).all() and (spade[0] == 101).all() and (spade[1] == 301).all()
    assert condition.embedding.shape == (2, 16) and condition.context is None


def test_the_paper_concatenates_the_translation_alone_and_cross_attends_to_one_token():
    conditioner = TranslationConditioner(**SIZES, latents=["spade"], label="token")
    condition = conditioner(BATCH, Stage())
    assert (condition.concat[1] == 301).all() and condition.concat.shape[1] == 4
    assert condition.embedding is None
    assert condition.context.tolist() == [[[1, 0, 0]], [[0, 0, 1]]]


def test_cached_latents_are_normalised_first():
    condition = TranslationConditioner(**SIZES)(CACHED, Stage())
    assert (condition.concat[0, :4] == 10).all() and (condition.concat[0, 4:] == 110).all()


@pytest.mark.parametrize("label", ["embedding", "token"])
def test_what_is_dropped_is_zero(label):
    conditioner = TranslationConditioner(**SIZES, label=label)
    drop = torch.tensor([[True, False], [False, True]])
    condition = conditioner(BATCH, Stage(), drop)
    said = condition.embedding if label == "embedding" else condition.context
    assert (condition.concat[0] == 0).all() and (condition.concat[1] != 0).all()
    assert (said[1] == 0).all() and (said[0] != 0).any()


def test_training_drops_everything_together_with_its_probability():
    drop = TranslationConditioner(**SIZES, drop_all_prob=0.25).sample_drop(
        4000, torch.Generator().manual_seed(0)
    )
    assert torch.equal(drop[:, 0], drop[:, 1])
    assert drop.float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("options", [{"latents": ["target"]}, {"latents": []}, {"label": "words"}])
def test_unknown_conditions_are_named(options):
    with pytest.raises(ValueError, match="^(latents|label)="):
        TranslationConditioner(**SIZES, **options)
