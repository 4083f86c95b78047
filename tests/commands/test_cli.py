import os
import subprocess
import sys

import pytest

from medldm import cli

HEAVY = ("torch", "pytorch_lightning", "numpy", "h5py", "hydra", "rich", "medldm.commands")


def loaded_by(*arguments: str) -> tuple[str, set[str]]:
    """What a command prints, and which heavy packages it imported."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {list(arguments)!r}\n"
        "runpy.run_module(sys.argv[0], run_name='__main__')\n"
        f"print('LOADED', *[name for name in {HEAVY} if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, loaded = finished.stdout.rsplit("LOADED", 1)
    return text, set(loaded.split())


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_explains_a_command_without_importing_torch(command):
    text, loaded = loaded_by("medldm", command, "--help")
    assert text.startswith(f"medldm {command}: ") and not loaded
    assert f"`medldm {command} --cfg job` prints every key" in text


def test_a_command_started_as_a_module_prints_the_same_help():
    """As the SLURM jobs start it."""
    assert loaded_by("medldm.commands.phantom", "-h")[0] == loaded_by("medldm", "phantom", "--help")[0]


def test_help_names_every_command_without_importing_torch():
    text, loaded = loaded_by("medldm", "--help")
    assert all(command in text for command in cli.COMMANDS) and not loaded


def test_the_dispatcher_replaces_itself_with_the_arguments_as_given(monkeypatch):
    calls = []
    arguments = ["experiment=a/b", "model.optimizer={lr: 1}", "name=two words", "--cfg", "job"]
    monkeypatch.setattr(os, "execv", lambda *a: calls.append(a))
    monkeypatch.setattr(sys, "argv", ["medldm", "train", *arguments])
    cli.main()
    assert calls == [(sys.executable, [sys.executable, "-m", "medldm.commands.train", *arguments])]


def test_an_unknown_command_lists_the_known(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medldm", "trian"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    line = capsys.readouterr().err
    assert stop.value.code == 2 and "trian" in line and "train" in line and line.count("\n") == 1
