"""A dataclass becomes flags and YAML; progress goes to stderr, tables and answers to stdout.

With --json stdout has the result as JSON, and nothing else. Without it, a stdout that is no
terminal still ends with the same JSON line: scripts of the last version read it there.
"""

import difflib
import io
import itertools
import json
import os
import re
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from mis_mlx import __version__, flag_help
from mis_mlx.types import GIB, MisError, Options, Within

T = TypeVar("T")
Made = TypeVar("Made", bound="Options")
ConfigFile = Annotated[str | None, tyro.conf.arg(aliases=["-c"], metavar="FILE")]
BLAS = Path(__file__).parent / "hardware" / "blas.py"  # a program of its own
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
ACCEPT = "--accept-gemma-terms"
DETAILS = "MIS_MLX_DETAILS"
# Switches of every command, and the environment that each sets.
SWITCHES = {ACCEPT: {"MIS_MLX_ACCEPT": "gemma"}, "-v": {DETAILS: "1"}, "--verbose": {DETAILS: "1"}}
JSON = "--json"  # of every command: the result as JSON on stdout, all else on stderr
# Set by mlx.launch and mpirun for each of several processes.
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
# MLX's errors that are about the device begin with one of these.
DEVICE = re.compile(r"\[METAL\]|\[metal::|\[malloc|kIOGPU")
MEMORY_GONE = re.compile(r"\[malloc|\[metal::malloc\]|Insufficient Memory|OutOfMemory")
# The display of this process's progress (reporting/progress.Display), if there is one.
SHOWN = list[Any]()
MOST_BYTES = 2**50
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": GIB,
}


def parse_bytes(text: str, flag: str = "--budget") -> int:
    """'5GiB', '600MiB', '4e9' -> bytes. GiB are powers of two, GB powers of ten; never mixed."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else None
    if not match or unit not in UNITS:
        raise MisError(
            f"{flag} {text!r} is not a size: write a number and a unit, such as 5GiB or 600MiB"
        )
    nbytes = float(match[1]) * UNITS[unit]
    if not 1 <= nbytes <= MOST_BYTES:
        raise MisError(f"{flag} is {text!r}: give a size from 1 byte to {MOST_BYTES // GIB}GiB")
    return int(nbytes)


@dataclass(frozen=True, kw_only=True)
class Budgeted(Options):
    """Flags of every command that computes within a budget."""

    budget: str | None = None
    """memory limit, such as 5GiB or 600MiB; default: 4GiB on a Mac of 8 GB, less if less is free"""

    @property
    def budget_bytes(self) -> int | None:
        """What --budget asks for."""
        return None if self.budget is None else parse_bytes(self.budget)


@dataclass(frozen=True, kw_only=True)
class Resumable(Budgeted):
    """Flags of every command with a run folder."""

    config: ConfigFile = None
    """YAML file with any of these flags"""
    out: str | None = None
    """run folder; default: the next free NAME-00N under runs/"""
    resume: bool = False
    """continue the run in --out, or the newest unfinished one"""
    dry_run: bool = False
    """show the time, memory and files it takes, and stop"""


def read_yaml(path: str, config_type: type) -> dict[str, Any]:
    """The YAML file's values, by field name of `config_type`; dashes count as underscores."""
    known = {f.name: f for f in fields(config_type)}
    result = {}
    lines = {}
    for key, value in _yaml_lines(path, flag_help.other_names(config_type)).items():
        lines[_name_of(str(key))] = (key, value)
    for name, (key, value) in flag_help.current_names(config_type, lines).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"known settings: {', '.join(sorted(known))}"
            )
            raise MisError(f"{path}: {key!r} is not a setting of this command: {hint}")
        result[name] = fitting(config_type, name, value, f"{path}: {key}")
    return result


def fitting(config_type: type, name: str, value: Any, shown: str) -> Any:
    """A setting's value in the type that its field wants.

    MisError where the field takes another. shown: what the setting is called there.
    """
    hint = get_type_hints(config_type)[name]
    value = _converted(value, hint)
    if not _fits(value, hint):
        annotated = get_type_hints(config_type, include_extras=True)
        takes = flag_help.metavar(annotated[name]) or "true or false"
        raise MisError(f"{shown} is {value!r}, but the setting takes {takes}: give one of that")
    return tuple(value) if isinstance(value, list) else value


