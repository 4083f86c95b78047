"""Leaves out updates whose gradients are not finite, counts them, and tells which layers they come from."""

import logging
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from medldm.errors import InputError
from medldm.ranks import all_reduce, is_divided, parts

log = logging.getLogger(__name__)
MOST_IN_A_ROW = 5  # updates that are left out before training stops


class SkipNonFinite(Callback):
    """Leaves out an update one of whose gradients is not finite: weights and moments stay as they were.

    The device decides, and the host reads its decision only when it logs: then it tells how many updates were
    left out, and after MOST_IN_A_ROW in a row training ends with an InputError that names the losses and the
    layers. The last checkpoint has finite weights. Fused optimisers take the device's decision (`found_inf`);
    others get gradients of zero, so that their momentum and weight decay act once more. So do
    those of a model whose weights are divided over processes. Logs `train/gradient_norm`, the norm over all
    gradients of the model's first optimiser before they are clipped, or after it where the module steps by
    hand.
    """

    def __init__(self, most_in_a_row: int = MOST_IN_A_ROW) -> None:
        self.most_in_a_row = most_in_a_row
        self.counts: Tensor | None = (
            None  # numbers of updates left out: of all, and of the last ones in a row
        )
        self.told = 0
        self.stepped: dict[
            int, list[nn.Parameter]
        ] = {}  # the parameters that each optimiser has updated last
        self.norms: dict[int, Tensor] = {}  # the norms of their gradients

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.counts, self.told = torch.zeros(2, device=module.device), 0
        if module.automatic_optimization:
            return
        for place, optimizer in enumerate(
            trainer.optimizers
        ):  # optimisers of such a module step without the hook
            optimizer.register_step_pre_hook(
                lambda optimizer, args, kwargs, place=place: self.guard(module, optimizer, place)
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        if module.automatic_optimization:
            self.guard(module, optimizer, 0)

    def guard(self, module: LightningModule, optimizer: Optimizer, place: int) -> None:
        """Leaves out this step where a gradient is not finite."""
        groups = (group["params"] for group in optimizer.param_groups)
        self.stepped[place] = stepped = [p for group in groups for p in group if p.grad is not None]
        if not stepped:
            return
        gradients = parts(parameter.grad for parameter in stepped)
        norms = torch.stack(torch._foreach_norm(gradients)).float()
        if is_shared := any(is_divided(parameter.grad) for parameter in stepped):
            norms = all_reduce(norms**2).sqrt()
        norm = norms.norm()
        is_bad = norm.isfinite().logical_not().float()
        self.norms[place] = norms
        if optimizer.defaults.get("fused") and not is_shared:
            optimizer.found_inf = is_bad
        else:
            for gradient in gradients:
                gradient.copy_(torch.where(is_bad.bool(), torch.zeros_like(gradient), gradient))
        if place == 0:
            self.counts = torch.stack([self.counts[0] + is_bad, (self.counts[1] + is_bad) * is_bad])
            module.log("train/gradient_norm", norm)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps or self.counts is None:
            return
        in_a_row = self.tell(trainer)
        if in_a_row >= self.most_in_a_row:
            raise InputError(self.diagnosis(trainer, module, in_a_row))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.counts is not None:
            self.tell(trainer)

    def tell(self, trainer: Trainer) -> int:
        """Logs how many updates were left out since it last did so. Returns the number of the last ones in a
        row.
        """
        total, in_a_row = (int(count) for count in self.counts.tolist())
        if total > self.told:
            log.warning(
                "%d updates up to step %d had gradients that are not finite and were left out",
                total, trainer.global_step,
            )  # fmt: skip
            self.told = total
        return in_a_row

    def diagnosis(self, trainer: Trainer, module: LightningModule, in_a_row: int) -> str:
        """The message with which training ends."""
        losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        bad = [name for name, value in losses.items() if value != value or abs(value) == float("inf")]
        bad = [name for name in bad if name != "train/gradient_norm"]
        what = f"of the losses {', '.join(bad)}" if bad else "while every loss is finite"
        return (
            f"training diverged before step {trainer.global_step}: {in_a_row} updates in a row had gradients "
            f"that are not finite, {what}; {self.layers(module)}; weights and earlier checkpoints are "
            "finite: lower model.optimizer.lr or set trainer.precision=32-true, then resume=auto"
        )

    def layers(self, module: LightningModule) -> str:
        """The first layers, in the model's order, whose gradients are not finite, and how many are not."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        found = []
        for place, norms in self.norms.items():
            pairs = zip(self.stepped[place], norms.isfinite().tolist(), strict=True)
            found += [names[id(parameter)] for parameter, is_finite in pairs if not is_finite]
        order = {name: i for i, name in enumerate(names.values())}
        found.sort(key=order.__getitem__)
        count = sum(len(norms) for norms in self.norms.values())
        return f"{len(found)} of {count} gradients are not finite, the first of {', '.join(found[:3])}"
