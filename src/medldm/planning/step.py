"""One training step of any module, without data and without a trainer: on shapes alone, or for real."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medldm.build import build_module
from medldm.devices import (
    ASKS_ONEDNN,
    CHUNK_ELEMENTS,
    CODES_PER_BLOCK,
    TRUSTS_BF16_CONVOLUTIONS,
    in_channels_last,
    to_channels_last,
)
from medldm.errors import InputError
from medldm.losses import PerceptualLoss
from medldm.networks.compiling import wrap_blocks
from medldm.networks.medicalnet import MedicalNet
from medldm.planning.trace import AttentionAsOnCUDA, AutocastAsOnCUDA, Cost, StepTrace

ADAM_STATE = 8  # bytes a parameter: two moments in float32
LATE = 10**9  # an update at which every loss that starts late has started


@dataclass(frozen=True)
class Job:
    """A model's config with what the data would have told it."""

    model: Mapping[str, Any]
    facts: Mapping[str, Any]
    keys: Sequence[str]  # arrays of a batch
    image_shape: tuple[int, ...]
    first_stage: Mapping[str, Any] | None = None  # descriptions, as a checkpoint holds them
    map_stage: Mapping[str, Any] | None = None
    segmenter: Mapping[str, Any] | None = None

    def build(self) -> nn.Module:
        """The module with fresh weights, in training mode, its perceptual network with random ones."""
        module = build_module(self.model, self.facts, self.first_stage, self.map_stage).train()
        for part in module.modules():
            if isinstance(part, PerceptualLoss) and not part._built:
                part._built.append(untrained_features(part.network))
        if self.segmenter is not None:
            module.segmenter_loss.ask(build_module(self.segmenter["model"], self.facts))
        return attach(module)


class UntrainedLPIPS(nn.Module):
    """The network of LPIPS with weights of any kind: its work and its activations are what counts."""

    def __init__(self, net: str) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS

        self.network = _LPIPS(net=net, pnet_rand=True, eval_mode=True)

    def forward(self, generated: Tensor, reference: Tensor) -> Tensor:
        return self.network(*(x.float().expand(-1, 3, -1, -1) for x in (generated, reference))).flatten()


def untrained_features(name: str) -> nn.Module:
    kind, _, which = name.partition("_")
    if kind == "lpips":
        network: nn.Module = UntrainedLPIPS(which)
    elif kind == "medicalnet":
        network = MedicalNet(int(which))
    else:
        network = PerceptualLoss(name).build()
    return network.eval().requires_grad_(False)


def attach(module: nn.Module) -> nn.Module:
    """Put a stand-in for Lightning's trainer on the module: one process, late in training, every batch an
    update.
    """
    module._trainer = SimpleNamespace(
        world_size=1,
        global_step=LATE,
        global_rank=0,
        is_last_batch=True,
        current_epoch=0,
        max_steps=1,
        max_epochs=None,
        fit_loop=SimpleNamespace(total_batch_idx=0),
    )
    module.log = module.log_dict = lambda *args, **kwargs: None
    module.manual_backward = lambda loss: loss.backward()
    if not module.automatic_optimization:
        module.update_generator = lambda: drop_gradients(module.generator)
        module.update_discriminators = lambda: drop_gradients(module.discriminators)
        module.draw_slices = first_slices
    return module


def first_slices(x: Tensor, batch_idx: int) -> tuple[int, Tensor]:
    """What `draw_slices` gives, without random numbers that the host would have to know."""
    return 0, torch.zeros(len(x), dtype=torch.long, device=x.device)


