"""Stores of files on 127.0.0.1, http and S3, and what can go wrong with a store."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass
class Store:
    """A server of an application.

    A fault is a status, "reset" (the connection ends without an answer), "stall" (no answer), "torn" (half of it, and
    the end), "slow" (it comes in five pieces), "loop" (a redirection to the same place) or "endless".
    """

    application: Application
    url: str = ""
    requests: list[str] = field(default_factory=list)
    """"GET /name" and so on, as they come."""
    faults: dict[str, Any] = field(default_factory=dict)
    """By method, or method and path: what happens to all of its requests, or a list of what happens to the next."""
    hurry: threading.Event = field(default_factory=threading.Event)
    """Ends what stalls."""

    def reset(self) -> None:
        self.requests.clear()
        self.faults.clear()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append(f"{method} {path}")
        fault = self.faults.get(f"{method} {path}", self.faults.get(method))
        if isinstance(fault, list):
            fault = fault.pop(0) if fault else None
        if isinstance(fault, int):
            start_response(f"{fault} Fault", [("Content-Length", "0")])
            return []
        if fault == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if fault == "stall":
            self.hurry.wait(20)
        if fault == "loop":
            start_response("302 Found", [("Location", path), ("Content-Length", "0")])
            return []
        if fault == "endless":
            start_response("200 OK", [])
            return (bytes(1 << 16) for _ in range(1 << 16))
        answer = self.application(environ, start_response)
        if fault not in ("torn", "slow"):
            return answer
        content = b"".join(answer)
        if fault == "torn":
            return [content[: len(content) // 2]]
        step = -(-len(content) // 5)
        return (self.hurry.wait(0.4) or content[i : i + step] for i in range(0, len(content), step))


def files_of(folder: Path) -> Application:
    """An http server's, without ranges."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        path = folder / environ["PATH_INFO"].lstrip("/")
        if not path.is_file():
            start_response("404 Not Found", [("Content-Length", "0")])
            return []
        content = path.read_bytes()
        start_response("200 OK", [("Content-Length", str(len(content)))])
        return [content] if environ["REQUEST_METHOD"] == "GET" else []

    return application


@contextlib.contextmanager
def served(application: Path | Application) -> Iterator[Store]:
    """A folder over http, or an application, while the context lasts."""
    store = Store(files_of(application) if isinstance(application, Path) else application)
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Quiet)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield store
    finally:
        store.hurry.set()
        server.shutdown()
        server.server_close()


class _Quiet(WSGIRequestHandler):
    def log(self, *arguments: Any, **more: Any) -> None:
        pass


def s3_application() -> Application:
    """moto's S3, in memory."""
    from moto.server import DomainDispatcherApplication, create_backend_app  # imports for a second

    return DomainDispatcherApplication(create_backend_app)
