"""What each axis of the default teacher costs: the measurements that come with the package.

    scripts/mis benchmarks/known_losses.py     # an hour on 2 cores, seconds where all is known

Searches for the losses below measure what is not known yet. Then the logs kept on this machine
replace those of mis_mlx/size_search/known, so that a search of the default teacher takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from laboratory import start

from mis_mlx import cli, search
from mis_mlx.models.opening import compute_type, resolve
from mis_mlx.size_search import known_losses
from mis_mlx.storage.files import DISK


@dataclass(frozen=True)
class Settings:
    """For which losses."""

    losses: tuple[float, ...] = (0.05, 0.12, 0.2)
    """values of --lose whose students are measured"""


def main(s: Settings) -> None:
    """Search for each loss, then copy what is known into the package."""
    for loss in s.losses:
        search.run(search.Settings(lose=loss))
    teacher = compute_type.open_to_compute(resolve.resolve_model().path)
    about = known_losses.identity(teacher, "built-in", search.Settings())
    source = known_losses.kept_folder(about)
    for name in known_losses.FILES:
        text = (source / name).read_text("utf-8")
        DISK.replace_text(known_losses.SHIPPED / name, text)
    cli.say(f"{known_losses.SHIPPED}: the measurements of {len(s.losses)} searches and before")


if __name__ == "__main__":
    start(Settings, main)
