"""MS-SSIM over random pairs reads an image once, as long as few enough values are kept."""

import numpy as np
import pytest
import torch

from medldm.evaluation import diversity
from medldm.evaluation.stored import StoredImage
from medldm.metrics.image import to_unit


class Counting:
    def __init__(self, num: int) -> None:
        rng = np.random.default_rng(0)
        self.arrays = rng.uniform(-1, 1, (num, 1, 32, 32)).astype(np.float32)
        self.count = np.zeros(num, int)

    def image(self, i: int) -> StoredImage:
        def read() -> np.ndarray:
            self.count[i] += 1
            return self.arrays[i]

        return StoredImage((1, 32, 32), read)


@pytest.mark.parametrize(("kept", "most_reads"), [(2**26, 1), (2 * 1024, 6)])
def test_an_image_is_kept_while_there_is_room(monkeypatch, kept, most_reads):
    monkeypatch.setattr(diversity, "VALUES_KEPT", kept)
    counting = Counting(4)
    images = [counting.image(i) for i in range(4)]
    chosen = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    read = diversity.reader(images, chosen)
    for i, j in chosen:
        for k in (i, j):
            assert torch.equal(read(k)[0], to_unit(torch.from_numpy(counting.arrays[k])))
    assert counting.count.max() <= most_reads
    assert (counting.count.sum() > 4) == (kept < 2**26)
