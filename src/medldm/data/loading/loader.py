"""The loader of batches: workers read compact arrays, which are expanded where they are used."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from medldm.batch import Batch
from medldm.data.loading.dataset import CaseDataset, as_is, expand, single_threaded_worker
from medldm.data.loading.sampler import ResumableSampler
from medldm.data.loading.settings import LoaderSettings
from medldm.devices import choose_settings


class CaseLoader(DataLoader):
    """A DataLoader that expands batches on their way out, unless Lightning does it after the transfer."""

    def __init__(self, dataset: CaseDataset, *, expand_here: bool, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.expand_here = expand_here

    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        return map(expand, batches) if self.expand_here else batches


def make_loader(
    dataset: CaseDataset, sampler: ResumableSampler, settings: LoaderSettings, *, seed: int, expand_here: bool
) -> CaseLoader:
    """The batches that `sampler` names, read by as many workers as the settings say."""
    workers = {}
    if settings.num_workers > 0:
        workers = {
            "persistent_workers": True,
            "multiprocessing_context": settings.worker_context,
            "worker_init_fn": single_threaded_worker,
        }
    return CaseLoader(
        dataset,
        expand_here=expand_here,
        batch_sampler=sampler,
        num_workers=settings.num_workers,
        collate_fn=as_is,
        pin_memory=choose_settings(pin_memory=settings.pin_memory).pin_memory,
        generator=torch.Generator().manual_seed(seed),  # else each pass draws from the global one
        **workers,
    )
