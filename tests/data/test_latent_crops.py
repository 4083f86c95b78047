"""Cached latents are cropped with the maps that belong to them."""

import numpy as np
import pytest

from medldm.data.loading.augment import CenterCrop, RandomCrop
from medldm.errors import InputError

FACTORS = (2, 4, 4)


def item():
    """A map of place numbers, and latents that hold the number of the first voxel of each cell."""
    shape = (12, 16, 24)
    places = np.arange(np.prod(shape)).reshape(1, *shape)
    cells = places[(slice(None), *(slice(None, None, f) for f in FACTORS))]
    return {"mask": places, "latent": cells.astype(np.float32), "case_id": "a"}


@pytest.mark.parametrize("crop", [RandomCrop((4, 8, None)), CenterCrop((4, 8, 16))])
def test_a_box_of_the_map_and_its_latents_is_the_same_box(crop):
    starts = set()
    for seed in range(8):
        cut = crop(item(), np.random.default_rng(seed))
        sizes = cut["mask"].shape[1:]
        assert cut["latent"].shape[1:] == tuple(n // f for n, f in zip(sizes, FACTORS, strict=True))
        first = cut["mask"][(slice(None), *(slice(None, None, f) for f in FACTORS))]
        np.testing.assert_array_equal(cut["latent"], first)
        starts.add(int(cut["mask"].min()))
    assert len(starts) > 1 or isinstance(crop, CenterCrop)


def test_a_box_that_cuts_cells_is_refused():
    with pytest.raises(InputError, match=r"crop_size=\[4, 6, 24\].*multiples of \[2, 4, 4\]"):
        RandomCrop((4, 6, None))(item(), np.random.default_rng(0))


def test_latents_alone_are_cropped_by_what_their_cells_stand_for():
    whole = item()
    alone = {"latent": whole["latent"], "source_latent": whole["latent"] + 1}
    for seed in range(4):
        cut = RandomCrop((4, 8, None))(whole, np.random.default_rng(seed))
        same = RandomCrop((4, 8, None), FACTORS)(alone, np.random.default_rng(seed))
        np.testing.assert_array_equal(same["latent"], cut["latent"])
        np.testing.assert_array_equal(same["source_latent"], cut["latent"] + 1)
    with pytest.raises(InputError, match="do not tell their voxels"):
        RandomCrop((2, 2, 2))(alone, np.random.default_rng(0))
