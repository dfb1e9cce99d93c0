"""Flags, YAML, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx import cli, distill, evaluate, flag_help, generate, quantize, sft
from mis_mlx.reporting import text
from mis_mlx.types import GIB, MisError, Row
from tests.conftest import ROOT

Settings = distill.Settings


def parsed(folder: Path, yaml: str, *flags: str) -> Any:
    """Settings of a YAML file and flags."""
    (folder / "settings.yaml").write_text(yaml, encoding="utf-8")
    return cli.parse(Settings, ["-c", str(folder / "settings.yaml"), *flags])


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("5 gib", 5 * GIB), ("600MiB", 600 * 2**20), ("4e9", 4 * 10**9), ("1.5GB", 15 * 10**8)],
)
def test_sizes_by_pencil(size: str, nbytes: int) -> None:
    """GiB are powers of two, GB of ten."""
    assert cli.parse_bytes(size) == nbytes


def test_flags_win_over_yaml_wins_over_defaults(tmp_path: Path) -> None:
    """Dashes are as good as underscores, names that mlx-lm users know as ours; 1e-3 without a dot
    is a number; null: none. `-c FILE`, `--config FILE` and `--config=FILE` read the same file.
    """
    assert cli.parse(Settings, []) == Settings()
    path = tmp_path / "s.yaml"
    path.write_text("iters: 7\nbatch-size: 3\nlearning_rate: 1e-3\nscenario: baca\nlayers: null\n")
    wanted = Settings(iters=9, batch_size=3, learning_rate=1e-3, scenario="narrow", dry_run=True)
    for words in (["-c", str(path)], ["--config", str(path)], [f"--config={path}"]):
        made = cli.parse(Settings, [*words, "--iters", "9", "--dry-run"])
        assert replace(made, config=None) == wanted


BAD = (
    ("learning_rat: 1\n", "learning_rat.* learning_rate"),
    ("xyzzy: 1\n", "xyzzy"),
    ("learning_rate: fast\n", "learning_rate .*fast.* FLOAT"),
    ("- iters\n", "settings.yaml"),
    ("iters: [\n", "settings.yaml"),
    ("iters: 1\n\tseed: 2\n", "settings.yaml"),
    ("iters: \udcff\n", "settings.yaml"),
    ("iters: 1.5\n", "iters .*1.5.* INT"),
    ("scenario: gorral\n", "scenario .*gorral.*fewer-experts,"),
    ("quantize: 3\n", r"quantize .*3.*\{4,0\}"),
    ("resume: perhaps\n", "resume .*perhaps.* true or false"),
    ("learning_rate: [1, 2]\n", r"learning_rate .*\[1, 2\].* FLOAT"),
    ("iters: 1\niters: 2\n", "1 and 2 "),
    ("eval-windows: 1\neval_windows: 2\n", "1 and 2 "),
    (None, "settings.yaml"),
)


@pytest.mark.parametrize(("yaml", "holds"), BAD)
def test_bad_yaml_is_a_sentence(tmp_path: Path, yaml: str | None, holds: str) -> None:
    """Names the file, and the setting with what it takes, before anything starts; a file that is
    not there, too.
    """
    path = tmp_path / "settings.yaml"
    if yaml is not None:
        path.write_bytes(yaml.encode("utf-8", "surrogateescape"))
    with pytest.raises(MisError, match=holds) as caught:
        cli.parse(Settings, ["-c", str(path)])
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said


def test_a_file_of_settings_is_given_once(tmp_path: Path) -> None:
    """Not two of them."""
    (tmp_path / "a.yaml").write_text("iters: 1\n")
    with pytest.raises(MisError, match=" 2 "):
        cli.parse(Settings, ["-c", str(tmp_path / "a.yaml"), "--config=missing.yaml"])


@pytest.mark.parametrize(
    ("flag", "name", "value"), [("--mlx-path", "out", "here"), ("--num-layers", "layers", 3)]
)
def test_other_names_of_a_flag(flag: str, name: str, value: Any, tmp_path: Path) -> None:
    """mlx-lm's: as a flag, in a file, and from Python."""
    assert getattr(cli.parse(Settings, [flag, str(value)]), name) == value
    assert getattr(cli.parse(Settings, [f"{flag}={value}"]), name) == value
    other = flag.removeprefix("--").replace("-", "_")
    assert getattr(parsed(tmp_path, f"{other}: {value}\n"), name) == value
    assert flag_help.current_names(Settings, {other: value, "seed": 1}) == {name: value, "seed": 1}


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        (Settings, ["teacher", "data", "budget", "out", "lose"]),
        (quantize.Settings, ["model", "teacher", "data", "budget", "mlx_path"]),
        (evaluate.Settings, ["teacher", "students", "data", "budget", "out"]),
    ],
)
def test_help_begins_with_what_matters(
    kind: Any, first: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The model, the text and the memory come before the batch size."""
    with pytest.raises(SystemExit):
        cli.parse(kind, ["--help"])
    shown = re.findall(r"(?m)^  (--[a-z][a-z0-9-]*)", capsys.readouterr().out)
    assert shown[: len(first)] == ["--" + name.replace("_", "-") for name in first]


def ended(run: Callable[[Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `main` with no flags."""
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as caught:
        cli.main(Settings, run)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_a_setting_of_a_file_is_no_flag() -> None:
    """What it is called there is said."""
    assert "vocab_text" in flag_help.quiet(Settings)
    with pytest.raises(MisError, match="--vocab-text.*vocab_text: "):
        cli.parse(Settings, ["--vocab-text", "x"])


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """0 and JSON last; 1 and one line on stderr; 3 when a check failed; 130 by hand; a bug keeps
    its traceback.
    """

    def fail(error: BaseException) -> Callable[[Any], dict[str, Any]]:
        def run(settings: Any) -> dict[str, Any]:
            raise error

        return run

    assert ended(lambda s: {"batch_size": s.batch_size, "name": "Miś"}, monkeypatch) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out.splitlines()[-1]) == {"batch_size": 2, "name": "Miś"}
    assert ended(fail(MisError("5 is more than 4: take less")), monkeypatch) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "mis_mlx: 5 is more than 4: take less\n")
    assert ended(lambda s: {"check_failed": True}, monkeypatch) == 3
    assert ended(fail(KeyboardInterrupt()), monkeypatch) == 130
    for bug in (ZeroDivisionError(), RuntimeError("dictionary changed size during iteration")):
        with pytest.raises(type(bug)):
            cli.main(Settings, fail(bug))


