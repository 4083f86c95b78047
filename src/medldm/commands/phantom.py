"""medldm phantom: write synthetic subjects in a dataset's own raw folder layout.

    medldm phantom dataset=mnms2 root=DIR num_subjects=8 seed=0 [image_size=256] [num_slices=[8,12]]
    medldm phantom dataset=brats root=DIR num_subjects=8 [size=[48,56,48]]

dataset       mnms2: cardiac short and long axis with masks and CINE, as M&Ms-2 is published;
              folder: 3D torso volumes with organ masks as images/ and masks/ (NIfTI);
              chestxray: chest X-rays in NORMAL/ and PNEUMONIA/; nih_cxr14: the same with the NIH's table;
              autopet: torso CT with organ maps; totalsegmentator_mri: the same as MR, one mask per organ;
              synthrad: pelvis, MR and CT; duke: breast MR;
              brats: brains in four modalities with a tumour; ixi: heads in T1, T2 and PD
root          folder to write to
num_subjects  how many subjects; seed decides which ones
image_size    typical matrix in pixels (null: 64 for folder, else 256)
num_slices    least and most slices of a stack (null: [8, 12] for mnms2, [40, 56] for folder)
size          voxels (x, y, z) of the 3D datasets (null: about 100 along each axis)

Then: medldm prepare data=mnms2 data.raw=DIR data.root=OUT
"""

import inspect

from omegaconf import DictConfig

from medldm.commands import clean_after_failure, run_command
from medldm.data.phantoms.brain import BRAIN_PHANTOMS
from medldm.data.phantoms.cardiac import PHANTOMS
from medldm.data.phantoms.chest import CHEST_PHANTOMS
from medldm.data.phantoms.torso import TORSO_PHANTOMS
from medldm.errors import InputError
from medldm.progress import progress

ALL_PHANTOMS = PHANTOMS | CHEST_PHANTOMS | TORSO_PHANTOMS | BRAIN_PHANTOMS


@clean_after_failure("root")
def task(cfg: DictConfig) -> None:
    if cfg.dataset not in ALL_PHANTOMS:
        known = ", ".join(ALL_PHANTOMS)
        raise InputError(f"dataset={cfg.dataset}: no phantom of that name; choose from {known}")
    write = ALL_PHANTOMS[cfg.dataset]
    sizes = {key: cfg[key] for key in ("image_size", "num_slices", "size") if cfg[key] is not None}
    unknown = sizes.keys() - inspect.signature(write).parameters.keys()
    if unknown:
        raise InputError(f"{min(unknown)}: the phantom {cfg.dataset} has no such option; leave it out")
    with progress("drawing subjects", cfg.num_subjects) as advance:
        write(
            cfg.root,
            num_subjects=cfg.num_subjects,
            seed=cfg.seed,
            progress=lambda: advance(1),
            **sizes,
        )
    print(cfg.root)


def main() -> None:
    run_command(task, "phantom")


if __name__ == "__main__":
    main()
