"""storage/hub.py against a real hub of our own on this machine: downloads, refusals, provenance."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mis_mlx.storage import hub
from tests.conftest import mostly_thorough

COMMIT = "c0ffee" + "0" * 34
CONTENT = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "modeling.py": b"raise SystemExit('code from a model repository was run')",
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """Enough of the Hugging Face hub's protocol for one model, `me/tiny`."""

    asked: list[str]
    silent = False

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        """Answer the three questions that a snapshot asks."""
        self.asked.append(self.path)
        if self.silent:
            threading.Event().wait(30)
            return
        path = self.path.partition("?")[0]
        files = [
            {"type": "file", "path": n, "size": len(b), "oid": git_id(b)}
            for n, b in CONTENT.items()
        ]
        if path.startswith("/api/models/me/tiny/revision/") or path == "/api/models/me/tiny":
            siblings = [{"rfilename": name} for name in CONTENT]
            self.answer({"id": "me/tiny", "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/api/models/me/tiny/tree/"):
            self.answer(files)
        elif path.startswith(f"/me/tiny/resolve/{COMMIT}/"):
            body = CONTENT[path.split(f"{COMMIT}/")[1]]
            headers = {"ETag": f'"{git_id(body)}"', "X-Repo-Commit": COMMIT}
            self.answer(body, headers)
        else:
            self.answer({"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET

    def answer(
        self, body: object, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        """Send bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def git_id(body: bytes) -> str:
    """The name that git, and so the hub, gives to a small file."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """The hub, running until the test ends."""
    Hub.asked = []
    Hub.silent = False
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        running.daemon_threads = True
        running.block_on_close = False
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def find(name: str, where: str, tmp_path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`resolve_model(name)` in a fresh process: the hub client reads settings when imported."""
    code = f"""
from mis_mlx.models.opening import resolve
from mis_mlx.storage import hub
from mis_mlx.types import MisError
hub.ANSWER_S = 2.0
try:
    print(resolve.resolve_model({name!r}).source)
except MisError as error:
    print("MisError:", error)
"""
    hidden = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MIS_"))
    }
    env = {**hidden, "HF_HOME": str(tmp_path / "hf"), "MIS_MLX_CACHE": str(tmp_path / "cache")}
    env |= {"HF_ENDPOINT": where, "HF_HUB_DISABLE_XET": "1", **more}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def address(server: ThreadingHTTPServer) -> str:
    """The hub's URL."""
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_model_comes_once_without_code_and_with_its_origin(
    server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    """Only safetensors, json, tokenizer and template arrive, silently, in an ordinary folder."""
    done = find("me/tiny", address(server), tmp_path)
    assert done.stdout == f"Hugging Face hub me/tiny at {COMMIT[:12]}\n", done.stderr
    assert done.stderr == ""
    folder = tmp_path / "cache" / "me--tiny"
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == wanted | {"source.json"}
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert all((folder / name).read_bytes() == CONTENT[name] for name in wanted)
    origin = json.loads((folder / "source.json").read_text())
    assert origin["revision"] == COMMIT
    assert origin["quantized_origin"] is None
    # The second time nobody is asked; without our cache, what another tool downloaded is found
    # without the hub.
    asked = len(Hub.asked)
    again = find("me/tiny", address(server), tmp_path)
    assert again.stdout == f"cache {folder} (Hugging Face hub me/tiny at {COMMIT[:12]})\n", (
        again.stderr
    )
    assert len(Hub.asked) == asked > 0
    shared = find("me/tiny", "http://127.0.0.1:9", tmp_path, MIS_MLX_CACHE=str(tmp_path / "other"))
    assert shared.stdout == done.stdout, shared.stderr


@pytest.mark.parametrize("way", ["offline", "no such model", "no answer", "no safetensors"])
def test_what_cannot_be_downloaded(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """HF_HUB_OFFLINE is obeyed; an unknown name; a hub that takes the question and never answers;
    a repository that holds only a pickle: one sentence that says what to do, and nothing is kept.
    """
    # the client alone would wait for ever: the 60 s limit would end the test
    Hub.silent = way == "no answer"
    name = "me/none" if way == "no such model" else "me/tiny"
    if way == "no safetensors":
        monkeypatch.delitem(CONTENT, "model.safetensors")
    offline = {"HF_HUB_OFFLINE": "1"} if way == "offline" else {}
    done = find(name, address(server), tmp_path, **offline)
    assert done.stdout.startswith("MisError: "), done.stderr
    assert name in done.stdout and done.stdout.count("\n") == 1 and done.stderr == ""
    if way == "no safetensors":
        assert "choose a model published as safetensors" in done.stdout
    else:
        assert f"{name} could not be downloaded from the Hugging Face hub" in done.stdout
    if way == "offline":
        assert "give the path of a model folder" in done.stdout and Hub.asked == []
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "gone",
    mostly_thorough(
        ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"],
        "model-00002-of-00002.safetensors",
    ),
)
def test_a_part_of_a_model_is_not_adopted(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """What a stopped download left in the hub's own cache is refused while the hub is away, with
    the folder to delete.
    """
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    monkeypatch.delitem(CONTENT, "model.safetensors")
    for number, name in enumerate(shards):
        header = json.dumps({f"w{number}": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
        content = len(header).to_bytes(8, "little") + header.encode() + b"x"
        monkeypatch.setitem(CONTENT, name, content)
    index = json.dumps({"weight_map": dict(zip(("w0", "w1"), shards, strict=True))})
    monkeypatch.setitem(CONTENT, "model.safetensors.index.json", index.encode())
    monkeypatch.delitem(CONTENT, gone)
    folder = tmp_path / "hf" / "hub" / "models--me--tiny"
    download = "from huggingface_hub import snapshot_download; snapshot_download('me/tiny')"
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address(server)}
    subprocess.run([sys.executable, "-c", download], env=env, capture_output=True, check=True)
    done = find("me/tiny", "http://127.0.0.1:9", tmp_path)
    assert done.stdout.startswith("MisError: "), done.stdout + done.stderr
    assert str(folder) in done.stdout
    assert not (tmp_path / "cache" / "me--tiny").exists()


def test_lock_sweeps_and_waits(tmp_path: Path) -> None:
    """What a killed run left is gone once the lock is held, for which a second process waits."""
    (tmp_path / ".tmp-model-1").mkdir()
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with hub.locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        assert "BlockingIOError" in subprocess.run(command, capture_output=True, text=True).stderr
    assert subprocess.run(command).returncode == 0


def test_cache_root_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """$MIS_MLX_CACHE comes before $XDG_CACHE_HOME, that before ~/.cache."""
    places = {"MIS_MLX_CACHE": "/m", "XDG_CACHE_HOME": "/x", "HOME": "/h"}
    for variable, place in places.items():
        monkeypatch.setenv(variable, place)
    for variable, root in zip(places, ("/m", "/x/mis_mlx", "/h/.cache/mis_mlx"), strict=True):
        assert hub.cache_root() == Path(root)
        monkeypatch.delenv(variable)
