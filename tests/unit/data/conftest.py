"""An S3 endpoint for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data_prep.shard_format import remote
from tests.loopback_stores import Store, s3_application, served


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Store]:
    with served(s3_application()) as store:
        yield store


@pytest.fixture
def s3(s3_server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The environment variables that lead to it are the AWS libraries' own."""
    names = {"ENDPOINT_URL": s3_server.url, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}
    for name, value in {**names, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    remote._filesystem.cache_clear()
    s3_server.reset()
    yield s3_server
    s3_server.reset()
    remote._filesystem.cache_clear()
