"""A W&B server on the loopback for the tests: it takes what the real client sends, and keeps it in lists.

It answers the handful of calls that a run's upload makes and no more; artifacts are declared known, so that none
has to be sent twice.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.bodies: list[bytes] = []  # all that was sent, word for word

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has what it wants closes its connection; that is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send({})

    def do_PUT(self) -> None:
        self._body()
        self.server.files.append(self.path.removeprefix("/upload/"))
        self._send({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.startswith("/graphql"):
            call = json.loads(body)
            self._send({"data": self._answer(call.get("operationName"), call.get("variables") or {})})
        else:
            if self.path.endswith("/file_stream"):
                lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                self.server.history += [json.loads(line) for line in lines]
            self._send({})

    def _answer(self, operation: str | None, variables: dict[str, Any]) -> dict[str, Any]:
        someone = {"id": "E1", "name": "someone"}
        if operation == "UpsertBucket":
            self.server.runs.append(variables)
            name, project = variables.get("name"), variables.get("project")
            bucket = {"id": "B1", "name": name, "displayName": variables.get("displayName"), "historyLineCount": 0}
            bucket["project"] = {"id": "P1", "name": project, "entity": someone}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateArtifact":
            self.server.artifacts.append(variables["input"])
            known = {"id": "A1", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "A1"}}}
            return {"createArtifact": {"artifact": known}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.server.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "B1", "uploadHeaders": [], "files": files}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "Viewer":
            return {"viewer": {"id": "U1", "entity": "someone", "username": "someone", "teams": {"edges": []}}}
        return {"project": None}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.server.bodies.append(body)
        return body

    def _send(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server for as long as the block runs."""
    with WandbServer() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
