"""Metres above sea level: by hand, from a recording, from the configuration file, or (asked for) macOS.

A Mac has no barometer and no GPS, so the height is never measured here. Knows nothing of temperatures.
"""

from __future__ import annotations

import importlib
import math
import tomllib
from pathlib import Path

from mis_mlx.machine.clock import Clock
from mis_mlx.machine.replay import Header
from mis_mlx.types import MisError

LOCATION = "location"  # altitude_m = "location" in the configuration file: ask macOS
LOCATION_TRIES = 10  # seconds to wait for a fix


def find_altitude(
    given_m: float | None, header: Header, config: Path | None = None, clock: Clock | None = None
) -> tuple[float | None, str]:
    """`(metres above sea level, source)`: by hand, else where the recording was made, else `altitude_m` in
    `config` (~/.config/mis_mlx.toml), else `(None, "")`. Raises MisError for an impossible height."""
    config = config or Path.home() / ".config" / "mis_mlx.toml"
    if given_m is not None:
        return _height(given_m, "--altitude-m"), "given"
    if header.altitude_m is not None:
        return _height(header.altitude_m, "the recording's altitude_m"), "replay header"
    try:
        settings = tomllib.loads(config.read_text(encoding="utf8"))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        raise MisError(f"{config} cannot be read ({error}): mend it or delete it") from None
    if "altitude_m" not in settings:
        return None, ""
    if settings["altitude_m"] == LOCATION:
        return by_location(clock or Clock())
    return _height(settings["altitude_m"], f"altitude_m in {config}"), f"given in {config.name}"


def by_location(clock: Clock) -> tuple[float | None, str]:
    """`(metres, "CoreLocation")` if macOS knows a height, else `(None, "")`. Asks macOS for the permission.

    Only on the user's word (`altitude_m = "location"` in the configuration file), and needs
    pyobjc-framework-CoreLocation. A Mac locates itself by Wi-Fi, which has no height: then verticalAccuracy
    is not positive and the altitude it reports means nothing (Apple's documentation of CLLocation).
    """
    try:
        location, run_loop = importlib.import_module("CoreLocation"), importlib.import_module("Foundation")
    except ImportError:
        return None, ""
    manager = location.CLLocationManager.alloc().init()
    manager.requestWhenInUseAuthorization()
    manager.startUpdatingLocation()
    try:
        for _ in range(LOCATION_TRIES):
            fix = manager.location()
            if fix is not None:
                return (float(fix.altitude()), "CoreLocation") if fix.verticalAccuracy() > 0 else (None, "")
            # A fix is delivered by the run loop, which a program without windows has to turn itself.
            run_loop.NSRunLoop.currentRunLoop().runUntilDate_(run_loop.NSDate.dateWithTimeIntervalSinceNow_(1.0))
            clock.sleep(0.1)
    finally:
        manager.stopUpdatingLocation()
    return None, ""


def _height(metres: object, where: str) -> float:
    number = isinstance(metres, int | float) and not isinstance(metres, bool) and math.isfinite(metres)
    if not number or not -430 <= float(metres) <= 9000:  # type: ignore[arg-type]
        raise MisError(f"{where} is {metres!r}, not between −430 and 9000 m above sea level: mend it")
    return float(metres)  # type: ignore[arg-type]