def _yaml_lines(path: str, others: Mapping[str, str]) -> dict[Any, Any]:
    """The file's `key: value` lines. MisError where it has something else, or a setting twice.

    others: as of `flag_help.other_names`.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
        tree = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise MisError(
            f"{path}: cannot be read ({error.strerror}): give an existing file to -c"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MisError(
            f"{path}: is not YAML ({' '.join(str(error).split())[:120]}): fix that line"
        ) from None
    if not isinstance(values, dict):
        raise MisError(
            f"{path}: holds a {type(values).__name__}, not `flag: value` lines: write one per line"
        )
    lines = dict[str, int]()
    for key, _ in tree.value if tree else ():
        name = _name_of(str(key.value))
        name = others.get(name, name)
        line = key.start_mark.line + 1
        if name in lines:
            raise MisError(
                f"{path}: lines {lines[name]} and {line} both give {name}: leave one of them out"
            )
        lines[name] = line
    return values


def _converted(value: Any, hint: Any) -> Any:
    """A YAML value in the type that the field wants, if YAML has read it as another."""
    # YAML 1.1 reads 1e-5 (no dot) as text; every tool in this field expects a number.
    if isinstance(value, str) and float in (hint, *get_args(hint)):
        with suppress(ValueError):
            value = float(value)
    # `vocab: 16384` is a number, the field takes text.
    if type(value) is int and not _fits(value, hint) and _fits(str(value), hint):
        return str(value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a field of this type admits a value of a YAML file, or of a Python program."""
    kind = get_origin(hint)
    inner = get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, i) for i in inner)
    if kind is Literal:
        return any(type(value) is type(i) and value == i for i in inner)
    if kind is tuple:
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def parse(config_type: Any, argv: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """Settings from flags over YAML (`-c FILE`) over the dataclass's defaults.

    Usage errors exit with 2.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    given: dict[str, Any] = {}
    if {"-h", "--help", "--help-all"} & set(args):
        print(flag_help.text(config_type, prog or "mis_mlx", every="--help-all" in args))
        sys.exit(0)
    args = _under_one_name(config_type, args)
    files = [file for flag, file in itertools.pairwise(args) if flag in ("-c", "--config")]
    if len(files) > 1:
        raise MisError(
            f"-c is given {len(files)} times ({', '.join(files)}): write all settings into one file"
        )
    if files and files[0]:
        given = read_yaml(files[0], config_type)
    needed = {f.name for f in fields(config_type) if f.default is f.default_factory is MISSING}
    default: Any = tyro.MISSING_NONPROP
    if needed <= set(given):
        default = config_type(**given)
    options = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    settings = tyro.cli(config_type, args=args, prog=prog, config=options, default=default)
    check_ranges(settings)
    if isinstance(settings, Options):
        return _as_said(settings, {*given, *_said(args)})
    return settings


def _as_said(settings: Made, named: set[str]) -> Made:
    """The settings as made of these names, and of what differs from the defaults, alone."""
    said = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if field.name in named or value != default:
            said[field.name] = value
    return type(settings)(**said)


def _under_one_name(config_type: type, args: Sequence[str]) -> list[str]:
    """The arguments with every flag under its setting's name, and `-c=FILE` as two of them.

    MisError for a flag of a setting that only a YAML file may give.
    """
    others = flag_help.other_names(config_type)
    file_only = flag_help.quiet(config_type)
    found = []
    for arg in args:
        flag, joined, value = arg.partition("=")
        if joined and flag in ("-c", "--config"):
            found += [flag, value]
            continue
        name = _name_of(flag)
        if flag.startswith("--") and name in others:
            name = others[name]
            flag = f"--{name.replace('_', '-')}"
        if flag.startswith("--") and name in file_only:
            raise MisError(
                f"{flag} is not a flag: write `{name}: ...` in a YAML file, and give that to -c"
            )
        found.append(f"{flag}{joined}{value}")
    return found


def _said(args: Sequence[str]) -> dict[str, str]:
    """Settings behind the flags in `args`: `--target-bpw=4` and `--target-bpw 4` are target_bpw's.

    A switch has whatever follows it for a value.
    """
    said = {}
    for arg, following in itertools.pairwise([*args, ""]):
        if arg.startswith("--"):
            flag, joined, value = arg.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            said[name] = value if joined else following
    return said


def _name_of(flag: str) -> str:
    """The setting of a flag: '--target-bpw' is target_bpw's."""
    return flag.lstrip("-").replace("-", "_")


def in_words_of(config_type: Any, message: str) -> str:
    """The message of a shared module, for one command: what is no flag of it is named as a setting.

    Then it says where settings are given, too.
    """
    settings = []
    for name in sorted(flag_help.quiet(config_type)):
        flag = "--" + name.replace("_", "-")
        message, count = re.subn(rf"{flag}(?![\w-])(?! is not a flag)", name, message)
        if count:
            settings.append(f"`{name}: ...`")
    if not settings:
        return message
    return f"{message} ({' and '.join(settings)}: in a YAML file, for -c)"


def check_ranges(settings: Any) -> None:
    """MisError where a number is outside of its field's `types.Within`, or a text is empty."""
    config_type = type(settings)
    file_only = flag_help.quiet(config_type)
    for name, hint in get_type_hints(config_type, include_extras=True).items():
        value = getattr(settings, name)
        shown = flag_help.shown(name, file_only)
        texts = value if isinstance(value, tuple) else (value,)
        if "" in texts and value != getattr(config_type, name, None):
            raise MisError(f"{shown} is empty: give a value, or leave it out")
        for limits in _ranges(hint):
            if isinstance(value, int | float) and not limits.holds(value):
                raise MisError(f"{shown} is {value:g}: {limits.remedy(value)}")


def _ranges(hint: Any) -> Iterator[Within]:
    """Every `Within` in an annotation, at any depth. The values of a Literal are no annotations."""
    if isinstance(hint, Within):
        yield hint
    if get_origin(hint) is Literal:
        return
    for part in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        yield from _ranges(part)


def rank() -> int | None:
    """Which of several processes that work together this one is, from 0; None if it works alone."""
    file = os.environ.get("MLX_HOSTFILE")  # of the ring; `mlx.launch -n 1` leaves it empty
    with suppress(OSError, ValueError):
        if file:
            hosts = Path(file).read_text(encoding="utf-8").strip()
            if len(json.loads(hosts or "[]")) < 2:
                return None
    for name in RANKS:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None


def prepare() -> None:
    """Compute on the device of MIS_MLX_DEVICE, if that is set."""
    device = os.environ.get("MIS_MLX_DEVICE")
    if device:
        import mlx.core as mx

        try:
            mx.set_default_device({"cpu": mx.cpu, "gpu": mx.gpu}[device])
        except (KeyError, ValueError):
            raise MisError(
                f"MIS_MLX_DEVICE is {device!r}, which this machine does not have: set it to "
                f"cpu or gpu, or unset it"
            ) from None


def device_trouble(error: RuntimeError, config_type: Any = None) -> str:
    """What MLX's error about the GPU or memory means, with a remedy; another error: empty.

    The remedy names flags of `config_type`.
    """
    text = " ".join(str(error).split())
    if not DEVICE.search(text):
        return ""
    flags = [f.name for f in fields(config_type)] if is_dataclass(config_type) else []
    what = "macOS stopped a computation on the GPU"
    remedy = "let the display sleep, keep AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 (mis_mlx sets it)"
    if MEMORY_GONE.search(text):
        what = "the memory is full"
        remedy = "close other programs"
    lower = [name for name in ("max_seq_length", "batch_size") if name in flags]
    less = "use a smaller model"
    if lower:
        less = "lower " + " and ".join(f"--{name.replace('_', '-')}" for name in lower)
    again = "; --resume continues from the last checkpoint" if "resume" in flags else ""
    return f"{what} ({text[:160]}): {remedy} or {less}{again}"


def preload() -> None:
    """On Linux, start a command that computes again, once, under hardware/blas.py.

    MLX's own matrix products are slow there.
    """
    preloaded = "blas" in os.environ.get("LD_PRELOAD", "") and BLAS_THREADS in os.environ
    done = preloaded or "MIS_MLX_BLAS" in os.environ
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    ours = program.parent == Path(__file__).parent
    if sys.platform == "linux" and "mlx.core" in sys.modules and ours and not done:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execv(sys.executable, [sys.executable, "-I", str(BLAS), *command])


@contextmanager
def end_quietly_on_closed_pipe() -> Iterator[None]:
    """If the reader of our output leaves (`| head`), end without a traceback and with code 141.

    That is how SIGPIPE ends a program. A stream that was closed from the first (`>&-`) takes all.
    """
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        for stream in (1, 2):
            poll.register(stream, 0)
        gone = poll.poll(0)
        if not gone:
            raise  # it was another pipe
        for stream, _ in gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.exit(141)


@end_quietly_on_closed_pipe()
def main(config_type: Any, run: Callable[[Any], dict[str, Any]], several: bool = False) -> None:
    """Parse and run; with --json, or where stdout is no terminal, print the result as JSON.

    Exits: 0 done, 1 MisError, 2 usage, 3 check, 130 Ctrl-C. several: whether this command can be
    one process of several; of these only the first one speaks.
    """
    spec = sys.modules["__main__"].__spec__
    prog = f"python -m {spec.name if spec else 'mis_mlx'}"
    if "--version" in sys.argv[1:]:
        print(f"mis_mlx {__version__}")
        sys.exit(0)
    json_alone = JSON in sys.argv
    for word in SWITCHES.keys() & set(sys.argv):
        os.environ.update(SWITCHES[word])  # for child processes too
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in {*SWITCHES, JSON}]
    try:
        settings = parse(config_type, prog=prog)
        preload()
        prepare()
        if rank() is not None and not several:
            raise MisError(f"{prog} runs on one machine only: start it without mlx.launch")
        elsewhere = io.StringIO() if rank() else sys.stderr  # of several processes one speaks
        with redirect_stdout(elsewhere) if json_alone or rank() else nullcontext():
            result = run(settings)
    except (MisError, RuntimeError) as error:
        message = in_words_of(config_type, str(error))
        if not isinstance(error, MisError):
            message = device_trouble(error, config_type)
        if not message:
            raise
        sys.stdout.flush()
        machine = f"machine {rank()}: " if rank() else ""
        print(f"mis_mlx: {machine}{message}", file=sys.stderr)
        sys.exit(130 if isinstance(error.__cause__, KeyboardInterrupt) else 1)
    except KeyboardInterrupt as stop:
        remedy = "start it again"
        if stop.args:
            remedy = f"finished work is kept: {continuing(str(stop))}"
        say(f"mis_mlx: stopped by hand; {remedy}")
        sys.exit(130)
    if not rank() and (json_alone or not sys.stdout.isatty()):
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    sys.exit(3 if result.get("check_failed") else 0)


