import csv
import json

import cv2
import numpy as np
import pytest
from synthetic_folders import smooth_images, write_case

from medldm.commands import evaluate
from medldm.evaluation.baselines import mean_images
from medldm.evaluation.conditions import read_conditions
from medldm.evaluation.matching import attributes_to_match, random_partners
from medldm.evaluation.pairs import known_facts, make_pairs
from medldm.evaluation.stored import load

QUICK = ("metrics.bootstrap.num_resamples=200", "panel_rows=1", "paths.weights=null")


def paths(folder):
    return f"generated={folder}/samples", f"reference={folder}/data", f"output={folder}/evaluation"


def run(call, folder, *more):
    status, out, err = call(evaluate, *paths(folder), *QUICK, *more)
    assert status == 0, err
    return json.loads((folder / "evaluation" / "metrics.json").read_text()), out


def test_evaluate_writes_numbers_cases_and_panels(call, folders):
    results, out = run(call, folders)
    rows = results["rows"]
    assert results["n"] == {"images": 24, "subjects": 3, "samples_per_condition": 1}
    assert list(rows) == ["generated", "mean_image", "random_real", "shuffled", "real"]
    assert rows["generated"]["nmse_var"]["mean"] < 0.5 < rows["shuffled"]["nmse_var"]["mean"]
    assert rows["real"]["edge_f1_1px"]["n"] == 24
    low, high = rows["generated"]["ssim"]["ci95"]
    assert low <= rows["generated"]["ssim"]["mean"] <= high
    assert results["differences"]["random_real"]["ssim"]["ci95"][0] > 0
    assert set(results["groups"]) == {"view", "phase", "slice_third"}
    assert results["groups"]["view"]["LA"]["generated"]["ssim"]["n"] == 6
    assert results["groups"]["slice_third"]["first"]["generated"]["ssim"]["n"] == 6
    assert results["condition"]["edges_from_test_image"] == 0
    assert results["provenance"]["generated"]["checkpoint_sha256"] == "abc123"
    assert str(folders / "evaluation" / "metrics.json") in out
    assert all(
        (folders / "evaluation" / "panels" / f"{kind}.png").is_file() for kind in ("best", "median", "worst")
    )


def test_per_case_lines_average_to_the_table(call, folders):
    results, _ = run(call, folders)
    with open(folders / "evaluation" / "per_case.csv") as file:
        lines = [line for line in csv.DictReader(file) if line["row"] == "generated"]
    assert len(lines) == 24 and {line["view"] for line in lines} == {"SA", "LA"}
    mean = np.mean([float(line["psnr"]) for line in lines])
    assert mean == pytest.approx(results["rows"]["generated"]["psnr"]["mean"], rel=1e-6)


def test_missing_inception_weights_leave_the_rest_running(call, folders, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(folders / "nowhere"))
    results, out = run(call, folders)
    for name in ("fid", "kid"):
        assert "pt_inception-2015-12-05-6726825d.pth" in results["networks"][name]["missing"]
    score = results["distribution"]["generated"]["frechet_random_conv"]
    assert score["n"] == score["n_reference"] == 24 and score["value"] > 0
    assert len(results["networks"]["frechet_random_conv"]["sha256"]) == 64
    assert "fid" not in results["distribution"]["generated"]
    assert any("n = 24 is below the 224 features" in line for line in results["warnings"])


def test_identical_folders_score_perfectly(call, folders):
    results, _ = run(call, folders, f"generated={folders}/data")
    rows = results["rows"]["generated"]
    assert rows["ssim"]["mean"] == pytest.approx(1) and rows["nmse_var"]["mean"] == 0
    assert rows["psnr"]["mean"] == "inf"
    assert results["distribution"]["generated"]["frechet_random_conv"]["value"] < 1e-6
    assert results["condition"]["edges_from_test_image"] == 1
    assert "very test image" in results["condition"]["note"]


def test_results_repeat_under_the_same_seed(call, folders):
    first, _ = run(call, folders, "seed=3")
    again, _ = run(call, folders, "seed=3")
    assert first["rows"] == again["rows"] and first["distribution"] == again["distribution"]


def test_mean_image_comes_from_training_subjects_only(call, folders):
    results, _ = run(call, folders, f"train={folders}/data")
    assert results["mean_image"].startswith("mean over 8 training images, split 'default'")


def test_mean_image_leaves_the_judged_subject_out(folders):
    pairs = make_pairs(folders / "samples", folders / "data", None)
    means = mean_images(pairs, None, ("view",))
    others = [load(p.real) for p in pairs if p.subject != "001" and p.attributes["view"] == 1]
    assert np.allclose(load(means[0]), np.mean(others, 0), atol=1e-6)


