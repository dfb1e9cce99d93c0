"""What the package's own source may do: who changes a disk or talks to a network, and what is never
run.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "mis_mlx"
CHANGES = {
    *("write_text", "write_bytes", "unlink", "mkdir", "makedirs", "rename", "rmtree", "rmdir"),
    *("copyfile", "copytree", "move", "touch", "symlink_to", "truncate", "pwrite", "ftruncate"),
    *("savez", "save_safetensors", "save_gguf"),
}
# Who changes a disk without `Files`, and why a run loses nothing by it.
WITHOUT = {
    "storage/files.py": "it is that class",
    "storage/checkpoint.py": "the text in the lock file, which is for people",
    "storage/hub.py": "a download, whole or absent: half of it lies in a folder of another name",
    "models/opening/wheel_model.py": "the same, its conversion",
    "judge/tasks/task_registry.py": "the same",
    "hardware/blas.py": "a library under other names, whole or absent; it runs before anything of "
    "ours is imported",
    "checks/engine.py": "a model made on the spot, in a temporary folder of its own",
    "checks/training_step.py": "the same",
    "checks/groups.py": "rows of a check as they are found, in that temporary folder",
    "doctor.py": "that temporary folder's parts",
    "hardware/programs.py": "the same, a wheel of a wrong hash is deleted",
    "hardware/jobs.py": "the log of a run that the page of `studio` has started",
    "studio_page/runs.py": "that page's lock file, which stays empty",
    "hardware/rates.py": "a file of zeros that measures how quick the disk is",
    "hardware/thermal/recording.py": "a recording of thermometers, which the command `thermal` "
    "makes",
}
TALKATIVE = {
    *("socket", "http", "urllib", "requests", "httpx", "socketserver", "ssl", "ftplib", "smtplib"),
    *("asyncio", "xmlrpc", "telnetlib", "websockets", "aiohttp", "huggingface_hub", "datasets"),
}
# Who may talk to a network, and what for.
MAY = {
    "storage/hub.py": "a model from the Hugging Face hub",
    "data/preparation.py": "a data set from the hub",
    "judge/tasks/questions.py": "a data set from the hub",
    "studio_page/decide.py": "asyncio's threads; opens nothing",
    "studio_page/run_panel.py": "quotes a name for an address of the page",
    "studio_page/judge.py": "asyncio's threads; opens nothing",
    "studio_page/guard.py": "takes the addresses of requests to the page apart",
    "hardware/jobs.py": "asyncio's child processes; opens nothing",
    "hardware/sockets.py": "asks of connections that mlx.launch made whether the other end lives; "
    "opens none to others; finds a free port of this machine for the page of `studio`",
}
OPENERS = ("load", "load_tokenizer", "load_model", "sharded_load", "from_pretrained", "MLXLM")


class Source(NamedTuple):
    """A file of the package: its text, the calls in it, and the modules that it imports."""

    text: str
    calls: list[ast.Call]
    modules: set[str]


def read(text: str) -> Source:
    """As Python reads it."""
    calls = []
    modules = set[str]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            calls.append(node)
        elif isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add((node.module or "").split(".")[0])
    return Source(text, calls, modules)


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    """By file."""
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    return {name: read(path.read_text("utf-8")) for name, path in files.items()}


def changes(source: Source) -> list[str]:
    """Calls that change a disk and do not go through an object called files or DISK."""
    found = []
    for call in source.calls:
        owner, _, name = ast.unparse(call.func).rpartition(".")
        opens = name == "open" and any(
            isinstance(a, ast.Constant) and a.value in ("w", "a", "wb", "ab", "xb")
            for a in call.args
        )
        moves = f"{owner}.{name}" in ("os.replace", "os.remove", "np.save")
        known = (bool(owner) and name in CHANGES) or moves
        through = owner.endswith(("files", "DISK")) or "io.BytesIO" in ast.unparse(call)
        if (known or opens) and not through:
            found.append(f"{call.lineno}: {ast.unparse(call)[:80]}")
    return found


def test_a_run_changes_the_disk_through_one_class(sources: dict[str, Source]) -> None:
    """What is not behind `Files` cannot fail here: it is listed with a reason."""
    every = {name: changes(source) for name, source in sources.items()}
    unlisted = {name: made for name, made in every.items() if made and name not in WITHOUT}
    assert not unlisted
    assert every["storage/files.py"]


def test_only_downloads_can_talk(sources: dict[str, Source]) -> None:
    """No other module imports anything that opens a connection."""
    every = {name: source.modules & TALKATIVE for name, source in sources.items()}
    found = {name: modules for name, modules in every.items() if modules}
    assert found.keys() <= MAY.keys(), found
    assert "storage/hub.py" in found


def doors(source: Source) -> list[str]:
    """Calls that may run a model's own code, without trust_remote_code=False beside them."""
    found = []
    for call in source.calls:
        called = ast.unparse(call.func)
        foreign = called.endswith(tuple(f"utils').{name}" for name in OPENERS))
        foreign = foreign or called.startswith(("utils.", "transformers."))
        foreign = foreign or called.split(".")[-1] in ("from_pretrained", "MLXLM", "sharded_load")
        whole = ast.unparse(call) if foreign else ""
        if foreign and "trust_remote_code" not in whole and "**trust" not in whole:
            found.append(f"{call.lineno} {whole[:80]}")
    return found


def test_foreign_code_is_refused_explicitly_wherever_it_could_run(
    sources: dict[str, Source],
) -> None:
    """No True anywhere; False is said at each door; the doors without one are not used."""
    assert doors(read("AutoTokenizer.from_pretrained(p)"))
    for name, source in sources.items():
        for never in ("trust_remote_code=True", '"trust_remote_code": True', "mlx_lm.benchmark"):
            assert never not in source.text, name
        assert "sharded_load" not in source.text, name
        assert not doors(source), name


def test_nothing_is_unpickled(sources: dict[str, Source]) -> None:
    """No module reads what can run code while it is read."""
    for name, source in sources.items():
        assert not source.modules & {"pickle", "marshal", "shelve", "dill", "joblib"}, name
        for call in source.calls:
            called = ast.unparse(call.func)
            assert called not in ("eval", "exec", "torch.load", "yaml.load"), name
            if called in ("np.load", "numpy.load"):
                assert "allow_pickle=True" not in ast.unparse(call), name
