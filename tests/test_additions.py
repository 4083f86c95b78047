"""The rows of "Where to add" in docs/architecture.md, each tried from a package and a folder of configs that
lie outside medldm.
"""

import sys
import textwrap

import h5py
import numpy as np
import pytest
import torch

from medldm.build import MODELS, load_module
from medldm.builders.kinds import Kind
from medldm.commands import plan, prepare, sample
from medldm.data import datasets
from medldm.data.prepared import load_index
from medldm.diffusion.encoders import SPATIAL_ENCODERS
from medldm.metrics.catalogue import IMAGE_METRICS, METRICS, MetricInfo, markdown_table, select_metrics
from medldm.models.common import stage_latents
from medldm.networks.autoencoder_plan import AUTOENCODER_LAYOUTS
from medldm.networks.unet_plan import ARRANGEMENTS
from tests.helpers import compose_config
from tests.training import VQVAE, build, fit, load, make_batches, run_training
from tests.translation import MSSPADE, VQGAN, build_stage, describe_stage, make_pairs

PARTS = '''
    """Parts of somebody's own study."""

    import dataclasses

    import torch
    from torch import nn

    from medldm.diffusion.objective import DenoisingObjective
    from medldm.diffusion.sampler import Coefficients, Sampler
    from medldm.diffusion.schedule import NoiseSchedule
    from medldm.models.common import stage_latents
    from medldm.models.translation import Translated
    from medldm.networks.autoencoder_plan import BlockStep, Plan
    from medldm.networks.quantizer import Quantized
    from medldm.networks.quantizers import FixedCodes, straight_through
    from medldm.networks.unet_plan import JOIN, KEEP, UNetStep, middle


    class Straight(nn.Module):
        """A schedule: -log SNR rises in a straight line."""

        def forward(self, t):
            return -8 + 12 * t


    def straight_schedule():
        return NoiseSchedule(Straight())


    class HalvedObjective(DenoisingObjective):
        """An objective: half of the loss that it inherits."""

        def __call__(self, *args, **kwargs):
            return {name: value / 2 for name, value in super().__call__(*args, **kwargs).items()}


    @dataclasses.dataclass(kw_only=True)
    class JumpSampler(Sampler):
        """A sampler: every step lands on x0_hat, with new noise of the next time."""

        def coefficients(self, gamma, path):
            alpha, sigma = torch.sigmoid(-gamma[1:]).sqrt(), torch.sigmoid(gamma[1:]).sqrt()
            return Coefficients(z=torch.zeros_like(alpha), x0=alpha, noise=sigma)


    class MeanEncoder(nn.Module):
        """A condition encoder: means over the cells of the latent grid, then a 1x1 convolution."""

        def __init__(self, in_channels, out_channels, downsampling):
            super().__init__()
            self.out_channels = out_channels
            self.pool, self.mix = nn.AvgPool2d(downsampling), nn.Conv2d(in_channels, out_channels, 1)

        def forward(self, planes):
            return self.mix(self.pool(planes))


    class Gate(nn.Module):
        """An attention of the U-Net: a gate for each channel."""

        def __init__(self, width, *, strength):
            super().__init__()
            self.strength, self.gate = strength, nn.Linear(width, width)

        def forward(self, h, context=None):
            return h + self.strength * h * torch.sigmoid(self.gate(h.mean((2, 3))))[:, :, None, None]


    class SquaredTranslation:
        """A loss of translation: squared differences of latents."""

        trains_autoencoder = False

        def discriminated_channels(self, first_stage, image_channels):
            return first_stage.latent_channels

        def __call__(self, module, batch, slices_of):
            z = stage_latents(module.first_stage, batch)
            z_hat = module.translator(stage_latents(module.first_stage, batch, "source"), batch["label"])
            loss = (z_hat - z).square().mean()
            return Translated({"squared": loss}, loss, loss, z, z_hat)


    def plan_ends(shape):
        """An arrangement of the U-Net: one skip alone, from the stem to a unit at the end."""
        levels = range(len(shape.channels))
        down = [
            [*shape.units_down(level), UNetStep("down", f"down.{level}.resample")] for level in levels[:-1]
        ]
        up = []
        for section, level in shape.levels_up():
            units = shape.units(section, level, [shape.channels[level]])
            up.append([*units, *([UNetStep("up", f"{section}.resample")] if level else [])])
        last = [JOIN, UNetStep("unit", "last", shape.stem_channels, sees_map=False)]
        return [[KEEP], *down, shape.units_down(levels[-1]), middle(shape), *up, last]


    def plan_halves(stages, strides):
        """A plan of an autoencoder: resampling alone, a strided convolution a level."""
        widths = [stages.stem_channels, *stages.channels]
        levels = list(zip(widths, widths[1:], strides))
        down = [BlockStep("down", a, b, stride) for a, b, stride in levels]
        return Plan(down, [BlockStep("up", b, a, stride) for a, b, stride in reversed(levels)])


    class Ternary(FixedCodes):
        """A quantiser: every channel becomes -1, 0 or 1, whichever is nearest."""

        def __init__(self, code_dim):
            super().__init__([3] * code_dim)

        def forward(self, h):
            z = h.clamp(-1, 1).round()
            indices = self.index_of(z.movedim(1, -1) + 1)
            return Quantized(straight_through(h, z), indices, h.new_zeros(()), self.counted(indices))


    class Gradients(nn.Module):
        """A loss of stage one in the place of the perceptual one: differences of neighbours."""

        spatial_dims = 2  # of volumes it would see a random slice

        def __init__(self, network, weights_dir):
            super().__init__()

        def build(self):
            """Has no weights to look for."""

        def forward(self, x_hat, x):
            return (x_hat.diff(dim=-1) - x.diff(dim=-1)).abs().mean()
'''
KIND = '''
    """A kind of model: an image is the mean image of its view."""

    import torch
    from torch import nn

    from medldm.builders.keys import instantiate_parts
    from medldm.models.common import TrainedModule, build_optimizer
    from medldm.models.protocols import Output


    class MeanModule(TrainedModule):
        def __init__(self, num_views, shape, **optimisation):
            super().__init__(**optimisation)
            self.means = nn.Parameter(torch.zeros(num_views, *shape))

        @staticmethod
        def batch_keys(model, *, is_cached):
            return ("image",)

        @property
        def outputs(self):
            return {"mean": Output(("image",), lambda batch, size, request: self.means[batch["view"]])}

        def configure_optimizers(self):
            optimizer = build_optimizer(self.make_optimizer, [self])
            return [optimizer], [{"scheduler": self.learning_rate(optimizer), "interval": "step"}]

        def losses(self, batch, step):
            return {"loss": (self.means[batch["view"]] - batch["image"]).square().mean()}

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.losses(batch, 0)["loss"], batch_size=len(batch["image"]))

        def picture(self, batch):
            return [batch["image"], self.means[batch["view"]].detach()]


    def build_mean_module(model, facts, stages):
        shape = (facts["image_channels"], *facts["image_size"])
        return MeanModule(facts["num_views"], shape, **instantiate_parts(model, skip=()))
'''
MEMBERS = {
    "model/translation_loss/squared": "_target_: study.SquaredTranslation",
    "model/quantizer/ternary": "_target_: study.Ternary\n_partial_: true",
    "model/mean": "defaults: [optimizer: adam, _self_]\nkind: mean\noptimizer: {lr: 0.1}",
    "model/network/halves": "defaults: [vqvae_f8, _self_]\nlayout: halves\nchannels: [16, 32]\n"
    "strides: [2, 2]\nattention_levels: []",
    "model/schedule/straight": "_target_: study.straight_schedule",
    "model/objective/halved": "defaults: [noise, _self_]\n_target_: study.HalvedObjective",
    "model/sampler/jump": "defaults: [ancestral, _self_]\n_target_: study.JumpSampler\nnum_steps: 3",
    "model/conditioner/mean": "defaults: [strided_cnn, _self_]\nencoder: mean",
    "model/network/gated": "defaults: [unet_block, _self_]\nchannels: [16, 32]\nattention:\n"
    "  {_target_: study.Gate, _partial_: true, strength: 0.5}",
    "model/network/ends": "defaults: [unet_block, _self_]\nskips: ends\nstem_channels: 16\n"
    "channels: [16, 16]\nnum_res_blocks: 1\nattention_levels: []",
    "data/lines": "defaults: [/data/common@_here_, _self_]\ndataset: lines\nimage_size: 32\n"
    "preprocess: {intensity: {mode: bit_depth}}",
    "experiment/study/ldm": "# @package _global_\ndefaults:\n  - /experiment/cardiac2d/ldm\n"
    "  - override /model/schedule: straight\n  - override /model/objective: halved\n"
    "  - override /model/sampler: jump\n  - override /model/conditioner: mean\n"
    "  - override /model/network: gated\n  - _self_\n\nmodel: {warmup_steps: 0}",
}
DATASET = '''
    """Pictures of lines, one subject a file."""

    from pathlib import Path

    from medldm.data.case import Case


    def index(root):
        paths = sorted(Path(root).glob("*.png"))
        return [Case(path.stem, path.stem, {"image": str(path)}) for path in paths]
'''


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The package `study` and the folder of its configs, as the override that makes Hydra read it."""
    (tmp_path / "study.py").write_text(textwrap.dedent(PARTS))
    (tmp_path / "study_kind.py").write_text(textwrap.dedent(KIND))
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in MEMBERS.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    yield f"hydra.searchpath=[file://{tmp_path / 'configs'}]"
    sys.modules.pop("study", None)
    sys.modules.pop("study_kind", None)


OWN = ("straight_schedule", "HalvedObjective", "JumpSampler", "Gate")


def test_schedule_objective_sampler_encoder_attention_and_preset_of_one_s_own(
    prepared, first_stage, study, tmp_path, monkeypatch
):
    import study as parts

    monkeypatch.setitem(SPATIAL_ENCODERS, "mean", parts.MeanEncoder)
    monkeypatch.setenv("MEDLDM_PARTS", ",".join(f"study.{name}" for name in OWN))
    stage = f"model.first_stage.checkpoint={first_stage}"
    last = run_training(prepared, tmp_path / "run", study, "experiment=study/ldm", stage)
    assert load(last)["global_step"] == 2
    import medldm

    model = medldm.load(last, device="cpu")
    module = model.module
    assert isinstance(module.objective, parts.HalvedObjective) and isinstance(
        module.sampler, parts.JumpSampler
    )
    assert isinstance(module.conditioner.encoder, parts.MeanEncoder)
    assert module.schedule.gamma(torch.tensor(0.5)) == -2
    assert any(isinstance(part, parts.Gate) for part in module.network.modules())
    case = load_index(prepared)["cases"][0]["id"]
    assert np.isfinite(model.sample(model.conditions(prepared, case))).all()


def test_a_loss_of_translation_of_one_s_own(study):
    overrides = ("model/translation_loss@model.objective=squared", "model.adversarial=null")
    module = build_stage(
        MSSPADE, study, *overrides, "model.discriminators=null", first_stage=describe_stage(VQGAN)
    )
    module.first_stage.is_fitted.fill_(True)
    (batch,) = make_pairs(1)
    z_hat, _ = module.translated(batch)
    expected = (z_hat - stage_latents(module.first_stage, batch)).square().mean()
    logged = fit(module, [batch]).callback_metrics
    assert logged["train/squared"] == logged["train/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_an_autoencoder_s_plan_of_one_s_own(study, monkeypatch):
    import study as parts

    monkeypatch.setitem(AUTOENCODER_LAYOUTS, "halves", parts.plan_halves)
    autoencoder = build(
        VQVAE, study, "model/network@model.autoencoder=halves", "model.autoencoder.mid=[]"
    ).autoencoder
    assert autoencoder.downsampling == (4, 4) and len(autoencoder.encoder) == len(autoencoder.decoder) == 2
    x_hat, quantized = autoencoder(torch.zeros(1, 1, 16, 16))
    assert x_hat.shape == (1, 1, 16, 16) and quantized.z.shape[2:] == (4, 4)


def test_a_quantiser_of_one_s_own(study):
    module = build(VQVAE, study, "+model/quantizer=ternary")
    (batch,) = make_batches(1, 2)
    codes = module.autoencoder.encode(batch["image"])
    assert set(module.autoencoder.quantize(codes).z.unique().tolist()) <= {-1.0, 0.0, 1.0}
    logged = fit(module, [batch]).callback_metrics
    assert torch.isfinite(logged["train/loss"])


def test_an_arrangement_of_the_u_net_of_one_s_own(study, monkeypatch):
    import study as parts

    monkeypatch.setitem(ARRANGEMENTS, "ends", parts.plan_ends)
    module = build("experiment=cardiac2d/ldm", study, "model/first_stage=pixel", "model/network=ends")
    network = module.network
    assert network.downsampling == (2, 2)
    # All widths are 16, and the last unit alone has the 16 channels of the stem beside those of the way up.
    assert [network.up[i].units[0].res.conv1.in_channels for i in range(2)] == [16, 16]
    assert network.last.res.conv1.in_channels == 16 + 16
    logged = fit(module, make_batches(1, 2)).callback_metrics
    assert torch.isfinite(logged["train/loss"])


def test_a_kind_of_model_of_one_s_own(prepared, study, tmp_path, monkeypatch):
    import study_kind as parts

    monkeypatch.setitem(MODELS, "mean", Kind(parts.MeanModule, parts.build_mean_module))
    last = run_training(prepared, tmp_path / "run", study, "model=mean")
    module = load_module(last)
    assert isinstance(module, parts.MeanModule)
    # Two updates of Adam, at a rate of 0.1, from 0 towards images that are dark almost everywhere.
    assert module.means.min().item() == pytest.approx(-0.2, abs=1e-3)
    paths = (f"checkpoint={last}", f"data.root={prepared}", f"output={tmp_path / 'out'}")
    sample.task(compose_config("sample", *paths, "split=all", "limit=1", "device=cpu"))
    plan.task(compose_config("plan", study, "model=mean", "data=mnms2", f"data.root={prepared}"))
    (written,) = (tmp_path / "out").glob("*.h5")
    with h5py.File(written) as file:
        assert np.array_equal(file["images"][0], module.means[file["view"][0], 0].detach().numpy())


def test_a_loss_of_stage_one_of_one_s_own(study):
    options = (VQVAE, study, "model.perceptual._target_=study.Gradients", "model.perceptual_weight=2")
    module = build(*options)
    trainer = fit(module, make_batches(2, 2))
    assert 0 < trainer.callback_metrics["train/perceptual"] < 4


def test_a_metric_of_one_s_own_enters_the_table(monkeypatch):
    def bias(generated, reference):
        return (generated - reference).flatten(1).mean(1)

    row = MetricInfo(bias, "mean difference", "of the range", "-1 to 1", None)
    monkeypatch.setitem(IMAGE_METRICS, "bias", row)
    monkeypatch.setitem(METRICS, "bias", row)
    (function,) = select_metrics(["bias"]).values()
    images = torch.zeros(2, 1, 4, 4)
    assert function(images + 0.25, images).tolist() == [0.25, 0.25]
    assert "| `bias` | mean difference |" in markdown_table()


def test_a_dataset_of_one_s_own(study, tmp_path, monkeypatch):
    import cv2

    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "lines.py").write_text(textwrap.dedent(DATASET))
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path / "sets")])
    (tmp_path / "raw").mkdir()
    for i in range(4):
        picture = np.zeros((40, 40), np.uint8)
        picture[8 * i] = 255
        cv2.imwrite(str(tmp_path / "raw" / f"line_{i}.png"), picture)
    paths = (f"data.raw={tmp_path / 'raw'}", f"data.root={tmp_path / 'out'}")
    prepare.task(compose_config("prepare", study, "data=lines", *paths, "data.num_workers=0"))
    index = load_index(tmp_path / "out")
    assert [case["id"] for case in index["cases"]] == [f"line_{i}" for i in range(4)]
    sys.modules.pop("medldm.data.datasets.lines", None)
