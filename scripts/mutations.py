"""Put mistakes into a copy of the checkout, one at a time, and see whether tests catch them.

    scripts/mis test --collect-only -q >/dev/null         # once: installs what tests need
    .venv/bin/python scripts/mutations.py                 # all of tests/mutations.toml
    .venv/bin/python scripts/mutations.py sign window     # some of them

The copy is a temporary folder, so the checkout stays as it is, also after Ctrl-C. A mutation is
caught when one of its tests fails with it and passes without it. Exit code 1 where one is not
caught, or where its text is not found any more.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutations.toml"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?::.+?|\S+)(?: - .*)?$", re.MULTILINE)
OPTIONS = ("-q", "-x", "-rfE", "-p", "no:cacheprovider")
STOPPED = 1  # pytest's exit code where tests failed
COLLECTION = 2  # where they could not be imported


@dataclass(frozen=True)
class Mutation:
    """A mistake: text `find`, which stands once in the file, becomes `replace`."""

    name: str
    about: str
    file: str
    find: str
    replace: str
    tests: list[str]


def mutations() -> list[Mutation]:
    """All of the list, in its order."""
    listed = tomllib.loads(LIST.read_text("utf-8"))
    return [Mutation(name, **values) for name, values in listed.items()]


def place(mutation: Mutation, root: Path) -> Path | None:
    """The file that holds the text once: the named one, else the only one of the package."""
    named = root / mutation.file
    if named.is_file() and named.read_text("utf-8").count(mutation.find) == 1:
        return named
    found = []
    for path in sorted((root / "mis_mlx").rglob("*.py")):
        found += [path] * path.read_text("utf-8").count(mutation.find)
    return found[0] if len(found) == 1 else None


def copy_to(root: Path) -> None:
    """Tracked files and new ones, and a .venv in which the package is the copy's."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, done.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_symlink() or source.is_file():  # a deleted one is still tracked
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    venv.create(root / ".venv", symlinks=True)
    packages = next((root / ".venv").glob("lib/python*/site-packages"))
    installed = [path for path in sys.path if path.endswith("site-packages")]
    # Folders named here are searched in this order, and their own .pth files, such as the one of
    # the installed checkout, are not read.
    (packages / "copy.pth").write_text("\n".join([str(root), *installed]) + "\n")


def pytest(root: Path, tests: list[str]) -> tuple[int, str]:
    """(exit code, output) of tests of the copy, up to the first that fails."""
    python = str(root / ".venv" / "bin" / "python")
    blas = str(root / "mis_mlx" / "hardware" / "blas.py")
    line = [python, "-I", blas, python, "-m", "pytest", *OPTIONS, *tests]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def write(path: Path, text: str) -> None:
    """Python must compile the file anew, also where size and second are those of before."""
    path.write_text(text, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def verdict(mutation: Mutation, root: Path) -> tuple[bool, str]:
    """(whether it is caught, by which test or why not)."""
    path = place(mutation, root)
    if path is None:
        return False, "does not apply any more: its text stands nowhere, or more than once"
    text = path.read_text("utf-8")
    write(path, text.replace(mutation.find, mutation.replace))
    try:
        code, said = pytest(root, mutation.tests)
    finally:
        write(path, text)
    if code == 0:
        return False, "NOT CAUGHT"
    failed = FAILED.findall(said)
    if code not in (STOPPED, COLLECTION) or not failed:
        return False, f"pytest ended with {code}: {said[-500:]}"
    code, _ = pytest(root, failed[:1])
    if code:
        return False, f"{failed[0]} fails without the mutation, too"
    return True, failed[0]


def main() -> int:
    """Run those that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="mutations of tests/mutations.toml; default: all")
    asked = parser.parse_args()
    known = mutations()
    unknown = set(asked.names) - {mutation.name for mutation in known}
    if unknown:
        parser.error(f"there is no mutation {', '.join(sorted(unknown))}: see --list")
    chosen = [m for m in known if m.name in asked.names or not asked.names]
    caught = Counter[str]()
    try:
        with tempfile.TemporaryDirectory(prefix="mis-mutations-") as folder:
            root = Path(folder).resolve()
            copy_to(root)
            for mutation in chosen:
                began = time.monotonic()
                found, why = verdict(mutation, root)
                package, *_ = [*Path(mutation.file).parts[1:-1], "commands"]
                caught[package] += found
                seconds = time.monotonic() - began
                print(f"{mutation.name:24} {seconds:5.0f} s  {why}", flush=True)
    except KeyboardInterrupt:
        print("stopped; the checkout is as it was", file=sys.stderr)
        return 130
    for package, count in sorted(caught.items()):
        print(f"{package}: {count}")
    print(f"{caught.total()} of {len(chosen)} caught")
    return 0 if caught.total() == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
