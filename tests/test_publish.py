"""Publishing: what is listed is what is sent, nothing is sent unasked, and failures are one line with the remedy."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.console import Console
from tiny_run import run_config, save_base, save_run

from packloop.engine.merge import merge
from packloop.engine.publish import files_to_upload, push
from packloop.errors import InputError

TOKEN = "hf_" + "a1B2" * 8
ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.resolved.yaml",
    "environment.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    run = save_run(run_config(save_base(directory / "base"), directory / "run"))
    for extra in ("checkpoints/step-000001/adapter_model.safetensors", "tensorboard/events.out", ".env", "notes.txt"):
        (run / extra).parent.mkdir(parents=True, exist_ok=True)
        (run / extra).write_text(f"HF_TOKEN={TOKEN}")
    return run


class Hub(BaseHTTPRequestHandler):
    """The few calls of the Hub that an upload of small files makes. Keeps what it is sent."""

    def do_GET(self):
        name = self.path.removeprefix("/api/models/")
        if name in self.server.repositories:
            private = self.server.repositories[name]
            return self.answer({"id": name, "_id": "0", "private": private, "tags": [], "siblings": [], "downloads": 0})
        return self.answer({"error": "Repository not found"}, status=404, error_code="RepoNotFound")

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else self.read_chunks()
        self.server.headers.append(self.headers)
        if self.server.refuse_writes:
            return self.answer({"error": "You don't have the rights"}, status=403)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories[name] = asked.get("private", asked.get("visibility") == "private")
            return self.answer({"url": f"{self.server.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in filter(None, body.split(b"\n")):
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer({"commitUrl": f"{self.server.url}/me/adapter/commit/1", "commitOid": "1"})

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, value: dict, *, status: int = 200, error_code: str | None = None):
        content = json.dumps(value).encode()
        self.send_response(status)
        if error_code:
            self.send_header("X-Error-Code", error_code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.repositories, server.headers, server.refuse_writes = {}, {}, [], False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the rest of the suite is kept off the network
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def say(*arguments, **options) -> tuple[str | None, str]:
    out = io.StringIO()
    return push(*arguments, console=Console(file=out, width=120, color_system=None), **options), out.getvalue()


def test_the_list_holds_the_adapter_and_nothing_else_of_the_directory(run_dir):
    assert {file.name for file in files_to_upload(run_dir)} == ADAPTER_FILES
    assert {file.name for file in files_to_upload(run_dir, metrics=True)} == ADAPTER_FILES | {"metrics.jsonl"}


def test_the_list_of_a_merged_model_has_every_shard(run_dir, tmp_path):
    merged = merge(run_dir, tmp_path / "merged", base="original", max_shard_size="100KB")
    names = {file.name for file in files_to_upload(merged)}
    assert names == {path.name for path in merged.iterdir()}
    assert {"model.safetensors.index.json", "config.json", "generation_config.json", "README.md"} < names
    assert not any("adapter" in name for name in names)


def test_a_link_out_of_the_directory_is_not_followed(run_dir, tmp_path):
    (tmp_path / "private.txt").write_text("private")
    copy = copy_run(run_dir, tmp_path / "run")
    (copy / "environment.json").unlink()
    (copy / "environment.json").symlink_to(tmp_path / "private.txt")
    assert "environment.json" not in {file.name for file in files_to_upload(copy)}


def test_what_is_announced_is_what_is_sent_and_no_more(run_dir, hub):
    address, shown = say(run_dir, "me/adapter", private=True, yes=True)
    assert address == f"{hub.url}/me/adapter"
    assert hub.files.keys() == ADAPTER_FILES
    assert all(hub.files[name] == (run_dir / name).read_bytes() for name in ADAPTER_FILES)
    assert hub.repositories == {"me/adapter": True}
    assert "to me/adapter (will be created; private), 7 files" in shown
    assert all(f"MiB  {name}\n" in shown for name in ADAPTER_FILES)
    assert TOKEN not in shown
    assert not any(TOKEN.encode() in content for content in hub.files.values())


def test_the_merged_model_is_merged_and_sent_and_the_temporary_directory_removed(run_dir, hub):
    beside = sorted(path.name for path in run_dir.parent.iterdir())
    _, shown = say(run_dir, "me/merged", merged=True, base="dequantized", yes=True)
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} < hub.files.keys()
    assert "public, for everyone to see" in shown
    assert sorted(path.name for path in run_dir.parent.iterdir()) == beside


@pytest.mark.parametrize(("answer", "sent"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_it_asks_on_a_terminal(run_dir, hub, monkeypatch, answer, sent):
    leader, follower = pty.openpty()
    with os.fdopen(follower) as terminal, os.fdopen(leader, "wb", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", terminal)
        keyboard.write(answer.encode())
        address, shown = say(run_dir, "me/adapter")
    assert bool(address) == bool(hub.files) == bool(hub.repositories) == sent
    assert ("nothing was uploaded" in shown) != sent


def test_without_a_terminal_or_yes_nothing_is_sent(run_dir, hub, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(InputError, match="so say --yes"):
        say(run_dir, "me/adapter")
    assert not hub.files
    assert not hub.repositories


def test_a_public_repository_is_not_taken_for_a_private_upload(run_dir, hub):
    hub.repositories["me/adapter"] = False
    with pytest.raises(InputError, match="exists and is public"):
        say(run_dir, "me/adapter", private=True, yes=True)
    assert not hub.files
    _, shown = say(run_dir, "me/adapter", yes=True)
    assert "(exists; public" in shown
    assert hub.files


def test_a_token_without_the_right_to_write_is_one_line(run_dir, hub):
    hub.refuse_writes = True
    with pytest.raises(InputError, match="log in with a token that may write there") as caught:
        say(run_dir, "me/adapter", yes=True)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "Zz9" * 10, "correct-horse-battery"])
def test_a_secret_in_a_file_stops_the_upload_without_being_shown(run_dir, hub, tmp_path, monkeypatch, secret):
    monkeypatch.setenv("DATABASE_PASSWORD", "correct-horse-battery")
    copy = copy_run(run_dir, tmp_path / "run")
    with (copy / "config.resolved.yaml").open("a") as file:
        file.write(f"# {secret}\n")
    with pytest.raises(InputError, match=r"config\.resolved\.yaml.*looks like a token or password") as caught:
        say(copy, "me/adapter", yes=True)
    assert secret not in str(caught.value)
    assert not hub.files


@pytest.mark.parametrize(
    "repo_id", ["adapter", "me/my adapter", "me/a/b", "", "me/..", "https://hf.co/me/x", "me/x--y"]
)
def test_bad_repository_names_are_refused_before_anything_else(repo_id):
    with pytest.raises(InputError, match="owner/name is needed") as caught:
        push("no/such/run", repo_id, yes=True)
    assert "\n" not in str(caught.value)


def test_directories_without_weights_and_checkpoints_are_refused(run_dir, tmp_path):
    with pytest.raises(InputError, match="give the directory of a finished run"):
        push(tmp_path, "me/adapter", yes=True)
    checkpoint = copy_run(run_dir, copy_run(run_dir, tmp_path / "run") / "checkpoints/step-000002")
    with pytest.raises(InputError, match="is a checkpoint; push the finished run"):
        push(checkpoint, "me/adapter", yes=True)


def test_no_network_and_no_token_are_one_line_with_the_remedy(run_dir, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed_port = probe.getsockname()[1]
    script = (
        "import os, sys\n"
        "from packloop.engine.publish import push\n"
        "from packloop.errors import InputError\n"
        "for token in (sys.argv[2], ''):\n"
        "    os.environ['HF_TOKEN'] = token\n"
        "    try:\n        push(sys.argv[1], 'me/adapter', yes=True)\n"
        "    except InputError as error:\n        print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": f"http://127.0.0.1:{closed_port}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", script, str(run_dir), TOKEN]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    no_network, no_token = done.stdout.splitlines()
    assert f"'me/adapter' at http://127.0.0.1:{closed_port} cannot be reached" in no_network
    assert "check the network" in no_network
    assert "log in with `hf auth login` or set HF_TOKEN" in no_token
    assert TOKEN not in done.stdout + done.stderr


def copy_run(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target
