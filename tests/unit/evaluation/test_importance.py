"""The training windows that decide what a narrower student keeps, and the student that a recipe makes of them."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from data_prep.shard_format.manifest import Manifest
from train.config import Config
from train.config_sections.data import DataConfig
from train.config_sections.model import ModelConfig
from train.evaluation.importance import importance, sample_windows
from train.models.build import build_student


def test_the_windows_are_the_seeds_first_of_the_training_split(shards_folder: str) -> None:
    manifest = Manifest.load(shards_folder)
    config = Config(data=DataConfig(shards_folder, sequence_length=32))
    found = sample_windows(config, manifest, 24)
    assert found.shape == (24, 32)
    every = sample_windows(config, manifest, 10**9)
    assert len(every) == sum(shard.tokens // 30 for shard in manifest.splits["train"])
    assert torch.equal(found, every[:24])
    other = replace(config, data=replace(config.data, seed=1))
    assert not torch.equal(found, sample_windows(other, manifest, 24))


def test_a_recipes_student_keeps_what_its_windows_say(shards_folder: str, teacher_folder: str) -> None:
    manifest = Manifest.load(shards_folder)
    model = ModelConfig(teacher_folder, layer_map="every_other", student_width=16)
    config = Config(model=model, data=DataConfig(shards_folder, sequence_length=32))
    measured = functools.partial(importance, config, manifest, "cpu")
    states = [
        build_student(config, manifest, measured=each).state_dict() for each in (measured, measured, None)
    ]
    words = "distilbert.embeddings.word_embeddings.weight"
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert states[2][words].shape == states[0][words].shape
    assert not torch.equal(states[0][words], states[2][words])
