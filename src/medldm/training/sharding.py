"""Networks that one device does not hold: weights, gradients and moments divided over processes (FSDP2)."""

from collections.abc import Mapping
from typing import Any

from lightning_fabric.utilities.optimizer import _optimizers_to_device
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from medldm.callbacks import Pictures, PowerAverages
from medldm.errors import InputError
from medldm.models.common import TrainedModule
from medldm.networks.compiling import outermost_blocks
from medldm.ranks import like, rank, whole

FSDP = "fsdp"  # of trainer.strategy
STEPS = ("training_step", "validation_step")  # in which the parts are put together


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy of FSDP2 with one axis, over all processes. Checkpoints are those of any other
    strategy, in one file, so that a run can go on with another number of processes, or with one.

    Weights are restored before they are divided, optimisers after it.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        divide(self.lightning_module, self.device_mesh["data_parallel"])
        self.model_to_device()
        self.barrier()
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        if is_fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if is_fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state | {"state": gathered(state["state"])}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its parts of what the checkpoint holds whole."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            parameters = dict(zip(numbers, own, strict=True))
            divided = {
                number: {
                    name: like(value, parameters[number]) if name != "step" else value
                    for name, value in entries.items()
                }
                for number, entries in state["state"].items()
            }
            optimizer.load_state_dict({"param_groups": state["param_groups"], "state": divided})


def divide(module: TrainedModule, mesh: DeviceMesh) -> None:
    """Divide each block of the networks, and then what is left, over the processes. Frozen parts, such as a
    first stage, stay whole: methods of theirs are called that FSDP does not see.
    """
    frozen = {p for p in module.parameters() if not p.requires_grad}
    for block in outermost_blocks(module):
        if any(p.requires_grad for p in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    for step in STEPS:
        register_fsdp_forward_method(module, step)


def gathered(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The values with their tensors whole and on the host; nothing but the names on all ranks but the first.
    Every rank has to call this.
    """
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = gathered(value)
        elif isinstance(value, Tensor):
            value = whole(value).detach()
            value = value.cpu() if rank() == 0 else None
        found[name] = value
    return found


def check_sharded(module: nn.Module, callbacks: list[Callback], num_ranks: int) -> None:
    """InputError for what cannot be trained in parts."""
    key = f"trainer.strategy={FSDP}"
    if num_ranks == 1:
        raise InputError(f"{key}: the run is one process, which holds everything; take trainer.strategy=auto")
    if not module.automatic_optimization:
        raise InputError(
            f"{key}: this model (stage one, translation) steps its optimisers by itself, which goes with "
            "trainer.strategy=auto alone"
        )
    if any(isinstance(part, _BatchNorm) for part in module.modules()):
        raise InputError(f"{key}: the model has batch norms, which do not go with it; take auto")
    for kind, name in ((Pictures, "pictures"), (PowerAverages, "post_hoc_ema")):
        if any(isinstance(callback, kind) for callback in callbacks):
            raise InputError(f"{key}: no process holds the whole network; set callbacks.{name}=null")


def check_layout(channels_last: Any, compiles: Any) -> None:
    """InputError for a layout or a compilation that was asked for and does not go with parts."""
    for key, value in (("channels_last", channels_last), ("compile", compiles)):
        if value is True:
            raise InputError(f"{key}=true: does not go with trainer.strategy={FSDP}; set it to auto")
