"""A student learns its teacher's samples, and stands alone afterwards."""

import pytest
import torch

from medldm.build import load_module
from medldm.commands import plan
from medldm.diffusion.sampler import EulerSampler
from medldm.errors import InputError
from medldm.models.distillation import DistillationModule
from tests.helpers import compose_config
from tests.training import load, make_batches, run_training

DISTILL = "experiment=cardiac2d/distill"


@pytest.fixture(scope="module")
def student(prepared, diffusion, tmp_path_factory):
    """last.ckpt of a student after two updates."""
    options = (f"model.teacher.checkpoint={diffusion}", "model.teacher.num_steps=3")
    return run_training(prepared, tmp_path_factory.mktemp("student") / "run", DISTILL, *options)


def taught(diffusion, student, *, kind="euler", num_steps=1, student_steps=(1,)):
    """A student that has its teacher's weights still."""
    module, teacher = load_module(student), load_module(diffusion)
    module.load_state_dict(teacher.state_dict())
    module.student_steps = student_steps
    module.teachers_sampler = type(module.teachers_sampler)(num_steps=num_steps)
    if kind == "euler":
        module.teachers_sampler = EulerSampler(num_steps=num_steps)
    module.learn_from(teacher)
    return module


def losses(module):
    (batch,) = make_batches(1, 2, 64)
    noise = torch.randn(
        2, module.first_stage.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        return module.pair_losses(batch, noise, None), batch, noise


def test_a_student_is_trained_where_it_is_evaluated(student):
    module = load_module(student)
    assert module.student_times().tolist() == [1.0, 0.75, 0.5, 0.25]
    module.student_steps = (3,)
    assert module.student_times().tolist() == pytest.approx([1.0, 0.667, 0.333])  # whole steps of 1000


def test_who_has_learnt_its_teacher_has_no_loss(diffusion, student):
    """One evaluation of either is the same, so long as the weights are."""
    found, _, _ = losses(taught(diffusion, student))
    assert found["loss"].item() == pytest.approx(0, abs=1e-8)


def test_the_loss_is_the_objectives_on_the_teachers_image(diffusion, student):
    module = taught(diffusion, student, num_steps=4, student_steps=(1, 2))
    found, batch, noise = losses(module)
    teacher = load_module(diffusion)
    with torch.no_grad():
        condition = teacher.condition(batch)
        denoise = teacher.objective.denoiser(teacher.network, teacher.schedule, condition)
        x = EulerSampler(num_steps=4)(denoise, teacher.schedule, noise)
        errors = []
        for time in (1.0, 0.5):
            t = torch.full((2,), time)
            alpha, sigma, *_ = teacher.schedule.scales(teacher.schedule.gamma(t), x)
            velocity = alpha * noise - sigma * x
            z_t = alpha * x + sigma * noise
            said = teacher.network(z_t, teacher.schedule.network_time(t, None), condition)
            errors.append((said - velocity).square().mean())
    torch.testing.assert_close(found["loss"], torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


def test_a_student_stands_alone(diffusion, student, tmp_path):
    """Its checkpoint holds no teacher, and is loaded without one; it remembers whom its teacher has seen."""
    content, teacher = load(student), load(diffusion)
    assert content["state_dict"].keys() == teacher["state_dict"].keys()
    assert content["medldm"]["init_from"]["data"] == teacher["medldm"]["data"]
    assert content["medldm"]["model"]["network"] == teacher["medldm"]["model"]["network"]
    module = load_module(student)
    assert isinstance(module, DistillationModule) and module.sampler.num_steps == 2  # shrunk from 4
    moved = [
        not torch.equal(a, b)
        for a, b in zip(module.network.parameters(), load_module(diffusion).network.parameters(), strict=True)
    ]
    assert any(moved)
    stages = (load_module(diffusion).first_stage.state_dict(), module.first_stage.state_dict())
    assert all(torch.equal(stages[0][key], stages[1][key]) for key in stages[0])
    (batch,) = make_batches(1, 2, 64)
    assert module.sample(batch, ["a", "b"], (8, 8)).isfinite().all()


def test_what_only_plans_a_distillation_is_told_where_its_parts_are():
    with pytest.raises(InputError, match="model.teacher.checkpoint: a student's parts are its teacher's"):
        plan.task(compose_config("plan", DISTILL))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "model.teacher.checkpoint: not given"),
        (
            ("model.teacher.checkpoint={first_stage}",),
            "of the kind autoencoder; give a latent diffusion model",
        ),
        (
            ("model.teacher.checkpoint={diffusion}", "model.teacher.kind=ancestral"),
            "kind=ancestral is none of",
        ),
        (("model.teacher.checkpoint={diffusion}", "model.student_steps=[0]"), "must be whole numbers"),
    ],
)
def test_a_teacher_that_cannot_teach_is_told_in_one_line(
    prepared, first_stage, diffusion, tmp_path, options, text
):
    paths = {"first_stage": first_stage, "diffusion": diffusion}
    with pytest.raises(InputError, match=text):
        run_training(prepared, tmp_path / "run", DISTILL, *(option.format(**paths) for option in options))
