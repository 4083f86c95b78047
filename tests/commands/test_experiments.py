"""Every experiment file trains two steps in mixed precision; the shared networks do so in 3D, in float32."""

import math
import shutil

import h5py
import nibabel
import numpy as np
import pytest
import torch

from medldm.build import load_module
from medldm.commands import encode, prepare, sample
from medldm.data import build_datamodule
from medldm.data.preparation.edges import label_contours
from medldm.data.prepared import load_index
from medldm.data.records import read_images
from medldm.errors import InputError
from medldm.outputs import SampleFolder
from tests.helpers import CONFIG_DIR, compose_config
from tests.training import LDM, fast_bf16_convolutions, gpu_settings, load, read_metrics, run_training

EXPERIMENTS = sorted(
    str(path.relative_to(CONFIG_DIR / "experiment").with_suffix(""))
    for path in (CONFIG_DIR / "experiment").rglob("*.yaml")
)
FOLDER_3D = ("data=folder", "data.spatial_dims=3")


def assert_trained(last) -> None:
    assert load(last)["global_step"] == 2 and last.with_name("best.ckpt").is_file()
    run_dir = last.parents[1]
    values = [float(row["train/loss"]) for row in read_metrics(run_dir) if row["train/loss"]]
    assert len(values) == 2 and all(map(math.isfinite, values))
    assert list((run_dir / "samples").glob("*.png"))


def prepared_for(data) -> str:
    """The fixture that stands in for an experiment's data: several modalities, volumes, or slices."""
    if len(data.get("modalities") or ()) > 1:
        return "prepared_modalities"
    return "prepared_3d" if data.get("spatial_dims") == 3 else "prepared"


def first_stage_for(cfg) -> str:
    """The fixture of the stage before; a translator brings its latents' options along."""
    if cfg.data.get("modalities"):
        return "vqgan_modalities" if "latent" in cfg.model.first_stage else "translator"
    return "first_stage_3d" if cfg.data.get("spatial_dims") == 3 else "first_stage"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_trains_two_steps_under_a_gpu_s_settings(name, request, tmp_path, monkeypatch):
    cfg = compose_config("train", f"experiment={name}", "debug=tiny", "data.root=-")
    overrides = [f"experiment={name}", *gpu_settings(f"experiment={name}")]
    assert cfg.model.optimizer.get("fused")  # a CPU has these kernels too
    if "first_stage" in cfg.model and cfg.model.first_stage.get("checkpoint", "") is not None:
        stage = request.getfixturevalue(first_stage_for(cfg))
        overrides.append(f"model.first_stage.checkpoint={stage}")
    if cfg.model.get("map_stage"):
        overrides.append(f"model.map_stage.checkpoint={request.getfixturevalue('map_stage')}")
    trained = "diffusion_3d" if cfg.data.get("spatial_dims") == 3 else "diffusion"
    if cfg.model.get("teacher"):
        teacher = request.getfixturevalue(trained)
        overrides += [f"model.teacher.checkpoint={teacher}", "model.teacher.num_steps=2"]
    if cfg.model.get("adapter"):
        overrides.append(f"model.adapter.checkpoint={request.getfixturevalue(trained)}")
    if cfg.model.get("segmenter"):
        overrides.append(f"model.segmenter.checkpoint={request.getfixturevalue('segmenter')}")
    root = request.getfixturevalue(prepared_for(cfg.data))
    fast_bf16_convolutions(monkeypatch)
    assert_trained(run_training(root, tmp_path / "run", *overrides))


