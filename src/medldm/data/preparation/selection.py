"""Which of a dataset's cases are prepared, under which names and in which split."""

import inspect
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medldm.data.case import Case
from medldm.data.datasets import find_dataset
from medldm.data.preparation.recipe import Recipe
from medldm.data.raw.tables import Note
from medldm.data.splits import subset_of
from medldm.errors import InputError
from medldm.files import safe_names

log = logging.getLogger(__name__)


def frame_step(cine: bool | int | None) -> int | None:
    """`data.cine` as a step from frame to frame, None for no frames."""
    if cine is None or cine is False:
        return None
    if not isinstance(cine, int) or cine < 1:
        raise InputError(f"data.cine={cine}: give true (every frame), a number n (every nth frame), or false")
    return int(cine)


def find_cases(
    dataset: str, raw: str | Path, options: Mapping[str, Any], note: Note = log.info
) -> list[Case]:
    """The cases of a dataset, which tells `note` what is worth a line; InputError for an option that it has
    not.
    """
    index = find_dataset(dataset).index
    given = {key: value for key, value in options.items() if value is not None}
    taken = inspect.signature(index).parameters.keys()
    if given.keys() - taken:
        raise InputError(
            f"data.{min(given.keys() - taken)}: the dataset {dataset} has no such option; set it to null"
        )
    given |= {"note": note} if "note" in taken else {}
    cases = index(raw, **given)
    twice = next((name for name, count in Counter(case.id for case in cases).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"data.raw={raw}: two images would be the case {twice:.120}; rename one of them")
    return cases


def with_their_cine(found: Sequence[Case], recipe: Recipe, **select: Any) -> list[Case]:
    """The selected cases, and the CINE frames of their subjects. InputError where a recipe has no use for
    frames.
    """
    cases = select_cases([case for case in found if not case.is_cine], **select)
    subjects = {case.subject for case in cases}
    frames = [case for case in found if case.is_cine and case.subject in subjects]
    if frames and recipe.spatial_dims != 2:
        raise InputError(
            "data.cine: frames are prepared as slices; set data.spatial_dims=2 or data.cine=false"
        )
    if frames and recipe.crop_label_margin is not None:
        raise InputError(
            "data.cine: frames have no class map to crop to; set data.preprocess.crop_label_margin=null or "
            "data.cine=false"
        )
    return cases + frames


def select_cases(
    cases: Sequence[Case],
    *,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    max_images: int | None = None,
    seed: int = 0,
) -> list[Case]:
    """The cases of some labels and of one part of the data's own `split`, and at most `max_images` of these,
    drawn with `seed` and kept in order. A part that is prepared alone is split anew.
    """
    if split is not None:
        cases = part_of(cases, split)
    if classes is not None:
        known = {str(case.attributes["label"]) for case in cases if "label" in case.attributes}
        unknown = [name for name in classes if str(name) not in known]
        if unknown:
            raise InputError(
                f"data.select.classes: no image has the label {unknown[0]}; "
                f"there are {', '.join(sorted(known)) or 'none'}"
            )
        cases = [case for case in cases if str(case.attributes.get("label")) in map(str, classes)]
    if max_images is not None and max_images < 1:
        raise InputError(f"data.select.max_images={max_images}: give 1 or more, or null for all")
    if max_images is None or len(cases) <= max_images:
        return list(cases)
    drawn = np.random.default_rng(seed).permutation(len(cases))[:max_images]
    return [cases[i] for i in sorted(drawn)]


def with_safe_names(cases: Sequence[Case], note: Note) -> list[Case]:
    """The cases with ids and subjects that name one file each inside a folder, on any system."""
    subjects = safe_names(dict.fromkeys(case.subject for case in cases))
    ids = safe_names(dict.fromkeys(case.id for case in cases))
    for what, names in (("subjects", subjects), ("cases", ids)):
        changed = [name for name, safe in names.items() if name != safe]
        if changed:
            note(
                f"{len(changed)} {what} have names that are no safe file names, or differ in case alone, and "
                f"got others ({shorten(changed[0])} -> {shorten(names[changed[0]])}); index.json keeps the "
                "original"
            )
    return [
        case
        if (case.id, case.subject) == (ids[case.id], subjects[case.subject])
        else replace(
            case,
            id=ids[case.id],
            subject=subjects[case.subject],
            original={"original_id": case.id, "original_subject": case.subject},
        )
        for case in cases
    ]


def shorten(name: str, length: int = 60) -> str:
    return name if len(name) <= length else f"{name[: length // 2]}...{name[-length // 2 :]}"


def part_of(cases: Sequence[Case], split: str) -> list[Case]:
    """The cases of one part of the stated split, which is then no split any more; all of data without one."""
    stated = {str(case.attributes["split"]) for case in cases if "split" in case.attributes}
    wanted = subset_of(split)
    kept = [c for c in cases if not stated or subset_of(str(c.attributes.get("split", ""))) == wanted]
    if wanted is None or not kept:
        there = ", ".join(sorted(stated)) or "no split"
        raise InputError(f"data.select.split={split}: no image is in this part; the data state {there}")
    return [
        replace(case, attributes={k: v for k, v in case.attributes.items() if k != "split"}) for case in kept
    ]


def stated_splits(cases: Sequence[Case]) -> dict[str, str] | None:
    """The data's own split of each subject, or None where they state none."""
    stated: dict[str, str] = {}
    for case in cases:
        name = case.attributes.get("split")
        if name is None:
            continue
        part = subset_of(str(name)) or str(name)
        if stated.setdefault(case.subject, part) != part:
            raise InputError(
                f"{case.main_path}: subject {case.subject} is in both {stated[case.subject]} and {part}; "
                "keep it in one split"
            )
    bare = next((case for case in cases if case.subject not in stated), None)
    if stated and bare:
        raise InputError(
            f"{bare.main_path}: subject {bare.subject} has no split while others have; state it for all, or "
            "for none"
        )
    return stated or None
