"""A server of W&B's, as far as its client asks one: it keeps rows and summaries of runs, and can go away.

Theirs is not to be had as a package; what this one answers was read off what the client sends.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER = "someone"


@dataclass
class Kept:
    """What the server has of a run."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    events: int = 0

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]


class _Http(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """W&B's process may end in the middle of a request."""


class WandbServer:
    """On a free port of this machine. `away`: answers nothing but that it is not there."""

    def __init__(self) -> None:
        self.runs: dict[str, Kept] = {}
        self.away = False
        self.opened = 0  # how often a run was
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """To a request of the client."""
        if path.endswith("/file_stream"):
            self._stream(self.runs[path.split("/")[-2]], asked.get("files") or {})
            return {}
        name, variables = asked.get("operationName"), asked.get("variables", {})
        if name == "RunResumeStatus":
            return {"data": {"model": _project() | {"bucket": _bucket(variables["name"], self.runs)}}}
        if name == "UpsertBucket":
            run, new = variables["name"], variables["name"] not in self.runs
            self.opened += variables["groupName"] is not None  # later ones only tell of its config
            self.runs.setdefault(run, Kept())
            return {"data": {"upsertBucket": {"bucket": _bucket(run, self.runs), "inserted": new}}}
        if name == "CreateRunFiles":
            return {"data": {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": []}}}
        return {"data": {}}

    def _stream(self, run: Kept, files: dict[str, Any]) -> None:
        for name, chunk in files.items():
            lines = [json.loads(line) for line in chunk["content"]] if name.endswith((".jsonl", ".json")) else []
            if name == "wandb-history.jsonl":
                run.rows[chunk["offset"] :] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
            elif name == "wandb-events.jsonl":
                run.events = chunk["offset"] + len(lines)


@contextmanager
def serve() -> Iterator[WandbServer]:
    server = WandbServer()
    try:
        yield server
    finally:
        server.close()


def _project() -> dict[str, Any]:
    return {"id": "1", "name": "farseer", "entity": {"id": "2", "name": OWNER}}


def _bucket(name: str, runs: dict[str, Kept]) -> dict[str, Any] | None:
    if (run := runs.get(name)) is None:
        return None
    return {
        "id": name,
        "name": name,
        "displayName": name,
        "description": None,
        "config": "{}",
        "sweepName": None,
        "project": _project(),
        "historyLineCount": len(run.rows),
        "eventsLineCount": run.events,
        "logLineCount": 0,
        "summaryMetrics": json.dumps(run.summary),
        "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]),
        "eventsTail": "[]",
        "tags": [],
        "notes": None,
        "wandbConfig": '{"t": 1}' if run.rows else None,
    }


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer = {} if server.away else server.answer(self.path, json.loads(body or b"{}"))
            text = json.dumps(answer).encode()
            self.send_response(503 if server.away else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
