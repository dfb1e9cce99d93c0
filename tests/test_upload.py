"""`export --upload-repo`: what a hub on this machine receives is complete and opens elsewhere."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx_lm
import pytest
from gguf import GGUFReader
from huggingface_hub import ModelCard

from mis_mlx.types import Checkpoint
from tests.conftest import Done, last_line


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files needs, on this machine; `got` is
    what was sent.
    """

    got: ClassVar[dict[str, bytes]] = {}
    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(
            {"sha": "0" * 40, "id": "me/small", "modelId": "me/small", "siblings": [], "tags": []}
        )

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.paths.append(self.path)
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._answer({"files": [{"path": f["path"], **plain} for f in files]})
        if "/commit/" in self.path:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    self.got[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            return self._answer(
                {"commitUrl": f"{self.path}/1", "commitOid": "1" * 40, "success": True}
            )
        return self._answer({"url": f"http://{self.headers['Host']}/me/small"})

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub_here(own_home: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a process that takes this machine for the hub."""
    Hub.got.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **own_home,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_none",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()


def uploaded(model: Path, out: Path, form: str, env: dict[str, str]) -> Done:
    """`export --upload-repo me/small`, as a user runs it."""
    line = [sys.executable, "-m", "mis_mlx.export", "--format", form, "--model", str(model)]
    line += ["--out", str(out), "--license", "apache-2.0", "--base-model", "owner/big"]
    line += ["--upload-repo", "me/small"]
    return subprocess.run(line, env=env, capture_output=True, text=True)


def files_of(folder: Path) -> dict[str, bytes]:
    """{name: content}."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def received(folder: Path) -> Path:
    """A folder with what the hub has."""
    for name, content in Hub.got.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_the_packed_model_goes_with_its_gguf(
    four: Path, tmp_path: Path, hub_here: dict[str, str]
) -> None:
    """Stock mlx_lm opens what the hub has, gguf-py reads the file beside it, and one commit has
    both.
    """
    before = len(Hub.paths)
    done = uploaded(four, tmp_path / "out", "gguf", hub_here)
    assert done.returncode == 0, done.stderr
    assert sum("/commit/" in path for path in Hub.paths[before:]) == 1
    there = received(tmp_path / "there")
    exported = files_of(tmp_path / "out")
    assert exported.items() <= Hub.got.items()
    packed = Hub.got.keys() - exported.keys()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= packed
    assert all(Hub.got[name] == (four / name).read_bytes() for name in packed)
    assert "sensitivity.json" not in packed
    model, _ = mlx_lm.load(str(there))
    ids = mx.array([[5, 300, 17, 9]])
    want, _ = mlx_lm.load(str(four))
    assert mx.array_equal(model(ids), want(ids))
    assert GGUFReader(there / last_line(done)["file"]).tensors
    card = ModelCard.load(there / "README.md")
    stated = card.data.to_dict()
    assert stated["library_name"] == "mlx"
    assert stated["tags"] == ["mlx", "gguf", "mis_mlx"]
    assert stated["base_model"] == "owner/big"
    assert stated["base_model_relation"] == "quantized"
    assert "mlx_lm.generate --model me/small" in card.text


@pytest.mark.thorough
def test_the_packed_model_goes_beside_a_folder_for_transformers(
    four: Path, tmp_path: Path, hub_here: dict[str, str]
) -> None:
    """The folder's own config.json stays at the top; mlx_lm opens the subfolder."""
    done = uploaded(four, tmp_path / "hf", "hf", hub_here)
    assert done.returncode == 0, done.stderr
    there = received(tmp_path / "there")
    assert files_of(tmp_path / "hf") == {k: v for k, v in Hub.got.items() if "/" not in k}
    assert "quantization" not in json.loads(Hub.got["config.json"])
    assert "quantization" in json.loads(Hub.got["mlx/config.json"])
    model, _ = mlx_lm.load(str(there / "mlx"))
    assert model(mx.array([[5, 300]])).shape == (1, 2, 512)
    card = ModelCard.load(there / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["mlx", "mis_mlx"]
    assert "hf download me/small --include 'mlx/*'" in card.text


def test_an_upload_that_fails_leaves_the_folder_and_says_so(
    llama: Checkpoint, tmp_path: Path, own_home: dict[str, str]
) -> None:
    """Nobody answers at that address."""
    env = {**own_home, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = uploaded(llama.path, tmp_path / "hf", "hf", {**env, "HF_TOKEN": "hf_none"})
    assert done.returncode == 1
    assert "me/small" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "hf" / "model.safetensors").is_file()