def test_stop_is_asked_once_and_forced_twice() -> None:
    """SIGTERM fills the list, a second one interrupts; afterwards the old handlers are back."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with cli.stop_asked() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_worker_thread_is_asked_by_nobody() -> None:
    """Python refuses signal handlers there."""
    with ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: cli.stop_asked().__enter__()).result() == []


def test_table_by_pencil() -> None:
    """One line a metric, one column a model; half the interval after ±; a metric nobody has is left
    out.
    """
    rows = [
        Row(model="a", metric="nll", value=2.5, low=2.4, high=2.6, n=9),
        Row("b", "nll", 3.0),
        Row("b", "kl", 0.25),
    ]
    assert text.table(
        rows, ["a", "b"], {"nll": ("loss", ".2f"), "kl": ("KL", ".1f"), "x": ("X", ".0f")}
    ) == ("| | a | b |\n|---|---:|---:|\n| loss | 2.50 ± 0.10 | 3.00 |\n| KL | – | 0.2 |")


LIMITS = """
import os, resource, sys
from dataclasses import dataclass, fields
from mis_mlx import cli
from mis_mlx.hardware import memory
@dataclass(frozen=True)
class Settings:
    iters: int = 1
hard, count = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
def run(settings):
    with memory.limited(memory.budget(None)):
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
    return {"limits": resource.getrlimit(resource.RLIMIT_NOFILE), "held": len(held)}
sys.argv = sys.argv[:1]
cli.main(Settings, run)
"""


@pytest.mark.parametrize(("hard", "soft"), [(1024, 1024), (8192, 4096)])
def test_a_command_may_open_more_files(hard: int, soft: int) -> None:
    """macOS begins with 256: up to 4,096, as far as the hard limit lets us, which stays."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip("the hard limit here is lower")
    line = [sys.executable, "-c", LIMITS, str(hard), str(soft - 50)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"limits": [soft, hard], "held": soft - 50}, done.stderr


