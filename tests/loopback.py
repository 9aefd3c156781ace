"""A web server and a Hugging Face hub on this machine, for tests of downloads."""

import json
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

import data
from conftest import save_tiny_weights


class Server(BaseHTTPRequestHandler):
    """Serves server.files, of each at most 100,000 bytes; logs what it was asked for."""
    def do_GET(self):
        self.server.log.append(self.path)
        body = self.server.files.get(self.path)
        self.answer(404 if body is None else 200, body or b"")

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:100_000])

    def log_message(self, *arguments):
        pass


def serve(monkeypatch, handler):
    """A server on this machine for the length of a test; its url ends without a slash."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.files, server.log, server.refusals = {}, [], {"": (404,)}
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def hang_up(server) -> None:
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("SMARTBERT_CACHE", str(tmp_path / "cache"))
    for server in serve(monkeypatch, Server):
        monkeypatch.setattr(data, "GLUE_URL", f"{server.url}/")
        monkeypatch.setattr(data, "MRPC_URL", f"{server.url}/msr_paraphrase_train.txt")
        yield server


class Hub(Server):
    """As much of the hub's protocol as snapshot_download needs. server.files: OWNER/NAME -> the
    files of that repository. server.refusals: a word of its paths -> what it answers instead."""
    def do_GET(self):
        path, commit = self.path.partition("?")[0].removeprefix("/api/models"), f"{1:040x}"
        self.server.log.append(path)
        asked = re.fullmatch("/(.+?/.+?)/(revision|tree|resolve)/[^/]+/?(.*)", path)
        name, word, file = asked.groups() if asked else ("", "", "")  # newer versions ask more
        if word in self.server.refusals:
            return self.answer(*self.server.refusals[word])
        files = self.server.files[name]
        if word == "resolve":
            return self.answer(200, files[file], {"ETag": file, "X-Repo-Commit": commit})
        listed = [{"type": "file", "path": file, "rfilename": file, "oid": file,
                   "size": len(body)} for file, body in files.items()]
        content = {"id": name, "sha": commit, "siblings": listed}
        self.answer(200, json.dumps(listed if word == "tree" else content).encode())

    do_HEAD = do_GET


def point_to(monkeypatch, **how) -> None:
    changed = partial(huggingface_hub.snapshot_download, token=False, **how)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", changed)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A model as transformers 5 saves it, with old files beside it, and one of old files alone."""
    new, old = save_tiny_weights(tmp_path / "new"), save_tiny_weights(tmp_path / "old", old=True)
    new, old = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (new, old))
    others = {"README.md": b"x", "onnx/model.onnx": b"y", "tf_model.h5": b"z"}
    for server in serve(monkeypatch, Hub):
        server.files = {"one/new": old | new | others, "one/old": old | others}
        point_to(monkeypatch, endpoint=server.url, cache_dir=tmp_path / "hub")
        yield server
