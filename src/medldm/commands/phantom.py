"""medldm phantom: write synthetic subjects in a dataset's own raw folder layout.

    medldm phantom dataset=mnms2 root=DIR num_subjects=8 seed=0 [image_size=256] [num_slices=[8,12]]
    medldm phantom dataset=brats root=DIR num_subjects=8 [size=[48,56,48]]

dataset       mnms2: cardiac short and long axis with masks and CINE, as M&Ms-2 is published;
              folder: 3D torso volumes with organ masks as images/ and masks/ (NIfTI)
              chestxray: chest X-rays in NORMAL/ and PNEUMONIA/; nih_cxr14: the same with the NIH's table
              autopet: torso CT with organ maps; totalsegmentator_mri: the same as MR, a mask an organ
              synthrad: pelvis, MR and CT; duke: breast MR
              brats: brains in four modalities with a tumour; ixi: heads in T1, T2 and PD
root          folder to write to
num_subjects  how many; seed: which ones
image_size    typical matrix in pixels (null: 64 for folder, else 256)
num_slices    least and most slices of a stack (null: [8, 12] for mnms2, [40, 56] for folder)
size          voxels (x, y, z) of the 3D datasets (null: about 100 an axis)

Then: medldm prepare data=mnms2 data.raw=DIR data.root=OUT
"""

from typing import TYPE_CHECKING

from medldm.commands import run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def task(cfg: "DictConfig") -> None:
    import inspect

    from rich.progress import Progress

    from medldm.data.phantoms.brain import BRAIN_PHANTOMS
    from medldm.data.phantoms.cardiac import PHANTOMS
    from medldm.data.phantoms.chest import CHEST_PHANTOMS
    from medldm.data.phantoms.torso import TORSO_PHANTOMS
    from medldm.errors import InputError

    phantoms = PHANTOMS | CHEST_PHANTOMS | TORSO_PHANTOMS | BRAIN_PHANTOMS
    if cfg.dataset not in phantoms:
        raise InputError(f"dataset={cfg.dataset}: no phantom of that name; choose from {', '.join(phantoms)}")
    root, count = cfg.root, cfg.num_subjects
    sizes = {key: cfg[key] for key in ("image_size", "num_slices", "size") if cfg[key] is not None}
    unknown = sizes.keys() - inspect.signature(phantoms[cfg.dataset]).parameters.keys()
    if unknown:
        raise InputError(f"{min(unknown)}: the phantom {cfg.dataset} has no such option; leave it out")
    with Progress() as progress:
        bar = progress.add_task("Drawing subjects", total=count)
        phantoms[cfg.dataset](
            root, num_subjects=count, seed=cfg.seed, progress=lambda: progress.advance(bar), **sizes
        )
    print(root)


def main() -> None:
    run_command(task, "phantom", __doc__)


if __name__ == "__main__":
    main()
