"""Types of the benchmarks' options: bad values are refused before anything is measured."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple


class Shape(NamedTuple):
    """Of a batch of tokens."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


def at_least_1(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, at least 1")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, more than 0")
    return value


def shape(text: str) -> Shape:
    """Batch and sequence length, "8x128"."""
    batch, x, length = text.partition("x")
    if not x:
        raise argparse.ArgumentTypeError(f"{text!r}: give BATCHxLENGTH, such as 8x128")
    found = Shape(at_least_1(batch), at_least_1(length))
    if found.length < 3:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a length of at least 3, since [CLS] and [SEP] take two"
        )
    return found


def shapes(text: str) -> list[Shape]:
    """Several of them, with commas."""
    return [shape(word) for word in text.split(",")]


def one_or_more_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """A type for some of these, with commas."""

    def chosen(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        unknown = [word for word in words if word not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: give some of {', '.join(names)}, with commas")
        return words

    return chosen


def device(text: str) -> str:
    """ "cpu", or "cuda" where there is a GPU."""
    import torch

    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: give cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here; give cpu")
    return text


def new_file(text: str) -> Path:
    """The path of a plain file that can be written, links followed."""
    path = Path(text).resolve()
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.parent}; make it first")
    # It is written beside its place, and moved there.
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written to; give another file")
    return path


def existing_file(text: str) -> Path:
    """A file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: no such file")
    return Path(text)
