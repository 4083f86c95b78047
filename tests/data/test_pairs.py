"""Ordered pairs of modalities: what an item holds, who meets whom, and that nothing depends on workers."""

import json

import h5py
import numpy as np
import pytest
import torch

from medldm.data import build_datamodule
from medldm.data.case import Case
from medldm.data.loading.dataset import case_items
from medldm.data.loading.pairs import PairDataset, pair_items
from medldm.data.preparation.jobs import make_jobs, make_tables
from medldm.data.preparation.recipe import make_recipe
from medldm.errors import InputError
from medldm.evaluation.translation import split_name
from tests.data.conftest import settings

MODALITIES = ["t1", "t1ce", "t2", "flair"]
KEYS = ("image", "source", "mask")


def value_of(subject: int, label: int) -> float:
    return (subject * 4 + label) / 64 - 0.5


@pytest.fixture(scope="module")
def brains(tmp_path_factory):
    """Eight subjects, four modalities each (the last lacks one), whose voxels tell whose they are."""
    root = tmp_path_factory.mktemp("brains")
    (root / "cases").mkdir()
    (root / "latents" / "vq").mkdir(parents=True)
    (root / "latents" / "vq" / "latents.json").write_text(
        json.dumps({"checkpoint_sha256": "x", "downsampling": [2, 2, 2]})
    )
    cases = []
    for subject in range(8):
        for label, name in enumerate(MODALITIES):
            if (subject, name) == (7, "t2"):
                continue
            case = f"s{subject}_{name}"
            image = np.full((1, 6, 6, 6), value_of(subject, label), np.float16)
            image[:, 0], image[:, :, 0] = -0.9, -0.8  # so that flips and crops show
            with h5py.File(root / "cases" / f"{case}.h5", "w") as file:
                file["image"], file["mask"] = image, np.full((1, 6, 6, 6), label, np.uint8)
            with h5py.File(root / "latents" / "vq" / f"{case}.h5", "w") as file:
                file["latents"] = np.full((1, 2, 3, 3, 3), value_of(subject, label), np.float16)
            cases.append(
                {
                    "id": case, "subject": f"s{subject}", "file": f"cases/{case}.h5", "label": label,
                    "affine": np.eye(4).tolist(), "spacing": [1, 1, 1], "shape": [6, 6, 6],
                }
            )  # fmt: skip
    index = {
        "schema_version": 1, "dataset": "brats", "spatial_dims": 3, "num_classes": 4, "image_channels": 1,
        "label_values": MODALITIES, "image_size": [6, 6, 6], "cases": cases,
    }  # fmt: skip
    (root / "index.json").write_text(json.dumps(index))
    return root


def build(root, keys=KEYS, **settings):
    data = {"root": root, "batch_size": 3, "pairs": "random", **settings}
    return build_datamodule(data, keys=keys, seed=settings.pop("seed", 0))


