"""The moving average of what a model samples with."""

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medldm.errors import InputError
from medldm.ranks import is_divided, like, parts, whole


class DividedAverage:
    """As `AveragedModel`, of modules whose weights are divided over ranks: each follows its own parts."""

    def __init__(self, modules: nn.Module) -> None:
        self.n_averaged = torch.tensor(0)
        self.followed = [x.detach().clone() for x in modules.parameters()]
        self.kept = [x.detach().clone() for x in modules.buffers()]
        pairs = zip((*modules.parameters(), *modules.buffers()), (*self.followed, *self.kept), strict=True)
        copies = {id(x): copy for x, copy in pairs}
        state = modules.state_dict(keep_vars=True)
        self.values = {f"module.{name}": copies[id(x)] for name, x in state.items()}

    @property
    def module(self) -> "DividedAverage":
        return self

    def parameters(self) -> list[Tensor]:
        return self.followed

    def buffers(self) -> list[Tensor]:
        return self.kept

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors on the host, by the names of an `AveragedModel`. Every rank has to call this."""
        values = {name: whole(x).cpu() for name, x in self.values.items()}
        return {"n_averaged": self.n_averaged.clone(), **values}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.n_averaged.copy_(state["n_averaged"])
        for name, x in self.values.items():
            parts([x])[0].copy_(parts([like(state[name], x)])[0])


class EMA(Callback):
    """Exponential moving average of `module.ema_modules`, used in validation, sampling and export.

    The decay warms up as min(decay, (1 + n) / (10 + n)). It is saved under the checkpoint's key "ema". A
    module whose `ema_modules` is None has no average.
    """

    def __init__(self, decay: float = 0.9999, *, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"callbacks.ema.decay={decay} must lie in [0, 1)")
        self.decay, self.every_n_steps = decay, every_n_steps
        self.average: AveragedModel | None = None
        self.last_step = 0
        self._state: dict[str, Tensor] | None = None
        self._raw: list[Tensor] | None = None

    @torch.no_grad()
    def update(self, modules: nn.Module) -> None:
        """One step of the average. `AveragedModel.update_parameters` would send its counter to the device and
        wait for it, and go through the parameters one by one.
        """
        n = int(self.average.n_averaged)  # lives on the host
        averaged, current = (parts(m.parameters()) for m in (self.average.module, modules))
        if n == 0:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))
        buffers = list(modules.buffers())
        if buffers:
            torch._foreach_copy_(list(self.average.module.buffers()), buffers)
        self.average.n_averaged += 1

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if module.ema_modules is None:
            return
        if any(is_divided(parameter) for parameter in module.ema_modules.parameters()):
            self.average = DividedAverage(module.ema_modules)
        else:
            self.average = AveragedModel(module.ema_modules)
            self.average.requires_grad_(False)
        if self._state is not None:
            self.average.load_state_dict(self._state)
            self._state = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.last_step = trainer.global_step  # a resumed run's step is not restored yet in on_fit_start

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.average is None or trainer.global_step == self.last_step:
            return  # an accumulating batch: no update happened
        self.last_step = trainer.global_step
        if trainer.global_step % self.every_n_steps == 0:
            self.update(module.ema_modules)

    def _swap_in(self, module: LightningModule) -> None:
        if self.average is None or self.average.n_averaged == 0 or self._raw is not None:
            return
        self._raw = [p.detach().clone() for p in module.ema_modules.parameters()]
        self._copy(list(self.average.module.parameters()), module)

    def _swap_out(self, module: LightningModule) -> None:
        if self._raw is not None:
            self._copy(self._raw, module)
            self._raw = None

    @staticmethod
    @torch.no_grad()
    def _copy(source: list[Tensor], module: LightningModule) -> None:
        torch._foreach_copy_(parts(module.ema_modules.parameters()), parts(source))

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_in(module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_out(module)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._swap_out(module)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        assert self._raw is None, "a checkpoint must hold the raw weights"
        if self.average is not None:
            checkpoint["ema"] = self.average.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        self._state = checkpoint.get("ema")
