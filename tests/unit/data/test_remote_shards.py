"""Shards from a live S3 endpoint and an http server: sizes, what is read, and a store that is slow or dies."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import fsspec
import pytest
import s3fs
import torch

from data_prep.shard_format import remote
from data_prep.shard_format.manifest import Manifest
from tests.loopback_stores import Store, served
from tests.paths import ROOT
from tests.tiny_shards import write_tiny_shards
from train.config_sections.data import DataConfig
from train.data import prefetch
from train.data.loader import BatchLoader, heldout_windows
from train.data.shard_cache import ShardCache
from train.data.shard_checks import check_shard_sizes, check_shards
from train.data.shards import read_histogram, read_shard
from train.errors import UserError

LOCATION = "s3://bucket/corpus"


@pytest.fixture
def bucket(s3: Store, folder: Path) -> Store:
    """The store with the shards of `folder` at LOCATION."""
    put(folder.iterdir())
    s3.requests.clear()
    return s3


@pytest.fixture
def http(folder: Path) -> Iterator[Store]:
    with served(folder) as store:
        yield store


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01, 0.01))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    monkeypatch.setattr(prefetch, "_JOIN_S", 1.0)


def put(files: Iterable[Path]) -> None:
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    s3.makedirs("bucket", exist_ok=True)
    for path in files:
        s3.pipe_file(f"bucket/corpus/{path.name}", path.read_bytes())


def batches(location: str, manifest: Manifest, **options: object) -> list[torch.Tensor]:
    loader = BatchLoader(
        location,
        manifest,
        sequence_length=16,
        global_batch_size=16,
        micro_batch_size=4,
        seed=1,
        lanes=8,
        **options,  # type: ignore[arg-type]
    )
    return [batch.input_ids for batch in loader.batches(0, 3)]


def test_s3_gives_what_local_files_give(
    bucket: Store, folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    assert Manifest.load(LOCATION) == manifest
    assert read_histogram(LOCATION, manifest).tolist() == read_histogram(str(folder), manifest).tolist()
    remote_windows = heldout_windows(LOCATION, manifest, 16, 7)
    assert all(map(torch.equal, remote_windows, heldout_windows(str(folder), manifest, 16, 7)))
    expected = batches(str(folder), manifest)
    for options in ({}, {"verify": "full"}, {"cache_dir": str(tmp_path)}, {"cache_dir": str(tmp_path)}):
        bucket.requests.clear()
        assert all(map(torch.equal, batches(LOCATION, manifest, **options), expected))
    assert not [line for line in bucket.requests if line.startswith("GET") and line.endswith(".tar")]


def test_http_gives_what_local_files_give(
    http: Store, folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    assert Manifest.load(http.url) == manifest
    expected = batches(str(folder), manifest)
    assert all(map(torch.equal, batches(http.url, manifest), expected))
    assert sum(line.startswith("HEAD") for line in http.requests) == len(manifest.splits["train"])
    http.requests.clear()
    for _ in range(2):
        assert all(map(torch.equal, batches(http.url, manifest, cache_dir=str(tmp_path)), expected))
    fetched = [line for line in http.requests if line.startswith("GET")]
    assert len(fetched) == len(set(fetched)) == len(list(tmp_path.iterdir()))
    assert all(map(torch.equal, batches(f"file://{folder}", manifest), expected))


# ---------------------------------------------------------------------------------------------------- sizes


def test_s3_is_asked_for_all_sizes_at_once_and_nothing_is_read(bucket: Store, manifest: Manifest) -> None:
    check_shards(LOCATION, manifest)
    assert bucket.requests == ["GET /bucket"]


def test_where_listing_is_refused_each_object_is_asked_for(bucket: Store, manifest: Manifest) -> None:
    bucket.faults["GET"] = 403
    check_shards(LOCATION, manifest)
    names = sorted(
        f"HEAD /bucket/corpus/{shard.name}" for split in manifest.splits.values() for shard in split
    )
    assert sorted(line for line in bucket.requests if line.startswith("HEAD")) == names


@pytest.mark.parametrize("listing", [None, 403], ids=["listed", "listing refused"])
def test_bad_sizes_in_s3_are_named(s3: Store, tmp_path: Path, listing: int | None) -> None:
    manifest = write_tiny_shards(tmp_path)
    put(tmp_path.iterdir())
    path = tmp_path / "train-000002.tar"
    content = path.read_bytes()
    for damaged, message in (
        (content[:-512], r"is truncated, \d+ of \d+ bytes"),
        (content + b"x", "was altered, it is longer than 10240 bytes"),
        (None, "is missing" if listing is None else r"cannot be read \(Forbidden\)"),
    ):
        s3.faults["GET"] = None
        if damaged is None:
            fsspec.filesystem("s3", skip_instance_cache=True).rm_file(f"bucket/corpus/{path.name}")
        else:
            path.write_bytes(damaged)
            put([path])
        s3.faults["GET"] = listing
        with pytest.raises(UserError, match=rf"shard {path.name} at {LOCATION}/{path.name} {message}: fetch"):
            check_shards(LOCATION, manifest)


@pytest.mark.parametrize("refusal", [403, 405, 501])
def test_where_head_is_refused_a_get_gives_the_size(http: Store, manifest: Manifest, refusal: int) -> None:
    """Signed URLs are for one method."""
    http.faults["HEAD"] = refusal
    shard = manifest.splits["train"][0]
    check_shard_sizes(http.url, [shard])
    assert [line.split()[0] for line in http.requests] == ["HEAD", "GET"]
    with pytest.raises(UserError, match=r"is truncated, \d+ of"):
        check_shard_sizes(http.url, [replace(shard, bytes=shard.bytes + 1)])


def test_a_busy_server_is_asked_again(http: Store, manifest: Manifest) -> None:
    http.faults.update(HEAD=503, GET=[429, 503])
    check_shard_sizes(http.url, manifest.splits["train"][:1])
    assert len(http.requests) == 6
    http.faults["GET"] = 500
    with pytest.raises(
        UserError,
        match=r"train-000000\.tar at http\S+ cannot be read \(ClientResponseError: 500, message='Fault'",
    ):
        check_shard_sizes(http.url, manifest.splits["train"][:1])


@pytest.mark.parametrize(
    ("fault", "message"), [("stall", "nothing came for 0.3 s"), ("loop", "TooManyRedirects")]
)
def test_a_server_that_stalls_or_redirects_in_circles(
    http: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote, "SIZE_LIMIT_S", 0.3)
    http.faults.update(HEAD=fault, GET=fault)
    begun = time.monotonic()
    with pytest.raises(UserError, match=rf"train-000000\.tar at http\S+ cannot be read \({message}"):
        check_shards(http.url, manifest)
    assert time.monotonic() - begun < 6  # its threads are waited for, but not for ever


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"",
    ],
    ids=["nonsense", "endless headers", "no number", "nothing"],
)
def test_an_answer_that_is_no_http_is_an_error(manifest: Manifest, answer: bytes) -> None:
    def reply(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(answer)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                reply(listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(
            UserError, match=r"shard train-000000\.tar at http\S+ cannot be read \((?s:.+)\): fetch"
        ):
            check_shard_sizes(f"http://127.0.0.1:{listener.getsockname()[1]}", manifest.splits["train"][:1])
        listener.shutdown(socket.SHUT_RDWR)


# ------------------------------------------------------------------------------------- slow, dying, not there


@pytest.fixture(params=["http", "bucket"])
def place(request: pytest.FixtureRequest) -> tuple[Store, str]:
    """Each kind of store, and where the shards lie in it."""
    store = request.getfixturevalue(request.param)
    return store, store.url if request.param == "http" else LOCATION


def test_a_torn_answer_is_asked_for_again_and_then_an_error(
    place: tuple[Store, str], folder: Path, manifest: Manifest
) -> None:
    store, location = place
    shard = manifest.splits["train"][0]
    for fault in ("torn", "reset"):
        store.faults["GET"] = [fault]
        assert bytes(read_shard(location, shard)) == (folder / shard.name).read_bytes()
        assert store.faults["GET"] == []
        store.faults["GET"] = fault
        store.requests.clear()
        with pytest.raises(
            UserError, match=rf"shard {shard.name} at {location}\S+ cannot be read \(.+\): fetch"
        ):
            read_shard(location, shard)
        assert len(store.requests) <= (9 if location == LOCATION else 6)  # aiohttp sends each twice


def test_a_store_that_stalls_is_an_error_in_time(
    place: tuple[Store, str], manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, location = place
    monkeypatch.setattr(remote, "STALL_S", 0.5)
    store.faults["GET"] = "stall"
    begun = time.monotonic()
    with pytest.raises(
        UserError, match=r"train-000000\.tar at \S+ cannot be read \(nothing came for 0.5 s\): fetch"
    ):
        read_shard(location, manifest.splits["train"][0])
    with pytest.raises(UserError, match=r"manifest\.json cannot be read: nothing came for 0.5 s"):
        Manifest.load(location)
    assert time.monotonic() - begun < 8


def test_slow_is_not_stalled(
    http: Store, folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole takes longer than the limit."""
    monkeypatch.setattr(remote, "STALL_S", 1.5)
    http.faults["GET"] = "slow"
    shard = manifest.splits["train"][0]
    assert bytes(read_shard(http.url, shard)) == (folder / shard.name).read_bytes()


