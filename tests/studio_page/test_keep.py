"""What the buttons of Keep run: Ollama's program, LM Studio's folder, an upload to a hub."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.studio_page.driving import Tab, browser, needs_browser, page_of
from tests.test_upload import Hub

# Writes down what it is called with, and what lies where it is called.
OLLAMA = """#!/bin/sh
{ printf '%s\\n' "$@"; ls; cat Modelfile; } > "$HOME/called"
"""


@pytest.fixture
def hub(folder: Path) -> Iterator[dict[str, str]]:
    """Variables of a process that takes this machine for the hub."""
    Hub.got.clear()
    Hub.paths.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_TOKEN": "hf_none",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        server.shutdown()


@needs_browser
@pytest.mark.slow
def test_given_to_other_programs(kept: Path, home: dict[str, str], hub: dict[str, str]) -> None:
    """Without them a sentence says what to do; with them they get the whole model, once."""
    user = Path(home["HOME"])
    programs = kept.parent / "programs"
    programs.mkdir()
    user.mkdir(exist_ok=True)
    env = {**home, **hub, "PATH": f"{programs}:{os.environ['PATH']}"}
    run = kept / "runs" / "tiny-001"
    with page_of(kept, env, "--models", "more") as served, browser() as context:
        tab = Tab(context, served.address)
        tab.go("Keep")
        tab.press("Give to Ollama")
        tab.sees("no Ollama: install it")
        tab.sees("ollama create tiny-001 -f Modelfile")
        assert not (kept / "exported").exists()
        tab.press("Copy to LM Studio")
        tab.sees("start LM Studio once, then copy again")

        program = programs / "ollama"
        program.write_text(OLLAMA)
        program.chmod(0o755)
        tab.press("Give to Ollama")
        tab.sees("Ollama has it: ollama run tiny-001")
        words = (user / "called").read_text().splitlines()
        assert words[:4] == ["create", "tiny-001", "-f", "Modelfile"]
        (gguf,) = (kept / "exported" / "tiny-001-ollama").glob("*.gguf")
        assert gguf.name in words
        assert f"FROM ./{gguf.name}" in words

        (user / ".lmstudio" / "models").mkdir(parents=True)
        tab.press("Copy to LM Studio")
        tab.sees("LM Studio lists it as mis_mlx/tiny-001")
        copied = user / ".lmstudio" / "models" / "mis_mlx" / "tiny-001"
        for path in (run / "model").iterdir():
            if path.is_file():
                assert (copied / path.name).read_bytes() == path.read_bytes()
        tab.press("Copy to LM Studio")
        tab.sees("exists already")

        tab.page.get_by_text("Upload to the Hugging Face hub").click()
        tab.page.get_by_label("Repository").fill("me/small")
        tab.press("Upload")
        tab.sees("Say the license of the weights")
        assert not Hub.got
        tab.page.get_by_label("License").fill("apache-2.0")
        tab.press("Upload")
        tab.sees("Upload tiny-001 to me/small as apache-2.0? Others may see it then.")
        assert not Hub.got
        tab.page.get_by_role("dialog").get_by_role("button", name="Upload").click()
        tab.sees("Uploaded to me/small")
        sent = kept / "exported" / "tiny-001-hf"
        assert Hub.got == {path.name: path.read_bytes() for path in sent.iterdir()}
        assert json.loads(Hub.got["config.json"])["model_type"] == "llama"
        assert not tab.errors
