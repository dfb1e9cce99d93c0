"""What most tests share: tiny models, a small text, and a home and cache of their own."""

from __future__ import annotations

from tests import fast_products  # noqa: F401

# isort: split
import contextlib
import fcntl
import gc
import importlib
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx import cli, quantize
from mis_mlx.compute import precision
from mis_mlx.hardware import rates
from mis_mlx.hardware.rates import Rates
from mis_mlx.models.opening import compute_type, load
from mis_mlx.planner import measured_block
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint
from tests import tiny

ROOT = Path(__file__).parents[1]
Done = subprocess.CompletedProcess[str]
Once = Callable[[str, Callable[[Path], object]], Path]
# For this process and all that it starts: a laptop on battery would wait for its plug, and bits are
# stated for a CPU.
os.environ["MIS_MLX_GOVERNOR"] = "observe"
os.environ["MIS_MLX_DEVICE"] = "cpu"
# What tests write need not survive a power cut of this machine, and a drive makes them wait. Power
# cuts under test (tests/faults/power.py) count the calls of `Files.fsync`, which stay.
os.fsync = lambda _: None
pytest.register_assert_rewrite("tests.family_checks")  # so that failures say both values
ITERS = 18
EVERY = 4
SMALL = ("--max-seq-length", 32, "--num-samples", 4, "--reconstruct-samples", 4)
SMALL += ("--eval-windows", 3, "--scenario", "goral", "--iters", ITERS, "--save-every", EVERY)
SMALL += ("--learning-rate", "1e-2", "--q-iters", 6)


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: the garbage collector need not look at them again and
    again.
    """
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cpu() -> Iterator[None]:
    """Bit-for-bit comparisons are stated for the CPU back end, also on a Mac."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="session", autouse=True)
def known_rates() -> Iterator[Callable[[], Rates]]:
    """Matrix products are timed once a session, which takes a third of a second, not for every
    plan.
    """
    measure = rates.assumed
    known = dict[str, Rates]()

    def assumed() -> Rates:
        if rates.device_name() not in known:
            known[rates.device_name()] = measure()
        return known[rates.device_name()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "assumed", assumed)
        yield assumed


@pytest.fixture(scope="session", autouse=True)
def measured_blocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What blocks hold is measured once a session, and kept beside the user's own cache."""
    path = tmp_path_factory.mktemp("blocks") / "blocks.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured_block, "kept_file", lambda: path)
        yield


@pytest.fixture
def brief_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether float16 holds a model's activations is looked at on 4 tokens, not 256: half precision
    is emulated here, and that pass takes longer than what most tests are about.
    """
    monkeypatch.setattr(compute_type, "FREQUENT", 2)
    monkeypatch.setattr(compute_type, "SPREAD", 2)


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch, brief_look: None) -> None:
    """This process, and those that it starts, compute by Metal's policy: float16, packed weights
    stay packed.
    """
    monkeypatch.setenv(precision.POLICY, "metal")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["cpu", "metal"])
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test is made under either policy."""
    monkeypatch.setenv(precision.POLICY, request.param)
    return str(request.param)


