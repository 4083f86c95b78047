"""Inputs that nobody would write on purpose: valid files, indexes and overrides, changed at random by a seed.

`Fuzzer(folder, seed)` makes the valid ones once; `fuzzer.tries(kind)` yields functions that write one changed
input and give it to the code that reads such inputs. Each ends well, or in an InputError of one line.
"""

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import commandlines
import cv2
import h5py
import nibabel
import nrrd
import numpy as np
import strangers

from medldm.build import load_module
from medldm.data.datasets import folder as own_folder
from medldm.data.loading.datamodule import CaseDataModule
from medldm.data.preparation.recipe import make_recipe
from medldm.data.prepared import load_index
from medldm.data.raw.readers import files_of, read_image, read_mask
from medldm.data.records import read_images
from medldm.data.splits import read_splits
from medldm.errors import InputError
from medldm.schemas import Latents, Metrics, Provenance, read_checked
from medldm.values import check_values

USED = 0.3  # of the changed checkpoints, by a command

ODD_NUMBERS = (0, 1, -1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1e308, -1e308, float("nan"), float("inf"), 0.5, "",
    "x", "../../x", "/etc/passwd", "a/b", "\0", "${x}", "???", "nan", "1e999", [], [[]], [None], [1, 2, 3],
    {}, {"a": 1}, {"_target_": "os.system"}, "é" * 300, [0] * 1000,
)  # fmt: skip
ODD_WORDS = (
    "nan", "inf", "-inf", "-1", "0", "1", "2", "1e20", "1e-20", "1000000000", "0.5", "true", "false", "null",
    "maybe", "''", "[]", "[1]", "[-1,0]", "[a,b]", "{}", "{a:1}", "../x", "???", "99999999999999999999",
    "[[1]]", "-0.0",
)  # fmt: skip
TOKENS = (
    b"-1",
    b"0",
    b"nan",
    b"1e308",
    b"99999999999",
    b"",
    b'"',
    b"(",
    b"\0",
    b"\n",
    b"../x",
    b"%s",
    b":",
    b",,",
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four changes; most come near the beginning, where headers are."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            return bytes(rng.randbytes(8))
        place = rng.randrange(min(len(out), 400) if rng.random() < 0.7 else len(out))
        rng.choice(CHANGES)(out, place, rng)
    return bytes(out)


def flip(out: bytearray, place: int, rng: random.Random) -> None:
    out[place] ^= 1 << rng.randrange(8)


def overwrite(out: bytearray, place: int, rng: random.Random) -> None:
    number, form = rng.choice(ODD_NUMBERS), rng.choice(("<H", ">H", "<I", ">I", "<Q", "B"))
    size = struct.calcsize(form)
    out[place : place + size] = struct.pack(form, number % 2 ** (8 * size))


def cut(out: bytearray, place: int, rng: random.Random) -> None:
    del out[place:]


def remove(out: bytearray, place: int, rng: random.Random) -> None:
    del out[place : place + rng.randint(1, 40)]


def repeat(out: bytearray, place: int, rng: random.Random) -> None:
    part = bytes(out[place : place + rng.randint(1, 60)])
    out[place:place] = part * rng.randint(1, 5)


def noise(out: bytearray, place: int, rng: random.Random) -> None:
    out[place : place + 8] = rng.randbytes(8)


def token(out: bytearray, place: int, rng: random.Random) -> None:
    out[place : place + rng.randint(0, 6)] = rng.choice(TOKENS)


CHANGES = (flip, flip, overwrite, overwrite, cut, remove, repeat, noise, token)


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of plain data with one to three nodes replaced, removed or added."""
    out = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        holder, key = pick(out, rng)
        if holder is None:
            return rng.choice(ODD_VALUES)
        what = rng.random()
        if what < 0.2:
            del holder[key]
        elif what < 0.3 and isinstance(holder, dict):
            holder[rng.choice(("x", "_target_", "id", str(key) + "s"))] = rng.choice(ODD_VALUES)
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return out


def pick(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random (mapping or list, key) of a tree; (None, None) of one that holds nothing."""
    holder, key = None, None
    while isinstance(tree, dict | list) and tree:
        holder, key = tree, rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        tree = tree[key]
        if rng.random() < 0.3:
            break
    return holder, key


class Fuzzer:
    """Valid inputs in `folder`, and what to do with changed ones."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        prepared: Path,
        places: commandlines.Places | None = None,
        first: int = 0,
        order: int = 0,
    ) -> None:
        """`first`: the number of the first command line, in the order that belongs to `order`."""
        self.folder, self.rng, self.prepared = folder, random.Random(seed), prepared
        self.places, self.number, self.order = places, first - 1, order
        self.changed_checkpoints: strangers.Strangers | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {path.name: path.read_bytes() for path in write_samples(folder / "valid")}
        self.root = folder / "data"
        if not self.root.exists():
            shutil.copytree(prepared, self.root)
        self.index = json.loads((prepared / "index.json").read_text())
        self.splits = json.loads((prepared / "splits.json").read_text())

    def tries(self, kind: str) -> Iterator[Callable[[], object]]:
        """Without end."""
        while True:
            yield getattr(self, f"try_{kind}")()

    def changed(self, name: str) -> Path:
        path = self.folder / name
        path.write_bytes(mutate(self.files[name], self.rng))
        return path

    def try_readers(self) -> Callable[[], object]:
        name = self.rng.choice([name for name in self.files if name not in ("manifest.csv", "data.raw")])
        path = self.changed(name)
        reader = self.rng.choice((read_image, read_mask))
        spelling = f"{path}::image" if path.suffix == ".h5" else path
        return lambda: (files_of(spelling), reader(spelling))

    def try_folders(self) -> Callable[[], object]:
        name = self.rng.choice([name for name in self.files if name.endswith((".h5", ".nii.gz", ".png"))])
        path = self.changed(name)
        return lambda: list(read_images(path))

    def try_manifests(self) -> Callable[[], object]:
        root = self.folder / "raw"
        (root / "images").mkdir(parents=True, exist_ok=True)
        for name in ("a.png", "a.nii.gz"):
            (root / "images" / name).write_bytes(self.files[name])
        (root / "manifest.csv").write_bytes(mutate(self.files["manifest.csv"], self.rng))
        return lambda: own_folder.index(root)

    def try_indexes(self) -> Callable[[], object]:
        (self.root / "index.json").write_text(json.dumps(mutate_tree(self.index, self.rng)))
        (self.root / "splits.json").write_text(json.dumps(self.splits))
        return self.load_data

    def try_splits(self) -> Callable[[], object]:
        (self.root / "index.json").write_text(json.dumps(self.index))
        (self.root / "splits.json").write_text(json.dumps(mutate_tree(self.splits, self.rng)))
        return self.load_data

    def load_data(self) -> object:
        load_index(self.root)
        read_splits(self.root / "splits.json")
        module = CaseDataModule(
            self.root, keys=("image", "mask", "edges"), seed=0, batch_size=2, num_workers=0
        )
        module.setup()
        return module.facts, [dataset[0] for dataset in [module.dataset("all")] if len(dataset)]

    def try_texts(self) -> Callable[[], object]:
        """index.json, splits.json and others as bytes."""
        path = self.folder / "any.json"
        path.write_bytes(mutate(json.dumps(self.index)[:3000].encode(), self.rng))
        schema = self.rng.choice((Latents, Metrics, Provenance))
        return lambda: read_checked(path, schema, "make it again")

    def try_recipes(self) -> Callable[[], object]:
        """Values of data.preprocess, as overrides give them."""
        words = copy.deepcopy(self.index["preprocess"])
        dims, size = words.pop("spatial_dims"), words.pop("image_size")
        for _ in range(self.rng.randint(1, 2)):
            holder, key = pick(words, self.rng)
            if holder is not None:
                holder[key] = from_word(self.rng.choice(ODD_WORDS))

        def use() -> object:
            check_values({"data": {"preprocess": words}})
            return make_recipe(dims, size, words)

        return use

    def try_overrides(self) -> Callable[[], object]:
        """A command line with a bad value, all of them in turn; a training ends after its first step."""
        out = self.folder / "out"
        self.number += 1
        every = commandlines.cells(self.places, out, self.order)
        name, odd = every[self.number % len(every)]
        command, words = self.places.lines(out)[name]
        return lambda: commandlines.run_line(command, words, [odd], out)

    def try_records(self) -> Callable[[], object]:
        """JSON files that commands wrote, read by other commands."""
        changed = partial(mutate_tree, rng=self.rng)
        return commandlines.try_records(self.places, self.folder, self.rng, changed)

    def try_checkpoints(self) -> Callable[[], object]:
        """A changed checkpoint is loaded and, for some, used by a command."""
        path, source = self.strangers().for_loading()
        out = self.folder / "out"
        names = {
            self.places.stage: "encode",
            self.places.model: "sample",
            self.places.translator: "translate",
        }
        command, words = self.places.lines(out)[names[source]]
        is_used = self.rng.random() < USED
        words = [word.replace(f"checkpoint={source}", f"checkpoint={path}") for word in words]
        return lambda: commandlines.run_line(command, words, [], out) if is_used else load_module(path)

    def try_resumes(self) -> Callable[[], object]:
        """A training goes on from a checkpoint with another state, for a step."""
        path, source = self.strangers(resumed=True).for_resuming()
        out = self.folder / "out"
        name = "train vqvae" if source == self.places.stage else "train ldm"
        command, words = self.places.lines(out)[name]
        return lambda: commandlines.run_line(command, words, [f"resume={path}"], out)

    def strangers(self, resumed: bool = False) -> strangers.Strangers:
        if self.changed_checkpoints is None:
            sources = [self.places.stage, self.places.model]
            sources += [self.places.translator] if self.places.translator and not resumed else []
            self.changed_checkpoints = strangers.Strangers(self.folder, self.rng, sources, mutate)
        return self.changed_checkpoints


def from_word(word: str) -> Any:
    """What Hydra makes of a word."""
    from medldm.overrides import parsed

    return parsed(f"key={word}")


def outcome_of(one: Callable[[], object]) -> str:
    """worked, told (an InputError of one line) or the type of any other exception, with its place."""
    try:
        one()
    except InputError as error:
        return (
            "told" if "\n" not in str(error) and len(str(error)) < 5000 else f"told in several lines: {error}"
        )
    except Exception as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        code = frame.tb_frame.f_code
        return f"{type(error).__name__} in {Path(code.co_filename).name}:{frame.tb_lineno}: {str(error):.120}"
    return "worked"


def write_samples(folder: Path) -> list[Path]:
    """A small valid file of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 200, (8, 9, 10)).astype(np.int16)
    picture = rng.integers(0, 255, (24, 20), np.uint8)
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 2.0, 3.0, 1.0])), folder / name)
    np.save(folder / "a.npy", volume)
    header = {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": np.zeros(3)}
    nrrd.write(str(folder / "a.nrrd"), volume, header | {"encoding": "gzip"})
    nrrd.write(str(folder / "b.nrrd"), volume, header | {"encoding": "raw"})
    for suffix in (".png", ".jpg", ".bmp", ".tif"):
        cv2.imwrite(str(folder / f"a{suffix}"), picture)
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("image", data=volume[None], chunks=(1, 8, 9, 10), compression="gzip")
        file["images"] = volume.astype(np.float32)
        file.attrs["subject"] = "a"
    (folder / "a.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        b"CompressedData = False\n"
        b"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = 8 9 10\n"
        b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n" + volume.tobytes()
    )
    write_dicom(folder / "a.dcm", picture)
    rows = ("images/a.png,p0,ED,train,61", "images/a.nii.gz,p1,ES,test,44")
    (folder / "manifest.csv").write_text("image,subject,phase,split,age\n" + "\n".join(rows) + "\n")
    return sorted(folder.iterdir())


def write_dicom(path: Path, picture: np.ndarray) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["medldm"])
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.Rows, data.Columns = picture.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelSpacing, data.Modality = [1, 1], "DX"
    data.PixelData = picture.tobytes()
    data.save_as(path, enforce_file_format=True)
