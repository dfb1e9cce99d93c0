"""What a stranger wrote is read in a child with limits, and no answer is no success."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mis_mlx.data import token_windows
from mis_mlx.hardware import child_process
from mis_mlx.models.opening import load, tokenizer_check
from mis_mlx.models.writing import model_writer
from mis_mlx.types import MisError
from tests import tiny
from tests.faults.test_folders import ESCAPE, patterned, settings

SOURCE = """
import os, signal, sys, time
def quiet(): os._exit(0)
def loud(): print("fine"); sys.stdout.flush(); os._exit(0)
def forged(): print('{"value": 1}', flush=True); os._exit(0)
def gone(): sys.exit(0)
def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def sleep(): time.sleep(600)
def greedy(): return len(bytearray(2**33))
def nan(): return float("nan")
def odd(): return {1, 2}
def fine(): return 7
"""
ENDS = {
    "quiet": "ended with 0",
    "loud": "ended with 0",
    "forged": "ended with 0",
    "gone": "SystemExit",
    "crash": "ended with -11",
    "sleep": "no answer in 3 s",
    "greedy": "MemoryError",
    "nan": "ValueError",
    "odd": "TypeError",
}


@pytest.mark.parametrize("function", ENDS)
def test_only_an_answer_is_an_answer(function: str, tmp_path: Path) -> None:
    """Exit code 0 is none, nor is what it prints; every other end is named."""
    (tmp_path / "f.py").write_text(SOURCE)
    seconds = 3.0 if "no answer" in ENDS[function] else 60.0
    with pytest.raises(child_process.NoAnswer, match=ENDS[function]):
        child_process.ask(str(tmp_path / "f.py"), function, {}, seconds, memory_bytes=2**32)
    if function == "quiet":  # the others fail for what they do, not because nothing works
        assert child_process.ask(str(tmp_path / "f.py"), "fine", {}, 60.0, memory_bytes=2**32) == 7


def test_what_it_starts_ends_with_it(tmp_path: Path) -> None:
    """A process that the child left behind is gone too when the time is over."""
    pid = tmp_path / "pid"
    (tmp_path / "f.py").write_text(
        "import os, time\ndef f(path):\n    if not os.fork():\n        open(path, "
        "'w').write(str(os.getpid()))\n"
        "        time.sleep(600)\n    time.sleep(600)\n"
    )
    with pytest.raises(child_process.NoAnswer):
        child_process.ask(str(tmp_path / "f.py"), "f", {"path": str(pid)}, 4.0)
    number = int(pid.read_text())
    assert _runs(os.getpid())  # the look itself works here
    for _ in range(100):
        if not _runs(number):
            return
        time.sleep(0.05)
    os.kill(number, signal.SIGKILL)
    raise AssertionError("it still runs")


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


ESCAPES = [
    ESCAPE,
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ '{0.__class__}'.format(1) | length // 0 }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'a' * 3000000 }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_stays_in_its_sandbox(template: str, tmp_path: Path) -> None:
    """Ten ways out, or to fill the memory: what comes of them is a sentence, or harmless text."""
    where = tmp_path / "m"
    where.mkdir()
    (where / "chat_template.jinja").write_text(template)
    try:
        done = tokenizer_check.attempt(str(where))
    except (OverflowError, ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
        assert str(error)
    except Exception as error:
        assert type(error).__name__ in ("SecurityError", "UndefinedError"), error
    else:
        assert done["characters"] < tokenizer_check.MOST_CHARACTERS


def test_a_panic_on_other_words_is_a_sentence(tmp_path: Path) -> None:
    """A pattern that only the user's own text sets off: Rust's panic becomes a MisError."""
    folder = tiny.make(tmp_path / "bomb")
    patterned(folder, "(q+)+$")
    tokenizer = load.tokenizer(folder)
    with pytest.raises(MisError, match="fails on 'qqqq"):
        token_windows.tokenize([{"text": "q" * 64 + "!"}], tokenizer)


def test_a_tokenizer_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files elsewhere are known; changed ones are tried; a refusal is never kept."""
    asked = list[str]()
    ask: Callable[..., Any] = child_process.ask
    monkeypatch.setattr(child_process, "ask", lambda *a: (asked.append(a[1]), ask(*a))[1])
    folder = tiny.make(tmp_path / "one")
    settings(folder, "tokenizer_config.json", mark=str(tmp_path))
    tokenizer_check.check_tokenizer(folder)
    tokenizer_check.check_tokenizer(shutil.copytree(folder, tmp_path / "two"))
    assert len(asked) == 1
    (folder / "chat_template.jinja").write_text(ESCAPE)
    for count in (2, 3):
        with pytest.raises(MisError, match="SecurityError"):
            tokenizer_check.check_tokenizer(folder)
        assert len(asked) == count


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "merges.txt"])
def test_a_link_out_is_not_copied(name: str, tmp_path: Path) -> None:
    """A tokenizer file that is a link to the user's own files would be published with the model."""
    secret = tmp_path / "secret"
    folder = tiny.make(tmp_path / "m")
    out = tmp_path / "out"
    secret.write_text("token = hf_...")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(MisError, match="link out of the model folder"):
        model_writer.write_folder({"model_type": "llama"}, {}, tensors=[], source=folder, out=out)
    assert not out.exists()