def test_partners_are_other_subjects_of_the_same_view_and_phase_where_these_are_matched(folders):
    pairs = make_pairs(folders / "samples", folders / "data", None)
    match = ("view", "phase")
    partners = random_partners(pairs, 0, match)
    assert partners == random_partners(pairs, 0, match) != random_partners(pairs, 1, match)
    for pair, i in zip(pairs, partners, strict=True):
        assert pairs[i].subject != pair.subject and pairs[i].place(match) == pair.place(match)


def test_reconstruction_is_a_row(call, folders):
    results, _ = run(call, folders, f"reconstruction={folders}/samples")
    assert results["rows"]["reconstruction"]["mae"] == results["rows"]["generated"]["mae"]


def test_several_samples_give_mean_best_and_diversity(call, folders):
    for i, subject in enumerate(("001", "002", "003")):
        images = smooth_images(8, 32, seed=i)
        path = folders / "samples" / f"{subject}.h5"
        path.unlink()
        write_case(path, images + 0.2, extra={"images_1": images - 0.1})
    results, _ = run(call, folders)
    rows = results["rows"]
    assert results["n"]["samples_per_condition"] == 2
    best, mean = rows["generated_best_of_k"]["rmse"]["mean"], rows["generated_mean_of_k"]["rmse"]["mean"]
    assert best < mean < rows["generated"]["rmse"]["mean"]
    assert rows["generated_mean_of_k"]["diversity_rmse"]["mean"] == pytest.approx(0.15, abs=0.01)


def test_png_folders_are_compared_too(call, tmp_path):
    images = smooth_images(6, 32, seed=0)
    for folder, shift in (("samples", 4), ("data", 0)):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(images):
            grey = np.clip((image + 1) * 127.5 + shift, 0, 255).round().astype(np.uint8)
            cv2.imwrite(str(tmp_path / folder / f"p{i % 3}_{i:03d}.png"), grey)
    results, _ = run(call, tmp_path)
    assert results["n"]["images"] == 6 and results["n"]["subjects"] == 3
    assert results["rows"]["generated"]["mae"]["mean"] == pytest.approx(4 / 255, rel=0.05)
    assert "edge_f1_1px" not in results["rows"]["generated"]


def test_a_part_of_a_case_is_matched_by_its_rows(folders):
    import h5py

    path = folders / "samples" / "002.h5"
    path.unlink()
    write_case(path, smooth_images(8, 32, seed=1)[4:], extra={"row": np.arange(4, 8)})
    with h5py.File(path, "r+") as file, h5py.File(folders / "data" / "cases" / "002.h5") as whole:
        for name in ("view", "phase", "slice_index", "num_slices"):
            file[name][:] = whole[name][4:]
    pairs = make_pairs(folders / "samples", folders / "data", folders / "samples")
    part = [pair for pair in pairs if pair.subject == "002"]
    assert [pair.id for pair in part] == [f"002_{row:03d}" for row in range(4, 8)]
    assert all(np.array_equal(load(pair.generated[0]), load(pair.real)) for pair in part)


def fail(call, folder, *more):
    status, _, err = call(evaluate, *paths(folder), *QUICK, *more)
    assert status == 2 and len(err.strip().splitlines()) == 1, err
    assert not (folder / "evaluation").exists()
    return err


def test_a_missing_folder_is_named(call, folders):
    assert f"{folders}/nothing" in fail(call, folders, f"generated={folders}/nothing")
    assert f"{folders}/nothing" in fail(call, folders, f"reference={folders}/nothing")


def test_a_shape_that_differs_is_named(call, folders):
    (folders / "samples" / "002.h5").unlink()
    write_case(folders / "samples" / "002.h5", smooth_images(8, 24, seed=1))
    assert "'002_000' has shape (1, 24, 24) and its reference (1, 32, 32)" in fail(call, folders)


def test_all_images_of_another_shape_are_listed(call, folders):
    (folders / "samples" / "002.h5").unlink()
    write_case(folders / "samples" / "002.h5", smooth_images(8, 24, seed=3))
    said = fail(call, folders)
    assert "8 of 24 files cannot be used" in said and "'002_001' has shape" in said and "and 3 more" in said


def test_names_without_a_partner_are_told(call, folders):
    write_case(folders / "other" / "x.h5", smooth_images(8, 32, seed=1))
    assert "no image has a name in common" in fail(call, folders, f"generated={folders}/other")
    write_case(folders / "samples" / "x.h5", smooth_images(8, 32, seed=1))
    assert "'x_000' has no image of that name" in fail(call, folders)


