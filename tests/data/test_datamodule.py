import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import pytest
import torch

from medldm.callbacks import LatentStatistics
from medldm.data import build_datamodule
from medldm.data.loading.dataset import expand
from medldm.data.loading.sampler import ResumableSampler
from medldm.data.preparation.edges import EdgeRecipe, detect_edges, label_contours
from medldm.data.preparation.prepare import prepare_dataset
from medldm.errors import InputError
from tests.data.conftest import MNMS2_LABELS, settings
from tests.training import VQVAE, run_training

KEYS = ("image", "mask", "edges")


def build(root, keys=KEYS, seed=0, **settings):
    return build_datamodule({"root": str(root), "batch_size": 3, **settings}, keys=keys, seed=seed)


def same(a, b) -> bool:
    """Whether two batches hold the same; a slice without a stack has NaN for its position in both."""
    return a.keys() == b.keys() and all(
        torch.equal(a[key].nan_to_num(-1), b[key].nan_to_num(-1))
        if isinstance(a[key], torch.Tensor)
        else a[key] == b[key]
        for key in a
    )


# ---- sampler ----


def test_sampler_continues_at_any_position():
    whole = ResumableSampler(23, 4, seed=5)
    epochs = [list(whole) for _ in range(3)]
    assert len(whole) == 5 and epochs[0] != epochs[1]
    resumed = ResumableSampler(23, 4, seed=5)
    resumed.set_position(1, 3)
    assert len(resumed) == 5 and list(resumed) == epochs[1][3:] and list(resumed) == epochs[2]
    resumed.set_position(0, 5)
    assert list(resumed) == epochs[1]


def test_set_epoch_keeps_a_position_within_that_epoch():
    sampler = ResumableSampler(23, 4, seed=5)
    sampler.set_position(2, 1)
    sampler.set_epoch(2)
    assert len(list(sampler)) == 4
    sampler.set_epoch(7)
    assert len(list(sampler)) == 5


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_items", [1, 5, 24, 27])
def test_ranks_side_by_side_are_the_single_process_batch(shuffle, num_items):
    single = list(ResumableSampler(num_items, 6, 1, shuffle))
    ranks = [list(ResumableSampler(num_items, 3, 1, shuffle, rank, 2)) for rank in range(2)]
    assert len(single) == len(ranks[0]) == len(ranks[1])
    for batch, first, second in zip(single, *ranks, strict=True):
        assert len(first) == len(second)
        assert (first + second)[: len(batch)] == batch


def test_training_drops_the_last_incomplete_batch_unless_it_is_the_only_one():
    assert [len(b) for b in ResumableSampler(10, 4)] == [4, 4]
    assert [len(b) for b in ResumableSampler(3, 4)] == [3]
    assert [len(b) for b in ResumableSampler(10, 4, shuffle=False)] == [4, 4, 2]


# ---- batches ----


def test_batch_has_the_agreed_keys_and_dtypes(mnms2):
    batch = next(iter(build(mnms2).train_dataloader()))
    assert batch["image"].shape == batch["mask"].shape == batch["edges"].shape == (3, 1, 64, 64)
    assert (batch["image"].dtype, batch["mask"].dtype, batch["edges"].dtype) == (
        torch.float32,
        torch.int64,
        torch.float32,
    )
    assert batch["image"].abs().max() <= 1 and set(batch["edges"].unique().tolist()) <= {0.0, 1.0}
    assert all(batch[key].dtype == torch.int64 for key in ("view", "phase", "label"))
    assert ((batch["slice_position"] >= 0) & (batch["slice_position"] <= 1)).all()


def test_values_equal_what_h5py_reads(mnms2):
    module = build(mnms2)
    for i, item in enumerate(module.items("all")):
        batch = module.dataset("all")[i]
        with h5py.File(mnms2 / module.index["cases"][item.case]["file"]) as file:
            assert np.array_equal(batch["image"][0, 0].numpy(), file["images"][item.row].astype(np.float32))
            assert np.array_equal(batch["mask"][0, 0].numpy(), file["semantic_maps"][item.row])
            assert batch["view"].item() == file["view"][item.row]


@pytest.mark.parametrize(
    "settings",
    [
        {"worker_context": "fork", "num_workers": 2},
        {"worker_context": "spawn", "num_workers": 1, "cache": "ram"},
    ],
)
def test_workers_give_what_the_main_process_gives(mnms2, settings):
    augment = {"flip_axes": [1], "edge_degrade": {"level": [0.2, 0.9]}, "crop_size": 48}
    here = list(build(mnms2, **augment).train_dataloader())
    loader = build(mnms2, **augment, **settings).train_dataloader()
    there = list(loader)
    assert len(here) == len(there) > 1 and all(same(a, b) for a, b in zip(here, there, strict=True))


