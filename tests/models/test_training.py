"""What every model shares in training: clipping, the learning rate's length, one fit after another."""

import copy
import math

import pytest
import torch
from torch import nn

from medldm.devices import GPU, choose_settings
from medldm.errors import InputError
from medldm.models.common import clip_gradients, warmup_cosine
from tests.helpers import compose_config
from tests.training import LDM, PIXELS, VQVAE, build, fit, make_batches

KINDS = {
    "autoencoder": (VQVAE,),
    "diffusion": (LDM, *PIXELS),
    "variational": ("experiment=medvdm/chestxray",),
    "segmentation": ("model=segmentation", "data.spatial_dims=2"),
}


@pytest.fixture(params=KINDS)
def module(request):
    return build(*KINDS[request.param], "model.warmup_steps=0")


def gpu_options() -> dict:
    """The options of a trainer on a CPU, as a GPU would have them."""
    return {"precision": choose_settings(hardware=GPU).precision}


def test_a_fused_optimiser_is_clipped_under_mixed_precision(module):
    """Lightning's own clipping ends the training there."""
    batches, limit = make_batches(2, 2), 1e-3
    seen = []
    options = gpu_options()
    if module.automatic_optimization:
        options["gradient_clip_val"] = limit
    else:
        module.gradient_clip_val = limit

    def note(optimizer, *_):
        norms = [
            p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        seen.append(
            (
                torch.stack(norms).norm(),
                {p.grad.dtype for g in optimizer.param_groups for p in g["params"] if p.grad is not None},
            )
        )

    make = module.make_optimizer
    module.make_optimizer = lambda groups: noted(make(groups), note)
    module.make_optimizer.__dict__["keywords"] = {}
    fit(module, batches, **options)
    assert len(seen) >= 2
    for norm, dtypes in seen:
        assert norm <= limit * 1.001 and dtypes == {torch.float32}


def noted(optimizer, note):
    optimizer.register_step_post_hook(note)
    return optimizer


def test_one_module_is_fitted_twice_in_a_process(module):
    batches = make_batches(2, 2)
    if hasattr(module, "adversarial"):
        module.adversarial.start = 100  # the discriminators have not begun when the first fit ends
    fit(module, batches)
    before = [p.detach().clone() for p in module.parameters() if p.requires_grad]
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    if hasattr(module, "adversarial"):
        module.adversarial.start = 0
        assert any(name.startswith("discriminators.") for name in trained)
    trainer = fit(module, batches)
    assert trainer.global_step == 2
    after = [p for p in module.parameters() if p.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > 0.8 * len(after)


def test_discriminators_stay_trainable_when_a_step_fails():
    module = build(VQVAE)

    def fail(*_):
        raise RuntimeError("out of memory")

    module.generator_step = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, make_batches(1, 2))
    assert all(p.requires_grad for p in module.discriminators.parameters())


@pytest.mark.parametrize("total", [-1, 0])
def test_a_cosine_without_a_number_of_its_own_lasts_as_long_as_the_training(module, total):
    module.cosine_steps, rates = total, []
    options = {"accumulate_grad_batches": 2}
    if not module.automatic_optimization:
        module.accumulate_grad_batches = options.pop("accumulate_grad_batches")
    start = module.learning_rate
    schedulers = []
    module.learning_rate = lambda optimizer: schedulers.append(start(optimizer)) or schedulers[-1]
    trainer = fit(module, make_batches(3, 2), **options)
    (scheduler,) = schedulers
    multiplier = scheduler.lr_lambdas[0]
    assert trainer.global_step == 2  # three batches: two updates, the second of one batch
    rates = [multiplier(step) for step in range(3)]
    assert rates == pytest.approx([1, 0.5, module.cosine_final], abs=1e-5)


def test_the_cosine_of_vdm_follows_epochs():
    assert compose_config("train", "experiment=medvdm/chestxray", "data.root=-").model.cosine_steps == 20_000
    cfg = compose_config(
        "train", "experiment=medvdm/chestxray", "data.root=-", "trainer.max_steps=-1", "trainer.max_epochs=5"
    )
    assert cfg.model.cosine_steps == -1  # of the training
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    for total in (-1, 0, None):
        rate = warmup_cosine(optimizer, total=total).lr_lambdas[0]
        assert [rate(step) for step in (0, 1, 10_000)] == [1, 1, 1]


def test_a_cosine_that_ends_nowhere_or_before_the_training(caplog):
    module = build(LDM, *PIXELS, "model.cosine_steps=-1")
    with pytest.raises(
        InputError, match="cosine_steps=-1: the training has no end; set max_steps or max_epochs"
    ):
        fit(module, make_batches(1, 2), max_epochs=-1)
    module = build(LDM, *PIXELS, "model.cosine_steps=1")
    fit(module, make_batches(3, 2))
    assert "cosine_steps=1: the rate is 0 from there on, and the training has 3 updates" in caplog.text
    with pytest.raises(InputError, match="model.warmup_steps=-5"):
        build(LDM, *PIXELS, "model.warmup_steps=-5")


def test_clipping_gives_torch_s_numbers_in_float32():
    module = nn.Linear(3, 2)
    for p in module.parameters():
        p.grad = torch.full_like(p, 10.0)
    other = copy.deepcopy(module)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    clip_gradients(module.parameters(), 0.5)
    nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert math.isclose(
        float(torch.stack([p.grad.norm() for p in module.parameters()]).norm()), 0.5, rel_tol=1e-5
    )
    before = [p.grad.clone() for p in module.parameters()]
    for limit in (None, 0, 0.0):
        clip_gradients(module.parameters(), limit)
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), before, strict=True))
