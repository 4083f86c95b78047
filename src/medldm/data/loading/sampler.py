"""Which items make up which batch, as a pure function of seed, epoch and rank, so that training can resume
anywhere.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

ItemRequest = tuple[int, int]  # (epoch, item): all that an item's randomness may depend on, beside the seed


class ResumableSampler(Sampler[list[ItemRequest]]):
    """A batch sampler: global batch k of an epoch is `order[k * W * B : (k + 1) * W * B]`, rank r takes its
    r-th part.

    `batch_size` B counts items a rank. In training (`drop_last`) the last incomplete global batch is dropped
    unless it is the only one. `weights` draw items with replacement in proportion. `len` is the full epoch
    also after `set_position`. Each full pass moves on to the next epoch; `set_epoch` (Lightning calls it)
    chooses another. With `equal_shares` every rank has equally many items, the first ones of an incomplete
    batch twice: without, each item is seen once, and ranks may have one batch less.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        *,
        drop_last: bool | None = None,
        equal_shares: bool = True,
        weights: Sequence[float] | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size={batch_size}, rank={rank}, world_size={world_size}: need 1 <= B, 0 <= r < W"
            )
        self.num_items, self.batch_size, self.seed, self.shuffle = num_items, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.drop_last = shuffle if drop_last is None else drop_last
        self.equal_shares = equal_shares
        self.weights = None if weights is None else np.asarray(weights, np.float64) / np.sum(weights)
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        full, rest = divmod(self.num_items, self.batch_size * self.world_size)
        return full if rest == 0 or (self.drop_last and full > 0) else full + 1

    @property
    def sampler(self) -> "ResumableSampler":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_position(self, epoch: int, batch: int) -> None:
        """Continue at batch `batch` of `epoch`: that many of its batches have been trained on."""
        self.epoch, self.start = (epoch, batch) if batch < len(self) else (epoch + 1, 0)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def order(self, epoch: int) -> np.ndarray:
        """The items of an epoch in order, the same on every rank."""
        if not self.shuffle:
            return np.arange(self.num_items)
        generator = np.random.default_rng((self.seed, epoch))
        if self.weights is not None:
            return generator.choice(self.num_items, self.num_items, p=self.weights)
        return generator.permutation(self.num_items)

    def __iter__(self) -> Iterator[list[ItemRequest]]:
        epoch, order = self.epoch, self.order(self.epoch)
        whole = self.batch_size * self.world_size
        for k in range(self.start, len(self)):
            part = order[k * whole : (k + 1) * whole]
            if self.equal_shares:
                part = np.resize(part, -(-len(part) // self.world_size) * self.world_size)
            share = np.array_split(part, self.world_size)[self.rank]
            if len(share):
                yield [(epoch, int(i)) for i in share]
        self.epoch, self.start = epoch + 1, 0