@pytest.fixture(scope="session")
def first_stage_3d(prepared_3d, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("first_stage_3d") / "run"
    return run_training(prepared_3d, run_dir, "experiment=medlsdm/folder_vqgan").with_name("best.ckpt")


@pytest.fixture(scope="session")
def map_stage(prepared_3d, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("map_stage") / "run"
    return run_training(prepared_3d, run_dir, "experiment=medlsdm/folder_map_vqvae").with_name("best.ckpt")


def test_the_autoencoder_trains_in_3d(first_stage_3d):
    assert_trained(first_stage_3d.with_name("last.ckpt"))


@pytest.fixture(scope="session")
def diffusion_3d(prepared_3d, first_stage_3d, tmp_path_factory):
    """Trained on cached latents, with the map as SPADE norms."""
    paths = (f"checkpoint={first_stage_3d}", f"data.root={prepared_3d}")
    encode.task(compose_config("encode", *paths, *FOLDER_3D, "data.num_workers=0"))
    options = ("model/network=unet_block", "model/conditioner=spade", "data.latents=auto")
    stage = f"model.first_stage.checkpoint={first_stage_3d}"
    run_dir = tmp_path_factory.mktemp("diffusion_3d") / "run"
    return run_training(prepared_3d, run_dir, LDM, *FOLDER_3D, *options, stage)


def test_diffusion_trains_in_3d_on_cached_latents(diffusion_3d):
    assert_trained(diffusion_3d)


def test_diffusion_trains_in_3d_on_images_with_concatenated_maps(prepared_3d, first_stage_3d, tmp_path):
    options = (
        "model/network=unet_block",
        "model/conditioner=strided_cnn",
        "model.conditioner.use_edges=false",
        "model.conditioner.drop_edges_prob=0",
    )
    stage = f"model.first_stage.checkpoint={first_stage_3d}"
    assert_trained(run_training(prepared_3d, tmp_path / "run", LDM, *FOLDER_3D, *options, stage))


@pytest.mark.parametrize("fixture", ["first_stage_3d", "diffusion_3d"])
def test_sampling_in_3d_writes_nifti_on_the_grid_of_the_source(prepared_3d, fixture, request, tmp_path):
    checkpoint = request.getfixturevalue(fixture)
    paths = (f"checkpoint={checkpoint}", f"data.root={prepared_3d}", f"output={tmp_path / 'out'}")
    sample.task(compose_config("sample", *paths, *FOLDER_3D, "split=val", "limit=1"))
    data = build_datamodule({"root": prepared_3d, "batch_size": 1}, keys=("image",), seed=0)
    dataset = data.dataset("val")
    entry = dataset.cases[dataset.items[0].case]
    image = nibabel.load(tmp_path / "out" / f"{entry['id']}.nii.gz")
    raw = nibabel.load(entry["raw"][0]["path"])
    assert image.shape == raw.shape
    np.testing.assert_allclose(image.affine, raw.affine, atol=1e-5)
    low, high = entry["intensity_range"]
    assert low - 1 <= image.get_fdata().min() and image.get_fdata().max() <= high + 1
    (record,) = read_images(tmp_path / "out")
    assert record.image.shape == tuple(dataset[0]["image"].shape[1:]) and np.abs(record.image).max() <= 1
    assert record.subject == entry["subject"]


@pytest.fixture(scope="session")
def semantic_3d(prepared_3d, tmp_path_factory):
    """Stage one with the SPADE decoder, and the semantic U-Net on it."""
    runs = tmp_path_factory.mktemp("semantic_3d")
    stage = run_training(prepared_3d, runs / "one", "experiment=medlsdm/folder_vqgan_spade").with_name(
        "best.ckpt"
    )
    options = ("experiment=medlsdm/folder_ldm", f"model.first_stage.checkpoint={stage}")
    return run_training(prepared_3d, runs / "two", *options)


def test_windows_tiles_trajectories_and_interpolations(prepared_3d, semantic_3d, tmp_path):
    from PIL import Image

    paths = (f"checkpoint={semantic_3d}", f"data.root={prepared_3d}", *FOLDER_3D, "split=train", "limit=2")
    volumes = {}
    for name, tile in (("whole", "null"), ("tiles", "16")):
        sizes = (f"tile={tile}", "windows.size=[16,null,null]", "trajectory=2")
        sizes += () if name == "whole" else ("windows.keep=0", "video_format=mp4")
        sample.task(compose_config("sample", *paths, *sizes, f"output={tmp_path / name}"))
        volumes[name] = [record.image for record in read_images(tmp_path / name)]
    for whole, tiles in zip(volumes["whole"], volumes["tiles"], strict=True):
        np.testing.assert_allclose(tiles, whole, atol=1e-4)
    for name, suffix in (("whole", "gif"), ("tiles", "mp4")):
        films = list((tmp_path / name / "trajectory").iterdir())
        assert [film.suffix for film in films] == [f".{suffix}"] * 2
    output = tmp_path / "between"
    sample.task(compose_config("sample", *paths, "interpolate.count=3", f"output={output}"))
    (gif,) = (output / "interpolation").glob("*.gif")
    assert Image.open(gif).n_frames >= 2
    with h5py.File(gif.with_suffix(".h5")) as file:
        assert file["images"].shape == (3, 32, 32, 32) and file["share"][:].tolist() == [0, 0.5, 1]


def prepare_maps(raw, root, files: dict, *options) -> dict:
    (raw / "masks").mkdir(parents=True)
    for name, file in files.items():
        shutil.copy(file, raw / "masks" / name)
    paths = ("data=folder", f"data.raw={raw}", f"data.root={root}", "data.num_workers=0")
    prepare.task(compose_config("prepare", *paths, *options))
    return load_index(root)


def test_a_volume_s_map_alone_gives_the_sample_that_it_gives_beside_its_image(
    prepared_3d, semantic_3d, tmp_path
):
    entry = load_index(prepared_3d)["cases"][0]
    raw = next(file["path"] for file in entry["raw"] if "/masks/" in file["path"])
    sizes = ("data.spatial_dims=3", "data.image_size=[32,32,32]")
    index = prepare_maps(tmp_path / "raw", tmp_path / "maps", {f"{entry['id']}.nii.gz": raw}, *sizes)
    assert index["has_images"] is False and index["num_classes"] == load_index(prepared_3d)["num_classes"]
    for root, name in ((prepared_3d, "beside"), (tmp_path / "maps", "alone")):
        paths = (f"checkpoint={semantic_3d}", f"data.root={root}", f"output={tmp_path / name}")
        sample.task(compose_config("sample", *paths, *FOLDER_3D, "split=all", "limit=1"))
    files = [tmp_path / name / f"{entry['id']}.h5" for name in ("beside", "alone")]
    with h5py.File(files[0]) as one, h5py.File(files[1]) as other:
        assert np.array_equal(one["images"], other["images"])
        assert np.array_equal(one["mask"], other["mask"])
    low, high = load_module(semantic_3d).facts["intensity_ranges"][0]
    values = nibabel.load(tmp_path / "alone" / f"{entry['id']}.nii.gz").get_fdata()
    assert low - 1 <= values.min() and 0.5 * (low + high) < values.max() <= high + 1
    with pytest.raises(InputError, match="from class maps alone"):
        build_datamodule({"root": tmp_path / "maps", "batch_size": 1}, keys=("image",), seed=0)
    with pytest.raises(InputError, match="holds a class map and no image"):
        list(read_images(tmp_path / "maps"))


def test_maps_alone_in_2d_are_sampled_with_their_contours_for_edges(phantom_raw, diffusion, tmp_path):
    raw = sorted(phantom_raw.rglob("*SA_ED_gt.nii.gz"))[0]
    sizes = ("data.image_size=64", "data.preprocess.edges.source=labels")
    index = prepare_maps(tmp_path / "raw", tmp_path / "maps", {"own.nii.gz": raw}, *sizes)
    assert index["has_images"] is False and index["cases"][0]["max_class"] == 3
    paths = (f"checkpoint={diffusion}", f"data.root={tmp_path / 'maps'}", f"output={tmp_path / 'out'}")
    sample.task(compose_config("sample", *paths, "data=folder", "split=all", "max_slices=2"))
    with h5py.File(tmp_path / "out" / "own.h5") as file:
        assert file["images"].shape == (2, 64, 64) and np.isfinite(file["images"][:]).all()
        for edges, mask in zip(file["edges"][:], file["semantic_maps"][:], strict=True):
            assert np.array_equal(edges, label_contours(mask))
    with pytest.raises(InputError, match="edges.source=labels"):
        prepare_maps(tmp_path / "again", tmp_path / "wrong", {"own.nii.gz": raw}, sizes[0])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("windows.size=[16,16]", "give 3 numbers"),
        ("windows.size=[10,null,null]", "does not divide"),
        ("tile=2", "at least 8"),
    ],
)
def test_options_of_large_volumes_are_checked_before_anything_is_written(
    prepared_3d, semantic_3d, tmp_path, option, message
):
    paths = (
        f"checkpoint={semantic_3d}",
        f"data.root={prepared_3d}",
        *FOLDER_3D,
        f"output={tmp_path / 'out'}",
    )
    with pytest.raises(InputError, match=message):
        sample.task(compose_config("sample", *paths, option))
    assert not (tmp_path / "out").exists()


