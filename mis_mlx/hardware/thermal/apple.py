"""Everything a Mac with Apple silicon tells about its heat, in one look: HID, SMC, pressure."""

from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p, create_string_buffer
from pathlib import Path
from typing import Any

from mis_mlx.hardware.thermal.apple_frameworks import Frameworks, foreign, load
from mis_mlx.hardware.thermal.apple_sensors import Hid, Smc
from mis_mlx.hardware.thermal.recording import Raw

PRESSURE_NAME = b"com.apple.system.thermalpressurelevel"


class Pressure:
    """notify(3) thermal pressure: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping. An M1 may say 0 at 100 °C."""

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
    """All mechanisms of this Mac; `refused`: why those are not there that are not. OSError where there is no Mac."""

    def __init__(self, library: Path | None = None):
        self._libraries = load(library)
        self._open: dict[str, Hid | Smc | Pressure] = {}
        self.refused: dict[str, str] = {}
        for name, mechanism in (("IOHID", Hid), ("SMC", Smc), ("pressure", Pressure)):
            try:
                self._open[name] = mechanism(self._libraries)
            except (OSError, ValueError) as error:  # ValueError: a data symbol is missing
                self.refused[name] = str(error)

    def look(self, mono_s: float, wall_s: float) -> Raw:
        """Read everything once, at these times; a mechanism that fails this time is missing this time."""
        missing, seen = dict(self.refused), dict[str, Any]()
        for name, mechanism in self._open.items():
            try:
                seen[name] = mechanism.read()
            except (OSError, ValueError) as error:
                missing[name] = str(error)
        hid, smc = seen.get("IOHID", ()), seen.get("SMC", {})
        return Raw(mono_s, wall_s, hid, smc=smc, missing=missing, pressure=seen.get("pressure"))

    def system(self, name: str) -> str | None:
        """A text `sysctl`, such as "hw.model" or "kern.osversion"; `None` when it has no such name."""
        types = (c_int, c_char_p, c_void_p, POINTER(c_size_t), c_void_p, c_size_t)
        buffer, size = create_string_buffer(256), c_size_t(256)
        if foreign(self._libraries.system, "sysctlbyname", *types)(name.encode("ascii"), buffer, byref(size), None, 0):
            return None
        return buffer.value.decode("utf8", "replace")

    def close(self) -> None:
        """Close what was opened, and only that: another run may sample at the same time."""
        for mechanism in self._open.values():
            mechanism.close()
