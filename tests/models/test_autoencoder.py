"""Stage one: manual optimisation of a generator and its discriminator."""

import pytest
import torch

from medldm.networks.compiling import wrap_blocks
from tests.training import PLAIN_SGD, VQVAE, build, fit, make_batches

NO_GAN = ("model.adversarial=null", "model.discriminators=null")
GAN = (VQVAE, "model.adversarial.start=0", "model.adversarial.ramp=0")


def with_start(module, start: int):
    module.adversarial.start = start
    return module


def weights_of(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def grads_of(module) -> list:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(a: list, b: list) -> bool:
    pairs = zip(a, b, strict=True)
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs
    )


def test_global_step_counts_updates_of_the_generator_alone():
    module = with_start(build(*GAN), 0)
    trainer = fit(module, make_batches(5, 2, 32))
    assert trainer.global_step == 5
    steps = [{int(s["step"]) for s in optimizer.state.values()} for optimizer in trainer.optimizers]
    assert steps == [{5}, {5}]


def test_max_steps_counts_updates_with_two_optimisers_and_accumulation():
    module = with_start(build(*GAN), 0)
    module.accumulate_grad_batches = 2
    trainer = fit(module, make_batches(12, 2, 32), max_steps=4)
    assert trainer.global_step == 4 and trainer.fit_loop.total_batch_idx == 7
    steps = [{int(s["step"]) for s in optimizer.state.values()} for optimizer in trainer.optimizers]
    assert steps == [{4}, {4}]


def test_the_discriminator_starts_after_so_many_updates_not_micro_batches():
    module = with_start(build(*GAN), 2)
    module.accumulate_grad_batches = 2
    calls = []
    inner = module.discriminator_loss
    module.discriminator_loss = lambda *a: calls.append(module.trainer.fit_loop.total_batch_idx) or inner(*a)
    fit(module, make_batches(8, 2, 32))
    assert calls == [4, 5, 6, 7]


def test_accumulation_equals_one_larger_batch():
    # A codebook learned by gradient: a moving average moves with every micro-batch.
    options = (VQVAE, *NO_GAN, *PLAIN_SGD, "model/network@model.autoencoder=vqvae_published")
    large, small = build(*options), build(*options)
    small.accumulate_grad_batches = 4
    batch = make_batches(1, 8, 32)[0]
    parts = [{key: value[2 * i : 2 * i + 2] for key, value in batch.items()} for i in range(4)]
    before = weights_of(large)
    fit(large, [batch])
    fit(small, parts)
    after = weights_of(large)
    assert any((after[name] - before[name]).abs().max() > 1e-3 for name in after)
    for name, value in small.named_parameters():
        torch.testing.assert_close(value, after[name], atol=1e-6, rtol=1e-4)


def test_neither_backward_leaves_gradients_on_the_other_side():
    module = with_start(build(*GAN), 0)
    module.accumulate_grad_batches = 2  # gradients are pending on both sides at the second batch
    seen = []

    def backward(loss):
        sides = (module.autoencoder, module.discriminators)
        before = [grads_of(side) for side in sides]
        loss.backward()
        seen.append([not same(old, grads_of(side)) for old, side in zip(before, sides, strict=True)])

    module.manual_backward = backward
    fit(module, make_batches(2, 2, 32))
    assert seen == [[True, False], [False, True]] * 2


def test_gradients_are_clipped_on_both_sides():
    module = with_start(build(*GAN, *PLAIN_SGD, "model.optimizer.lr=1.0"), 0)
    module.gradient_clip_val = 1e-3
    before = weights_of(module)
    fit(module, make_batches(1, 2, 32))
    for side in ("autoencoder", "discriminators"):
        moved = [v - before[n] for n, v in module.named_parameters() if n.startswith(side)]
        assert torch.stack([m.norm() for m in moved]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def passes_of(module, batch) -> list[int]:
    """The batch sizes of the discriminator's passes in one step."""
    sizes = []
    (discriminator,) = module.discriminators
    discriminator.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    fit(module, [batch])
    return sizes


def test_feature_matching_needs_no_second_pass_over_the_real_images():
    """The update's pass over them is the one that features were matched with: without matching there are as
    many passes, and the discriminator's update is the same.
    """
    (batch,) = make_batches(1, 2, 32)
    matched = with_start(build(*GAN, "model.adversarial.feature_matching_weight=1.0"), 0)
    plain = with_start(build(*GAN), 0)
    assert passes_of(matched, batch) == passes_of(plain, batch) == [2, 2, 2]
    pairs = zip(matched.discriminators.parameters(), plain.discriminators.parameters(), strict=True)
    assert all(torch.equal(found, wanted) for found, wanted in pairs)


@pytest.mark.parametrize(("norm", "sizes"), [("group", [2, 4]), ("batch", [2, 2, 2])])
def test_as_on_a_gpu_real_and_fake_images_are_one_pass_unless_a_norm_would_mix_them(norm, sizes):
    (batch,) = make_batches(1, 2, 32)
    options = (*GAN, *PLAIN_SGD, f"model.discriminators.image.norm={norm}")
    on_cpu, on_gpu = (with_start(build(*options), 0) for _ in range(2))
    wrap_blocks(on_gpu, lambda call: call)
    fit(on_cpu, [batch])
    assert passes_of(on_gpu, batch) == sizes
    for found, wanted in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_a_2d_discriminator_sees_one_random_slice_of_a_volume():
    module = build(*GAN)
    x = torch.rand(3, 1, 8, 32, 32)
    index = torch.tensor([1, 7, 0])
    seen = module.view(x, 2, (0, index))
    assert torch.equal(seen, torch.stack([x[i, :, k] for i, k in enumerate(index)]))
    assert torch.equal(module.view(x, 3, (0, index)), x)


def test_discriminators_and_their_loss_belong_together():
    with pytest.raises(ValueError, match="give both or neither"):
        build(VQVAE, "model.adversarial=null")


def test_codebook_usage_counts_one_epoch():
    module = build(VQVAE, *NO_GAN)
    trainer = fit(module, make_batches(3, 2, 32))
    usage = float(trainer.callback_metrics["train/codebook_usage"])
    assert 0 < usage <= 1
    assert module.autoencoder.quantizer.epoch_count.sum() == 0
