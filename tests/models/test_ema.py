import pytest
import torch
from pytorch_lightning import Callback

from medldm.callbacks import EMA
from medldm.errors import InputError
from tests.training import LDM, PIXELS, build, fit, make_batches


class Recorder(Callback):
    """The denoiser's weights after every update."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append(weights_of(module))


def weights_of(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.ema_modules.parameters()]


@pytest.fixture
def module():
    return build(LDM, *PIXELS, "model.optimizer.lr=0.01")


def test_the_average_equals_hand_computation_with_warm_up(module):
    ema, recorder = EMA(0.3), Recorder()
    fit(module, make_batches(6, 2), ema, recorder)
    expected = recorder.weights[0]  # the first update is taken as it is
    decays = []
    for n, weights in enumerate(recorder.weights[1:], 1):
        decays.append(min(0.3, (1 + n) / (10 + n)))
        expected = [decays[-1] * e + (1 - decays[-1]) * w for e, w in zip(expected, weights, strict=True)]
    assert decays == [2 / 11, 3 / 12, 0.3, 0.3, 0.3]
    for average, value in zip(ema.average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(average, value)


def test_only_the_denoiser_is_averaged(module):
    ema = EMA(0.9)
    fit(module, make_batches(1, 2), ema)
    assert {key.split(".")[1] for key in ema.average.state_dict() if "." in key} == {"network", "conditioner"}


def test_the_average_is_used_in_validation_and_only_there(module):
    ema, seen = EMA(0.9), []
    module.validation_step = lambda batch, batch_idx: seen.append(weights_of(module))
    recorder = Recorder()
    batches = make_batches(3, 2)
    fit(module, batches, ema, recorder, validation=batches[:1])
    averaged = list(ema.average.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(seen[0], averaged, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(module), recorder.weights[-1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(seen[0], recorder.weights[-1], strict=True))


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "ctrl_c"])
def test_raw_weights_come_back_after_an_exception_in_validation(module, error):
    def fail(batch, batch_idx):
        raise error

    recorder = Recorder()
    module.validation_step = fail
    batches = make_batches(3, 2)
    with pytest.raises((RuntimeError, SystemExit)):
        fit(module, batches, EMA(0.9), recorder, validation=batches[:1])
    assert all(torch.equal(a, b) for a, b in zip(weights_of(module), recorder.weights[-1], strict=True))


def test_accumulating_batches_do_not_advance_the_average(module):
    ema = EMA(0.9)
    trainer = fit(module, make_batches(6, 2), ema, accumulate_grad_batches=3)
    assert trainer.global_step == 2 and ema.average.n_averaged == 2


def test_a_module_without_an_average_has_none():
    ema = EMA(0.9)
    fit(build("experiment=cardiac2d/vqvae"), make_batches(1, 2, 32), ema)
    assert ema.average is None


def test_a_decay_outside_its_range_is_named():
    with pytest.raises(InputError, match=r"callbacks.ema.decay=1.5"):
        EMA(1.5)
