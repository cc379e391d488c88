"""Which checkpoint the ranks agree to go on from, and what is said of one that cannot be loaded."""

from __future__ import annotations

import pickle
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.unit.checkpointing.test_checkpoint import change, make_checkpoint, without_digests
from train.checkpointing import resume, safe_load
from train.checkpointing.resume import choose_checkpoint, load_checkpoint, refuse_other_optimizer
from train.checkpointing.state import TrainState
from train.errors import RankError, UserError

pytestmark = pytest.mark.usefixtures("one_rank")


def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(tmp_path: Path) -> None:
    said: list[str] = []
    assert choose_checkpoint(tmp_path, said.append) is None
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    assert choose_checkpoint(tmp_path, said.append) == newer
    assert said == []
    change(newer / "zero_pp_rank_1_mp_rank_00_optim_states.pt", lambda content: content[:-1] + b"x")
    assert choose_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1
    assert f"{newer} is passed over: zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged" in said[0]


def test_where_none_is_whole_the_run_does_not_start_anew(tmp_path: Path) -> None:
    """Its rows would go, and hours of work: that is for the user to say."""
    for step in (5, 10):
        (make_checkpoint(tmp_path, step) / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(
        UserError, match=r"00000010 is passed over.*00000005 is .* restore one, or remove them all"
    ):
        choose_checkpoint(tmp_path, lambda line: None)


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path) -> None:
    """A copy of a whole checkpoint, also where this start needs none."""
    path = make_checkpoint(tmp_path, 5)
    (tmp_path / resume.UNIVERSAL / path.name).mkdir(parents=True)
    assert choose_checkpoint(tmp_path, pytest.fail) == path
    assert list(tmp_path.iterdir()) == [path]


def test_a_signal_to_all_processes_of_a_job_leaves_the_conversion_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C goes to the process group, Slurm's signals to the whole step; the checkpoint would seem damaged."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport os, signal, sys\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):\n    os.kill(os.getpid(), number)\n"
        "sys.exit('lived on')\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert "(lived on)" in (resume._run_conversion(tmp_path / "step", tmp_path / ".universal/step", 2) or "")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def on_rank_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)


@pytest.mark.parametrize("name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_a_host_without_the_run_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = make_checkpoint(tmp_path, 5)
    facts = resume.read_facts(path)
    (path / name).unlink()
    monkeypatch.setattr("data_prep.shard_format.files.SEEN_LATE_S", 0.01)
    on_rank_1(monkeypatch)
    with pytest.raises(
        RankError, match=rf"rank 1 on \S+ does not see .*{name} is missing.*all hosts have mounted"
    ):
        resume._fault_of_share(path, facts)


def test_files_that_a_host_sees_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path, 5)
    facts = resume.read_facts(path)
    on_rank_1(monkeypatch)
    path.rename(tmp_path / "elsewhere")
    threading.Timer(0.3, (tmp_path / "elsewhere").rename, (path,)).start()
    assert resume._fault_of_share(path, facts) is None


def test_another_optimizers_state_is_refused(tmp_path: Path) -> None:
    """Also where config.yaml, which says it first, is gone."""
    path = make_checkpoint(tmp_path, 5)
    refuse_other_optimizer(None, "adamw")
    refuse_other_optimizer(path, "lamb")
    with pytest.raises(
        UserError, match=r"00005 was written with optimizer.name=lamb, .*give optimizer.name=lamb, or"
    ):
        refuse_other_optimizer(path, "adamw")


class Engine:
    """Loads as DeepSpeed does: what the checkpoint says of the groups' settings wins."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = SimpleNamespace(optimizer=torch.optim.AdamW([weight], weight_decay=0.1, fused=True))
        self.module = torch.nn.Linear(2, 1)
        self.module.bias.requires_grad_(False)

    def _get_ckpt_name(self, folder: str, tag: str) -> str:
        return f"{folder}/{tag}/mp_rank_00_model_states.pt"

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        (group,) = self.optimizer.optimizer.param_groups
        group["weight_decay"] = 0.7
        self.optimizer.optimizer.state[group["params"][0]]["step"] = torch.tensor(3.0, dtype=torch.float64)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return folder, {"halfling": self.outcome}


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (
            pickle.UnpicklingError("Unsupported global: GLOBAL posix.system was"),
            r"step-00000005 names posix.system: no",
        ),
        (
            RuntimeError("PytorchStreamReader failed reading file data/1"),
            r"step-00000005 is damaged .*remove it",
        ),
        (RuntimeError("Error(s) in loading state_dict"), r"holds another model than the configuration"),
        ({"step": "five"}, r"its state is none of this project's"),
        ({}, r"its state is none of this project's"),
        (None, r"its state is none of this project's"),
    ],
)
def test_what_cannot_be_loaded_is_one_message(
    outcome: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_load, "engine_types", list)
    path = without_digests(make_checkpoint(tmp_path, 5))
    with pytest.raises(UserError, match=message):
        load_checkpoint(Engine(outcome=outcome), path, 2, lambda line: None)


@pytest.mark.parametrize(
    ("trained", "named"), [("weight bias", "1 differ, from bias on"), ("bias", "2 differ, from bias on")]
)
def test_parameters_that_are_trained_since_or_no_longer_are_named_by_the_objective(
    trained: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_load, "engine_types", list)
    path, engine = make_checkpoint(tmp_path, 5), Engine(outcome=asdict(TrainState(5)))
    for name, parameter in engine.module.named_parameters():
        parameter.requires_grad_(name in trained.split())
    message = (
        rf"00005 is of a run whose objective trained other .*\({named}\); give the objective\.\* weights"
    )
    with pytest.raises(UserError, match=message):
        load_checkpoint(engine, path, 2, lambda line: None)
    engine.module = torch.nn.Linear(2, 1, bias=False)  # another model, of which the engine says more
    assert load_checkpoint(engine, path, 2, lambda line: None) == TrainState(5)


def test_the_state_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_load, "engine_types", list)
    state = TrainState(5, loss_history=(1.0, 2.0))
    path = make_checkpoint(tmp_path, 5)
    engine = Engine(outcome=asdict(state))
    assert load_checkpoint(engine, path, 2, lambda line: None) == state
    (group,) = engine.optimizer.optimizer.param_groups
    assert group["weight_decay"] == 0.1, "a changed value would have no effect"
    step = engine.optimizer.optimizer.state[group["params"][0]]["step"]
    assert (step.item(), step.dtype) == (3, torch.float32)
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nValueError: no")
    monkeypatch.setattr("subprocess.run", lambda *args, **options: failed)
    with pytest.raises(
        UserError, match=r"cannot be converted .*ValueError: no.*start as many ranks as wrote it, 2"
    ):
        load_checkpoint(Engine(outcome=asdict(state)), path, 1, lambda line: None)
    failed.returncode, failed.stderr = 2, f"noise\n{path} names posix.system: no code"
    with pytest.raises(UserError, match=rf"^{path} names posix.system: no code$"):
        load_checkpoint(Engine(outcome=asdict(state)), path, 1, lambda line: None)
