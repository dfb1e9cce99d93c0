"""`mis_mlx.distill(...)` and the other functions of Python: what the commands do, with keywords for
flags.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import pytest

import mis_mlx
from mis_mlx import flag_help
from mis_mlx.types import Checkpoint
from tests.conftest import Done

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys
import mis_mlx
clean = [name for name in ("mlx.core", "numpy", "mis_mlx.cli") if name in sys.modules]
result = mis_mlx.distill(teacher=sys.argv[1], dry_run=True, budget="1GiB", max_seq_length=32)
import ctypes
fast = hasattr(ctypes.CDLL(None), "cblas_sgemm")
print(json.dumps({"clean": clean, "folder": result.folder, "mode": result["mode"], "fast": fast}))
"""


@pytest.fixture(autouse=True)
def as_a_user_meets_it() -> None:
    """Other tests of this process import the commands' modules by themselves, which only our own
    code does.
    """
    for name in mis_mlx.FUNCTIONS:
        vars(mis_mlx).pop(name, None)


def test_prune_quantize_open(
    llama: Checkpoint, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two stages as functions, paths as Path; nothing goes to stdout; what comes out opens."""
    made = mis_mlx.prune(
        model=llama.path,
        mlx_path=tmp_path / "small",
        scenario="none",
        ffn=256,
        num_samples=4,
        max_seq_length=32,
        data=text_folder,
    )
    assert made.folder == tmp_path / "small"
    assert made["params"] < made["params_before"]
    plain = dict(target_bpw=None, q_iters=0, num_samples=2, max_seq_length=32)
    packed = mis_mlx.quantize(model=made.folder, mlx_path=tmp_path / "packed", **plain)
    there = mis_mlx.open(packed.folder)
    assert there.config["intermediate_size"] == 256
    assert there.nbytes < mis_mlx.open(made.folder).nbytes
    assert there.tensors["model.norm.weight"].shape == (llama.config["hidden_size"],)
    assert capsys.readouterr().out == ""


def test_a_run_folder_opens_as_its_model(finished: tuple[Path, Done]) -> None:
    """The last model of a run."""
    assert mis_mlx.open(finished[0]).path == finished[0] / "model"


def test_what_a_caller_can_mend_is_raised(llama: Checkpoint, tmp_path: Path) -> None:
    """A value that cannot be and a folder that is not there are MisErrors, an unknown keyword a
    TypeError.
    """
    made = tmp_path / "made"
    prunes = {"model": llama.path, "mlx_path": made}
    with pytest.raises(mis_mlx.MisError, match="--num-samples is -1.* 1 "):
        mis_mlx.prune(**prunes, num_samples=-1)
    with pytest.raises(mis_mlx.MisError, match="num_samples is '8'"):
        mis_mlx.prune(**prunes, num_samples="8")
    with pytest.raises(mis_mlx.MisError, match="'GGUF'.*gguf"):
        mis_mlx.export(model=llama.path, format="GGUF", out=made)
    assert not made.exists()
    with pytest.raises(mis_mlx.MisError, match="config.json"):
        mis_mlx.open(tmp_path)
    with pytest.raises(TypeError, match="iters"):
        mis_mlx.prune(iters=2)
    with pytest.raises(AttributeError, match="distil"):
        mis_mlx.distil  # noqa: B018


def test_keywords_are_the_flags() -> None:
    """An editor sees them, with types and defaults."""
    for name in mis_mlx.FUNCTIONS:
        function = getattr(mis_mlx, name)
        keywords = inspect.signature(function).parameters
        own = flag_help.internal(function.Settings)
        assert keywords.keys() == {f.name for f in fields(function.Settings)} - own
        assert "budget" in keywords


@pytest.mark.thorough
def test_importing_does_nothing_and_the_first_call_brings_fast_products(
    llama: Checkpoint, own_home: dict[str, str]
) -> None:
    """In a process of its own, without `scripts/mis`: no library before it is used; then, on Linux,
    OpenBLAS.
    """
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LD_PRELOAD", "MIS_MLX_BLAS", "OPENBLAS_NUM_THREADS")
    }
    env["MIS_MLX_CACHE"] = own_home["MIS_MLX_CACHE"]  # which has this machine's rates
    line = [sys.executable, "-c", PROGRAM, str(llama.path)]
    done: Done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {"clean": [], "folder": None, "mode": "none", "fast": found["fast"]}
    assert found["fast"] or sys.platform != "linux" or mx.default_device() == mx.gpu
    assert "| all |" in done.stderr


@pytest.mark.thorough
def test_the_examples_of_the_page_run(
    llama: Checkpoint, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/python-api.md, block by block: with a tiny model, text of a few lines, and few steps."""
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    small = dict(data=str(text_folder), max_seq_length=32, num_samples=4)
    for block in blocks:
        code = block.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', f'"{llama.path}", **small')
        code = code.replace(
            "iters=30", "iters=2, reconstruct_samples=4, eval_windows=2, vocab='1x'"
        )
        code = code.replace("model=packed.folder", "model=packed.folder, out_type='f16'")
        code = code.replace("model=small.folder", "model=small.folder, q_iters=0, **few")
        code = code.replace(
            f'teacher="{llama.path}", **small, students',
            f'teacher="{llama.path}", **texts, students',
        )
        texts = {"data": small["data"], "max_seq_length": 32, "eval_windows": 2}
        exec(
            compile(code, "docs/python-api.md", "exec"),
            {"small": small, "few": small, "texts": texts},
        )
    assert (tmp_path / "runs" / "small" / "model").is_dir()
    assert (tmp_path / "exported" / "Modelfile").is_file()
