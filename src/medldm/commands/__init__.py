"""What every command shares: Hydra start-up, and a user's mistake told in one line with exit status 2."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from medldm.cli import asks_for_help, explanation
from medldm.errors import InputError
from medldm.files import disk_fault, nothing_empty
from medldm.locks import one_writer
from medldm.overrides import NO_CHOICE, check_dashes, check_paths, explain, line_of_job, renamed
from medldm.runs import RUN_DIR_VARIABLE
from medldm.shards import read_shard
from medldm.values import check_values

Task = Callable[[DictConfig], None]

PACKAGE_DIR = Path(__file__).resolve().parents[1]
# In a wheel the configs lie inside the package, in a checkout beside src/.
PLACES = (PACKAGE_DIR / "configs", PACKAGE_DIR.parents[1] / "configs")
CONFIG_DIR = next(filter(Path.is_dir, PLACES), PLACES[0])


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def user_message(error: BaseException, name: str) -> str | None:
    """The line for a user's mistake, or None where the error is a defect of ours."""
    if line := line_of_job(error, name):
        return line
    chain = list(causes(error))
    for link in chain:
        if isinstance(link, InputError):
            # A loader's worker sends its traceback along, the message last.
            return one_line(str(link).rpartition("InputError: ")[2])
    for link in chain:
        if isinstance(link, OSError) and (reason := disk_fault(link)):
            return one_line(f"{link.filename}: {reason}" if link.filename else reason)
    for link in chain:
        if isinstance(link, MissingMandatoryValue):
            return f"{link.full_key}: not given; write {link.full_key}=... on the command line"
    for link in chain:
        if isinstance(link, TypeError) and "unexpected keyword argument" in str(link):
            return one_line(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)) or NO_CHOICE in str(error):
        told = [line for link in chain if (line := explain(link, name, sys.argv[1:], CONFIG_DIR))]
        if told:
            return one_line(told[0])
        inner = chain[1] if len(chain) > 1 and isinstance(chain[1], OmegaConfBaseException) else None
        return one_line(error) + (f" ({one_line(inner).split(' full_key')[0]})" if inner else "")
    return None


@contextmanager
def mistakes_in_one_line(name: str) -> Iterator[None]:
    """Bad input ends the process with one line and status 2; MEDLDM_TRACEBACK=1 shows where it came from."""
    try:
        yield
    except Exception as error:
        message = user_message(error, name)
        if message is None or os.environ.get("MEDLDM_TRACEBACK"):
            raise
        print(f"medldm {name}: {message}", file=sys.stderr)
        sys.exit(2)


def clean_after_failure(key: str, *, alone: bool = True) -> Callable[[Task], Task]:
    """Decorates `task(cfg)`, which writes into the folder that the config gives under `key`: a failure leaves
    no empty folder, and where the task is `alone`, no other work is written there meanwhile."""

    def decorate(task: Task) -> Task:
        @wraps(task)
        def guarded(cfg: DictConfig) -> None:
            folder = OmegaConf.select(cfg, key, throw_on_missing=False)
            path = folder and Path(str(folder))
            with nothing_empty(path), one_writer(path if alone else None, share=read_shard(cfg.get("shard"))):
                task(cfg)

        return guarded

    return decorate


def experiment_name() -> str:
    """The experiment chosen on the command line, `default` without one."""
    if not HydraConfig.initialized():
        return "default"
    return HydraConfig.get().runtime.choices.get("experiment") or "default"


def adopt_renamed(name: str) -> None:
    """Former names of config members on the command line become today's, each with a line on stderr.

    The command line itself changes, so that the ranks which Lightning starts read the same words.
    """
    for place, word in enumerate(sys.argv):
        if place and (now := renamed(word)) != word:
            print(f"medldm {name}: {word} is deprecated; write {now}", file=sys.stderr)
            sys.argv[place] = now


def run_here(command: str, overrides: list[str]) -> None:
    """One command in this process, so that `import torch` is paid for once."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose(command, overrides=overrides)
    os.environ.pop(RUN_DIR_VARIABLE, None)  # what a training leaves for the ranks it starts
    import_module(f"medldm.commands.{command}").task(cfg)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(task: Task, name: str) -> None:
    """Run `task(cfg)` under Hydra with the config of this command's name, or print the command's help."""
    if asks_for_help(sys.argv[1:]):
        print(explanation(name))
        return
    adopt_renamed(name)

    def guarded(cfg: DictConfig) -> None:
        with mistakes_in_one_line(name):  # inside Hydra, which would print a line of its own
            check_paths(OmegaConf.to_container(cfg), sys.argv[1:])
            check_values(OmegaConf.to_container(cfg))
            task(cfg)

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with mistakes_in_one_line(name):
        if line := check_dashes(sys.argv[1:]):
            raise InputError(line)
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=name)(guarded)()
