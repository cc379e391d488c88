"""No code of a checkpoint, a model's folder or a tokenizer's is ever run: prepared ones are refused."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.write_shards import load_tokenizer
from tests.paths import ROOT
from train.checkpointing import safe_load
from train.errors import UserError
from train.models.build import teacher_config
from train.models.encoder_config import read_config, read_tokenizer
from train.models.loading import check_encoder, load_masked_lm

LOADING = re.compile(r"(?P<pickle>torch\.load|pickle\.loads?)|\w+\.from_(pretrained|config)")
CODE = """
from pathlib import Path
Path({target!r}).touch()
from transformers import BertForMaskedLM, BertConfig, PreTrainedTokenizerFast
class Config(BertConfig): model_type = "own"
class Model(BertForMaskedLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def as_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def as_before_zip(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_bare_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """What must not come to be."""
    return tmp_path / "touched"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [as_zip, as_before_zip, as_bare_pickle])
def test_a_checkpoints_pickle_is_refused_whatever_its_reader_asks_for(
    save: Callable[[Any, Path], None], target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_load, "engine_types", lambda: [Counts])
    monkeypatch.setenv(safe_load.OFF, "1")
    file = tmp_path / "states.pt"
    save({"weights": torch.ones(2), "hook": Touches(target)}, file)
    message = (
        r"step-1 (names getattr|is no archive of tensors): no code of such a file is run here.*you trust"
    )
    with pytest.raises(UserError, match=message) as raised, safe_load.weights_only(Path("step-1")):
        torch.load(file, weights_only=False)
    assert "weights_only" not in str(raised.value)  # torch's own advice is how to run it
    assert not target.exists()
    torch.save({"weights": torch.ones(2), "scaler": Counts(3)}, file)
    with safe_load.weights_only(Path("step-1")):
        assert torch.load(file, weights_only=False)["scaler"].number == 3
    assert safe_load.ON not in safe_load.os.environ
    assert safe_load.os.environ[safe_load.OFF] == "1"


class Counts:
    """Of the engine's own, in its place."""

    def __init__(self, number: int) -> None:
        self.number = number


class Attribute:
    """Pickled as Python 3.11.0 to 3.11.3 (Debian 12's is 3.11.2) pickle a member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.how = getattr, (owner, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how


@pytest.mark.parametrize("save", [as_zip, as_before_zip])
def test_of_getattr_only_a_member_of_the_engines_enumerations_is_taken(
    save: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    stage, scaler = safe_load.engine_types()[2], safe_load.engine_types()[0]
    save({"stage": Attribute(stage, "gradients")}, tmp_path / "states.pt")
    with safe_load.weights_only(tmp_path):
        assert torch.load(tmp_path / "states.pt", weights_only=False)["stage"] is stage.gradients
    for owner, name in ((stage, "mro"), (scaler, "__init__"), (stage, "__class__")):
        save({"stage": Attribute(owner, name)}, tmp_path / "states.pt")
        with pytest.raises(UserError, match="names getattr: no code"), safe_load.weights_only(tmp_path):
            torch.load(tmp_path / "states.pt", weights_only=False)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_torch_script_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_load, "engine_types", list)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), tmp_path / "states.pt")
    with pytest.raises(UserError, match="no code of such a file is run"), safe_load.weights_only(tmp_path):
        torch.load(tmp_path / "states.pt", weights_only=False)


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_load, "engine_types", list)
    with pytest.raises(RuntimeError, match="size mismatch"), safe_load.weights_only(Path("step-1")):
        raise RuntimeError("Error(s) in loading state_dict: size mismatch")


def with_own_code(folder: Path, target: Path, file: str, content: dict[str, Any]) -> str:
    """A folder whose `file` names classes of a module beside it."""
    (folder / "own.py").write_text(CODE.format(target=str(target)))
    classes = {
        "AutoConfig": "own.Config",
        "AutoModelForMaskedLM": "own.Model",
        "AutoTokenizer": [None, "own.Tokenizer"],
    }
    (folder / file).write_text(json.dumps({**content, "auto_map": classes}))
    return str(folder)


@pytest.mark.parametrize("model_type", ["own", "bert"])
def test_a_teacher_with_code_of_its_own_is_refused_without_a_question(
    model_type: str, teacher_folder: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers knows the type, and would compute something else than that code."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    config = json.loads((folder / "config.json").read_text())
    name = with_own_code(folder, target, "config.json", {**config, "model_type": model_type})
    readers: list[Callable[[str], Any]] = [teacher_config, load_masked_lm, check_encoder, read_config]
    for read in readers:
        with pytest.raises(
            UserError, match=r"teacher: .*auto_map.* never run here; give a model of transformers'"
        ):
            read(name)
    assert not target.exists()


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(
    tokenizer_folder: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    name = with_own_code(folder, target, "tokenizer_config.json", {"tokenizer_class": "Tokenizer"})
    with pytest.raises(UserError, match="cannot be read: it asks for code of its own, which is never run"):
        read_tokenizer(name)
    with pytest.raises(UserError):
        load_tokenizer(name)
    assert not target.exists()


def test_a_teachers_pickled_weights_are_refused(teacher_folder: str, target: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    load_masked_lm(str(folder))
    torch.save({**weights, "hook": Touches(target)}, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"teacher: its weights cannot be read: a file names \S+: no code"
    ) as raised:
        load_masked_lm(str(folder))
    assert "weights_only" not in str(raised.value)
    assert not target.exists()


def test_every_call_that_could_run_code_says_that_it_must_not() -> None:
    """By its own arguments: what transformers and torch take for granted has changed before."""
    files = [path for package in ("data_prep", "train", "launch") for path in (ROOT / package).rglob("*.py")]
    silent = []
    for path in files:
        if not LOADING.search(text := path.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and (found := LOADING.fullmatch(ast.unparse(node.func))):
                word, value = ("weights_only", "True") if found["pickle"] else ("trust_remote_code", "False")
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                if given.get(word) != value:
                    silent.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} {found[0]}: {word}={value} is missing"
                    )
    assert silent == []
