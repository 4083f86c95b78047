"""The demo: every stage in one process, and a second call that only goes on."""

import json

import pytest

from medldm.commands import demo
from medldm.errors import InputError
from tests.helpers import compose_config

SHORT = (
    "['trainer.max_steps=2','trainer.limit_train_batches=2','trainer.enable_progress_bar=false',"
    "'data.batch_size=4','trainer.check_val_every_n_epoch=1']"
)


def test_demo_runs_every_stage_and_can_be_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MEDLDM_RUN_DIR", raising=False)
    cfg = compose_config(
        "demo",
        f"output={tmp_path / 'demo'}",
        "num_subjects=6",
        f"vqvae={SHORT}",
        f"ldm={SHORT}",
        "sample=['sampler.num_steps=2']",
    )
    for _ in range(2):
        demo.task(cfg)
        page, metrics = tmp_path / "demo" / "report.html", tmp_path / "demo" / "evaluation" / "metrics.json"
        assert capsys.readouterr().out.split()[-2:] == [str(metrics), str(page)]
    cfg.num_subjects = 7
    with pytest.raises(InputError, match="of another num_subjects"):
        demo.task(cfg)
    rows = json.loads(metrics.read_text())["rows"]
    assert {"generated", "reconstruction", "mean_image"} <= set(rows)  # one test subject has no partner
    assert "data:image/png" in page.read_text()
