"""The quantiser against hand-computed values."""

import pytest
import torch
import torch.nn.functional as F

from medldm.networks import quantizer as module
from medldm.networks.quantizer import VectorQuantizer, nearest_codes


def latent(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_nearest_codes_equal_the_full_distance_matrix(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": chunk * 50})
    x, codebook = latent(333, 4), latent(50, 4, seed=1)
    assert torch.equal(nearest_codes(x, codebook), torch.cdist(x, codebook).argmin(1))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradient_passes_straight_through(spatial_dims):
    quantizer = VectorQuantizer(16, 3, commitment_weight=0.0, codebook_weight=0.0)
    h = latent(2, 3, *(4,) * spatial_dims).requires_grad_()
    weight = latent(2, 3, *(4,) * spatial_dims, seed=2)
    (quantizer(h).z * weight).sum().backward()
    torch.testing.assert_close(h.grad, weight)


def test_output_is_the_nearest_code():
    quantizer = VectorQuantizer(16, 3, init="normal")
    quantized = quantizer(latent(2, 3, 4, 5))
    assert quantized.indices.shape == (2, 4, 5)
    torch.testing.assert_close(quantized.z, quantizer.lookup(quantized.indices))


@pytest.mark.parametrize(
    ("legacy", "codebook_gradient", "input_gradient"), [(False, 1.0, 0.25), (True, 0.25, 1.0)]
)
def test_loss_terms_reach_the_right_side(legacy, codebook_gradient, input_gradient):
    quantizer = VectorQuantizer(1, 2, init="normal", legacy_beta=legacy)
    h = latent(1, 2, 3, 3).requires_grad_()
    quantized = quantizer(h)
    mse = F.mse_loss(h, quantizer.codebook.view(1, 2, 1, 1).expand_as(h))
    torch.testing.assert_close(quantized.loss, 1.25 * mse)
    quantized.loss.backward()
    difference = (h - quantizer.codebook.view(1, 2, 1, 1)).detach()
    torch.testing.assert_close(h.grad, input_gradient * 2 * difference / difference.numel())
    expected = -codebook_gradient * 2 * difference.sum((0, 2, 3))[None] / difference.numel()
    torch.testing.assert_close(quantizer.codebook.grad, expected)


def test_moving_average_by_hand():
    quantizer = VectorQuantizer(2, 1, ema_decay=0.9, init="normal")
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0], [10.0]]))
        quantizer.code_sum.copy_(quantizer.codebook)
    quantizer(torch.tensor([1.0, 2.0, 3.0, 9.0]).view(1, 1, 2, 2))
    torch.testing.assert_close(quantizer.code_count, torch.tensor([0.9 + 0.1 * 3, 0.9 + 0.1 * 1]))
    torch.testing.assert_close(quantizer.code_sum, torch.tensor([[0.1 * 6.0], [9.0 + 0.1 * 9.0]]))
    torch.testing.assert_close(
        quantizer.codebook, torch.tensor([[0.6 / 1.2], [9.9 / 1.0]]), rtol=1e-5, atol=1e-6
    )


def test_unused_codes_do_not_blow_up_after_the_first_step():
    quantizer = VectorQuantizer(512, 4, ema_decay=0.99, init="normal").train()
    for step in range(2):
        quantizer(latent(1, 4, 16, 16, seed=step))
    assert quantizer.codebook.abs().max() < 10  # MONAI's EMA quantiser reaches 5e5 here


def test_restart_moves_unused_codes_into_the_data_and_keeps_used_ones():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 2, ema_decay=0.5, restart_threshold=0.4, init="normal").train()
    with torch.no_grad():
        quantizer.codebook[1:].add_(1000.0)
        quantizer.code_sum.copy_(quantizer.codebook)
    h = latent(1, 2, 32, 32)
    for _ in range(3):
        used = quantizer(h).perplexity
    assert quantizer.codebook.abs().max() < 10
    assert used > 32


def test_initialisation_from_data_survives_saving_and_loading():
    quantizer = VectorQuantizer(32, 3, ema_decay=0.99, init="data").train()
    h = latent(1, 3, 8, 8)
    quantizer(h)
    assert bool(quantizer.initialised)
    rows = h.movedim(1, -1).reshape(-1, 3)
    fresh = VectorQuantizer(32, 3, ema_decay=0.99, init="data").train()
    fresh.load_state_dict(quantizer.state_dict())
    before = fresh.codebook.clone()
    fresh(h)
    assert (fresh.codebook - before).abs().max() < 0.1  # one moving-average step, no new start
    assert torch.cdist(before, rows).min(1).values.median() < 0.2


def test_evaluation_and_sampling_leave_the_codebook_untouched():
    quantizer = VectorQuantizer(32, 3, ema_decay=0.99, init="data", restart_threshold=1.0).train()
    quantizer(latent(1, 3, 8, 8))
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.eval()(latent(1, 3, 8, 8, seed=3) * 100)
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


def test_half_precision_stays_finite_where_sums_overflow_it():
    quantizer = VectorQuantizer(4, 1, ema_decay=0.99, init="normal").train()
    h = torch.full((1, 1, 256, 300), 1.05, dtype=torch.float16)  # 76,800 x 1.05 is inf in half
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(h)
    assert quantized.z.dtype == torch.float32
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


def test_perplexity_counts_equally_used_codes():
    quantizer = VectorQuantizer(8, 1, init="normal")
    with torch.no_grad():
        quantizer.codebook.copy_(torch.arange(8.0)[:, None])
    h = torch.arange(4.0).repeat(8).view(1, 1, 4, 8)
    torch.testing.assert_close(quantizer(h).perplexity, torch.tensor(4.0))


def test_no_token_by_code_matrix_is_held(monkeypatch):
    largest = 0
    real = torch.addmm

    def spy(*args, **kwargs):
        nonlocal largest
        out = real(*args, **kwargs)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch, "addmm", spy)
    nearest_codes(latent(32768, 4), latent(16384, 4))
    assert largest * 4 < 0.3 * 2**30


def test_a_restarted_code_starts_with_a_count_of_one():
    """Else it would be below the threshold again, and move at every update."""
    quantizer = VectorQuantizer(64, 2, ema_decay=0.9, restart_threshold=0.95, init="normal").train()
    quantizer(torch.randn(1, 2, 4, 4))  # 16 vectors: most codes fall to 0.9
    assert quantizer.code_count.min() >= 0.95 and (quantizer.code_count == 1).sum() >= 48