@pytest.fixture
def cpu_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test claims is about float32 and de-quantized weights, whatever policy the tests run
    under.
    """
    monkeypatch.setenv(precision.POLICY, "cpu")


def near(float32: float, half: float) -> float:
    """How near is near, by the type that the tests run in."""
    return float32 if precision.usual_dtype() == mx.float32 else half


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: the folder or file `make` writes, made by whichever of pytest-xdist's
    processes is first.
    """
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name: str, make: Callable[[Path], object]) -> Path:
        with (root / f"{name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not lock.seek(0, os.SEEK_END):
                make(root / name)
                lock.write("made")
        return root / name

    return get


@pytest.fixture(scope="session")
def models(once: Once) -> Callable[[str], Checkpoint]:
    """`models(kind)`: the tiny float32 model of a kind in tiny.KINDS or MODELS, made once a
    session.
    """
    made = dict[str, Checkpoint]()

    def get(kind: str) -> Checkpoint:
        if kind not in made:
            sizes = {**tiny.KINDS, **tiny.MODELS}[kind]
            made[kind] = load.open_checkpoint(once(kind, lambda folder: tiny.make(folder, **sizes)))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def llama(models: Callable[[str], Checkpoint]) -> Checkpoint:
    """The tiny llama: 3 layers, hidden 64, FFN 768, 4 heads in 2 groups."""
    return models("llama")


@pytest.fixture(scope="session")
def four(once: Once, llama: Checkpoint) -> Path:
    """The tiny llama as `quantize` leaves it: 4 bits at group 64, embedding in 8. Do not write
    into it.
    """

    def make(folder: Path) -> None:
        plain: dict[str, Any] = {"target_bpw": None, "q_method": "round"}
        quantize.run(quantize.Settings(model=str(llama.path), mlx_path=str(folder), **plain))

    return once("four", make)


@pytest.fixture(scope="session")
def batches() -> list[mx.array]:
    """Two windows of token ids, (1, 24) each."""
    return [mx.random.randint(0, 512, (1, 24), key=mx.random.key(k)) for k in (1, 2)]


@pytest.fixture(scope="session")
def text_folder(once: Once) -> Path:
    """A data folder in mlx-lm's format: some pages of Python's manual."""
    from pydoc_data.topics import topics

    def write(folder: Path) -> None:
        folder.mkdir()
        names = sorted(topics)
        splits = {"train": names[:12], "valid": names[30:32], "test": names[40:44]}
        for split, chosen in splits.items():
            rows = [json.dumps({"text": topics[name][:3000]}) for name in chosen]
            (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")

    return once("text", write)


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with prompts, answers chosen and rejected, and a license."""
    folder = tmp_path_factory.mktemp("answers")
    for split, numbers in (("train", range(24)), ("valid", range(40, 50))):
        rows = [
            {
                "prompt": f"how many is {n} and {n % 5}?",
                "completion": f"that is {n + n % 5}",
                "chosen": f"that is {n + n % 5}",
                "rejected": f"no idea, {n}",
            }
            for n in numbers
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "LICENSE").write_text("CC0")
    return folder


@pytest.fixture(scope="session")
def own_home(
    tmp_path_factory: pytest.TempPathFactory, cpu: None, known_rates: Callable[[], Rates]
) -> dict[str, str]:
    """An environment whose home is empty and offline: the user's is never touched. Its cache holds
    no model, only this machine's rates.
    """
    home = tmp_path_factory.mktemp("home")
    (home / "cache").mkdir()
    (home / "cache" / "rates.json").write_text(rates.to_json(known_rates()))
    own = {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "MIS_MLX_CACHE": str(home / "cache"),
    }
    return {"OPENBLAS_NUM_THREADS": "1", **os.environ, **own}


@pytest.fixture(scope="session")
def command(own_home: dict[str, str]) -> Callable[..., Done]:
    """`command("distill", "--iters", 3)`: exit code and words of `python -m mis_mlx.distill --iters
    3`, here: no process is started.
    """

    def run(name: str, *flags: object, cwd: Path | None = None) -> Done:
        module: Any = importlib.import_module(f"mis_mlx.{name}")
        line = [name, *map(str, flags)]
        said, told = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "12")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr("sys.argv", list(line))
            patch.setenv("MIS_MLX_CACHE", own_home["MIS_MLX_CACHE"])
            patch.setenv(cli.DETAILS, "")  # so that it is gone afterwards, whatever main sets
            patch.delenv(cli.DETAILS)
            if cwd:
                patch.chdir(cwd)
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
                cli.main(module.Settings, module.run)
        code = caught.value.code
        assert isinstance(code, int)
        texts = [stream.buffer.getvalue().decode() for stream in (said, told)]
        return Done(line, code, *texts)

    return run


@pytest.fixture(scope="session")
def flags(llama: Checkpoint, text_folder: Path) -> tuple[object, ...]:
    """Flags of a `distill` of seconds, which leaves what it made on the way."""
    return ("--teacher", llama.path, "--data", text_folder, *SMALL, "--keep-steps")


@pytest.fixture(scope="session")
def finished(once: Once, flags: tuple[object, ...], own_home: dict[str, str]) -> tuple[Path, Done]:
    """(run folder, process) of one undisturbed `distill`, made once a session; do not write into
    it. A process of its own: strings hash otherwise than in what it is compared with.
    """

    def distil(folder: Path) -> None:
        folder.mkdir()
        words = map(str, (*flags, "--out", folder / "run"))
        line = [sys.executable, "-m", "mis_mlx.distill", *words]
        env = {**own_home, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (folder / "process.json").write_text(json.dumps(vars(done)))

    folder = once("distill", distil)
    return folder / "run", Done(**json.loads((folder / "process.json").read_text()))


@contextlib.contextmanager
def files_up_to(nbytes: int) -> Iterator[None]:
    """No file of this process may grow beyond that; the kernel says so in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mostly_slow(
    cases: Iterable[Any], *quick: Any, thorough: Iterable[Any] = (), of_several: bool = False
) -> list[Any]:
    """The cases of a parametrization, slow but for the quick and the thorough ones. of_several: a
    case has a value for each name.
    """
    between = list(thorough)
    marked = []
    for case in cases:
        if case not in quick:
            values = case if of_several else (case,)
            mark = pytest.mark.thorough if case in between else pytest.mark.slow
            case = pytest.param(*values, marks=mark)
        marked.append(case)
    return marked


def mostly_thorough(cases: Iterable[Any], *quick: Any, of_several: bool = False) -> list[Any]:
    """As `mostly_slow`, but all others are thorough."""
    every = list(cases)
    return mostly_slow(every, *quick, thorough=every, of_several=of_several)


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of the distilled model, where there is one of its own, and of the 4-bit model."""
    found = {"model": (run / "model" / "model.safetensors").read_bytes()}
    distilled = run / "distilled" / "model.safetensors"
    if distilled.is_file():
        found["distilled"] = distilled.read_bytes()
    return found


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    return [(r["number"], r["loss"], r["grad_norm"]) for r in run_folder.metrics(run)]


def last_line(done: Done) -> dict[str, Any]:
    """The result of a command."""
    return json.loads(done.stdout.splitlines()[-1])


def sentence(done: Done) -> str:
    """The one line that a refusal leaves on stderr, progress before it allowed."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("mis_mlx: ")
    return line


@pytest.fixture(scope="module")
def undisturbed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small: Any,
    command: Callable[..., Done],
) -> tuple[Path, Done]:
    """(run folder, what it said) of one undisturbed run of a test module's command; do not write
    into it.

    small: the module's fixture of flags.
    """
    name = request.module.__name__.rpartition("test_")[2]
    out = tmp_path_factory.mktemp(name) / "run"
    done = command(name, *small, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def settings_of(command: Any, flags: Sequence[object], out: Path, **changes: Any) -> Any:
    """The settings of a command that these flags stand for."""
    made = cli.parse(command.Settings, [*map(str, flags), "--out", str(out)])
    return made.with_values(**changes)
