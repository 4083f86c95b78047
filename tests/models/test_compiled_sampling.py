"""Sampling with a compiled network, by whole commands and from Python.

Graphs are traced by torch's compiler and run as they were traced: making kernels of them takes a CPU minutes
(docs/performance.md has what was seen with the whole compiler). So images are equal bit for bit but where a
network computes otherwise under a compiler.
"""

import json

import nibabel
import numpy as np
import pytest
import torch

import medldm
from medldm.build import load_module
from medldm.commands import sample, translate
from medldm.data.records import read_images
from medldm.devices import CPU, GPU, choose_loop
from medldm.errors import InputError
from medldm.networks import compiling
from medldm.sampling import compile_networks, predictor_of
from tests.helpers import compose_config
from tests.training import run_training


class Traced:
    """Stands in the place of the compiler's second half."""

    def __init__(self) -> None:
        self.records: list[bool] = []  # of each graph, whether it was to be a CUDA graph
        self.num_runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list, *, records: bool = False):
        self.records.append(records)

        def run(*args):
            self.num_runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def traced(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "inductor_or_eager", found := Traced())
    yield found
    torch._dynamo.reset()


def both_ways(checkpoint, root, folder, *overrides):
    """Images of the first test case uncompiled and compiled."""
    images = []
    for compiles in ("false", "true"):
        output = folder / compiles
        paths = (f"checkpoint={checkpoint}", f"data.root={root}", f"output={output}", "png=false")
        choice = ("split=test", "limit=1", f"compile={compiles}")
        sample.task(compose_config("sample", *paths, *choice, *overrides))
        images.append(np.stack([record.image for record in read_images(output)]))
    return images


def assert_rounded_otherwise(plain, compiled):
    """Group norms take their sums in parts while a compiler follows: float32 rounds them otherwise."""
    np.testing.assert_allclose(compiled, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def test_slices_under_guidance(prepared, diffusion, traced, tmp_path):
    options = ("max_slices=4", "data.batch_size=2", "sampler.num_steps=3", "sampler.guidance_scale=2")
    plain, compiled = both_ways(diffusion, prepared, tmp_path, *options)
    assert len(plain) == 4
    assert_rounded_otherwise(plain, compiled)
    assert traced.records == [False] and traced.num_runs == 2 * 3  # one graph for all steps of both batches


def test_volumes_in_bf16_in_windows_by_a_base_with_a_branch(prepared_3d, traced, tmp_path):
    pixels = ("model/first_stage=pixel", "data.spatial_dims=3", "trainer.max_steps=1")
    options = ("experiment=medlsdm/folder_ldm", "model/conditioner=onehot", *pixels)
    base = run_training(prepared_3d, tmp_path / "base", *options)
    options = ("experiment=medlsdm/control", f"model.adapter.checkpoint={base}", "trainer.max_steps=1")
    branch = run_training(prepared_3d, tmp_path / "run", *options)
    options = ("data.spatial_dims=3", "windows.size=[16,null,null]", "precision=bf16-mixed")
    plain, compiled = both_ways(branch, prepared_3d, tmp_path, *options, "sampler.num_steps=3")
    assert plain.shape[-3:] == (32, 32, 32)
    # attention takes its products in another order while a compiler follows: bf16 rounds them otherwise
    np.testing.assert_allclose(compiled, plain, rtol=0, atol=0.02)
    # three windows; the last step is another graph, because it is computed in float32
    assert traced.records == [False, False] and traced.num_runs == 3 * 3


def test_translations_by_the_command_and_from_python(prepared_modalities, translator, traced, tmp_path):
    options = ("experiment=aldm/brats_ldm", f"model.first_stage.checkpoint={translator}")
    checkpoint = run_training(prepared_modalities, tmp_path / "run", *options)
    index = json.loads((prepared_modalities / "index.json").read_text())
    source = next(case["raw"][0]["path"] for case in index["cases"] if case["id"].endswith("_t1"))
    targets = ["t2", "flair"]  # a batch: torch and medldm convolve a single small volume by other kernels
    made = {}
    for compiles in ("false", "true"):
        paths = (f"checkpoint={checkpoint}", f"source={source}", f"output={tmp_path / compiles}")
        choice = ("source_modality=t1", "targets=[t2,flair]", f"compile={compiles}", "sampler.num_steps=3")
        translate.task(compose_config("translate", *paths, *choice))
        images = sorted((tmp_path / compiles).glob("*.nii.gz"))
        made[compiles] = np.stack([nibabel.load(path).get_fdata() for path in images])
    assert_rounded_otherwise(made["false"], made["true"])
    assert traced.records == [False] and traced.num_runs == 3
    plain, compiled = (
        medldm.load(checkpoint, device="cpu", compile=compiles).translate(source, "t1", targets, num_steps=3)
        for compiles in (False, True)
    )
    for name in targets:
        assert_rounded_otherwise(plain[name], compiled[name])
    assert len(traced.records) == 2 and traced.num_runs == 6


def test_what_takes_one_pass_is_refused_unless_the_device_chooses(first_stage, translator):
    said = "compile: this output takes one pass and no loop; set it to false"
    with pytest.raises(InputError, match=said):
        medldm.load(first_stage, device="cpu", compile=True)
    with pytest.raises(InputError, match=said):
        paths = (f"checkpoint={translator}", "source=none.nii.gz", "output=none", "source_modality=t1")
        translate.task(compose_config("translate", *paths, "compile=true"))
    module = load_module(first_stage)
    compile_networks(module, predictor_of(module).output, "auto", hardware=GPU)
    assert not any(compiling.is_wrapped(part) for part in module.modules())
    with pytest.raises(InputError, match="compile=perhaps is none of true, false, auto"):
        medldm.load("none.ckpt", device="cpu", compile="perhaps")


def test_a_guide_is_compiled_too_and_a_gpu_records_both(diffusion, traced, monkeypatch):
    module, guide = load_module(diffusion), load_module(diffusion, weights="raw")
    module.guide_by(guide)
    asked = []
    monkeypatch.setattr("medldm.sampling.compile_loop", lambda part, records: asked.append((part, records)))
    for hardware, choice in ((GPU, "auto"), (CPU, "auto"), (CPU, True)):
        compile_networks(module, predictor_of(module).output, choice, hardware=hardware)
    assert asked == [(part, records) for records in (True, False) for part in (module.network, guide.network)]
    assert choose_loop("auto", hardware=GPU) == (True, True)
    assert choose_loop("auto", hardware=CPU) == choose_loop(False, hardware=GPU) == (False, False)