def test_fine_tuning_starts_from_the_weights_of_another_run(prepared_3d, first_stage_3d, tmp_path):
    options = ("experiment=medlsdm/folder_vqgan", "model.optimizer.lr=0", f"init_from={first_stage_3d}")
    tuned = load(run_training(prepared_3d, tmp_path / "run", *options))["state_dict"]
    start = load(first_stage_3d)["state_dict"]
    torch.testing.assert_close(tuned["autoencoder.head.weight"], start["autoencoder.head.weight"])
    other = ("experiment=medlsdm/folder_vqgan_spade", f"init_from={first_stage_3d}")
    with pytest.raises(InputError, match="init_from=.*not the same model"):
        run_training(prepared_3d, tmp_path / "other", *other)


def test_fine_tuning_keeps_the_first_stage_that_is_named(prepared_3d, semantic_3d, tmp_path):
    """And not the one that the other run was trained on."""
    named = run_training(prepared_3d, tmp_path / "one", "experiment=medlsdm/folder_vqgan_spade", "seed=5")
    named = named.with_name("best.ckpt")
    first = (f"model.first_stage.checkpoint={named}", f"init_from={semantic_3d}")
    options = ("experiment=medlsdm/folder_ldm", "model.optimizer.lr=0", *first)
    tuned = load(run_training(prepared_3d, tmp_path / "two", *options))["state_dict"]
    start, stage = load_module(str(semantic_3d)).state_dict(), load(named)["state_dict"]  # the moving average
    same = {"network.stem.weight": start["network.stem.weight"]}
    same["first_stage.autoencoder.head.weight"] = stage["autoencoder.head.weight"]
    for name, value in same.items():
        torch.testing.assert_close(tuned[name], value, msg=name)


