from tests.training import VQVAE, read_metrics, run_training


def test_weights_and_biases_offline_keeps_numbers_and_pictures_in_the_run(prepared, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = tmp_path / "run"
    try:
        run_training(prepared, run_dir, VQVAE, "logger=wandb", "logger.wandb.offline=true")
    finally:
        wandb.finish()
    assert list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert list(run_dir.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
    assert read_metrics(run_dir)  # beside it, always