def drop_gradients(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.zero_grad(set_to_none=True)


def train_step(module: nn.Module, batch: dict, update: Callable[[], None] | None = None) -> None:
    """Forward and backward of one batch, all losses on; `update` for modules that Lightning would step."""
    loss = module.training_step(batch, 0)
    if loss is not None:
        loss.backward()
        drop_gradients([module]) if update is None else update()


def random_batch(job: Job, module: nn.Module, batch_size: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of the job's keys, of any content: what a loader would put on the device."""
    facts, shape = job.facts, job.image_shape

    def draw(channels: int, size: Sequence[int]) -> Tensor:
        return torch.randn(batch_size, channels, *size, device=device)

    stage = module.first_stage
    batch: dict[str, Tensor] = {}
    for key in job.keys:
        if key in ("latent", "source_latent"):
            batch[key] = draw(stage.latent_channels, stage.latent_shape(shape))
        elif key == "mask":
            batch[key] = torch.zeros(batch_size, 1, *shape, dtype=torch.long, device=device)
        elif key == "edges":
            batch[key] = torch.zeros(batch_size, 1, *shape, device=device)
        else:
            batch[key] = draw(facts["image_channels"], shape)
    for key in ("label", "source_label", "view", "phase"):
        batch[key] = torch.zeros(batch_size, dtype=torch.long, device=device)
    return batch | {"slice_position": torch.zeros(batch_size, device=device)}


def outside(module: nn.Module) -> list[nn.Module]:
    """Frozen networks that a step runs and that are no part of the module's state."""
    networks = [net for part in module.modules() if isinstance(part, PerceptualLoss) for net in part._built]
    loss = getattr(module, "segmenter_loss", None)
    return [*networks, *([] if loss is None else [loss.segmenter])]


def state_bytes(module: nn.Module, *, averages: bool) -> int:
    """The bytes of weights, buffers and Adam's moments and, where `averages`, of the moving average of what
    it follows.
    """
    held = [*module.parameters(), *module.buffers()]
    trainable = num_trainable(module)
    followed = module.ema_modules if averages else None
    copies = sum(p.numel() * p.element_size() for p in followed.parameters()) if followed is not None else 0
    return sum(x.numel() * x.element_size() for x in held) + ADAM_STATE * trainable + copies


def num_trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the module's tensors by their shapes, those of frozen perceptual networks too."""
    losses = [part for part in module.modules() if isinstance(part, PerceptualLoss)]
    losses += [getattr(module, "segmenter_loss", None) or SimpleNamespace()]
    for loss in losses:
        loss.device = torch.device("cpu")  # shapes cannot be moved
    for root in (module, *outside(module)):
        for part in root.modules():
            for table in (part._parameters, part._buffers):
                for name, value in table.items():
                    if value is not None:
                        table[name] = mode.from_tensor(value)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """A context in which choices by the kind of device are those of a GPU, for tensors on the host that stand
    in for its own.
    """
    tables = (TRUSTS_BF16_CONVOLUTIONS, CHUNK_ELEMENTS, CODES_PER_BLOCK, ASKS_ONEDNN)
    before = [table["cpu"] for table in tables]
    for table in tables:
        table["cpu"] = table["cuda"]
    try:
        yield
    finally:
        for table, value in zip(tables, before, strict=True):
            table["cpu"] = value


class Traced(NamedTuple):
    """One step from shapes alone: its cost, the bytes of the batch, and the module, without values."""

    cost: Cost
    compiled: Cost  # with the networks' blocks compiled
    batch_bytes: int
    module: nn.Module


def traced_step(job: Job, batch_size: int, *, bf16: bool, on_cuda: bool, compiles: bool = False) -> Traced:
    """One training step of a batch, followed through its shapes. `on_cuda`: in the layout of memory that a
    GPU gets; `compiles`: with blocks called as they are when they are compiled.
    """
    module = job.build()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if on_cuda:
        to_channels_last(module)
    make_fake(module, mode)
    with ExitStack() as stack:
        stack.enter_context(mode)
        batch = random_batch(job, module, batch_size, torch.device("cpu"))
        if on_cuda:
            stack.enter_context(as_on_cuda())
            batch = in_channels_last(batch)
            stack.enter_context(AutocastAsOnCUDA())
            stack.enter_context(AttentionAsOnCUDA())
        trace = stack.enter_context(StepTrace())
        if compiles:
            wrap_blocks(module, trace.block)
        # compiled blocks round for themselves what the others keep in autocast's cache
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=not compiles):
            try:
                train_step(module, batch)
            except torch._subclasses.fake_tensor.DataDependentOutputException as error:
                raise InputError(f"plan: a step of this model looks at values: {error}") from error
    batch_bytes = sum(x.numel() * x.element_size() for x in batch.values())
    return Traced(trace.cost, trace.compiled, batch_bytes, module)