def test_the_device_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIS_MLX_DEVICE=cpu computes there; a device that is not here, or unknown, is a sentence."""
    for device in ("tpu", *(() if mx.is_available(mx.gpu) else ("gpu",))):
        monkeypatch.setenv("MIS_MLX_DEVICE", device)
        with pytest.raises(MisError, match=f"MIS_MLX_DEVICE is '{device}'"):
            cli.prepare()
    chosen = list[object]()
    monkeypatch.setattr(mx, "set_default_device", chosen.append)
    for device in ("gpu", "cpu"):
        monkeypatch.setenv("MIS_MLX_DEVICE", device)
        cli.prepare()
    assert chosen == [mx.gpu, mx.cpu]


@pytest.mark.parametrize(
    ("words", "variable", "value"),
    [
        (["-v"], cli.DETAILS, "1"),
        (["--verbose"], cli.DETAILS, "1"),
        (["-v", "-v"], cli.DETAILS, "1"),
        ([cli.ACCEPT], "MIS_MLX_ACCEPT", "gemma"),
    ],
)
def test_switches_of_every_command(
    words: list[str],
    variable: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Taken before a command's own flags are read, also twice, and known to its children."""
    monkeypatch.setenv(variable, "")  # which is undone, whatever main sets
    monkeypatch.setattr("sys.argv", ["command", *words])
    with pytest.raises(SystemExit):
        cli.main(Settings, lambda s: {"set": os.environ[variable]})
    assert json.loads(capsys.readouterr().out) == {"set": value}


DEVICE_ERRORS = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum "
    "allowed buffer size of 30150672384 bytes.",
    "[malloc] Unable to allocate 17179869184 bytes.",
)


@pytest.mark.parametrize("error", DEVICE_ERRORS)
def test_an_error_of_the_device_is_a_sentence(
    error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As MLX 0.32 words them: MLX's own words, what to do; --resume only where there is one."""

    def run(settings: Any) -> dict[str, Any]:
        raise RuntimeError(error)

    assert ended(run, monkeypatch) == 1
    said = capsys.readouterr().err
    assert said.startswith("mis_mlx: ") and error[:60] in said and said.count("\n") == 1
    assert ("AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in said) == ("Interactivity" in error)
    assert all(flag in said for flag in ("--max-seq-length", "--batch-size", "--resume"))
    short = cli.device_trouble(RuntimeError(error), generate.Settings)
    assert "--resume" not in short


def test_tables_stand_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words left, numbers right; other lines stay, and what is written to a file is not this."""
    table = text.markdown_table(["", "a", "long"], [["one", "1", "2"], ["three", "100.5", "–"]])
    page = f"before\n\n{table}\n\nafter"
    assert text.aligned(page) == page  # not a terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert text.aligned(page).splitlines() == [
        "before",
        "",
        "|       |     a | long |",
        "|-------|-------|------|",
        "| one   |     1 |    2 |",
        "| three | 100.5 |    – |",
        "",
        "after",
    ]


def test_what_was_said_is_known(tmp_path: Path) -> None:
    """By a flag, in a file or as a keyword, also where it equals the default; nothing else is, and
    None is not where it is the default. What is said later comes to it.
    """
    said = {"target_bpw": 4.5, "seed": 0}
    by_flag = cli.parse(Settings, ["--target-bpw=4.5", "--seed", "0"])
    by_file = parsed(tmp_path, "target-bpw: 4.5\nvocab: null\n", "--seed", "0")
    by_keyword = Settings(target_bpw=4.5, seed=0, vocab=None)
    assert by_flag.given == by_keyword.given == said
    assert by_file.given == {**said, "config": str(tmp_path / "settings.yaml")}
    assert Settings().given == cli.parse(Settings, []).given == {}
    assert Settings(target_bpw=None).given == {"target_bpw": None}  # the default is a number
    assert cli.parse(sft.Settings, ["--no-fuse"]).given == {"fuse": False}
    later = by_flag.with_values(iters=3)
    assert later.given == {**said, "iters": 3}
    assert later == Settings(target_bpw=4.5, seed=0, iters=3)
