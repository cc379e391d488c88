"""One call of transformers' Trainer, the same for every kind of task."""

from __future__ import annotations


class Stopped(Exception):
    """A signal came, and what was done so far is saved."""
