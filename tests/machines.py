"""Several processes on this machine that work together as several machines do, over the ring back
end on loopback.

`started` begins them as `mlx.launch` does, by its two environment variables, so that a test knows
their process ids.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
Processes = list[subprocess.Popen[str]]


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
        made = []
        for rank in range(n):
            own = {**env, "PYTHONPATH": f"{ROOT}:{env.get('PYTHONPATH', '')}"}
            if n > 1:
                own |= {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            line = [sys.executable, *map(str, argv)]
            pipe = subprocess.PIPE
            here = cwd[rank] if cwd else None
            made.append(
                subprocess.Popen(line, env=own, cwd=here, stdout=pipe, stderr=pipe, text=True)
            )
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
