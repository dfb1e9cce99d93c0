"""Every flag of every command, with what it does not take and with the ends of what it does: a
sentence or a result.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import mlx.core as mx
import pytest

from mis_mlx import __main__, cli, distill, flag_help, prune
from mis_mlx.hardware import rates
from mis_mlx.quantization import stage
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.types import GIB, Checkpoint, MisError, Within
from tests.conftest import mostly_slow
from tests.test_commands_contract import dry
from tests.test_docs import flags_of

WORDS = ("nan", "inf", "-inf", "-1", "0", "1e30", str(10**12), "")


KINDS: list[Any] = [
    importlib.import_module(f"mis_mlx.{name}").Settings for name in __main__.commands()
]


def parts(hint: Any) -> Iterator[Any]:
    """An annotation and all that it is made of, the words of a Literal left out."""
    yield hint
    if get_origin(hint) is not Literal:
        for inner in get_args(hint):
            yield from parts(inner)


def limits(kind: Any) -> dict[str, tuple[type, list[Within]]]:
    """{field: (int or float, the ranges in its annotation)} of every field that holds a number."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        every = list(parts(hint))
        number = next((part for part in every if part in (int, float)), None)
        if number:
            notes = chain.from_iterable(getattr(part, "__metadata__", ()) for part in every)
            found[name] = (number, [note for note in notes if isinstance(note, Within)])
    return found


def name_of(kind: Any) -> str:
    """`distill.Settings`, for the list of tests."""
    return f"{kind.__module__.removeprefix('mis_mlx.')}.{kind.__name__}"


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_every_number_has_one_range(kind: Any) -> None:
    """Which its default lies in."""
    bare = [name for name, (_, ranges) in limits(kind).items() if len(ranges) != 1]
    assert not bare, f"give these a types.Within: {bare}"
    for field in fields(kind):
        if field.name in limits(kind) and field.default not in (None, MISSING):
            assert limits(kind)[field.name][1][0].holds(field.default), field.name


