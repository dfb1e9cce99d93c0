"""What a process holds while it opens a tokenizer of many tokens, and afterwards."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mis_mlx.models.opening.model_size import model_of
from tests import tiny

TOKENS = 50_000
LIBRARIES = 60 * 2**20  # mlx-lm and transformers, which are imported then
MEASURE = """
import sys
from pathlib import Path
from mis_mlx.models.opening import load

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(2**10 * int(line.split()[1]) for line in lines if line.startswith(what))

before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
tokenizer = load.tokenizer(Path(sys.argv[1]))
print(resident("VmHWM") - before, resident("VmRSS") - before, len(tokenizer.encode("a bear")))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder with TOKENS tokens, each joined of two others."""
    folder = tiny.make(tmp_path_factory.mktemp("many") / "model")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text("utf-8"))
    draws = random.Random(0)
    vocab = spec["model"]["vocab"]
    letters = [token for token in vocab if len(token) == 1]
    parts = list(letters)
    merges = []
    while len(vocab) < TOKENS:
        pair = draws.choice(parts), draws.choice(letters)
        token = "".join(pair)
        if token not in vocab:
            vocab[token] = len(vocab)
            merges.append(pair)
            parts.append(token)
    spec["model"]["merges"] = merges
    path.write_text(json.dumps(spec), "utf-8")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="resident sets are counted as Linux tells them")
def test_opening_takes_no_more_than_is_planned_and_gives_back_most_of_it(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": TOKENS}
    planned = model_of(config)
    command = [sys.executable, "-c", MEASURE, str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peak, kept, tokens = map(int, output.stdout.split())
    assert tokens
    assert planned.opening_bytes / 3 < peak <= LIBRARIES + planned.opening_bytes
    assert kept <= LIBRARIES + planned.text_bytes
