"""The Hugging Face hub's endpoints for making, filling and reading a model repository, on 127.0.0.1."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask, Response, abort, request
from werkzeug.serving import make_server


class Hub:
    """Repositories as {name: {"private": bool, "files": {path: bytes}, "messages": [...]}}."""

    def __init__(self, token: str) -> None:
        self.token, self.url = token, ""
        self.repositories: dict[str, dict[str, Any]] = {}

    def application(self) -> Flask:
        app = Flask("hub")
        app.before_request(self._authorise)
        app.add_url_rule("/api/repos/create", view_func=self._create, methods=["POST"])
        app.add_url_rule(
            "/api/validate-yaml", view_func=lambda: {"errors": [], "warnings": []}, methods=["POST"]
        )
        app.add_url_rule("/api/models/<owner>/<name>", view_func=self._info)
        app.add_url_rule("/api/models/<owner>/<name>/revision/<_>", view_func=self._info)
        app.add_url_rule("/api/models/<owner>/<name>/preupload/<_>", view_func=self._ask, methods=["POST"])
        app.add_url_rule("/api/models/<owner>/<name>/commit/<_>", view_func=self._commit, methods=["POST"])
        app.add_url_rule("/<owner>/<name>/resolve/<_>/<path:path>", view_func=self._file)
        return app

    def _authorise(self) -> None:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            abort(401)

    def _create(self) -> Any:
        asked = request.get_json()
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        address = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repositories:
            return address, 409
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repositories[name] = {"private": private, "files": {}, "messages": []}
        return address

    def _info(self, owner: str, name: str, _: str = "") -> Any:
        found = self._found(owner, name)
        files = [{"rfilename": path} for path in found["files"]]
        sha = hashlib.sha1(repr(sorted(found["files"])).encode()).hexdigest()
        return {
            "id": f"{owner}/{name}",
            "private": found["private"],
            "siblings": files,
            "sha": sha,
            "tags": [],
        }

    def _ask(self, owner: str, name: str, _: str) -> Any:
        self._found(owner, name)
        files = request.get_json()["files"]
        return {
            "files": [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for each in files
            ]
        }

    def _commit(self, owner: str, name: str, _: str) -> Any:
        found = self._found(owner, name)
        for line in request.get_data().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                found["messages"].append(value["summary"])
            else:
                assert entry["key"] == "file"
                found["files"][value["path"]] = base64.b64decode(value["content"])
        commit = {"commitUrl": f"{self.url}/{owner}/{name}/commit/1", "commitOid": "1" * 40}
        return {**commit, "hookOutput": "", "success": True}

    def _file(self, owner: str, name: str, _: str, path: str) -> Any:
        content = self._found(owner, name)["files"].get(path)
        if content is None:
            return Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha1(content).hexdigest()
        return Response(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": "1" * 40})

    def _found(self, owner: str, name: str) -> dict[str, Any]:
        if f"{owner}/{name}" not in self.repositories:
            abort(Response(status=404, headers={"X-Error-Code": "RepoNotFound"}))
        return self.repositories[f"{owner}/{name}"]


@contextmanager
def hub(token: str) -> Iterator[Hub]:
    """A hub that lets in one token."""
    stand_in = Hub(token)
    server = make_server("127.0.0.1", 0, stand_in.application(), threaded=True)
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        thread.join()
