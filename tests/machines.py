"""Several processes on this machine that work together as several machines do, over the ring back
end on loopback.

`started` begins them as `mlx.launch` does, by its two environment variables, so that a test knows
their process ids.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests import forks

ROOT = Path(__file__).parents[1]
Processes = list["forks.Fork | subprocess.Popen[str]"]


def ports(count: int) -> list[int]:
    """Free ones, as far as anybody can say."""
    ends = [socket.socket() for _ in range(count)]
    for end in ends:
        end.bind(("127.0.0.1", 0))
    found = [end.getsockname()[1] for end in ends]
    for end in ends:
        end.close()
    return found


@contextmanager
def started(
    n: int, argv: Sequence[object], env: Mapping[str, str], cwd: Sequence[Path] = ()
) -> Iterator[Processes]:
    """`python argv` n times, each a machine of n, perhaps in a folder of its own. Who is left at
    the end is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(n)]))
        several = {"MLX_HOSTFILE": str(hosts)} if n > 1 else {}
        made = [
            forks.start(
                argv,
                {**env, **several, "MLX_RANK": str(rank)} if n > 1 else env,
                cwd[rank] if cwd else None,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(n)
        ]
        try:
            yield made
        finally:
            for process in made:
                process.kill()
                process.communicate()


def ended(processes: Processes, seconds: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """All of them, once they are."""
    said = [process.communicate(timeout=seconds) for process in processes]
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *texts)
        for p, texts in zip(processes, said, strict=True)
    ]
