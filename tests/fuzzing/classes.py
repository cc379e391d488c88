"""Every class of inputs that a user or a disk can damage."""

from __future__ import annotations

from tests.fuzzing import checkpoints, corpora, models, run_folders, settings_files, task_data

CLASSES = {
    target.name: target
    for module in (settings_files, corpora, run_folders, checkpoints, task_data, models)
    for target in module.TARGETS
}