def test_a_store_that_is_not_there(manifest: Manifest, s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    shard = manifest.splits["train"][0]
    with pytest.raises(UserError, match=r"train-000000\.tar at http://127.* cannot be read \(.*Connect"):
        check_shards("http://127.0.0.1:9", manifest)
    with pytest.raises(
        UserError,
        match=r"train-000000\.tar at s3://bucket/\S+ cannot be read \(EndpointConnectionError: Could",
    ):
        read_shard("s3://bucket", shard)


def test_what_is_missing_in_a_store_is_said(http: Store, bucket: Store, manifest: Manifest) -> None:
    absent = replace(manifest.splits["train"][0], name="absent.tar")
    for location in (http.url, LOCATION):
        for read in (
            lambda: read_shard(location, absent),  # noqa: B023
            lambda: check_shard_sizes(location, [absent]),  # noqa: B023
        ):
            with pytest.raises(
                UserError, match=rf"shard absent\.tar at {location}/absent\.tar is missing: fetch"
            ):
                read()
        with pytest.raises(FileNotFoundError, match="does not exist; make shards"):
            Manifest.load(f"{location}/elsewhere")


def test_no_more_is_read_than_the_manifest_says(http: Store, manifest: Manifest, tmp_path: Path) -> None:
    http.faults["GET"] = "endless"
    begun = time.monotonic()
    with pytest.raises(UserError, match="was altered, it is longer than"):
        read_shard(http.url, manifest.splits["train"][0], cache=ShardCache(str(tmp_path / "cache")))
    with pytest.raises(UserError, match=r"histogram\.npy .* was altered, its sha256"):
        read_histogram(http.url, manifest)
    assert time.monotonic() - begun < 5  # 4 GB would take longer
    assert not (tmp_path / "cache").exists()


def test_a_bad_shard_is_named_while_others_stall(tmp_path: Path) -> None:
    """With verify="full", all shards are read at once: the error does not wait for the others."""
    manifest = write_tiny_shards(tmp_path)
    path = tmp_path / manifest.splits["train"][0].name
    path.write_bytes(bytes(path.stat().st_size))
    with served(tmp_path) as store:
        store.faults.update({"GET": "stall", f"GET /{path.name}": None})
        begun = time.monotonic()
        with pytest.raises(UserError, match=rf"shard {path.name} at http.* was altered, its sha256"):
            check_shards(store.url, manifest, "full")
    assert time.monotonic() - begun < 6


# --------------------------------------------------------------------------------------- loader and processes


def test_a_loader_that_waits_for_a_store_can_be_closed(http: Store, manifest: Manifest) -> None:
    loader = BatchLoader(
        http.url, manifest, sequence_length=16, global_batch_size=16, micro_batch_size=2, seed=1, lanes=8
    )
    http.faults["GET"] = "stall"
    http.requests.clear()
    iterator = loader.batches(0, 10)
    threading.Thread(target=lambda: next(iterator, None), daemon=True).start()
    while not http.requests:
        time.sleep(0.02)
    begun = time.monotonic()
    prefetch._stop_producers()  # what the end of the interpreter calls
    assert time.monotonic() - begun < 3


def test_a_process_ends_although_a_store_stalls(http: Store) -> None:
    """By itself, with its exit code and nothing on stderr; and at Ctrl-C."""
    http.faults["GET"] = "stall"
    script = """
        import signal, sys, threading
        from data_prep.shard_format.manifest import Manifest

        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of some shells

        def load():
            Manifest.load(sys.argv[1])

        if sys.argv[2] == "ctrl-c":
            load()
        threading.Thread(target=load, daemon=True).start()
        sys.stdin.readline()
        sys.exit(75)
    """
    for number, end in enumerate(("exit", "ctrl-c"), start=1):
        command = [sys.executable, "-c", textwrap.dedent(script), http.url, end]
        with subprocess.Popen(command, cwd=ROOT, stdin=PIPE, stderr=PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            while len(http.requests) < number and time.monotonic() < deadline:
                time.sleep(0.05)
            begun = time.monotonic()
            if end == "ctrl-c":
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate("now\n", timeout=60)
        assert time.monotonic() - begun < 15
        if end == "exit":
            assert (process.returncode, errors) == (75, "")
        else:
            assert errors.rstrip().endswith("KeyboardInterrupt")
    assert len(http.requests) == 2


# ------------------------------------------------------------------------------------- schemes and packages


@pytest.mark.parametrize("url", ["pipe:cat /shards", "ftp://host/shards", "simplecache::s3://bucket/corpus"])
def test_another_scheme_is_refused_with_those_that_are_read(url: str) -> None:
    for use in (Manifest.load, lambda url: DataConfig(shards=url)):
        with pytest.raises(
            UserError, match=r"cannot be read \(\S+:\): give a path, a file: URL, or a URL of http://"
        ):
            use(url)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("az", "adlfs"), ("abfs", "adlfs")])
def test_a_missing_package_is_said_with_the_command_that_installs_it(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    requirements = Path(ROOT, "requirements-remote.txt")
    with pytest.raises(
        UserError, match=rf"{package}, which is not installed .*pip install -r {requirements}"
    ):
        Manifest.load(f"{scheme}://bucket/corpus")
    assert f"\n{package}==" in requirements.read_text()
