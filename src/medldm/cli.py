"""The program `medldm`: prints help, or replaces itself by `python -m medldm.commands.COMMAND ...`.

It replaces the process because Lightning's launcher of several ranks runs `sys.argv` again: a dispatcher that
takes its sub-command off the list would start the other ranks with other overrides. Help is read from the
source of a command without importing it, so that it appears at once.
"""

import ast
import os
import sys
from pathlib import Path

COMMANDS = {
    "phantom": "write synthetic subjects in a dataset's own raw folder layout",
    "prepare": "raw images -> prepared cases, index.json and splits.json",
    "train": "train one stage of an experiment",
    "plan": "what an experiment needs on a card: memory, work, time, and what fits",
    "encode": "cache the latents of a prepared dataset for stage two",
    "sample": "write generated images (or a first stage's reconstructions)",
    "translate": "one volume in other modalities, from the volume alone",
    "evaluate": "compare two folders of images: metrics.json, per_case.csv and a table",
    "utility": "what synthetic images are worth: segmenters trained on them, tested on real images",
    "export": "prepared images as PNG slices, or a checkpoint as safetensors with a model card",
    "report": "one self-contained HTML page about a run",
    "doctor": "what this machine has for medldm, and what is wrong with it",
    "demo": "phantom -> prepare -> both stages -> sample -> evaluate -> report, on a CPU, in minutes",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"usage: medldm COMMAND [key=value ...]\n\n{rows}\n\n"
        "`medldm COMMAND --help` explains a command and its keys, "
        "`medldm COMMAND --cfg job` prints its config."
    )


def explanation(command: str) -> str:
    """What `medldm COMMAND --help` prints: the docstring of the command's module."""
    source = (Path(__file__).parent / "commands" / f"{command}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return f"{text}\n\n`medldm {command} --cfg job` prints every key with its value."


def asks_for_help(arguments: list[str]) -> bool:
    return bool({"-h", "--help"} & set(arguments))


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"medldm: no command '{command}'; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    if asks_for_help(rest):
        print(explanation(command))
        return
    os.execv(sys.executable, [sys.executable, "-m", f"medldm.commands.{command}", *rest])


if __name__ == "__main__":
    main()