def test_slices_in_another_order_are_not_compared(call, folders):
    path = folders / "samples" / "002.h5"
    path.unlink()
    write_case(path, smooth_images(8, 32, seed=1))
    import h5py

    with h5py.File(path, "r+") as file:
        file["phase"][:] = 1 - file["phase"][:]
    assert "is phase 1 and its reference phase 0" in fail(call, folders)


def test_unknown_metrics_and_baselines_are_named(call, folders):
    assert "no metric 'sim'" in fail(call, folders, "metrics.image=[sim]")
    assert "no network 'vgg'" in fail(call, folders, "metrics.features=[vgg]")
    assert "no baseline 'zero'" in fail(call, folders, "metrics.baselines=[zero]")


def test_copies_of_training_images_are_counted(call, folders, tmp_path):
    from medldm.data.records import read_images

    copies = tmp_path / "train"
    (copies / "images").mkdir(parents=True)
    for record in read_images(folders / "samples"):  # the "training set": what the model then gave back
        picture = np.rint((record.image[0] + 1) * 127.5).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(copies / "images" / f"train_{record.id}.png"), picture)
    results, out = run(call, folders, f"train={copies / 'images'}")
    assert results["rows"]["generated"]["nearest_train_rmse"]["mean"] < 0.005
    assert results["rows"]["real"]["nearest_train_rmse"]["mean"] > 0.01
    assert results["memorization"]["memorized_share"] == 1
    audit, closest = (results["memorization"][key] for key in ("audit", "closest"))
    assert audit["num_copies"] == audit["num_images"] and closest[0]["correlation"] > 0.99
    assert "100.0% of the generated images lie as near" in out
    assert run(call, folders)[0]["memorization"] == {}


# ---- every row on the same images, or marked ----


def label_slices(folder, labels: dict[str, int], told: list[str]) -> None:
    """Give the subjects a label and the samples a provenance that says what the model was told."""
    index = json.loads((folder / "data" / "index.json").read_text())
    for case in index["cases"]:
        case["slices"] = {"label": [labels[case["subject"]]] * 8}
    index["label_values"] = ["healthy", "sick"]
    (folder / "data" / "index.json").write_text(json.dumps(index))
    made = {"condition": ["mask", "edges"], "attributes": told, "dropped": []}
    (folder / "samples" / "provenance.json").write_text(json.dumps(made))


LABELS = {"001": 0, "002": 0, "003": 1, "004": 0}
STAND_INS = ("mean_image", "random_real", "shuffled")


@pytest.mark.parametrize("told", [[], ["label"], ["view", "phase", "label"]])
def test_all_rows_are_on_all_images_whatever_their_labels(call, folders, told):
    """A subject that is alone with its label has no stand-in of it: the label is then not matched."""
    label_slices(folders, LABELS, told)
    results, out = run(call, folders)
    for row in ("generated", *STAND_INS, "real"):
        facts = results["cases"]["rows"][row]
        assert (facts["n"], facts["num_subjects"], facts["same_as_generated"]) == (24, 3, True)
    for row in STAND_INS:
        assert results["rows"][row]["ssim"]["n"] == 24
        assert results["matched_on"][row] == [name for name in told if name != "label"]
        said = "label is not matched: it would leave 8 of 24 images without one"
        assert (said in results["row_definitions"][row]) == bool(told)
    assert out.count("24 (3)") == 5 and "*" not in out
    with open(folders / "evaluation" / "per_case.csv") as file:
        lines = list(csv.DictReader(file))
    assert {line["row_n"] for line in lines} == {"24"} and len(lines) == 5 * 24


def test_a_row_on_fewer_images_is_marked_and_compared_on_the_same_ones(call, folders):
    label_slices(folders, LABELS, [])
    results, out = run(call, folders, "metrics.match=[label]", "metrics.features=[random_conv]")
    for row in STAND_INS:
        facts, beside = results["cases"]["rows"][row], results["generated_beside"][row]
        assert (facts["n"], facts["num_subjects"], facts["same_as_generated"]) == (16, 2, False)
        assert facts["without"] == ["003_000", "003_001", "003_002"]
        assert beside["psnr"]["n"] == results["rows"][row]["psnr"]["n"] == 16
        gap = beside["psnr"]["mean"] - results["rows"][row]["psnr"]["mean"]
        assert results["differences"][row]["psnr"]["mean"] == pytest.approx(gap)
        assert any(f"{row} is on 16 of 24 images (of 2 subjects" in line for line in results["warnings"])
    assert out.count("16 (2) *") == 3 and "the 16 images (2 subjects) that shuffled is on" in out
    sets = results["distribution"]
    assert sets["mean_image"]["frechet_random_conv"]["n_reference"] == 16
    assert sets["generated"]["frechet_random_conv"]["n_reference"] == 24
    with open(folders / "evaluation" / "per_case.csv") as file:
        numbers = {line["row"]: line["row_n"] for line in csv.DictReader(file)}
    assert numbers == {"generated": "24", "real": "24"} | dict.fromkeys(STAND_INS, "16")


