"""Quantisers behind one interface, against hand-computed values and closed forms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from medldm.build import build_module
from medldm.diffusion.latent import FirstStage
from medldm.diffusion.sampler import SAMPLERS, override_sampler
from medldm.networks.quantizers import (
    FiniteScalarQuantizer,
    GaussianLatent,
    LookupFreeQuantizer,
    ResidualQuantizer,
)
from tests.training import FACTS, LDM, build, make_batches

KINDS = {
    "vq": (),
    "fsq": ("+model/quantizer=fsq",),
    "lfq": ("+model/quantizer=lfq", "model.autoencoder.latent_channels=6"),
    "residual_vq": ("+model/quantizer=residual_vq", "model.quantizer.depth=2"),
    "kl": ("+model/quantizer=kl",),
}


def latent(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- finite scalar quantisation ----


def test_fsq_has_as_many_codes_as_its_levels_allow_and_reaches_all():
    quantizer = FiniteScalarQuantizer(4, levels=[8, 5, 5, 5])
    assert quantizer.num_codes == 1000
    h = latent(1, 4, 400, 400, scale=2.0)
    quantized = quantizer(h)
    assert quantized.indices.unique().tolist() == list(range(1000))
    for channel, count in enumerate((8, 5, 5, 5)):
        values = quantized.z[:, channel].unique()
        wanted = (torch.arange(count) - count // 2) / (count // 2)
        torch.testing.assert_close(values, wanted)
    assert quantized.loss == 0
    low, high = quantizer.code_range()
    assert (low.item(), high.item()) == (-1, 1)


def test_fsq_rounds_and_its_gradient_is_that_of_the_bound():
    """The paper's bound: tanh, moved for even numbers of levels, within 0.1% of half of all levels."""
    quantizer = FiniteScalarQuantizer(2, levels=[8, 5])
    h = torch.tensor([[0.3, -2.0, 0.0, 9.0], [0.3, -0.2, 0.0, -9.0]])[None].requires_grad_()  # (1, 2, 4)
    half, offset = torch.tensor([[3.5 * 0.999], [2 * 0.999]]), torch.tensor([[0.5], [0.0]])
    shifted = h + torch.atanh(offset / half)
    bounded = torch.tanh(shifted) * half - offset
    width = torch.tensor([[4.0], [2.0]])
    quantized = quantizer(h)
    torch.testing.assert_close(quantized.z, bounded.round() / width)
    assert quantized.z[0, :, 2].tolist() == [0, 0]  # 0 stays 0
    quantized.z.sum().backward()
    torch.testing.assert_close(h.grad, ((1 - torch.tanh(shifted) ** 2) * half / width).detach())


def test_fsq_wants_a_level_for_every_channel():
    with pytest.raises(ValueError, match=r"levels=\[8, 5\] must be 3 numbers"):
        FiniteScalarQuantizer(3, levels=[8, 5])


# ---- lookup-free quantisation ----


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_lfq_s_entropies_are_those_of_all_codes(temperature):
    """Over the codebook {-1, 1}^C, of softmax(-|h - code|^2 / temperature)."""
    quantizer = LookupFreeQuantizer(4, temperature=temperature)
    x = latent(50, 4, scale=0.4).double()
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    p = torch.softmax(-(x[:, None] - codes).square().sum(-1) / temperature, dim=1)
    each, mean = quantizer.entropies(x)
    torch.testing.assert_close(each, torch.special.entr(p).sum(1).mean())
    torch.testing.assert_close(mean, torch.special.entr(p.mean(0)).sum())


def test_lfq_s_entropy_of_the_mean_lies_between_nothing_and_all_codes():
    quantizer = LookupFreeQuantizer(12)  # two groups
    same = 100 * torch.ones(64, 12)
    assert [v.item() for v in quantizer.entropies(same)] == pytest.approx([0, 0], abs=1e-6)
    assert [v.item() for v in quantizer.entropies(0 * same)] == pytest.approx([12 * math.log(2)] * 2)
    all_corners = 100 * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))
    each, mean = LookupFreeQuantizer(4).entropies(all_corners)
    assert each.item() == pytest.approx(0, abs=1e-6) and mean.item() == pytest.approx(4 * math.log(2))


