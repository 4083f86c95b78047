"""Between loggings a training step never waits for the device: nothing of it is read by the host."""

import pytest
import torch

from medldm.build import load_module
from medldm.callbacks import EMA, CountUpdates, ProgressBar, SkipNonFinite, StopOnSignal
from medldm.diffusion.conditioner import SpatialConditioner
from medldm.diffusion.control import controlled
from medldm.models.segmenter_loss import SegmenterLoss
from tests.host_reads import HostReads
from tests.training import FACTS, LDM, PIXELS, VQVAE, build, fit, make_batches

FACTS_3D = FACTS | {"spatial_dims": 3, "image_size": [16, 16, 16]}
GAN = ("model.adversarial.start=0", "model.autoencoder.quantizer.restart_threshold=0.5")
BUILT = {
    "autoencoder": (FACTS, VQVAE, *GAN),
    "autoencoder with moving averages": (
        FACTS,
        "experiment=cardiac2d/vqvae_as_run",
        "model.adversarial.start=0",
    ),
    "autoencoder 3D": (FACTS_3D, "experiment=medlsdm/folder_vqgan_spade", *GAN),
    "diffusion": (FACTS, LDM, *PIXELS, "model.conditioner.drop_all_prob=0.3"),
    "diffusion, learned schedule": (FACTS, LDM, *PIXELS, "model/schedule=learned_nnet"),
    "variational": (FACTS, "experiment=medvdm/chestxray"),
    "segmentation": (FACTS_3D, "experiment=medlsdm/folder_segmentation"),
    "regression": (FACTS_3D, "experiment=aldm/brats_regression"),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("medldm.batch.is_on_host", lambda x: False)


def volumes(count: int) -> list[dict]:
    batches = make_batches(count, 2, pixels=64)  # 64 x 64 pixels are 16 x 16 x 16 voxels
    for batch in batches:
        for key in ("image", "mask", "edges"):
            batch[key] = batch[key].reshape(2, 1, 16, 16, 16)
        batch |= {
            "source": -batch["image"],
            "label": torch.tensor([1, 2]),
            "source_label": torch.tensor([0, 0]),
        }
    return batches


def reads_of(module, batches) -> list[str]:
    module.use_channels_last()
    if not module.automatic_optimization:
        module.gradient_clip_val = 1.0
    options = {"gradient_clip_val": 1.0} if module.automatic_optimization else {}
    watch = HostReads()
    callbacks = (CountUpdates(), EMA(0.99), SkipNonFinite(), StopOnSignal(checkpoints=None), watch)
    fit(module, batches, *callbacks, log_every_n_steps=100, **options)
    assert watch.num_steps == len(batches) - watch.first
    return watch.tensors.found


@pytest.mark.parametrize("name", BUILT)
def test_a_training_step_reads_nothing(name):
    facts, *overrides = BUILT[name]
    module = build(*overrides, facts=facts)
    batches = make_batches(3, 2) if facts is FACTS else volumes(3)
    assert not reads_of(module, batches)


@pytest.mark.parametrize("fixture", ["diffusion", "translator"])
def test_a_training_step_behind_a_first_stage_reads_nothing(fixture, request):
    module = load_module(request.getfixturevalue(fixture))
    module.train()
    batches = make_batches(3, 2, pixels=64) if fixture == "diffusion" else volumes(3)
    if fixture == "translator":
        module.adversarial.start = 0
    assert not reads_of(module, batches)


def test_a_segmenter_s_losses_and_a_control_branch_read_nothing(diffusion, segmenter):
    module = load_module(diffusion).train()
    module.segmenter_loss = SegmenterLoss(feature_weight=1.0, map_weight=1.0, contrast_weight=1.0)
    module.segmenter_loss.ask(load_module(segmenter))
    hint = SpatialConditioner(4, downsampling=(8, 8), encoder="strided_cnn", use_mask=True, drop_all_prob=0.3)
    module.conditioner, module.network = controlled(module.conditioner, module.network, hint)
    assert not reads_of(module, make_batches(3, 2, pixels=64))


def test_the_watch_sees_what_would_wait():
    watch = HostReads(first=0)

    class Leaky(torch.nn.Module):
        def forward(self, x):
            host = torch.zeros(3)
            host.sum().item()  # of the host's own: no matter
            flag = bool(x.sum() > 0)
            x[x > 0], x.cpu(), torch.tensor(1.0, device=x.device), host.to(x.device), x.tolist()
            return flag

    x = torch.ones(2, 3)
    watch.tensors.add(x)
    from tests.host_reads import CallWatch, OperatorWatch

    with OperatorWatch(watch.tensors), CallWatch(watch.tensors):
        Leaky()(x)
    found = " ".join(watch.tensors.found)
    assert len(watch.tensors.found) == 6
    for word in ("_local_scalar_dense", "by a mask", ".cpu()", "torch.tensor", ".to(device)", ".tolist()"):
        assert word in found


@pytest.mark.parametrize(("max_epochs", "said"), [(-1, "Epoch 0"), (3, "Epoch 0/2")])
def test_the_progress_bar_names_a_last_epoch_where_there_is_one(max_epochs, said):
    from pytorch_lightning import Trainer
    from pytorch_lightning.demos.boring_classes import BoringModel

    class Watched(ProgressBar):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            shown.append(self.progress.tasks[self.train_progress_bar_id].description.strip())

    shown = []
    trainer = Trainer(
        accelerator="cpu", max_epochs=max_epochs, max_steps=1, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[Watched()],
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert [text.split("]")[-1] for text in shown] == [said]


def test_the_progress_bar_reads_when_it_is_logged(monkeypatch):
    from pytorch_lightning.callbacks import RichProgressBar

    read = []
    monkeypatch.setattr(
        RichProgressBar, "get_metrics", lambda self, trainer, module: read.append(0) or {"loss": 1}
    )

    class At:
        training, log_every_n_steps, global_step = True, 10, 0

    bar = ProgressBar()
    for At.global_step in range(1, 31):
        assert bar.get_metrics(At, None) == {"loss": 1}
    assert len(read) == 1 + 3