def ended(kind: Any, args: list[str]) -> str | Any:
    """The sentence of a refusal, "usage", or the settings."""
    try:
        return cli.parse(kind, args)
    except MisError as error:
        return str(error)
    except SystemExit as error:
        assert error.code == 2, (args, error.code)
        return "usage"


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_no_number_gets_by_its_range(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence, a usage error, or a value within the range: all flags as settings, one of each
    type by hand.
    """
    base = cli.parse(kind, [])
    by_hand = {
        number: name
        for name, (number, _) in limits(kind).items()
        if name not in flag_help.quiet(kind)
    }
    for name, (number, (within,)) in limits(kind).items():
        quiet = name in flag_help.quiet(kind)  # of the YAML file alone
        flag = name if quiet else f"--{name.replace('_', '-')}"
        for word in WORDS:
            whole = word and float(word).is_integer()
            value = number(float(word)) if whole else float(word or "nan")
            try:
                cli.check_ranges(replace(base, **{name: value}))
                assert within.holds(value), (name, word)
            except MisError as error:
                assert str(error).startswith(f"{flag} is ")
                assert "\n" not in str(error)
                assert not within.holds(value)
            if by_hand[number] != name:
                continue
            seen = ended(kind, [f"{flag}={word}"])
            if isinstance(seen, str):
                assert seen == "usage" or (seen.startswith(f"{flag} is ") and "\n" not in seen), (
                    word,
                    seen,
                )
                assert not (whole and number is float and within.holds(value)), (name, word, seen)
            else:
                assert within.holds(getattr(seen, name)), (name, word)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_no_word_is_empty(kind: Any, tmp_path: Path) -> None:
    """All flags as settings; the last one by hand and by YAML too."""
    base = cli.parse(kind, [])
    words = {}
    for field in fields(kind):
        hints = list(parts(get_type_hints(kind, include_extras=True)[field.name]))
        if str in hints:
            words[field.name] = ("",) if tuple in map(get_origin, hints) else ""
    for name, value in words.items():
        shown = name if name in flag_help.quiet(kind) else flag(name)
        with pytest.raises(MisError, match=f"^{shown} "):
            cli.check_ranges(replace(base, **{name: value}))
    for name in [n for n in words if n != "config" and words[n] == ""][-1:]:
        assert ended(kind, [flag(name), ""]).startswith(f"{flag(name)} ")
        if "config" in words:
            (tmp_path / "s.yaml").write_text(f"{name}: ''\n")
            assert ended(kind, ["-c", str(tmp_path / "s.yaml")]).startswith(f"{flag(name)} ")


SIZES = ("-3GiB", "nan", "inf", "5e999GiB", "0", "0.1", "", "9" * 400, "GiB", "5 GiB please", "5TB")


@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_are_none(size: str) -> None:
    """Negative, no number, nothing, more than any machine has: one sentence that names the flag."""
    with pytest.raises(MisError, match="^--bytes .*[^\n]*GiB"):
        cli.parse_bytes(size, "--bytes")


def places(kind: str, folder: Path) -> dict[str, Any]:
    """{what: place} where nothing can be made, or is kept; what is there already is for commands
    that want new.
    """
    (folder / "file").write_text("precious")
    (folder / "there").mkdir()
    (folder / "there" / "mine").write_text("precious")
    found = {
        "a file in the way": folder / "file" / "x" / "y",
        "no folder takes it": Path("/proc/mis/x"),
        "a name too long": folder / ("x" * 300),
    }
    if kind == "new":
        found |= {"there": folder / "there", "a file": folder / "file"}
    elif kind == "file":
        found |= {"a folder": folder / "there"}
    else:
        found |= {"a file": folder / "file"}
    return found


DRY = {"dry_run": True}
# command: (its flag, what it names, flags without which it works)
OUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **dict.fromkeys(("distill", "search", "sft", "dpo", "grpo"), ("out", "folder", DRY)),
    "evaluate": ("out", "folder", {**DRY, "tasks": ("sums",)}),
    "export": ("out", "new", DRY),
    **dict.fromkeys(("prune", "quantize"), ("mlx_path", "new", {})),
    "report": ("out", "file", {}),
    "doctor": ("out", "new", {}),
    "thermal": ("out", "new", {}),
}


@pytest.mark.parametrize("name", OUTS)
def test_a_place_that_takes_nothing_is_refused_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence before anything is read, looked for or measured; nothing is written."""
    flag, kind, flags = OUTS[name]
    module: Any = importlib.import_module(f"mis_mlx.{name}")

    def worked(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("it began to work")

    for place in (
        "mis_mlx.models.opening.resolve.resolve_model",
        "mis_mlx.models.opening.load.open_checkpoint",
        "mis_mlx.reporting.run_reader.read",
        "mis_mlx.checks.kernels.CHECKS",
        "mis_mlx.thermal.Live",
    ):
        monkeypatch.setattr(place, worked)
    if name == "report":
        flags = {"run": str(tmp_path)}
    for what, place in places(kind, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        given = place if name == "doctor" else str(place)
        with pytest.raises(MisError) as error:
            module.run(module.Settings(**{**flags, flag: given}))
        assert "\n" not in str(error.value) and place.name in str(error.value), what
        assert sorted(tmp_path.rglob("*")) == before
        assert (tmp_path / "file").read_text() == "precious"


def test_a_parent_that_is_missing_is_made(
    tmp_path: Path, llama: Checkpoint, batches: list[mx.array]
) -> None:
    """`quantize` spools beside its result, in a folder that is not there yet."""
    out = tmp_path / "new" / "deep" / "four"
    stage.quantize(
        llama,
        out,
        rounding=QuantizationConfig(target_bpw=None),
        batches=batches,
        held=0,
    )
    assert [p.name for p in out.parent.iterdir()] == ["four"]


DRY_RUNS = ("distill", "search", "sft", "dpo", "grpo", "evaluate", "export", "plan", "generate")


def ends(kind: Any, names: set[str]) -> Iterator[dict[str, Any]]:
    """Each of these numbers alone at either end of its range, then all numbers together."""
    together: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, (number, (within,)) in limits(kind).items():
        low = math.nextafter(within.least, math.inf) if within.above else within.least
        for every, value in zip(together, (low, within.most), strict=True):
            every[name] = number(value)
            if name in names:
                yield {name: number(value)}
    yield from together


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two GiB more raise MemoryError (on Linux), before the system has to end a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if sys.platform == "linux":
        held = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert held
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(held[1]) + 2 * GIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", mostly_slow(DRY_RUNS, "export", thorough=set(DRY_RUNS) - {"plan"}))
def test_the_ends_of_every_range_can_be_planned(
    name: str,
    llama: Checkpoint,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dry run gives a result that JSON holds, or one sentence; flags that `distill` has, too, are
    asked of it alone.
    """
    # which takes a third of a second, for every number
    monkeypatch.setattr(rates, "matmul_flops", lambda *_: 1e11)
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    module: Any = importlib.import_module(f"mis_mlx.{name}")
    base = dry(name, llama.path, text_folder, tmp_path)
    # so that what follows is not refused for something else
    assert module.run(base)["peak_bytes"] > 0
    failed = []
    names = set(limits(module.Settings))
    if name != "distill":
        names -= set(limits(distill.Settings))
    for flags in ends(module.Settings, names):
        try:
            json.dumps(module.run(base.with_values(**flags)), allow_nan=False)
        except MisError as error:
            if "\n" in str(error):
                failed.append(f"{flags}: {error}")
        except Exception as error:
            failed.append(f"{flags}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


PACKAGE = Path(cli.__file__).parent
# These name flags of other programs, or of commands that they start.
OTHERS = ("hardware", "studio_page", "cli.py", "flag_help.py", "__main__.py")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def flags_said(source: ast.Module) -> set[str]:
    """The flags in a module's texts, but for its docstrings."""
    docs = {id(node.value) for node in ast.walk(source) if isinstance(node, ast.Expr)}
    said = set[str]()
    for node in ast.walk(source):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            said.update(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", node.value))
    return said


def test_messages_name_flags_that_exist() -> None:
    """A module of a command names flags of commands; a command's own file its own ones, or says of
    which command they are.
    """
    known = {}
    for command in __main__.commands():
        names = flags_of(command) | {"--config"}
        positive = {f"--{name.removeprefix('--no-')}" for name in names if name[:5] == "--no-"}
        known[command] = names | positive | {f"--no-{name[2:]}" for name in names}
    every = set(chain.from_iterable(known.values()))
    aliases = {"--mlx-path", "--outtype"}  # spellings of other programs that `export` takes
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] in OTHERS:
            continue
        said = flags_said(ast.parse(path.read_text("utf-8"))) - aliases
        assert said <= every, (str(place), said - every)
        if place.stem in known and len(place.parts) == 1 and place.stem != "search":
            assert said <= known[place.stem], (str(place), said - known[place.stem])


def test_what_is_no_flag_here_is_named_as_a_setting() -> None:
    """In `prune` the importance is a flag, in `distill` a line of a file."""
    sentence = "use --importance rms here, or give another --altitude-m"
    assert cli.in_words_of(prune.Settings, sentence) == sentence
    told = cli.in_words_of(distill.Settings, sentence)
    assert "--importance" not in told
    assert "`importance: ...`" in told
    assert "--altitude-m" in told


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_every_flag_is_explained(kind: Any) -> None:
    """No line of help is a name and a default alone, and no default is empty."""
    name = kind.__module__.rpartition(".")[2]
    about = flag_help.docs(kind)
    assert not [field.name for field in fields(kind) if not about.get(field.name)]
    assert "(default: )" not in flag_help.text(kind, name, every=True)
