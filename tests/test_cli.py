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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx import (
    cli,
    distill,
    evaluate,
    flag_help,
    quantize,
    sft,
    thermal,
)
from mis_mlx.reporting import progress, text
from mis_mlx.types import GIB, MisError, Row, Step

Settings = distill.Settings


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GiB", 5 * GIB),
        ("5 gib", 5 * GIB),
        ("600MiB", 600 * 2**20),
        ("4e9", 4_000_000_000),
        ("1.5GB", 1_500_000_000),
    ],
)
def test_sizes_by_pencil(text: str, nbytes: int) -> None:
    """GiB are powers of two, GB of ten."""
    assert cli.parse_bytes(text) == nbytes


def parsed(folder: Path, yaml: str, *flags: str, kind: Any = Settings) -> Any:
    """Settings of a YAML file and flags."""
    (folder / "settings.yaml").write_text(yaml, encoding="utf-8")
    return cli.parse(kind, ["-c", str(folder / "settings.yaml"), *flags])


def test_flags_win_over_yaml_wins_over_defaults(tmp_path: Path) -> None:
    """Three layers, dashes as good as underscores, and names that mlx-lm users know."""
    made = parsed(tmp_path, "iters: 7\nbatch-size: 3\nscenario: baca\n", "--iters", "9")
    assert (made.iters, made.batch_size, made.scenario, made.seed) == (9, 3, "narrow", 0)
    assert cli.parse(Settings, []) == Settings()
    made = cli.parse(
        Settings, ["--learning-rate", "1e-3", "--max-seq-length", "64", "--dry-run", "--resume"]
    )
    assert (made.learning_rate, made.max_seq_length, made.dry_run, made.resume) == (
        1e-3,
        64,
        True,
        True,
    )


def test_long_spellings_of_c(tmp_path: Path) -> None:
    """`-c FILE`, `--config FILE` and `--config=FILE` read the same file; 1e-3 without a dot is a
    number; null: none.
    """
    path = tmp_path / "s.yaml"
    path.write_text(
        "iters: 7\nlearning_rate: 1e-3\nbudget:\nlayers: null\nhalny: 0\nvocab: 16384\n"
    )
    for flags in (["-c", str(path)], ["--config", str(path)], [f"--config={path}"]):
        made = cli.parse(Settings, flags)
        assert (made.iters, made.learning_rate, made.budget, made.layers, made.halny) == (
            7,
            1e-3,
            None,
            None,
            0,
        )
        assert made.vocab == "16384"


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        (
            "learning_rat: 1\n",
            "'learning_rat' is not a setting of this command: did you mean learning_rate?",
        ),
        ("xyzzy: 1\n", "'xyzzy' is not a setting of this command: known settings:"),
        ("learning_rate: fast\n", "learning_rate is 'fast', but the setting takes FLOAT"),
        ("- iters\n", "holds a list"),
        ("iters: [\n", "is not YAML"),
        ("iters: 1\n\tseed: 2\n", "is not YAML"),
        ("iters: 1.5\n", "iters is 1.5, but the setting takes INT"),
        ("scenario: gorral\n", "scenario is 'gorral', but the setting takes {fewer-experts,"),
        ("quantize: 3\n", "quantize is 3, but the setting takes {4,0}"),
        ("resume: perhaps\n", "resume is 'perhaps', but the setting takes true or false"),
        ("learning_rate: [1, 2]\n", "learning_rate is [1, 2], but the setting takes FLOAT"),
    ],
)
def test_bad_yaml_is_a_sentence(tmp_path: Path, yaml: str, sentence: str) -> None:
    """Names the file and the setting, before anything starts."""
    with pytest.raises(MisError) as caught:
        parsed(tmp_path, yaml)
    said = str(caught.value)
    assert sentence in said
    assert str(tmp_path / "settings.yaml") in said
    assert "\n" not in said


def test_no_yaml_there(tmp_path: Path) -> None:
    """A missing file, a folder, bytes that are no text."""
    (tmp_path / "s.yaml").write_bytes(b"iters: \xff\xfe\n")
    for path, why in (
        (tmp_path / "missing.yaml", "give an existing file"),
        (tmp_path, "give an existing file"),
        (tmp_path / "s.yaml", "is not YAML"),
    ):
        with pytest.raises(MisError, match=why):
            cli.parse(Settings, ["-c", str(path)])