def test_lfq_takes_signs_and_passes_gradients_straight_through():
    quantizer = LookupFreeQuantizer(3, commitment_weight=0.0, entropy_weight=0.0)
    assert quantizer.num_codes == 8
    h, weight = latent(2, 3, 4, 5).requires_grad_(), latent(2, 3, 4, 5, seed=1)
    quantized = quantizer(h)
    torch.testing.assert_close(quantized.z, torch.where(h > 0, 1.0, -1.0))
    torch.testing.assert_close(
        quantized.indices, (h > 0).long().mul(torch.tensor([1, 2, 4]).view(3, 1, 1)).sum(1)
    )
    (quantized.z * weight).sum().backward()
    torch.testing.assert_close(h.grad, weight)
    committed = LookupFreeQuantizer(3, commitment_weight=1.0, entropy_weight=0.0)(h).loss
    torch.testing.assert_close(committed, F.mse_loss(h, h.sign()))


# ---- residual vector quantisation ----


def test_residual_codes_by_hand():
    quantizer = ResidualQuantizer(1, num_codes=3, depth=2, commitment_weight=1.0)
    with torch.no_grad():
        quantizer.parts[0].codebook.copy_(torch.tensor([[-4.0], [0.0], [4.0]]))
        quantizer.parts[1].codebook.copy_(torch.tensor([[-1.0], [0.0], [1.0]]))
    h = torch.tensor([5.2, -3.1, 0.4]).view(1, 1, 3).requires_grad_()
    quantized = quantizer(h)
    assert quantized.z.flatten().tolist() == pytest.approx([5, -3, 0])
    assert quantized.indices.flatten().tolist() == [2 + 3 * 2, 0 + 3 * 2, 1 + 3 * 1]
    torch.testing.assert_close(quantizer.lookup(quantized.indices), quantized.z.detach())
    rests = [torch.tensor([1.2, 0.9, 0.4]), torch.tensor([0.2, -0.1, 0.4])]
    expected = (
        sum(2 * rest.square().mean() for rest in rests) / 2
    )  # codebook and commitment, averaged over parts
    torch.testing.assert_close(quantized.loss, expected)
    quantized.z.sum().backward()
    torch.testing.assert_close(h.grad, torch.ones_like(h))
    assert [v.item() for v in quantizer.code_range()] == [-5, 5]


# ---- Gaussian latents ----