def test_batches_after_resuming_equal_the_uninterrupted_ones(mnms2):
    settings = {"flip_axes": [0, 1], "edge_degrade": {}, "crop_size": [40, 32]}
    loader = build(mnms2, **settings).train_dataloader()
    whole = [list(loader) for _ in range(2)]
    assert not same(whole[0][0], whole[1][0])
    resumed = build(mnms2, **settings)
    resumed.load_state_dict({"epoch": 1, "batch": 2})
    assert resumed.state_dict() == {"epoch": 1, "batch": 2}
    rest = list(resumed.train_dataloader())
    assert len(rest) == len(whole[1]) - 2
    assert all(same(a, b) for a, b in zip(rest, whole[1][2:], strict=True))


def test_other_seed_gives_other_batches(mnms2):
    first, second = (next(iter(build(mnms2, seed=seed).train_dataloader())) for seed in (0, 1))
    assert first["case_id"] != second["case_id"]


def test_evaluation_visits_every_item_once_in_order(mnms2):
    module = build(mnms2)
    ids = sum((batch["case_id"] for batch in module.test_dataloader()), [])
    assert ids == sorted(ids) and len(ids) == len(set(ids)) == len(module.items("test"))


def test_views_filter_and_balance(mnms2):
    module = build(mnms2, views=["SA"])
    assert {item.view for item in module.items("all")} == {0}
    balanced = build(mnms2, balance_views=True, batch_size=1)
    loader = balanced.train_dataloader()
    views = torch.cat([batch["view"] for _ in range(30) for batch in loader]).float()
    assert abs(views.mean() - 0.5) < 0.12


def test_stage_two_on_latents_opens_no_image(mnms2, tmp_path, monkeypatch):
    root = Path(shutil.copytree(mnms2, tmp_path / "root"))
    folder = root / "latents" / "vq"
    folder.mkdir(parents=True)
    index = json.loads((root / "index.json").read_text())
    for case in index["cases"]:
        with h5py.File(folder / f"{case['id']}.h5", "w") as file:
            rows = np.arange(case["num_slices"], dtype=np.float16).reshape(-1, 1, 1, 1)
            file["latents"] = np.broadcast_to(rows, (case["num_slices"], 3, 8, 8))
    images = {case["id"]: case["content"]["image"] for case in index["cases"]}
    facts = {"checkpoint_sha256": "x", "shape": [3, 8, 8], "cases": images}
    (folder / "latents.json").write_text(json.dumps(facts))
    module = build(root, keys=("latent", "mask"), latents="vq")
    batch = next(iter(module.train_dataloader()))
    assert batch["latent"].shape == (3, 3, 8, 8) and batch["latent"].dtype == torch.float32
    assert torch.equal(batch["latent"][:, 0, 0, 0].long(), batch["row"])
    assert "image" not in batch and module.latent_facts["shape"] == [3, 8, 8]
    with pytest.raises(InputError, match="cannot be flipped"):
        build(root, keys=("latent",), latents="vq", flip_axes=[1])
    with pytest.raises(InputError, match="medldm encode"):
        build(root, keys=("latent",), latents="other")


def test_degraded_edges_reach_the_batch_with_their_level(mnms2):
    module = build(mnms2, edge_degrade={"level": [0.5, 0.5]})
    batch = next(iter(module.train_dataloader()))
    assert (batch["edge_level"] == 0.5).all()
    plain, rough = (module.dataset("test", edge_level=level)[2] for level in (0.0, 1.0))
    assert torch.equal(plain["edges"], module.dataset("test")[2]["edges"])
    assert not torch.equal(plain["edges"], rough["edges"])
    contours = module.dataset("test", edge_level="contours")[2]
    assert np.array_equal(contours["edges"][0, 0], label_contours(contours["mask"][0, 0].numpy()))


@pytest.mark.parametrize("level", [1.5, -0.1, "none"])
def test_an_edge_level_out_of_range_is_an_input_error(mnms2, level):
    with pytest.raises(InputError, match=f"edge_level={level}: give a number"):
        build(mnms2).dataset("test", edge_level=level)
    with pytest.raises(InputError, match="reads no class maps"):
        build(mnms2, keys=("edges",)).dataset("test", edge_level="contours")
    with pytest.raises(InputError, match="reads no edges"):
        build(mnms2, keys=("mask",)).dataset("test", edge_level=0.5)


