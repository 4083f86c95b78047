"""Stage two: latents of a first stage that stays as it is."""

import pytest
import torch
from pytorch_lightning import Trainer

from medldm.build import load_module
from medldm.commands import encode
from medldm.data import build_datamodule
from medldm.diffusion.sampler import DPMSolverSampler
from tests.helpers import compose_config
from tests.training import LDM, load

KEYS = ("image", "mask", "edges")


def make_data(root, latents=None):
    from omegaconf import OmegaConf

    cfg = compose_config("train", LDM, "debug=tiny", f"data.root={root}", "data.batch_size=4")
    data = OmegaConf.to_container(cfg.data, resolve=True) | {"latents": latents}
    keys = ("latent", "mask", "edges") if latents else KEYS
    return build_datamodule(data, keys=keys, seed=0)


def make_trainer() -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


@pytest.fixture
def module(diffusion):
    return load_module(diffusion)


def test_training_latents_have_mean_0_and_deviation_1(module, prepared):
    data = make_data(prepared)
    z = torch.cat([module.latents(batch) for batch in data.loader(data.dataset("train"))])
    z = z.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(z.mean(1), torch.zeros(len(z)).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(1, unbiased=False), torch.ones(len(z)).double(), atol=1e-5, rtol=0)


def test_sampling_leaves_the_model_and_its_codebook_as_they_are(module, prepared):
    data = make_data(prepared)
    batch = next(iter(data.loader(data.dataset("val"))))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.train()  # as in the middle of training
    images = module.sample(batch, batch["case_id"], (8, 8))
    assert images.shape == batch["image"].shape
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_training_leaves_the_first_stage_as_it_was(diffusion, first_stage):
    first, second = load(first_stage)["state_dict"], load(diffusion)["state_dict"]
    keys = [key for key in first if key.startswith("autoencoder.")]
    assert "autoencoder.quantizer.codebook" in keys
    assert all(torch.equal(first[key], second[f"first_stage.{key}"]) for key in keys)


def test_cached_latents_give_the_loss_of_encoding_on_the_fly(module, prepared, first_stage):
    encode.task(
        compose_config("encode", f"checkpoint={first_stage}", f"data.root={prepared}", "data.num_workers=0")
    )
    name = next((prepared / "latents").iterdir()).name
    fly, cached = make_data(prepared), make_data(prepared, latents=name)
    batches = [next(iter(data.loader(data.dataset("train")))) for data in (fly, cached)]
    assert "image" not in batches[1]
    module.trainer = make_trainer()
    with torch.no_grad():
        a, b = (module.losses(batch, step=3)["loss"] for batch in batches)
    torch.testing.assert_close(a, b, rtol=2e-3, atol=0)  # float16 keeps 11 bits
    torch.testing.assert_close(*(module.latents(batch) for batch in batches), atol=5e-3, rtol=2e-3)


def test_the_validation_loss_is_reproducible(module, prepared):
    values = [make_trainer().validate(module, make_data(prepared), verbose=False)[0] for _ in range(2)]
    assert values[0] == values[1] and values[0]["val/loss"] > 0


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_do_not_depend_on_their_batch(module, prepared, eta):
    data = make_data(prepared)
    batch = next(iter(data.loader(data.dataset("val"))))
    one = {key: value[1:2] for key, value in batch.items()}
    sampler = DPMSolverSampler(num_steps=4, eta=eta)
    together = module.sample(batch, batch["case_id"], (8, 8), sampler=sampler)
    alone = module.sample(one, one["case_id"], (8, 8), sampler=sampler)
    again = module.sample(one, one["case_id"], (8, 8), sampler=sampler, seed=1)
    assert (alone - again).abs().max() > 0.01
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def test_the_loss_of_a_step_repeats_and_differs_between_steps(module, prepared):
    data = make_data(prepared)
    batch = next(iter(data.loader(data.dataset("train"))))
    module.trainer = make_trainer()
    with torch.no_grad():
        losses = [module.losses(batch, step)["loss"].item() for step in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]
