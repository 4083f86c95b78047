"""Where judged images come from: whether from these very cases as they are prepared now, and of which
subjects.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from medldm.data.hdf5 import made_from, open_hdf5
from medldm.data.loading.dataset import array_digests
from medldm.errors import InputError
from medldm.evaluation.stored import hdf5_files
from medldm.fingerprints import digest, file_sha256
from medldm.held_out import Seen
from medldm.schemas import Provenance, read_checked

HELD_OUT = ("val", "test")
ARRAYS = ("image", "mask", "edges", "source")


def read_provenance(folders: Mapping[str, Path | None]) -> dict[str, dict]:
    """provenance.json of the folders of images that have one."""
    found = {}
    for name in ("generated", "reconstruction", "spade", "regression"):
        path = folders.get(name) and folders[name] / "provenance.json"
        if path and path.is_file():
            found[name] = read_checked(path, Provenance, "make the images again")
    return found


def for_report(provenance: Mapping[str, dict]) -> dict[str, dict]:
    """The provenance without the long list of subjects, which may be all of a dataset."""
    return {
        name: facts | {"training_subjects": len(facts["training_subjects"])}
        if isinstance(facts.get("training_subjects"), list)
        else facts
        for name, facts in provenance.items()
    }


def check_unseen(
    provenance: Mapping[str, dict], segmenter: Seen | None, subjects: Collection[str], allow: bool
) -> Iterator[str]:
    """A line for every folder whose model, and one for the segmenter, if it was trained on judged subjects or
    does not know. InputError where the images were sampled as held-out ones, unless `allow`.
    """
    judged = set(subjects)
    is_held_out = provenance.get("generated", {}).get("split") in HELD_OUT
    for name, facts in provenance.items():
        if "checkpoint_sha256" not in facts:
            continue
        each = (
            list(facts["images"].values()) if "images" in facts else [facts]
        )  # of translate: an entry a file
        unrecorded = any(one.get("unrecorded_stages") or "training_subjects" not in one for one in each)
        trained = {subject for one in each for subject in one.get("training_subjects", ())}
        what = f"{name}: the checkpoint of its images"
        yield from seen_line(what, judged, trained, is_held_out and not allow)
        if unrecorded:
            yield f"{what} does not say which subjects it was trained on (an older medldm wrote it)"
    if segmenter is not None:
        yield from seen_line("segmenter", judged, segmenter.all, is_held_out and not allow)
        if segmenter.unrecorded:
            yield "segmenter: does not say which subjects it was trained on (an older medldm wrote it)"


def seen_line(what: str, judged: set[str], trained: set[str], is_refused: bool) -> Iterator[str]:
    both = sorted(judged & trained)
    if not both:
        return
    line = f"{what} was trained on {len(both)} of the {len(judged)} judged subjects ({both[0]}, ...)"
    if is_refused:
        raise InputError(
            f"{line}, which were sampled as held-out ones; sample with the data.split of the training, or "
            "set allow_training_subjects=true"
        )
    yield line


def check_cases(
    folders: Mapping[str, Path | None], provenance: Mapping[str, dict], index: Mapping[str, Any]
) -> Iterator[str]:
    """A line for every folder whose images were made from other preparations of their cases than the index
    speaks of. InputError where it is the very data that they were made from.
    """
    cases = {case["id"]: case for case in index.get("cases", ())}
    for name in provenance:
        check_one_run(folders[name])
        stale = [
            path.stem
            for path in hdf5_files(folders[name])
            if is_changed(made_from(path), expected_content(path.stem, cases))
        ]
        if not stale:
            continue
        line = f"{name}: {len(stale)} cases ({stale[0]}, ...) were prepared otherwise when they were sampled"
        if provenance[name].get("data_root") == str(folders["reference"].resolve()):
            raise InputError(f"{folders[name]}: {line}; run `medldm sample` into this folder again")
        yield line


def check_one_run(folder: Path) -> None:
    """InputError where files of several runs of `medldm sample` lie in a folder: provenance.json speaks of
    one.
    """
    runs = {path: open_hdf5(path).attributes.get("settings_digest") for path in hdf5_files(folder)}
    if len(set(runs.values())) > 1:
        first = next(iter(runs.values()))
        other = next(path for path, run in runs.items() if run != first)
        raise InputError(
            f"{other}: sampled with other settings than {next(iter(runs)).name} beside it; run "
            "`medldm sample` into an empty folder"
        )


def expected_content(case_id: str, cases: Mapping[str, dict]) -> dict[str, str]:
    """Digests of a case's arrays; for a translation, those of its target and of its source."""
    source_id, is_pair, target = case_id.rpartition("_to_")
    if case_id in cases or not is_pair or source_id not in cases:
        return array_digests(cases.get(case_id, {}))
    source = cases[source_id]
    content = array_digests(cases.get(f"{source['subject']}_{target}", {}))
    return content and content | {"source": array_digests(source).get("image")}


def is_changed(stated: Mapping[str, str], expected: Mapping[str, str | None]) -> bool:
    return any(
        None not in (stated.get(key), expected.get(key)) and stated[key] != expected[key] for key in ARRAYS
    )


def describe_inputs(folders: Mapping[str, Path | None], index: Mapping[str, Any]) -> dict[str, Any]:
    """Digests by which a report knows whether what was judged has changed since."""
    cases = {case["id"]: array_digests(case) for case in index.get("cases", ())}
    return {
        "reference": digest(cases) if cases and all(cases.values()) else None,
        "preprocess_hash": index.get("preprocess_hash"),
        "generated": images_digest(folders["generated"]),
    }


def images_digest(folder: Path) -> str | None:
    """A digest of the files in a folder, by their names and sizes, and of what those of `medldm sample` say
    they were made from and how; None where there is no such folder.
    """
    if not folder.is_dir():
        return None
    content = []
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."):
        stated = open_hdf5(path).attributes if path.suffix == ".h5" else {}
        name = str(path.relative_to(folder))
        content.append(
            [name, path.stat().st_size, *(stated.get(key) for key in ("made_from", "settings_digest"))]
        )
    return digest(content)


def changes_since(results: Mapping[str, Any], runs: Collection[str]) -> Iterator[str]:
    """A line where images were made anew, or a checkpoint of these run folders was trained on, since an
    evaluation, whose metrics.json is `results`.
    """
    judged = (results.get("inputs") or {}).get("generated")
    folder = (results.get("folders") or {}).get("generated")
    now = images_digest(Path(folder)) if judged and folder else None
    if now is not None and now != judged:
        yield f"{folder}: changed since these numbers were measured; run `medldm evaluate` again"
    made = (results.get("provenance") or {}).get("generated") or {}
    path = Path(made.get("checkpoint", ""))
    is_ours = any(path.resolve().is_relative_to(Path(run).resolve()) for run in runs)
    if path.is_file() and is_ours and file_sha256(path) != made.get("checkpoint_sha256"):
        yield f"{path}: trained on since the judged images were sampled; sample and evaluate again"
