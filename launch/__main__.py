"""Distil a large encoder into a small one: every command of Halfling under one name.

  halfling COMMAND [its options]                       COMMAND --help teaches each
  halfling launch [flags of deepspeed] pretrain ...    on all GPUs here, or on the hosts of --hostfile

`python launch/NAME.py` and `python data_prep/NAME.py`, as messages and the documentation spell the commands, are the
same commands, called by their files: halfling NAME. `halfling launch` is the command `deepspeed`, started so that
Ctrl-C ends it in order: the ranks save and say so, and the exit code is 75; `deepspeed` itself ends at once with a
traceback, and kills ranks that save for more than 30 s. Its remarks are left out unless --log_level asks for them.
"""

from __future__ import annotations

import argparse
import difflib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_prep.shard_format.required_packages import require_packages

require_packages()

import argcomplete

from launch.common.cli import run_main
from launch.common.stages import AGAIN, LAUNCHER, QUIET, run_until_stopped
from train.distributed.signals import STOPPED_AFTER_SAVING
from train.errors import UserError

COMMANDS = {
    "quickstart": ("launch/quickstart.py", "the whole path on two CPU cores, ten minutes, no downloads"),
    "tokenizer": ("data_prep/train_tokenizer.py", "a WordPiece vocabulary of your text"),
    "shards": ("data_prep/write_shards.py", "your text, tokenised, as shards"),
    "verify": ("data_prep/verify_shards.py", "check shards, show passages"),
    "inspect-batch": ("launch/inspect_batch.py", "what the model will see at a step"),
    "plan": ("launch/plan.py", "memory, days and GPU-hours of a run, before anything is booked"),
    "doctor": ("launch/doctor.py", "are all hosts ready? each failure with its remedy"),
    "pretrain": ("launch/pretrain.py", "train a student from a teacher, or a model from scratch"),
    "export": ("launch/export.py", "a checkpoint as a Hugging Face folder, as ONNX, on the hub"),
    "trim-vocabulary": ("launch/trim_vocabulary.py", "cut a teacher's vocabulary to what a corpus uses"),
    "finetune": (
        "launch/finetune.py",
        "score an encoder on GLUE, IMDb, SQuAD, your own data; task distillation",
    ),
    "score-squad": ("launch/score_squad.py", "score answers by SQuAD's official rules"),
    "score-embeddings": ("launch/score_embeddings.py", "score sentence vectors: similarity and retrieval"),
    "study": ("launch/study.py", "what each way of distilling one teacher is worth, in scores"),
    "ablate": ("launch/ablate.py", "what each part of a recipe is worth"),
    "benchmark": ("launch/benchmark.py", "speed of one part on this machine"),
    "report": ("launch/report.py", "one page about finished runs"),
}
"""Name -> file, what it does; in the order in which a user comes to need them."""
SHELLS = 'eval "$(register-python-argcomplete halfling)"'


def main(arguments: Sequence[str]) -> int:
    """Run a command; the launcher's exit code where it is `launch`.

    Raises:
        SystemExit: with the exit code of any other command.
        UserError: no such command.
    """
    if "_ARGCOMPLETE" in os.environ:
        complete()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    first, *rest = arguments
    if first == "launch":
        return start_ranks(rest)
    if first.startswith("-") or first.endswith(".py"):  # `python -m launch` in place of `deepspeed`
        return start_ranks(arguments)
    run_command(first, rest)
    return 0


def script_of(name: str) -> str | None:
    """A command's file, by its name here or by the file's: both `shards` and `write_shards`."""
    files = {Path(script).stem.replace("_", "-"): script for script, _ in COMMANDS.values()}
    return COMMANDS[name][0] if name in COMMANDS else files.get(name.replace("_", "-"))


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Run a command's file as the program; it ends this process with its own exit code."""
    if (script := script_of(name)) is None:
        near = difflib.get_close_matches(name, [*COMMANDS, "launch"], 1)
        remedy = f"did you mean {near[0]}?" if near else "`halfling --help` lists all"
        raise UserError(f"{name}: no such command; {remedy}")
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start_ranks(arguments: Sequence[str]) -> int:
    """The exit code of ranks under DeepSpeed's launcher.

    Args:
        arguments: of `deepspeed`; its script may be named as a command.
    """
    words = list(arguments)
    place = next((place for place, word in enumerate(words) if word in COMMANDS), None)
    if place is not None and not any(word.endswith(".py") for word in words[:place]):
        words[place] = str(ROOT / COMMANDS[words[place]][0])
    is_talkative = any(word.startswith(("--log_level", "-q", "--quiet")) for word in words)
    command = [*LAUNCHER, *([] if is_talkative else QUIET), *words]
    code, was_stopped = run_until_stopped(command, os.environ)
    if was_stopped and code not in (0, STOPPED_AFTER_SAVING):
        print(AGAIN, file=sys.stderr)
        return STOPPED_AFTER_SAVING
    return code


def help_text() -> str:
    """What `halfling --help` says."""
    lines = [(__doc__ or "").rstrip(), "", "Commands:"]
    lines += [f"  {name:18}{says}" for name, (_, says) in COMMANDS.items()]
    recipes = ", ".join(sorted(path.stem for path in (ROOT / "launch" / "recipes").glob("*.yaml")))
    lines += ["", f"Recipes, for --config NAME: {recipes}"]
    lines += [f"They lie in {ROOT / 'launch'}, as do job scripts for Slurm, PBS and Kubernetes."]
    lines += [f"Completion of words by the shell: {SHELLS}"]
    return "\n".join(lines)


def complete() -> None:
    """Answer a shell's question how a word may end; a command is followed no further than to its parser."""
    parse = argparse.ArgumentParser.parse_known_args

    def answer(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]
        argcomplete.autocomplete(parser)  # ends this process

    argparse.ArgumentParser.parse_known_args = answer  # type: ignore[method-assign, assignment]
    typed = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    if len(typed) > 2 and script_of(typed[1]) is not None:
        os.environ["_ARGCOMPLETE"] = "2"  # the command's name, too, is part of the program's
        run_command(typed[1], [])
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("command", choices=[*COMMANDS, "launch"])
    parser.parse_args()


if __name__ == "__main__":
    run_main(main)