def test_stored_edge_levels_serve_where_no_image_is_read(raw_mnms2, tmp_path):
    levels = [{"blur": 1.0}, {"blur": 2.5, "min_length": 10}]
    common = settings(labels=MNMS2_LABELS)
    common["preprocess"]["edges"] |= {"levels": levels}
    root = prepare_dataset(dataset="mnms2", raw=raw_mnms2, root=tmp_path, **common)
    index = json.loads((root / "index.json").read_text())
    assert index["num_edge_levels"] == 2
    with h5py.File(root / index["cases"][0]["file"]) as file:
        assert json.loads(file["edges_levels"].attrs["parameters"]) == levels
        first = file["images"][0].astype(np.float32)
        stored = detect_edges(cv2.GaussianBlur(first, (0, 0), 2.5), EdgeRecipe(min_length=10))
        assert (file["edges_levels"][0, 1] != stored).mean() < 0.01  # of half floats here
    only = {"redetect_prob": 1.0, "full_drop_prob": 0.0, "contours_only_prob": 0.0, "level": [1, 1]}
    for cache in ("none", "ram"):
        module = build(root, keys=("edges", "mask"), edge_degrade=only, cache=cache)
        dataset = module.dataset("train", augment=True)
        without = build(root, keys=("edges", "mask"), edge_degrade=only | {"redetect_prob": 0.0})
        batch = dataset.__getitems__([(0, 0), (0, 1)])
        assert "edges_levels" not in batch and batch["edges"].shape == (2, 1, 64, 64)
        plain = without.dataset("train", augment=True).__getitems__([(0, 0), (0, 1)])
        assert not torch.equal(batch["edges"], plain["edges"])
    assert dataset.read("edges_levels", dataset.items[0]).shape == (2, 64, 64)
    assert build(root, edge_degrade=only).dataset("train", augment=True).stored_keys == KEYS


def test_a_batch_s_edges_are_detected_by_the_recipe_of_their_view(mnms2):
    """A view whose detector finds nothing gets nothing when its edges are detected again."""
    only = {"redetect_prob": 1.0, "full_drop_prob": 0.0, "contours_only_prob": 0.0, "level": [0.1, 0.1]}
    module = build(mnms2, edge_degrade=only | {"num_strokes": 0.0})
    module.setup()
    recipe = {**module.index["preprocess"]["edges"], "per_view": {"LA": {"dark_threshold": 255}}}
    module.index["preprocess"] = {**module.index["preprocess"], "edges": recipe}
    dataset = module.dataset("train", augment=True)
    seen = set()
    for seed in range(8):  # detected again at one time in ten
        dataset.seed = seed
        batch = dataset.__getitems__([(0, i) for i in range(len(dataset))])
        for i, name in enumerate(module.index["view_names"][v] for v in batch["view"].tolist()):
            draw = np.random.default_rng((seed, 0, i))
            draw.uniform(0.1, 0.1)
            is_again = [draw.random() for _ in range(3)][-1] < 0.1
            if is_again:
                assert bool(batch["edges"][i].any()) == (name == "SA"), (seed, i, name)
                seen.add(name)
    assert seen == {"SA", "LA"}


def test_edges_cannot_be_detected_again_where_no_image_and_no_level_is_read(mnms2, caplog):
    module = build(mnms2, keys=("edges", "mask"), edge_degrade={"level": [0, 1]})
    with pytest.raises(InputError, match="data.edge_degrade.*edges.levels.*redetect_prob=0"):
        module.dataset("train", augment=True)
    module.dataset("test", edge_level=0.5)
    assert "none are detected again" in caplog.text
    without = {"level": [0, 1], "redetect_prob": 0.0}
    build(mnms2, keys=("edges", "mask"), edge_degrade=without).dataset("train", augment=True)


def test_compact_batches_expand_once(mnms2):
    compact = build(mnms2).dataset("train").__getitems__([(0, 0), (0, 1)])
    assert compact["image"].dtype == torch.float16 and compact["mask"].dtype == torch.uint8
    assert same(expand(compact), expand(expand(compact)))


# ---- 3D ----