@pytest.mark.parametrize(
    "flags",
    [
        ["--itres", "3"],
        ["--iters", "three"],
        ["--scenario", "tatra"],
        ["--iters"],
        ["stray"],
        ["--quantize", "3"],
    ],
)
def test_wrong_usage_exits_with_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """tyro's own message, on stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.parse(Settings, flags)
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""


def test_a_switch_that_is_on_is_shown_as_it_is_turned_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`sft --fuse` is no flag, `--no-fuse` is."""
    with pytest.raises(SystemExit):
        cli.parse(sft.Settings, ["--help-all"])
    said = capsys.readouterr().out
    assert "  --no-fuse " in said
    assert "keep the adapters next to the model" in said
    assert "  --fuse" not in said
    assert not cli.parse(sft.Settings, ["--no-fuse"]).fuse


def test_the_help_of_a_command_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    """In the same form as of all others: what there is, then the flags of one."""
    kinds = thermal.Record | thermal.Doctor
    usage = "usage: thermal record FILE [flags]"
    for args, named in ((["--help"], "  record "), (["record", "--help"], usage)):
        with pytest.raises(SystemExit) as caught:
            cli.parse(kinds, args, prog="thermal")
        assert caught.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith("usage: thermal ") and named in said and "│" not in said


@pytest.mark.parametrize(
    ("kind", "flag", "name", "value"),
    [
        (Settings, "--mlx-path", "out", "here"),
        (Settings, "--num-layers", "layers", 3),
    ],
)
def test_other_names_of_a_flag(
    kind: Any, flag: str, name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mlx-lm's: as a flag, in a file, and from Python; unsaid."""
    assert getattr(cli.parse(kind, [flag, str(value)]), name) == value
    assert getattr(cli.parse(kind, [f"{flag}={value}"]), name) == value
    other = flag.removeprefix("--").replace("-", "_")
    (tmp_path / "s.yaml").write_text(f"{other}: {value}\n")
    assert getattr(cli.parse(kind, ["-c", str(tmp_path / "s.yaml")]), name) == value
    assert flag_help.current_names(kind, {other: value, "seed": 1}) == {name: value, "seed": 1}
    with pytest.raises(SystemExit):
        cli.parse(kind, ["--help-all"])
    assert flag not in capsys.readouterr().out.replace("--num-layers-", "")


def test_verbose_is_a_switch_of_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`-v` and `--verbose`, also twice, are taken before a command's own flags are read, and reach
    its children.
    """
    for words in (["-v"], ["--verbose"], ["-v", "-v"]):
        monkeypatch.setenv(cli.DETAILS, "")  # which is undone, whatever main sets
        monkeypatch.setattr("sys.argv", ["command", *words])
        with pytest.raises(SystemExit):
            cli.main(Settings, lambda s: {"details": os.environ[cli.DETAILS]})
        assert capsys.readouterr().out == '{"details": "1"}\n'


def test_a_setting_of_a_file_is_no_flag() -> None:
    """A flag of such a name says where it goes."""
    assert {"temperature", "vocab_text"} <= flag_help.quiet(distill.Settings)
    with pytest.raises(
        MisError, match="--vocab-text is not a flag: write `vocab_text: ...` in a YAML file"
    ):
        cli.parse(distill.Settings, ["--vocab-text", "x"])
    assert not [
        title for title, _ in flag_help.grouped(distill.Settings) if title == "this command only"
    ]


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
    assert json.loads(shown.out.splitlines()[-1]) == {
        "batch_size": 2,
        "name": "Miś",
    }
    assert ended(fail(MisError("5 is more than 4: take less")), monkeypatch) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "mis_mlx: 5 is more than 4: take less\n")
    assert ended(lambda s: {"check_failed": True}, monkeypatch) == 3
    assert ended(fail(KeyboardInterrupt()), monkeypatch) == 130
    monkeypatch.setenv("MIS_MLX_ACCEPT", "")
    monkeypatch.setattr("sys.argv", ["command", cli.ACCEPT])
    with pytest.raises(SystemExit, match="0"):
        cli.main(Settings, lambda s: {"accepted": os.environ["MIS_MLX_ACCEPT"]})
    assert '{"accepted": "gemma"}' in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["command"])
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


@pytest.mark.parametrize("lines", ["iters: 1\niters: 2", "eval-windows: 1\neval_windows: 2"])
def test_a_setting_is_said_once(tmp_path: Path, lines: str) -> None:
    """Neither twice in a file, however it is spelt, nor in two files."""
    file = tmp_path / "a.yaml"
    file.write_text(f"{lines}\n")
    with pytest.raises(MisError, match="lines 1 and 2 both give"):
        cli.read_yaml(str(file), distill.Settings)
    with pytest.raises(MisError, match="given 2 times"):
        cli.parse(distill.Settings, ["-c", str(file), "--config=missing.yaml"])


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


def test_progress_is_quiet_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Not a terminal: only the last line, on stderr; what a step says."""
    with progress.bar("distil", 3) as show:
        for number in (1, 2, 3):
            show(
                number,
                text.step_text(
                    Step(
                        number=number,
                        loss=2.5,
                        grad_norm=1.0,
                        learning_rate=1e-3,
                        tokens=500,
                        seconds=2.0,
                        peak_bytes=3 * 2**20,
                        note="clipped 9.0 to 4.0",
                    )
                ),
            )
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (
        "",
        "distil 3/3  loss 2.500  250 tok/s  3 MiB  clipped 9.0 to 4.0\n",
    )


def test_the_line_of_a_step() -> None:
    """Loss, speed, and memory beside what is allowed."""
    step = Step(
        number=3,
        loss=2.5,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens=500,
        seconds=2.0,
        peak_bytes=3 * 2**20,
    )
    assert text.step_text(step, 6 * 2**20) == "loss 2.500  250 tok/s  3 MiB of 6 MiB"


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
    done = run_here(LIMITS, hard, soft - 50)
    assert json.loads(done.stdout) == {"limits": [soft, hard], "held": soft - 50}, done.stderr


def run_here(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """What a Python of its own says to `code`."""
    line = [sys.executable, "-c", code, *map(str, args)]
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        line, env={**os.environ, "PYTHONPATH": root, **env}, capture_output=True, text=True
    )


DEVICE = """
from dataclasses import dataclass, fields
import mlx.core as mx
from mis_mlx import cli
@dataclass(frozen=True)
class Settings:
    iters: int = 1
mx.set_default_device(mx.Device(mx.cpu, 0))
cli.main(Settings, lambda s: {"cpu": mx.default_device() == mx.cpu})
"""


def test_the_device_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIS_MLX_DEVICE=cpu computes there; a device that is not here, or unknown, is a sentence."""
    assert json.loads(run_here(DEVICE, MIS_MLX_DEVICE="cpu").stdout) == {"cpu": True}
    for device in ("tpu", *(() if mx.is_available(mx.gpu) else ("gpu",))):
        done = run_here(DEVICE, MIS_MLX_DEVICE=device)
        assert done.returncode == 1
        assert f"mis_mlx: MIS_MLX_DEVICE is '{device}'" in done.stderr
    chosen = list[object]()
    monkeypatch.setattr(mx, "set_default_device", chosen.append)
    for device in ("gpu", "cpu"):
        monkeypatch.setenv("MIS_MLX_DEVICE", device)
        cli.prepare()
    assert chosen == [mx.gpu, mx.cpu]


@dataclass(frozen=True)
class Short:
    """Settings of a command without --resume."""

    max_seq_length: int = 8


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (
            "[METAL] Command buffer execution failed: Impacting Interactivity "
            "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
            "macOS stopped a computation on the GPU",
            "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1",
        ),
        (
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            "the memory is full",
            "close other programs",
        ),
        (
            "[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the "
            "maximum allowed "
            "buffer size of 30150672384 bytes.",
            "the memory is full",
            "close other programs",
        ),
        (
            "[malloc] Unable to allocate 17179869184 bytes.",
            "the memory is full",
            "close other programs",
        ),
    ],
)
def test_an_error_of_the_device_is_a_sentence(
    error: str,
    what: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As MLX 0.32 words them: what happened, MLX's own words, what to do; --resume only where there
    is one.
    """

    def run(settings: Any) -> dict[str, Any]:
        raise RuntimeError(error)

    assert ended(run, monkeypatch) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"mis_mlx: {what} ({error[:60]}") and said.count("\n") == 1
    assert remedy in said and "lower --max-seq-length and --batch-size; --resume continues" in said
    short = cli.device_trouble(RuntimeError(error), Short)
    assert short.endswith("lower --max-seq-length")
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
    by_file = parsed(tmp_path, "target-bpw: 4.5\nseed: 0\nvocab: null\n")
    by_keyword = Settings(target_bpw=4.5, seed=0, vocab=None)
    assert by_flag.given == by_keyword.given == said
    assert by_file.given == {**said, "config": str(tmp_path / "settings.yaml")}
    assert Settings().given == cli.parse(Settings, []).given == {}
    assert Settings(target_bpw=None).given == {"target_bpw": None}  # the default is a number
    both = parsed(tmp_path, "iters: 7\n", "--seed", "0")
    assert both.given == {"iters": 7, "seed": 0, "config": both.config}
    later = by_flag.with_values(iters=3)
    assert later.given == {**said, "iters": 3}
    assert later == Settings(target_bpw=4.5, seed=0, iters=3)


def test_a_switch_that_is_turned_off_was_said() -> None:
    """--no-fuse, as fuse=True where somebody writes that."""
    assert cli.parse(sft.Settings, ["--no-fuse"]).given == {"fuse": False}
    assert sft.Settings(fuse=True).given == {"fuse": True}
