"""A bound on the memory that building a model may take, whatever sizes the config of a checkpoint names."""

import os

from torch.utils._python_dispatch import TorchDispatchMode

from medldm.errors import InputError

LARGEST_COUNT = 100_000  # tensors made while a model is built


def memory_of_machine() -> int:
    """The memory of this machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Allowance(TorchDispatchMode):
    """A context in which at most LARGEST_COUNT tensors are made, of at most `num_bytes` together: InputError
    before the one that is too much is allocated.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes, self.bytes_left, self.count_left = num_bytes, num_bytes, LARGEST_COUNT

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in {argument.name for argument in func._schema.arguments} and not types:
            like = func(*args, **(kwargs | {"device": "meta"}))
            self.bytes_left -= like.numel() * like.element_size()
            self.count_left -= 1
            if self.bytes_left < 0 or self.count_left < 0:
                limit = f"{self.num_bytes / 2**30:.3g} GiB in {LARGEST_COUNT} tensors"
                raise InputError(f"the config asks for a model larger than its weights can be: {limit}")
        return func(*args, **kwargs)