def test_volumes_are_cropped_at_random_in_training_and_centrally_in_validation(volumes):
    module = build(volumes, keys=("image", "mask"), batch_size=2, spatial_dims=3, crop_size=16)
    train, again = (next(iter(module.train_dataloader())) for _ in range(2))
    assert train["image"].shape == train["mask"].shape == (2, 1, 16, 16, 16) and same(train, again)
    assert train["affine"].shape == (2, 4, 4) and train["affine"].dtype == torch.float64
    assert train["spacing"].shape == (2, 3)
    (validation,) = list(module.val_dataloader())
    whole = next(iter(module.loader(module.dataset("all"), batch_size=1)))
    assert validation["image"].shape[2:] == (16, 16, 16) and whole["image"].shape[2] >= 16


def test_statistics_of_latents_are_of_the_windows_that_training_sees(volumes):
    module = build(volumes, keys=("image",), batch_size=1, crop_size=[16, 16, 8])
    seen = []

    def fit(batches):
        seen.extend(tuple(batch["image"].shape[2:]) for batch in batches)

    stage = SimpleNamespace(shift=torch.zeros(1), scale=torch.ones(1))
    model = SimpleNamespace(needs_latent_statistics=True, fit_first_stage=fit, first_stage=stage)
    LatentStatistics(module).on_fit_start(SimpleNamespace(is_global_zero=True), model)
    assert set(seen) == {(16, 16, 8)}


def test_volumes_of_unequal_shape_ask_for_a_crop(volumes, tmp_path):
    root = Path(shutil.copytree(volumes, tmp_path / "root"))
    index = json.loads((root / "index.json").read_text())
    path = root / index["cases"][0]["file"]
    with h5py.File(path, "a") as file:
        image = file["image"][..., :8]
        del file["image"]
        file["image"] = image
    index["cases"][0] |= {"file_size": path.stat().st_size, "content": None}
    (root / "index.json").write_text(json.dumps(index))
    module = build(root, keys=("image",), batch_size=4)
    with pytest.raises(InputError, match="data.crop_size"):
        list(module.loader(module.dataset("all")))


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "???"}, "data.root: not given"),
        ({"root": "/nowhere"}, "run `medldm prepare"),
        ({"views": ["SAX"]}, "no view 'SAX'"),
        ({"split": "mine"}, "data.split=mine"),
        ({"spatial_dims": 3}, "data.spatial_dims=3"),
        ({"cache": "disk"}, "data.cache=disk"),
        ({"keys": ("latent",)}, "data.latents"),
        ({"bach_size": 3}, "bach_size"),
        ({"crop_size": [1, 2, 3]}, "data.crop_size"),
        ({"edge_degrade": {"levle": 1}}, "data.edge_degrade"),
    ],
)
def test_wrong_settings_are_input_errors(mnms2, settings, message):
    settings = dict(settings)
    keys, root = settings.pop("keys", KEYS), settings.pop("root", mnms2)
    with pytest.raises(InputError, match=message):
        build(root, keys=keys, **settings).train_dataloader()


def test_missing_or_shortened_case_is_found_before_training(mnms2, tmp_path):
    root = Path(shutil.copytree(mnms2, tmp_path / "root"))
    path = root / "cases" / "002.h5"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="002.h5: damaged"):
        build(root)
    path.unlink()
    with pytest.raises(InputError, match="002.h5: missing"):
        build(root)


def test_a_case_without_a_map_is_found_before_training(mnms2, tmp_path):
    index = json.loads((mnms2 / "index.json").read_text())
    index["cases"][1]["max_class"] = None
    (tmp_path / "cases").symlink_to(mnms2 / "cases")
    shutil.copy(mnms2 / "splits.json", tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"1 cases were prepared without a class map \(002...\)"):
        build_datamodule({"root": str(tmp_path), "batch_size": 2}, keys=["image", "mask"], seed=0)
    assert build_datamodule({"root": str(tmp_path), "batch_size": 2}, keys=["image"], seed=0)


def test_overlapping_split_stops_training(mnms2, tmp_path):
    root = Path(shutil.copytree(mnms2, tmp_path / "root"))
    (root / "splits.json").write_text(json.dumps({"default": {"train": ["001"], "val": ["001"], "test": []}}))
    with pytest.raises(InputError, match="both train and val"):
        build(root)


def test_a_window_of_slices_is_cut_from_the_whole_volume_at_every_depth(volumes):
    module = build(volumes, keys=("image", "mask"), batch_size=1, crop_size=[8, None, None])
    loader, starts = module.train_dataloader(), set()
    for batch in (batch for _ in range(12) for batch in loader):
        with h5py.File(volumes / module.index["cases"][batch["case_index"].item()]["file"]) as file:
            whole = file["image"][()].astype(np.float32)
        (window,) = batch["image"].numpy()
        fits = [k for k in range(whole.shape[1] - 7) if np.array_equal(whole[:, k : k + 8], window)]
        assert len(fits) == 1
        starts.add(fits[0])
    assert len(starts) > 4


