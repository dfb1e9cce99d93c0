"""Everything a Mac with Apple silicon tells about its heat, in one look: HID, SMC, pressure.

Each mechanism may be absent on its own; then it says why.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p, create_string_buffer
from pathlib import Path
from typing import TypeVar

from mis_mlx.hardware.thermal.apple_frameworks import Frameworks, foreign, load
from mis_mlx.hardware.thermal.apple_sensors import Hid, Smc
from mis_mlx.hardware.thermal.recording import Raw, Rows

# TCMz, the firmware's own hottest spot of the die, exists from M1 on.
KEYS = ("TCMz", "TVA0", "TB0T", "TB1T", "TB2T", "PSTR")
PRESSURE_NAME = b"com.apple.system.thermalpressurelevel"

T = TypeVar("T")


class Pressure:
    """notify(3) thermal pressure: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping. One-sided: an M1 Air may
    throttle at 100 °C and still say 0."""

    def __init__(self, libraries: Frameworks):
        system = libraries.system
        register = foreign(system, "notify_register_check", c_uint32, c_char_p, POINTER(c_int))
        self._get = foreign(system, "notify_get_state", c_uint32, c_int, POINTER(c_uint64))
        self._cancel = foreign(system, "notify_cancel", c_uint32, c_int)
        self._token = c_int(-1)
        code = register(PRESSURE_NAME, byref(self._token))
        if code:
            raise OSError(f"notify_register_check answered {code}")

    def read(self) -> int:
        """The level now; takes 10 µs."""
        state = c_uint64(0)
        code = self._get(self._token, byref(state))
        if code:
            raise OSError(f"notify_get_state answered {code}")
        return int(state.value)

    def close(self) -> None:
        """Give the token back."""
        self._cancel(self._token)


class Apple:
    """All mechanisms of this Mac. Raises OSError where there is no Mac at all."""

    def __init__(self, library: Path | None = None):
        self.libraries = load(library)
        self._refused: dict[str, str] = {}
        self.hid = self._open("IOHID", Hid)
        self.smc = self._open("SMC", Smc)
        self.pressure = self._open("pressure", Pressure)

    def _open(self, name: str, mechanism: Callable[[Frameworks], T]) -> T | None:
        try:
            return mechanism(self.libraries)
        except (OSError, ValueError) as error:  # ValueError: a data symbol is missing
            self._refused[name] = str(error)
            return None

    def look(self, mono_s: float, wall_s: float) -> Raw:
        """Read everything once, at these times; a mechanism that fails this time is missing this time."""
        missing = dict(self._refused)

        def attempt(name: str, read: Callable[[], T], nothing: T) -> T:
            try:
                return read()
            except (OSError, ValueError) as error:
                missing[name] = str(error)
                return nothing

        hid: Rows = attempt("IOHID", self.hid.read, ()) if self.hid else ()
        smc: dict[str, str] = attempt("SMC", self._read_keys, {})
        pressure = attempt("pressure", self.pressure.read, None) if self.pressure else None
        return Raw(mono_s, wall_s, hid, smc=smc, missing=missing, pressure=pressure)

    def _read_keys(self) -> dict[str, str]:
        answers = {key: self.smc.read(key) for key in KEYS} if self.smc else {}
        return {key: f"{a[0]}:{a[1].hex()}" for key, a in answers.items() if a is not None}

    def system(self, name: str) -> str | None:
        """A text `sysctl`, such as "hw.model" or "kern.osversion"; `None` when it has no such name."""
        types = (c_int, c_char_p, c_void_p, POINTER(c_size_t), c_void_p, c_size_t)
        buffer, size = create_string_buffer(256), c_size_t(256)
        if foreign(self.libraries.system, "sysctlbyname", *types)(name.encode("ascii"), buffer, byref(size), None, 0):
            return None
        return buffer.value.decode("utf8", "replace")

    def close(self) -> None:
        """Close what was opened, and only that: another run may sample at the same time."""
        for mechanism in (self.hid, self.smc, self.pressure):
            if mechanism is not None:
                mechanism.close()
