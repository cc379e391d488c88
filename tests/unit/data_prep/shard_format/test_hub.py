"""A name on the hub without a network: refused at once, not after the client's many tries."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from data_prep.shard_format import hub
from train.errors import UserError
from train.finetuning.data.readers import read_splits
from train.models.encoder_config import read_config


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> str:
    """An endpoint at which nobody listens."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    return endpoint


def test_models_and_datasets_are_refused_at_once(offline: str) -> None:
    said = rf"{offline} cannot be reached \(Connection refused\): give a local folder, or go online once"
    started = time.monotonic()
    with pytest.raises(UserError, match=f"the model nobody/nothing is not here, and {said}"):
        read_config("nobody/nothing")
    with pytest.raises(UserError, match=f"the dataset nobody/nothing is not here, and {said}"):
        read_splits(("nobody/nothing", None), {})
    assert time.monotonic() - started < 20  # `datasets` itself takes seconds to import


def test_what_the_cache_holds_is_used(offline: str, capsys: pytest.CaptureFixture[str]) -> None:
    hub.require_hub("the model a/b", lambda: True)
    assert "the model a/b from the cache; HF_HUB_OFFLINE=1 saves the waiting" in capsys.readouterr().out


def test_nothing_is_tried_where_the_client_is_told_to_stay_offline(
    monkeypatch: pytest.MonkeyPatch, offline: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.require_hub("the model a/b")


@pytest.mark.parametrize("endpoint", ["http://hub:port", "http://[::1"])
def test_an_endpoint_that_is_no_url_is_refused(
    offline: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UserError, match=r"cannot be reached .*: give a local folder"):
        hub.require_hub("the model a/b")