def test_a_box_larger_than_a_volume_is_an_input_error(volumes):
    with pytest.raises(InputError, match=r"crop_size=\[200, 16, 16\].*\.h5 has"):
        build(volumes, keys=("image",), crop_size=[200, 16, 16]).train_dataloader()


# ---- CINE frames without maps ----


def build_cine(root, keys=("image",), **settings):
    data = {"root": str(root), "batch_size": 3, **settings}
    return build_datamodule(data, keys=keys, seed=0, with_cine=True)


def ids(module, subset):
    return {module.dataset(subset).item_id(item).rpartition("_")[0] for item in module.items(subset)}


def test_cine_frames_of_training_subjects_alone_train_an_autoencoder(mnms2_cine):
    module = build_cine(mnms2_cine)
    subjects = module.subjects
    assert all(len(subjects[subset]) == 1 for subset in ("train", "val", "test"))
    (own,) = subjects["train"]
    assert ids(module, "train") == {own, f"{own}_cine"}
    assert ids(module, "val") == set(subjects["val"]) and ids(module, "test") == set(subjects["test"])
    assert ids(module, "all") == {"001", "002", "003"}
    seen = [batch for _ in range(2) for batch in module.train_dataloader()]
    assert {name.split("_")[0] for batch in seen for name in batch["case_id"]} == {own}
    assert {len(name.split("_")) for batch in seen for name in batch["case_id"]} == {2, 3}
    assert all(batch["image"].shape[1:] == (1, 64, 64) for batch in seen)
    assert {name for batch in module.test_dataloader() for name in batch["case_id"]} == {
        f"{subjects['test'][0]}_{row:03d}" for row in range(len(module.items("test")))
    }


def test_views_ram_and_fractions_hold_for_cine_frames(mnms2_cine):
    module = build_cine(mnms2_cine, views=["LA"], cache="ram", crop_size=48)
    assert {item.view for item in module.items("train")} == {1}
    assert [item.phase for item in module.items("train")] == [0, 1, -1, -1, -1, -1]
    assert len(next(iter(module.train_dataloader()))["image"]) == 3


@pytest.mark.parametrize("keys", [("image", "mask"), ("image", "edges"), ("mask",)])
def test_a_model_of_maps_or_edges_sees_the_labelled_acquisitions_alone(mnms2, mnms2_cine, keys):
    assert build_cine(mnms2_cine, keys).items("train") == build(mnms2, keys).items("train")


def test_whoever_does_not_train_an_autoencoder_sees_no_cine_frame(mnms2, mnms2_cine):
    plain, other = build(mnms2, ("image",)), build(mnms2_cine, ("image",))
    assert other.items("train") == plain.items("train") and other.facts == plain.facts
    assert other.record["content"] == plain.record["content"] != build_cine(mnms2_cine).record["content"]


def test_a_folder_without_cine_is_read_as_ever(mnms2):
    with_cine, plain = build_cine(mnms2), build(mnms2, ("image",))
    assert with_cine.items("train") == plain.items("train") and with_cine.record == plain.record


def test_a_missing_cine_file_is_named_by_who_reads_it(mnms2_cine, tmp_path):
    root = Path(shutil.copytree(mnms2_cine, tmp_path / "copy"))
    (root / "cases/001_cine.h5").unlink()
    build(root, ("image", "mask"))
    with pytest.raises(InputError, match="001_cine.h5: missing"):
        build_cine(root)


def test_train_gives_cine_frames_to_stage_one(mnms2_cine, tmp_path):
    overrides = ("trainer.max_steps=1", "data.batch_size=2")
    last = run_training(mnms2_cine, tmp_path / "vqvae", VQVAE, *overrides)
    record = torch.load(last, weights_only=True)["medldm"]["data"]
    assert record["content"] == build_cine(mnms2_cine).record["content"]


def test_train_gives_none_to_a_diffusion_of_images(mnms2_cine, tmp_path, monkeypatch):
    class BuiltError(Exception):
        pass

    def stop(data, **options):
        raise BuiltError(options["keys"], options["with_cine"])

    monkeypatch.setattr("medldm.training.run.build_datamodule", stop)
    with pytest.raises(BuiltError) as built:
        run_training(mnms2_cine, tmp_path / "run", "experiment=medvdm/chestxray_pixel", "data=mnms2")
    assert built.value.args == (("image",), False)
