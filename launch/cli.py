"""What every entry point shares: the command line, and how errors reach the user.

Exit codes: 0 done; 2 bad usage, configuration or input; 75 stopped by a signal after saving, run again to
continue; 141 nobody reads the output any more (`| head`); 1 anything else. Under a launcher every rank meets the same
error: rank 0 alone prints it.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import jsonargparse

from launch.error_messages import tell
from train.config import Config
from train.distributed.discovery import probable_rank
from train.environment_file import load_environment_file
from train.errors import RunError, UserError

BAD_USAGE = 2
BAD_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
PROFILE_STEPS = 3

# Attribute docstrings under each field become the help text of its flag.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, each flag with its type and default."""


def parse_config(arguments: Sequence[str], description: str) -> Config:
    """The configuration of a command line: defaults < `--config` files < `--section.key=value`.

    Raises:
        UserError: unknown key, ill-typed or impossible value; the message names it.
        SystemExit: after `--help`.
    """
    parser = jsonargparse.ArgumentParser(
        description=description,
        exit_on_error=False,
        default_env=False,
        prog=os.path.basename(sys.argv[0]),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML recipe; later ones override earlier ones.")
    parser.add_argument("--profile", action="store_true", help="Short for --run.profile_steps=3.")
    parser.add_class_arguments(Config, None)
    # The deepspeed launcher adds --local_rank; the environment's LOCAL_RANK says the same.
    kept = [argument for argument in arguments if not argument.startswith(("--local_rank", "--local-rank"))]
    try:
        namespace = parser.parse_args(kept)
        tree = vars(parser.instantiate(namespace))
        config = Config(**{name: tree[name] for name in Config.__dataclass_fields__})
    except jsonargparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    if namespace.profile and not config.run.profile_steps:
        return replace(config, run=replace(config.run, profile_steps=PROFILE_STEPS))
    return config


def run_main(main: Callable[[Sequence[str]], int]) -> None:
    """Call `main` with the command line and exit with its code; turn users' errors into one plain message."""
    try:
        load_environment_file()
        # torch reads it when it is imported: a name server without the hosts' names would cost a line per connection.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        code = main(sys.argv[1:])
    except (UserError, OSError, RunError) as error:
        if os.environ.get("HALFLING_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            code = 128 + signal.SIGPIPE
        else:
            tell(f"error: {error}", os.environ, others_know=isinstance(error, RunError) and error.others_know)
            code = BAD_USAGE if isinstance(error, (UserError, *BAD_PATHS)) else 1
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


def _reader_has_left() -> bool:
    """Is the standard output a pipe that nobody reads any more?"""
    if sys.stdout is None:
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except OSError:  # no file, as where a test captures it
        return False
    return bool(poll.poll(0))  # no event is waited for: only an error or a hang-up is told
