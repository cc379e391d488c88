"""Sizes before training, from wherever they can be asked for."""

from __future__ import annotations

import contextlib
import http.server
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.shard_format.manifest import Manifest
from tests.tiny_shards import write_tiny_shards
from train.data import shard_sizes
from train.data.shard_checks import check_shards

# Stand-ins for the two stores' commands: a folder is the bucket. What each is asked goes into a file.
AWS = """#!/bin/sh
echo "$*" >> {folder}/asked
case "$1 $2" in
"s3 ls") {listing}; cd "{folder}/${{3#s3://}}" && for f in *; do
    echo "2026-11-22 10:00:00 $(printf %10d $(stat -c %s $f)) $f"; done ;;
"s3api head-object") stat -c %s "{folder}/$4/$6" ;;
*) exit 2 ;;
esac
"""
GSUTIL = """#!/bin/sh
echo "$*" >> {folder}/asked
case "$1" in
ls) {listing}; cd "{folder}/${{3#gs://}}" && for f in *; do
    echo "  $(stat -c %s $f)  2026-11-22T10:00:00Z  $3$f"; done; echo "TOTAL: 6 objects, 999 bytes (999 B)" ;;
stat) f="{folder}/${{2#gs://}}"; [ -f $f ] && echo "$2:" && echo "    Content-Length:         $(stat -c %s $f)" ;;
*) exit 2 ;;
esac
"""


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Manifest]:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path, write_tiny_shards(tmp_path / "bucket" / "corpus")


def install(folder: Path, scheme: str, listing: str) -> None:
    path = folder / ("aws" if scheme == "s3" else "gsutil")
    path.write_text((AWS if scheme == "s3" else GSUTIL).format(folder=folder, listing=listing))
    path.chmod(0o755)


@pytest.mark.parametrize("listing", ["true", "exit 254"], ids=["listed", "listing refused"])
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_stores_are_asked_before_anything_is_read(
    bucket: tuple[Path, Manifest], scheme: str, listing: str
) -> None:
    folder, manifest = bucket
    install(folder, scheme, listing)
    location, path = f"{scheme}://bucket/corpus", folder / "bucket" / "corpus" / "train-000002.tar"
    check_shards(location, manifest)
    asked = (folder / "asked").read_text().splitlines()
    count = sum(len(shards) for shards in manifest.splits.values())
    assert len(asked) == (1 if listing == "true" else 1 + count)
    assert not [line for line in asked if " cp " in f" {line} " or " cat " in f" {line} "]
    content = path.read_bytes()
    for damaged, message in (
        (content[:-512], r"shard train-000002\.tar at \S+ is truncated"),
        (content + b"x", r"shard train-000002\.tar at \S+ was altered, it is longer"),
        (None, r"shard train-000002\.tar at \S+ cannot be read \(.*(does not list it|exit code 1)\)"),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            check_shards(location, manifest)


def test_a_pipe_is_asked_by_the_command_that_is_given_for_it(
    bucket: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = bucket
    corpus = folder / "bucket" / "corpus"
    (corpus / "train-000001.tar").write_bytes(b"short")
    location = f"pipe:cat {corpus}"
    check_shards(location, manifest)  # nobody to ask
    monkeypatch.setenv("HALFLING_PIPE_SIZE", f"stat -c %s {corpus}/")
    with pytest.raises(ValueError, match=r"shard train-000001\.tar at pipe:cat .* is truncated, 5 of"):
        check_shards(location, manifest)
    for command, message in (("false", "exit code 1"), ("echo some #", "invalid literal")):
        monkeypatch.setenv("HALFLING_PIPE_SIZE", command)
        with pytest.raises(ValueError, match=rf"train-000000\.tar at pipe:.* cannot be read \(.*{message}"):
            check_shards(location, manifest)


@contextlib.contextmanager
def answering(folder: Path, **codes: object) -> Iterator[tuple[str, list[str]]]:
    """A server whose answers to a method are a list of codes, in turn; then files."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def answer(self, method: str) -> bool:
            asked.append(method)
            todo = codes.get(method)
            code = (
                todo.pop(0) if isinstance(todo, list) and todo else None if isinstance(todo, list) else todo
            )
            if code == "stall":
                time.sleep(2)
            elif code == "loop":
                self.send_response(302)
                self.send_header("Location", self.path)
                self.end_headers()
            elif code is not None:
                self.send_error(int(str(code)))
            return code is not None

        def do_HEAD(self) -> None:
            if not self.answer("HEAD"):
                super().do_HEAD()

        def do_GET(self) -> None:
            if not self.answer("GET"):
                with contextlib.suppress(OSError):
                    super().do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize("refusal", [403, 405, 501])
def test_where_head_is_refused_a_get_tells_the_size(tmp_path: Path, refusal: int) -> None:
    """Signed URLs are for one method."""
    manifest = write_tiny_shards(tmp_path, shards=1, heldout=0)
    with answering(tmp_path, HEAD=refusal) as (url, asked):
        check_shards(url, manifest)
        assert asked == ["HEAD", "GET"]
        (tmp_path / "train-000000.tar").write_bytes(b"short")
        with pytest.raises(ValueError, match="is truncated, 5 of"):
            check_shards(url, manifest)


def test_a_busy_server_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_sizes, "_RETRY_AFTER_S", (0.01, 0.01))
    manifest = write_tiny_shards(tmp_path, shards=1, heldout=0)
    with answering(tmp_path, HEAD=[503, 429]) as (url, asked):
        check_shards(url, manifest)
        assert asked == ["HEAD"] * 3
    with (
        answering(tmp_path, HEAD=500) as (url, asked),
        pytest.raises(ValueError, match=r"train-000000\.tar at http\S+ cannot be read \(HTTP Error 500"),
    ):
        check_shards(url, manifest)


def test_a_server_that_stalls_or_sends_in_circles_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_sizes, "_TIMEOUT_S", 0.3)
    manifest = write_tiny_shards(tmp_path, shards=1, heldout=0)
    for behaviour, message in (("stall", "timed out"), ("loop", "infinite loop")):
        with (
            answering(tmp_path, HEAD=behaviour, GET=behaviour) as (url, _),
            pytest.raises(ValueError, match=rf"train-000000\.tar at http\S+ cannot be read \(.*{message}"),
        ):
            check_shards(url, manifest)


def test_many_local_shards_take_few_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job for each would cost more than its question: a million shards are checked in seconds, not a minute."""
    jobs: list[object] = []

    class Counted(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **more: Any) -> Any:
            jobs.append(arguments)
            return super().submit(*arguments, **more)

    monkeypatch.setattr(shard_sizes, "ThreadPoolExecutor", Counted)
    shard = write_tiny_shards(tmp_path, shards=1, heldout=0).splits["train"][0]
    infos = [replace(shard, name=f"{i}.tar", bytes=0) for i in range(2_000)]
    for info in infos:
        (tmp_path / info.name).touch()
    shard_sizes.check_shard_sizes(str(tmp_path), infos)
    assert len(jobs) <= 10
    with pytest.raises(ValueError, match=r"shard 1999\.tar at .* is truncated, 0 of 1 bytes"):
        shard_sizes.check_shard_sizes(str(tmp_path), [*infos[:-1], replace(infos[-1], bytes=1)])
