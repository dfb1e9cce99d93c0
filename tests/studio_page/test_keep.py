"""What Keep uploads to a hub."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.studio_page.driving import Tab, browser, needs_browser, page_of
from tests.test_upload import Hub


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
def test_uploaded_to_a_hub(kept: Path, home: dict[str, str], hub: dict[str, str]) -> None:
    """After a question, the whole model with its license."""
    with page_of(kept, {**home, **hub}, "--models", "more") as served, browser() as context:
        tab = Tab(context, served.address)
        tab.go("Keep")
        tab.sees("GGUF, as the model is packed")
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
        for path in sent.iterdir():
            assert Hub.got[path.name] == path.read_bytes()
        assert json.loads(Hub.got["config.json"])["model_type"] == "llama"
        assert not tab.errors
