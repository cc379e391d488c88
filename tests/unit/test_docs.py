"""README.md and docs/: every command parses with the real parsers, every path exists, and what is quick is run."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import pytest
from deepspeed.launcher import runner

from launch.__main__ import script_of
from tests.paths import ROOT
from train.errors import UserError

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("train/*/README.md"))]
OURS = ("train", "launch", "data_prep", "tests", "ds_configs", "docs", ".ci")
STARTERS = ("python", "deepspeed", "mpirun", "sbatch", "srun", "make", "torchrun", "halfling")
BATCH_SCRIPTS = {
    "launch/slurm/pretrain.sbatch": "launch/pretrain.py",
    "launch/slurm/data-prep.sbatch": "data_prep/write_shards.py",
    "launch/slurm/finetune-array.sbatch": "launch/finetune.py",
}
"""What each job script hands its words to."""
QUICK = (
    "launch/plan.py",
    "data_prep/train_tokenizer.py",
    "data_prep/write_shards.py",
    "data_prep/verify_shards.py",
)


class Command(NamedTuple):
    """A command of a page."""

    page: str
    text: str


class ParsedError(BaseException):
    """A command line was taken by its parser: nothing more of the command is run. No command may catch it."""


def code_of(page: Path) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, and code inside of sentences."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    blocks = [*fenced, *re.findall(r"(?:^    .+\n)+", rest, re.M)]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            yield re.split(r"\s{3,}(?! *-)", line.strip())[0]
    rest = re.sub(r"(?:^    .+\n)+", "", rest, flags=re.M)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest))


def commands() -> list[Command]:
    """Every command of the pages that starts something of this repository."""
    found = []
    for page in PAGES:
        for line in code_of(page):
            words = re.sub(r"^(?:[A-Z_]+=\S+ )*", "", line).split()
            if (
                len(words) > 1
                and words[0] in STARTERS
                and re.search(r"\.(py|sbatch)\b|^make |^halfling [a-z-]+ \S", " ".join(words))
            ):
                found.append(Command(page.name, line))
    return found


def words_of(text: str) -> list[str]:
    """A command's words, without what stands for others: `...`, brackets around options, variables before it."""
    words = shlex.split(re.sub(r"^(?:[A-Z_]+=\S+ )*", "", text), comments=True)
    plain = [
        word.strip("[]") if word[0] == "[" or (word[-1] == "]" and "[" not in word) else word
        for word in words
    ]
    return [word for word in plain if word not in ("...", "--section.key=value")]


def script_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """The script of this repository that a command ends up in, and what it is given there."""
    if words[:2] == ["halfling", "launch"]:
        arguments = runner.parse_args(words[2:])
        return script_of(arguments.user_script) or "none", arguments.user_args
    if words[0] == "halfling":
        return script_of(words[1]) or "none", words[2:]
    if words[0] in ("deepspeed", "torchrun"):
        arguments = runner.parse_args(words[1:])
        return arguments.user_script, arguments.user_args
    place = next(i for i, word in enumerate(words) if word.endswith((".py", ".sbatch")))
    return BATCH_SCRIPTS.get(words[place], words[place]), words[place + 1 :]


def module_of(script: str) -> Any:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository's, with what the pages' commands name beside it."""
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "runs", "shards"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "R.yaml").write_text("optimizer: {lr: 0.002}\n")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "simplewiki.jsonl.gz").touch()
    (tmp_path / "mytexts").mkdir()
    for name in ("one", "two"):
        text = (
            f"{name} text of {number} words about foxes, dogs and what they do all day."
            for number in range(900)
        )
        (tmp_path / "mytexts" / f"{name}.txt").write_text("\n".join(text))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command", dict.fromkeys(commands()), ids=lambda command: f"{command.page}: {command.text}"
)
def test_commands_parse(command: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(command.text)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], check=True, capture_output=True)
        return
    script, arguments = script_and_arguments(words)
    assert (desk / script).is_file()
    parse_args, instantiate = argparse.ArgumentParser.parse_args, jsonargparse.ArgumentParser.instantiate

    def plain(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parsed = parse_args(self, *args, **kwargs)
        if isinstance(self, jsonargparse.ArgumentParser):
            return parsed
        raise ParsedError

    def typed(self: jsonargparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        instantiate(self, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", plain)
    monkeypatch.setattr(jsonargparse.ArgumentParser, "instantiate", typed)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(ParsedError):
        module_of(script).main(arguments)


@pytest.mark.parametrize(
    "text", ["python launch/plan.py --nodez 8", "deepspeed launch/pretrain.py --model.teachr=T"]
)
def test_a_mistyped_flag_does_not_parse(text: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, UserError)):
        test_commands_parse(Command("none", text), desk, monkeypatch)


def test_paths_exist() -> None:
    missing = []
    for page in PAGES:
        text = page.read_text()
        named = re.findall(rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, OURS))})/[\w./*-]*\w)", text)
        linked = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
        missing += [f"{page.name}: {path}" for path in named if not list(ROOT.glob(path))]
        missing += [f"{page.name}: {target}" for target in linked if not (page.parent / target).exists()]
        for name in re.findall(r"(requirements[\w-]*\.txt)", text):
            missing += [] if (ROOT / name).exists() else [f"{page.name}: {name}"]
    assert missing == []


def test_quick_commands_of_the_readme_run(desk: Path) -> None:
    """A plan for the published corpus, a vocabulary, shards and their check."""
    quick = [command.text for command in commands() if command.page == "README.md"]
    quick = [text for text in quick if any(script in text.split() for script in QUICK)]
    assert len(quick) >= len(QUICK)
    for text in sorted(
        quick, key=lambda text: "launch/plan.py" not in text
    ):  # it would plan for these shards
        script, arguments = script_and_arguments(words_of(text))
        assert module_of(script).main(arguments) == 0, text