def subject_and_label(x: torch.Tensor) -> list[tuple[int, int]]:
    codes = ((x[:, 0, -1, -1, -1] + 0.5) * 64).round().int().tolist()
    return [(code // 4, code % 4) for code in codes]


def check_batch(batch) -> None:
    names = [case.split("_") for case in batch["case_id"]]
    targets, sources = subject_and_label(batch["image"]), subject_and_label(batch["source"])
    for name, target, source in zip(names, targets, sources, strict=True):
        assert name == [f"s{target[0]}", MODALITIES[source[1]], "to", MODALITIES[target[1]]]
        assert target[0] == source[0] and target[1] != source[1]
    assert batch["label"].tolist() == [label for _, label in targets]
    assert batch["source_label"].tolist() == [label for _, label in sources]
    assert (batch["mask"].flatten(1).amax(1) == batch["label"]).all()
    assert batch["source"].dtype == batch["image"].dtype == torch.float32


def test_a_batch_holds_source_and_target_of_one_subject(brains):
    for batch in build(brains).train_dataloader():
        check_batch(batch)


def test_training_draws_one_pair_a_subject_and_all_twelve_in_time(brains):
    module = build(brains, batch_size=1)
    loader, seen = module.train_dataloader(), set()
    subjects = module.subjects["train"]
    for _ in range(40):
        names = [batch["case_id"][0].split("_") for batch in loader]
        assert sorted(name[0] for name in names) == sorted(subjects)
        seen |= {(name[1], name[3]) for name in names}
    assert len(seen) == 12


def test_evaluation_sees_every_ordered_pair_once_and_a_missing_modality_costs_its_own(brains):
    module = build(brains)
    ids = [name for batch in module.loader(module.dataset("all")) for name in batch["case_id"]]
    assert len(ids) == len(set(ids)) == 7 * 12 + 6
    assert not any(name.startswith("s7") and "t2" in name.split("_") for name in ids)


def test_pairs_do_not_depend_on_workers_memory_or_resuming(brains):
    settings = {"flip_axes": [0, 1, 2], "crop_size": 5}
    here = list(build(brains, **settings).train_dataloader())
    for other in ({"num_workers": 1, "worker_context": "fork"}, {"cache": "ram"}):
        there = list(build(brains, **settings, **other).train_dataloader())
        for a, b in zip(here, there, strict=True):
            assert a["case_id"] == b["case_id"]
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["source"], b["source"])
    resumed = build(brains, **settings)
    resumed.load_state_dict({"epoch": 0, "batch": 1})
    assert [b["case_id"] for b in resumed.train_dataloader()] == [b["case_id"] for b in here[1:]]


def test_source_and_target_are_cropped_and_flipped_alike(brains):
    settings = {"flip_axes": [0, 1], "crop_size": 5, "batch_size": 1}
    loader = build(brains, **settings).train_dataloader()
    marks = set()
    for batch in (batch for _ in range(10) for batch in loader):
        places = [(batch[key] < -0.7) for key in ("image", "source")]
        assert torch.equal(*places)
        marks.add(places[0].sum().item() * 1000 + places[0][0, 0, :, :, 2].nonzero().sum().item())
    assert len(marks) > 3


def test_flips_come_as_often_as_asked(brains):
    loader = build(brains, flip_axes=[0], flip_prob=0.1, batch_size=1).train_dataloader()
    flipped = [
        bool(b["image"][0, 0, -1, -1, -1] < -0.85) for _ in range(60) for b in loader
    ]  # fmt: skip
    assert 0.05 < np.mean(flipped) < 0.16


def test_cached_latents_come_in_pairs_too(brains):
    module = build(brains, keys=("latent", "source_latent"), latents="vq")
    batch = next(iter(module.train_dataloader()))
    assert batch["latent"].shape == batch["source_latent"].shape == (3, 2, 3, 3, 3)
    check_batch({**batch, "image": batch["latent"], "source": batch["source_latent"],
                 "mask": batch["label"].view(-1, 1)})  # fmt: skip
    window = build(brains, keys=("latent", "source_latent"), latents="vq", crop_size=[4, None, 2])
    assert next(iter(window.train_dataloader()))["source_latent"].shape == (3, 2, 2, 3, 1)
    held = build(brains, keys=("latent", "source_latent"), latents="vq", cache="ram")
    assert torch.equal(next(iter(held.train_dataloader()))["source_latent"], batch["source_latent"])


def test_chosen_pairs_alone(brains):
    module = build(brains, pair_labels=[["t1", "t2"]])
    ids = [name for batch in module.loader(module.dataset("all")) for name in batch["case_id"]]
    assert len(ids) == 7 and all(name.endswith("_t1_to_t2") for name in ids)


def test_without_pairs_the_same_folder_gives_single_volumes(brains):
    module = build(brains, keys=("image",), pairs=None)
    assert len(module.items("all")) == 31 and "source" not in module.dataset("all")[0]


def test_no_subject_stands_on_both_sides_of_a_split(brains):
    module = build(brains, keys=("image",))
    sides = [
        {module.index["cases"][item.case]["subject"] for item in module.items(subset)}
        for subset in ("train", "val", "test")
    ]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_modalities_are_numbered_in_the_order_of_the_config():
    from medldm.data.case import Case

    cases = [Case(name, "s", {}, {"label": name}) for name in sorted(MODALITIES)]
    assert make_tables(cases, MODALITIES).labels == MODALITIES
    assert make_tables(cases[:2], MODALITIES).labels == MODALITIES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": "some"}, "data.pairs=some"),
        ({"pairs": None}, "translates one image"),
        ({"pair_labels": [["t1", "pd"]]}, "pd"),
        ({"pair_labels": [["t1", "t1"]]}, "leaves no pair"),
    ],
)
def test_wrong_pairs_are_input_errors(brains, settings, message):
    with pytest.raises(InputError, match=message):
        build(brains, **settings)


def test_visits_of_a_subject_make_pairs_of_their_own_and_names_that_lead_back(tmp_path):
    names = [f"BraTS-GLI-00000-{visit}_{label}" for visit in ("000", "001") for label in ("t1", "t2")]
    cases = [
        {
            "id": name, "subject": "BraTS-GLI-00000", "label": i % 2, "affine": np.eye(4).tolist(),
            "shape": [6, 6, 6], "spacing": [1, 1, 1], "file": f"{name}.h5",
            "attributes": {"visit": name[16:19], "label": name[-2:]},
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    index = {"spatial_dims": 3, "label_values": ["t1", "t2"], "cases": cases}
    groups = pair_items(index, [item for i in range(4) for item in case_items(index, i)], None)
    visits = [
        {cases[item.case]["attributes"]["visit"] for pair in group for item in pair} for group in groups
    ]
    assert visits == [{"000"}, {"001"}]
    pairs = PairDataset(tmp_path, index, groups, keys=["source"])
    name = pairs.pair_id(groups[1][0])
    assert name == "BraTS-GLI-00000-001_t1_to_t2"
    parts = split_name(name, tmp_path, {case["id"]: case for case in cases})
    assert parts == ("BraTS-GLI-00000", "t1", "t2", "BraTS-GLI-00000-001_t2")


def test_slices_of_two_visits_are_two_files(tmp_path):
    cases = [
        Case(f"{n}{k}", "p0", {"image": f"{n}{k}.png"}, {"visit": str(k), "label": n})
        for n in "ab"
        for k in (1, 2)
    ]
    new = {"command": "", "earlier": {}}
    jobs = make_jobs(cases, tmp_path, "folder", make_recipe(2, 32, settings()["preprocess"]), **new)
    assert [(job.id, job.subject, len(job.cases)) for job in jobs] == [("p0_1", "p0", 2), ("p0_2", "p0", 2)]
    plain = [Case(c.id, c.subject, c.paths, {"label": c.attributes["label"]}) for c in cases]
    (job,) = make_jobs(plain, tmp_path, "folder", make_recipe(2, 32, settings()["preprocess"]), **new)
    assert job.id == "p0"
