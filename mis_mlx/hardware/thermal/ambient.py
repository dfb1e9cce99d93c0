"""Estimate the temperature of the air around the machine.

No laptop has a room thermometer, so this is an estimate with an uncertainty, from sensors and the
user, of which the surest counts. No witness is no estimate, never a silent 20 °C.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mis_mlx.types import Reading

GIVEN_SIGMA_C = 0.7
SOAK_SIGMA_C = 0.8
# after a long rest all sensors agree within this: all have the air's temperature
SOAK_SPREAD_C = 1.5
DRIFT_C2_PER_S = 1.0 / 3600  # how fast a past value loses worth: variance grows by 1 °C² an hour
VIRTUAL_OFFSET_C = 1.0  # TVA0 reads that much low on M1 (20 dumps of laptops)


class Estimate(NamedTuple):
    """Ambient temperature ± one standard deviation, and the witness behind it."""

    celsius: float
    sigma_c: float
    source: str


class Anchor(NamedTuple):
    """What one witness said last, when, and what TVA0 was then."""

    estimate: Estimate
    time_s: float
    virtual_c: float | None


class Ambient:
    """The estimate over time.

    given_c: the reading of the user's thermometer at the first look. virtual_sigma_c: how far TVA0
    may be off, 2.5 °C on M1 and M2, 4 on later chips.
    """

    def __init__(self, given_c: float | None = None, virtual_sigma_c: float = 2.5):
        self._given_c = given_c
        self._virtual_sigma_c = virtual_sigma_c
        self._anchors: dict[str, Anchor] = {}  # by source

    def update(self, values: Mapping[str, Any], now_s: float, rested: bool) -> Estimate | None:
        """The estimate after one more look; None: no witness.

        rested: just booted, or woken from a long sleep.
        """
        virtual_c = values.get("virtual_ambient_c")
        new = [cold_soak(values) if rested else None]
        if self._given_c is not None and "given" not in self._anchors:
            new.append(Estimate(self._given_c, GIVEN_SIGMA_C, "given"))
        for estimate in new:
            if estimate is not None:
                self._anchors[estimate.source] = Anchor(estimate, now_s, virtual_c)
        witnesses = [_aged(anchor, now_s, virtual_c) for anchor in self._anchors.values()]
        if virtual_c is not None:
            celsius = virtual_c + VIRTUAL_OFFSET_C
            witnesses.append(Estimate(celsius, self._virtual_sigma_c, "SMC TVA0"))
        return min(witnesses, key=lambda witness: witness.sigma_c, default=None)


def _aged(anchor: Anchor, now_s: float, virtual_c: float | None) -> Estimate:
    """A past estimate with the uncertainty that it has now.

    Less sure with time, and by as much as TVA0 has moved since, so that a value from before the
    halny came cannot outvote the sensors that feel it.
    """
    moved = 0.0
    if virtual_c is not None and anchor.virtual_c is not None:
        moved = virtual_c - anchor.virtual_c
    age_s = now_s - anchor.time_s
    variance = anchor.estimate.sigma_c**2 + DRIFT_C2_PER_S * age_s + moved**2
    return anchor.estimate._replace(sigma_c=math.sqrt(variance))


def t_env_kind(reading: Reading) -> str:
    """What AAIS may call its T_env: "measured", "given" or "none"."""
    source = reading.sources.get("ambient_c")
    if source is None:
        return "none"
    return "given" if source == "given" else "measured"


def cold_soak(values: Mapping[str, Any]) -> Estimate | None:
    """Estimate the air after a long rest: all parts have its temperature, if they agree.

    The best free method. None with fewer than three parts, or where they do not agree.
    """
    parts = map(values.get, ("battery_c", "nand_c", "virtual_ambient_c", "soc_c"))
    known = [part for part in parts if part is not None]
    if len(known) < 3 or max(known) - min(known) > SOAK_SPREAD_C:
        return None
    return Estimate(min(known) - 0.3, SOAK_SIGMA_C, "cold soak")