def test_a_row_that_cannot_be_made_is_said(call, folders):
    for name in ("002", "003"):
        (folders / "samples" / f"{name}.h5").unlink()
    results, out = run(call, folders)
    assert list(results["rows"]) == ["generated", "real"]
    for row in STAND_INS:
        assert f"note: {row} left out: " in out


AGES = {"001": ("41", "F"), "002": ("63", "F"), "003": ("60", "M"), "004": ("44", "F")}


def test_stand_ins_have_the_sex_and_the_nearest_age_of_whom_they_stand_for_where_these_were_conditions(
    call, folders
):
    index = json.loads((folders / "data" / "index.json").read_text())
    for case in index["cases"]:
        case["attributes"] = dict(zip(("age", "sex"), AGES[case["id"]], strict=True))
    (folders / "data" / "index.json").write_text(json.dumps(index))
    told = {"condition": ["edges"], "attributes": ["age", "sex"], "checkpoint_sha256": "abc123"}
    (folders / "samples" / "provenance.json").write_text(json.dumps(told))
    write_case(folders / "samples" / "004.h5", smooth_images(8, 32, seed=4))
    pairs = make_pairs(folders / "samples", folders / "data", None)
    wanted = attributes_to_match("auto", read_conditions(told), known_facts(folders / "data"), pairs)
    assert wanted == (("sex",), {"age": 22.0})
    partners = random_partners(pairs, 0, (), wanted.scalars)
    nearest = {pair.subject: pairs[i].subject for pair, i in zip(pairs, partners, strict=True)}
    assert nearest == {"001": "004", "002": "003", "003": "002", "004": "001"}
    partners = random_partners(pairs, 0, ("sex",), wanted.scalars)
    same = {
        pair.subject: None if i is None else pairs[i].subject for pair, i in zip(pairs, partners, strict=True)
    }
    assert same == {"001": "004", "002": "004", "003": None, "004": "001"}
    results, _ = run(call, folders, "metrics.match=[age]")
    for row in ("random_real", "shuffled"):
        assert (results["matched_on"][row], results["nearest_in"][row]) == ([], ["age"])
        assert ", nearest age" in results["row_definitions"][row]
    assert "age is a number: the mean is over all of its values" in results["row_definitions"]["mean_image"]


def test_an_unknown_attribute_to_match_is_named(call, folders):
    assert "no attribute 'vendor'; choose auto or from" in fail(call, folders, "metrics.match=[vendor]")


# ---- edges that were given, and edges that were not ----


@pytest.mark.parametrize(
    ("made", "name", "said"),
    [
        ({"condition": ["edges"], "dropped": []}, "edge_f1_1px", "the edges differ from those of the test"),
        ({"condition": ["edges"], "dropped": ["edges"]}, "edge_f1_real_1px", "edges withheld when"),
        ({"condition": ["mask"], "dropped": []}, "edge_f1_real_1px", "drawn without edges"),
        ({"condition": ["edges"], "edge_level": 0.5}, "edge_f1_1px", "edges (edge_level 0.5)"),
    ],
)
def test_edges_count_as_the_condition_only_where_they_were_given(folders, call, made, name, said):
    (folders / "samples" / "provenance.json").write_text(json.dumps(made))
    quick = ("metrics.features=[]", "metrics.lpips=null", "metrics.image=[psnr]", "metrics.baselines=[]")
    results, out = run(call, folders, *quick, "panel_rows=0")
    found = {key for key in results["rows"]["generated"] if key.startswith("edge_f1")}
    assert found == {name, name.replace("1px", "2px")} and said in out
    assert "very test image" not in out and results["condition"]["edges_from_test_image"] == 0
    assert results["definitions"][name].endswith("within 1 px (Chebyshev)")


def test_pictures_of_another_program_are_not_taken_for_made_from_edges(folders, call):
    from medldm.data.records import read_images

    (folders / "pictures").mkdir()
    for record in read_images(folders / "samples"):
        grey = np.rint((record.image[0] + 1) * 127.5).astype(np.uint8)
        cv2.imwrite(str(folders / "pictures" / f"{record.id}.png"), grey)
    quick = ("metrics.features=[]", "metrics.lpips=null", "metrics.image=[psnr]", "metrics.baselines=[]")
    results, out = run(call, folders, f"generated={folders}/pictures", *quick, "panel_rows=0")
    assert results["condition"]["edges_from_test_image"] is None and "is not recorded" in out
    assert "edge_f1_real_1px" in results["rows"]["generated"]