def test_a_written_volume_lies_where_the_raw_one_does(prepared_3d, tmp_path):
    """Voxel for voxel, in the units of the source."""
    data = build_datamodule({"root": prepared_3d, "batch_size": 1}, keys=("image",), seed=0)
    dataset = data.dataset("val")
    case = dataset.items[0].case
    SampleFolder(tmp_path, dataset, {}).write(case, [0], [dataset[0]["image"]], [])
    written = nibabel.load(tmp_path / f"{dataset.cases[case]['id']}.nii.gz")
    raw = nibabel.load(dataset.cases[case]["raw"][0]["path"])
    low, high = dataset.cases[case]["intensity_range"]
    source = np.clip(raw.get_fdata(), low, high)
    inside = written.get_fdata() > low + 1
    np.testing.assert_array_equal(written.affine, raw.affine)
    assert inside.mean() > 0.3
    np.testing.assert_allclose(written.get_fdata()[inside], source[inside], atol=1e-3 * (high - low))


def test_debug_tiny_changes_sizes_only():
    from omegaconf import OmegaConf

    from medldm.shrinking import shrink

    model = OmegaConf.to_container(compose_config("train", LDM, "data.root=-").model, resolve=True)
    small = shrink(model)

    def shape(part):
        return {key: shape(value) for key, value in part.items()} if isinstance(part, dict) else type(part)

    assert shape(small) == shape(model)
    assert small["network"]["channels"] == [16, 16, 16] and model["network"]["channels"] != [16, 16, 16]