def test_the_divergence_is_the_closed_form_s():
    quantizer = GaussianLatent(3, kl_weight=2.0).train()
    torch.nn.init.normal_(quantizer.log_variance.weight, generator=torch.Generator().manual_seed(0))
    h = latent(2, 3, 4, 5)
    with torch.no_grad():
        log_variance = torch.einsum("dc,bchw->bdhw", quantizer.log_variance.weight, h) - 6
        expected = kl_divergence(Normal(h, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
        torch.testing.assert_close(quantizer(h).loss, 2 * expected)


def test_latents_are_drawn_in_training_and_their_mean_elsewhere():
    quantizer = GaussianLatent(2, kl_weight=1.0)
    with torch.no_grad():
        quantizer.log_variance.bias.copy_(torch.tensor([0.25, 1.0]).log())
    h = latent(1, 2, 1, 1).expand(1, 2, 200, 200)
    torch.manual_seed(0)
    drawn = quantizer.train()(h).z
    assert (drawn - h).std((0, 2, 3)).tolist() == pytest.approx([0.5, 1.0], rel=0.02)
    assert torch.equal(quantizer.eval()(h).z, h)


# ---- all behind one interface ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_codes_pass_through_indices_gradients_and_snap(kind, dims):
    torch.manual_seed(0)
    module = build("experiment=cardiac2d/demo_vqvae", *KINDS[kind], facts=FACTS | {"spatial_dims": dims})
    quantizer, channels = module.autoencoder.quantizer.train(), module.autoencoder.latent_channels
    h = latent(2, channels, *(4,) * dims).requires_grad_()
    quantized = quantizer(h)
    assert quantized.z.shape == h.shape and quantized.indices.shape == (2, *(4,) * dims)
    quantized.z.sum().backward()
    assert h.grad.abs().max() > 0 and quantized.loss.isfinite() and quantized.perplexity >= 1
    assert 0 < quantizer.epoch_usage() <= 1
    quantizer.eval()
    z = quantizer(h).z.detach()
    torch.testing.assert_close(quantizer.snap(z).z, z)
    noisy = z + 1e-3 * latent(*z.shape, seed=1)
    is_dense = kind in ("kl", "residual_vq")
    torch.testing.assert_close(quantizer.snap(noisy).z, noisy if is_dense else z, rtol=0, atol=1e-6)
    if kind != "kl":
        torch.testing.assert_close(quantizer.lookup(quantizer(h).indices), z)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vq"])
def test_every_sampler_and_conditioner_works_on_latents_of_every_quantizer(kind):
    stage = build("experiment=cardiac2d/demo_vqvae", *KINDS[kind]).autoencoder
    described = {"stage": "autoencoder", "facts": FACTS, "model": describe(*KINDS[kind])}
    (batch,) = make_batches(1, 2, 64)
    for conditioner in ("strided_cnn_attributes", "spade"):
        module = build_second(described, conditioner)
        module.first_stage.fit([stage.encode(batch["image"]).detach()])
        module.eval()
        for name in SAMPLERS:
            sampler = override_sampler(module.sampler, {"kind": name, "num_steps": 1})
            shape = module.latent_shape((64, 64))
            image = module.sample(batch, ["a", "b"], shape, sampler=sampler)
            assert image.shape == (2, 1, 64, 64) and image.isfinite().all()


def describe(*overrides):
    from omegaconf import OmegaConf

    from medldm.shrinking import shrink
    from tests.helpers import compose_config

    cfg = compose_config("train", "debug=tiny", "experiment=cardiac2d/demo_vqvae", *overrides)
    return shrink(OmegaConf.to_container(cfg.model, resolve=True))


def build_second(described, conditioner):
    from omegaconf import OmegaConf

    from medldm.shrinking import shrink
    from tests.helpers import compose_config

    cfg = compose_config(
        "train", "debug=tiny", LDM, "model/network=unet_block", f"model/conditioner={conditioner}"
    )
    return build_module(shrink(OmegaConf.to_container(cfg.model, resolve=True)), FACTS, described)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", ["prequant", "quant"])
def test_a_first_stage_comes_back_through_its_latents(kind, kept):
    """decode(encode(x)) is the autoencoder's own reconstruction, whatever the latent that is kept."""
    autoencoder = build("experiment=cardiac2d/demo_vqvae", *KINDS[kind]).autoencoder.eval()
    stage = FirstStage(autoencoder, latent=kept)
    (batch,) = make_batches(1, 2, 64)
    with torch.no_grad():
        stage.fit([stage.encode_raw(batch["image"])])
        torch.testing.assert_close(
            stage.reconstruct(batch["image"]), autoencoder(batch["image"])[0], rtol=1e-3, atol=1e-4
        )


def test_what_has_no_codes_or_lies_elsewhere_is_told():
    gaussian = build("experiment=cardiac2d/demo_vqvae", *KINDS["kl"]).autoencoder
    with pytest.raises(ValueError, match="normalisation=codebook_range: Gaussian latents have no codes"):
        FirstStage(gaussian, normalisation="codebook_range").fit(())
    scalar = build("experiment=cardiac2d/demo_vqvae", *KINDS["fsq"]).autoencoder
    with pytest.raises(ValueError, match="requantize=False: the decoder knows codes"):
        FirstStage(scalar, requantize=False)
