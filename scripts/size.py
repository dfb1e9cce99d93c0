"""Print how large each room of the project is, in syntax nodes, and fail above its ceiling.

    scripts/mis scripts/size.py           # what lint runs
    scripts/mis scripts/size.py --lower   # after a commit that deletes

Ceilings stand in size.toml and only fall. Nodes of the syntax tree are counted, since neither
layout nor comments change them.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CEILINGS = ROOT / "size.toml"
OUTSIDE = ("tests", "benchmarks", "scripts")


def sizes() -> Counter[str]:
    """{room: syntax nodes of its Python files}: each folder of the package, its commands together,
    and what stands beside the package."""
    nodes = Counter[str]()
    for top in ("mis_mlx", *OUTSIDE):
        for path in (ROOT / top).rglob("*.py"):
            inside = path.relative_to(ROOT / top).parts
            room = top if top in OUTSIDE else inside[0] if len(inside) > 1 else "commands"
            nodes[room] += sum(1 for _ in ast.walk(ast.parse(path.read_text("utf-8"))))
    return nodes


def main() -> None:
    """Print a row a room; exit code 1 where one is above its ceiling or has none."""
    now = sizes()
    ceilings = tomllib.loads(CEILINGS.read_text("utf-8"))
    if "--lower" in sys.argv[1:]:
        comment = CEILINGS.read_text("utf-8").partition("\n\n")[0]
        lower = [f"{room} = {min(nodes, ceilings.get(room, nodes))}" for room, nodes in now.items()]
        CEILINGS.write_text("\n".join([comment, "", *sorted(lower), ""]), "utf-8")
        return
    package = sum(nodes for room, nodes in now.items() if room not in OUTSIDE)
    print(f"package {package} syntax nodes", *(f"{room} {now[room]}" for room in OUTSIDE), sep=", ")
    above = [room for room in sorted(now) if now[room] > ceilings.get(room, 0)]
    for room in above:
        print(f"size: {room} has {now[room]} syntax nodes, its ceiling is {ceilings.get(room, 0)}")
    if above:
        sys.exit("size: delete as much elsewhere in the room; size.toml's ceilings only fall")


if __name__ == "__main__":
    main()
