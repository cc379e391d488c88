"""What every entry point shares: the command line, and how errors reach the user.

Exit codes: 0 done; 2 bad usage, configuration or input; 75 stopped by a signal after saving, run again to
continue; 141 nobody reads the output any more (`| head`); 1 anything else. What the user can mend is one line; every
other error keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse

from data_prep.shard_format.errors import refuse_empty_words
from launch.common.recipe_file import explained, found_recipe, read_recipe_file
from train.config import Config
from train.distributed.discovery import discover_ranks, probable_rank
from train.environment_file import load_environment_file
from train.errors import (
    BAD_PATHS,
    DISK_ERRORS,
    RankError,
    ReportedElsewhereError,
    RunError,
    UserError,
    exit_code,
)

PROFILE_STEPS = 3
SECONDS_FOR_RANK_0 = 10.0
"""Within these it has met and printed an error of the command line too."""
SECONDS_TO_PRINT = 1.0
"""A launcher may end the rank that is about to print as soon as another one has ended."""

# Attribute docstrings under each field become the help text of its flag.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, each flag with its type and default."""


def command_parser(description: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser of a command's own flags, whose --help shows the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )


def parse_config(arguments: Sequence[str], description: str) -> Config:
    """The configuration of a command line: defaults < `--config` files < `--section.key=value`.

    Raises:
        UserError: unknown key, ill-typed or impossible value; the message names it.
        SystemExit: after `--help`.
    """
    parser = _config_parser(description, os.path.basename(sys.argv[0]))
    # The deepspeed launcher adds --local_rank; the environment's LOCAL_RANK says the same.
    kept = [argument for argument in arguments if not argument.startswith(("--local_rank", "--local-rank"))]
    kept = [_with_found_recipe(before, word) for before, word in pairwise(["", *kept])]
    recipes = {path: read_recipe_file(path) for path in _recipes_of(kept)}
    try:
        namespace = parser.parse_args(kept)
        tree = vars(parser.instantiate(namespace))
        config = Config(**{name: tree[name] for name in Config.__dataclass_fields__})
    except jsonargparse.ArgumentError as error:
        message = " ".join(str(error).split())
        raise UserError(_with_recipe(explained(message), recipes, kept)) from None
    except UserError as error:
        raise UserError(_with_recipe(str(error), recipes, kept)) from None
    if namespace.profile and not config.run.profile_steps:
        return replace(config, run=replace(config.run, profile_steps=PROFILE_STEPS))
    return config


@cache  # most of the time goes into reading the docstrings of train/config_sections/; an ablation parses ten times
def _config_parser(description: str, prog: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description=description,
        exit_on_error=False,
        default_env=False,
        prog=prog,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML recipe, or the name of one in launch/recipes; later ones override earlier ones.",
    )
    parser.add_argument("--profile", action="store_true", help="Short for --run.profile_steps=3.")
    parser.add_class_arguments(Config, None)
    return parser


def _with_found_recipe(before: str, word: str) -> str:
    """A word of the command line, with the path of the recipe that it names."""
    if before == "--config":
        return found_recipe(word)
    flag, _, name = word.partition("=")
    return f"--config={found_recipe(name)}" if flag == "--config" and name else word


def _recipes_of(arguments: Sequence[str]) -> list[Path]:
    """The files that --config names."""
    words = [word for flag, word in pairwise(arguments) if flag == "--config"]
    words += [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    return [Path(word) for word in words if os.path.lexists(word)]


def _with_recipe(message: str, recipes: Mapping[Path, Mapping[str, Any]], arguments: Sequence[str]) -> str:
    """A message with the file that its key stands in, where no flag overrides it."""
    given = {word.removeprefix("--").partition("=")[0] for word in arguments}
    for path, values in reversed(list(recipes.items())):
        for key in values:
            if key not in given and re.search(rf"(^|\W){re.escape(key)}\b", message):
                return f"{path}: {message}"
    if message.startswith("Problems parsing config"):  # what the parser's YAML refuses, and ours reads
        return f"{' or '.join(map(str, recipes))}: {message}; mend it"
    return message


def run_main(main: Callable[[Sequence[str]], int], one_job: bool = False) -> None:
    """Call `main` with the command line and exit with its code; turn users' errors into one plain message.

    Args:
        one_job: under a launcher all ranks get the same command line, and train together.
    """
    try:
        refuse_empty_words(sys.argv[1:])
        _load_environment()
        code = main(sys.argv[1:])
    except ReportedElsewhereError as silent:
        time.sleep(SECONDS_TO_PRINT)
        code = exit_code(silent.__cause__)
    except (UserError, RunError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            code = 128 + signal.SIGPIPE
        elif os.environ.get("HALFLING_TRACEBACK") or not is_plain(error):
            raise
        else:
            if not (one_job and _is_left_to_another_rank(error)):
                print(f"error: {error}", file=sys.stderr, flush=True)
            code = exit_code(error)
    except SystemExit as ended:  # argparse's, after --help or bad usage
        if isinstance(ended.code, str):
            raise
        code = ended.code or 0
    except KeyboardInterrupt:
        if probable_rank(os.environ) == 0:
            print("interrupted", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    if _reader_has_left():  # what is still buffered would raise when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if sys.stdout is not None:  # closed by the shell: >&-
        sys.stdout.flush()
    sys.exit(code)


def _load_environment() -> None:
    try:
        load_environment_file()
    except UserError as error:  # each host may have its own
        raise RankError(str(error)) from None
    # torch reads it when it is imported: a name server without the hosts' names would cost a line per connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def is_plain(error: Exception) -> bool:
    """Whether its text alone is enough; of OSErrors, those about a path or a full disk."""
    if not isinstance(error, OSError):
        return True
    return isinstance(error, BAD_PATHS) or error.filename is not None or error.errno in DISK_ERRORS


def _is_left_to_another_rank(error: Exception) -> bool:
    """Whether another rank prints the same. Before the ranks join, all judge the same command line and run folder, but
    each host may have its own files: the first rank of every host prints.

    The launchers of DeepSpeed and torchrun end all ranks of a host with the first that ends, mpirun those of all hosts:
    there another rank waits for its end, and prints where it goes on, since rank 0 is then without the error.
    """
    if not isinstance(error, UserError) or isinstance(error, RankError) or _have_joined():
        return False
    try:
        ranks = discover_ranks(os.environ)
    except UserError:
        return False
    if ranks.local_rank == 0:
        return False
    if ranks.launcher in ("srun", "environment"):
        return True
    time.sleep(SECONDS_FOR_RANK_0)
    on_host_of_rank_0 = ranks.rank == ranks.local_rank
    return ranks.launcher != "mpirun" and not on_host_of_rank_0


def _have_joined() -> bool:
    """Whether there is a process group, in which train/distributed/heartbeat.py decides who prints."""
    distributed = sys.modules.get("torch.distributed")  # an import would take seconds
    return distributed is not None and distributed.is_initialized()


def _reader_has_left() -> bool:
    """Is the standard output a pipe that nobody reads any more?"""
    if sys.stdout is None:
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except OSError:  # no file, as where a test captures it
        return False
    return bool(poll.poll(0))  # no event is waited for: only an error or a hang-up is reported
