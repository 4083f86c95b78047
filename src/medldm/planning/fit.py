"""Finds what fits a card: the largest batch, the largest crop, with activation checkpointing or without."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from medldm.planning.estimate import Estimate, Planner
from medldm.planning.step import Job

SWITCH = "use_checkpoint"  # the argument of networks that switches activation checkpointing on
SMALLER = 0.5  # edges of the crop that is traced beside the planned one, as a share of its edges


def advice(planner: Planner, found: Estimate, plan: Mapping[str, Any]) -> Iterator[str]:
    """The lines below the table: what fits the card, and how long the experiment will take."""
    limit = planner.card.memory_gib / plan["reserved"]
    most = planner.largest(found, limit)
    fits, needed = found.memory.allocated <= limit, found.memory.allocated
    yield (
        f"{needed:.1f} GiB in tensors and scratch, {needed * plan['reserved']:.1f} with the allocator's "
        f"rounding, of {planner.card.memory_gib:.1f}: "
        + (f"fits; data.batch_size up to {most}" if fits else "DOES NOT FIT")
    )
    if not fits and most:
        wanted = found.batch_size * plan["trainer"]["accumulate_grad_batches"]
        yield f"use data.batch_size={most} trainer.accumulate_grad_batches={-(-wanted // most)}"
    if plan["alternatives"] is True or (plan["alternatives"] == "auto" and not fits):
        yield from checkpointing_advice(planner, found, limit)
        yield from crop_advice(planner, found, limit)
    yield from time_advice(found, plan)
    yield (
        "assumed: Adam in float32, every loss on, discriminators too; convolutions may copy their tensors; "
        "what kernels reach of the card's peaks as in configs/plan.yaml"
    )


def time_advice(found: Estimate, plan: Mapping[str, Any]) -> Iterator[str]:
    updates = plan["updates"] or max(0, plan["trainer"]["max_steps"])
    if updates:
        hours = updates * plan["trainer"]["accumulate_grad_batches"] * found.expected / 3600
        yield (
            f"{1 / found.expected:.3g} steps a second expected (at most {1 / found.roofline:.3g}), "
            f"{hours:.3g} hours for {updates} updates; within a factor of {plan['spread']}, loading and "
            "validation left out"
        )


def checkpointing_advice(planner: Planner, found: Estimate, limit: float) -> Iterator[str]:
    """The memory and time of a step of the same batch with activation checkpointing switched the
    other way.
    """
    switches = dict(switches_of(planner.job.model))
    if not switches:
        return
    turn_on = not all(switches.values())
    job = replace(planner.job, model=with_switches(planner.job.model, turn_on))
    other = replace(planner, job=job).estimate(found.batch_size)
    changed = [key for key, value in switches.items() if value != turn_on]
    words = " ".join(f"model.{key}={str(turn_on).lower()}" for key in changed)
    fits = "fits" if other.memory.allocated <= limit else "does not fit"
    yield (
        f"activation checkpointing {'on' if turn_on else 'off'} ({words}): {other.memory.allocated:.1f} GiB, "
        f"{other.expected / found.expected:.2f} times the expected time: {fits}"
    )


def switches_of(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key of a model's config that turns activation checkpointing on or off, dotted, with its value."""
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from switches_of(value, f"{prefix}{key}.")
        elif key == SWITCH and isinstance(value, bool):
            yield prefix + key, value


def with_switches(part: Mapping[str, Any], on: bool) -> dict[str, Any]:
    """A model's config with activation checkpointing on, or off, everywhere."""
    return {
        key: with_switches(value, on) if isinstance(value, Mapping)
        else on if key == SWITCH and isinstance(value, bool) else value
        for key, value in part.items()
    }  # fmt: skip


def crop_advice(planner: Planner, found: Estimate, limit: float) -> Iterator[str]:
    """The largest crop of the planned proportions that fits at the planned batch."""
    if "codec" in planner.job.model:  # the sizes of its codec follow from the whole image
        return
    crop = largest_crop(planner, found, limit)
    if crop is None:
        yield "no crop fits at this batch: take a smaller batch or a larger card"
    elif crop != tuple(planner.job.image_shape):
        text = "[" + ",".join(map(str, crop)) + "]"
        yield f"data.crop_size up to {text} fits at data.batch_size={found.batch_size}"


def largest_crop(planner: Planner, found: Estimate, limit: float) -> tuple[int, ...] | None:
    """The crop on the line through the memories of two crops, made smaller until its own trace fits; no
    larger than the images. None where not even one multiple of the model's factors on each axis fits.
    """
    job, shape = planner.job, tuple(planner.job.image_shape)
    factors = job.build().size_factors or (1,) * len(shape)
    image = job.facts.get("image_size") or (None,) * len(shape)
    smaller = rounded(shape, SMALLER, factors, shape)
    if smaller == shape:
        return shape if found.memory.allocated <= limit else None
    points = [(prod(shape), found.memory.allocated)]
    points.append((prod(smaller), with_shape(planner, smaller, found).memory.allocated))
    (v1, m1), (v2, m2) = points
    voxels = v1 + (limit - m1) * (v1 - v2) / (m1 - m2) if m1 != m2 else v1
    share = (max(voxels, 0) / v1) ** (1 / len(shape))
    while min(crop := rounded(shape, share, factors, image)) > 0:
        if crop == smaller or with_shape(planner, crop, found).memory.allocated <= limit:
            return crop if crop != smaller or points[1][1] <= limit else None
        share *= 0.95
    return None


def with_shape(planner: Planner, shape: Sequence[int], found: Estimate) -> Estimate:
    job: Job = replace(planner.job, image_shape=tuple(shape))
    return replace(planner, job=job).estimate(found.batch_size)


def rounded(
    shape: Sequence[int], share: float, factors: Sequence[int], most: Sequence[int | None]
) -> tuple[int, ...]:
    """The shape's edges times `share`, as multiples of `factors` and no longer than `most`, where known."""
    edges = [int(n * share / f) * f for n, f in zip(shape, factors, strict=True)]
    return tuple(min(n, m // f * f) if m else n for n, f, m in zip(edges, factors, most, strict=True))