def say(*lines: str) -> None:
    """Lines of progress for people, on stderr, from the first of several processes."""
    if rank():
        return
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def detail(*lines: str) -> None:
    """Lines of progress that only -v shows."""
    if DETAILS in os.environ:
        say(*lines)


def outcome(text: str) -> None:
    """What a phase led to: it stands in the line that ends the phase; elsewhere, in its own."""
    if not (SHOWN and SHOWN[0].takes(text)):
        say(text)


def continuing(run: str | Path) -> str:
    """How to go on with a run: the command to paste; the flags, where a program began it."""
    flags = f"--out {shlex.quote(str(run))} --resume"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.name.startswith("mis_mlx."):
        python = from_here(Path(sys.executable))
        return f"continue with {shlex.quote(str(python))} -P -m {spec.name} {flags}"
    return f"continue with {flags}"


def from_here(path: Path) -> Path:
    """A path relative to the current folder, if it is in it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def show_progress(label: str, items: Collection[T]) -> Iterator[T]:
    """The items, one after the other; the display, if there is one, shows how many are done.

    The display: reporting/progress.
    """
    level = SHOWN[0].level(label, len(items)) if SHOWN else nullcontext(lambda done: None)
    with level as show:
        for done, item in enumerate(items):
            show(done)
            yield item


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """A list that a first Ctrl-C or SIGTERM fills; a second one stops at once.

    Python gives signals to the main thread alone: in another one the list stays empty.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("Stopping after this step. Press Ctrl-C again to stop now.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
