"""Read the heat of a Mac with Apple silicon: HID thermometers, the SMC's keys, thermal pressure.

No root is needed. HID has some 57 thermometers on an M1 Air, by calls that are private, and stable
since 2020 (sources: fermion-star/apple_sensors, vladkens/macmon, exelban/stats). No key is ever
written (command 6 does not exist here).
"""

import ctypes
import json
import platform
import struct
import sys
from ctypes import byref, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mis_mlx.hardware.thermal.recording import Raw, Rows

# Group, file: functions, with types of result and arguments in C ("void_p": any pointer); variables
# ("data").
DECLARED = json.loads((Path(__file__).parent / "apple.json").read_text("utf-8"))
UTF8 = 0x08000100  # kCFStringEncodingUTF8
APPLE_VENDOR_PAGE = 0xFF00
TEMPERATURE_USAGE = 5
TEMPERATURE_EVENT = 15
SINT32 = 3  # kCFNumberSInt32Type
HANDLE_EVENT = 2  # kSMCHandleYPCEvent
READ_BYTES = 5
KEY_BY_INDEX = 8
KEY_INFO = 9
# TCMz, the firmware's own hottest spot of the die, exists from M1 on.
KEYS = ("TCMz", "TVA0", "TB0T", "TB1T", "TB2T", "PSTR")


@cache
def functions(group: str, library: Path | None = None) -> Any:
    """All functions and variables of a group of `DECLARED` by name, with their types.

    ctypes' default int would cut every pointer to 32 bits. library: in place of Apple's (the
    compiled fake of the tests). OSError with a sentence where this is no Mac with Apple silicon, or
    its macOS has dropped a private function; ValueError for a variable.
    """
    if library is None and sys.platform != "darwin":
        raise OSError("not a Mac")
    if library is None and platform.machine() != "arm64":
        raise OSError(
            f"Python runs as {platform.machine()} (Intel or Rosetta), the sensors need arm64"
        )
    opened = SimpleNamespace()
    for file, names in DECLARED[group].items():
        # Apple's file exists in the dyld cache only, and loads all the same.
        loaded = ctypes.CDLL(str(library or file))
        for name, types in names.items():
            setattr(opened, name, _typed(loaded, name, types))
    return opened


def _typed(library: ctypes.CDLL, name: str, types: str) -> Any:
    """A function of a library with its types, "RESULT ARGUMENT ...", or a variable, "data TYPE"."""
    # c_void does not exist: None stands for it, as ctypes wants it; and for "data"
    first, *others = (getattr(ctypes, f"c_{word}", None) for word in types.split())
    if types.startswith("data "):
        variable: Any = others[0]
        return variable.in_dll(library, name)
    function = getattr(library, name, None)
    if function is None:
        raise OSError(f"{name} is missing from this macOS")
    function.restype = first
    function.argtypes = others
    return function


class Hid:
    """One client of the HID event system, matched to thermometers. OSError when there is none."""

    def __init__(self, library: Path | None = None):
        self._c = c = functions("Hid", library)
        self._client = c.IOHIDEventSystemClientCreate(None)
        if not self._client:
            raise OSError("IOHIDEventSystemClientCreate gave nothing")
        names = (b"Product", b"PrimaryUsagePage", b"PrimaryUsage")
        self._product, *usage = (c.CFStringCreateWithCString(None, name, UTF8) for name in names)
        # of {"PrimaryUsagePage": 0xff00, "PrimaryUsage": 5}: thermometers only
        keys = (c_void_p * 2)(*usage)
        numbers = (c_int32(APPLE_VENDOR_PAGE), c_int32(TEMPERATURE_USAGE))
        values = (c_void_p * 2)(*(c.CFNumberCreate(None, SINT32, byref(n)) for n in numbers))
        key_calls = byref(c.kCFTypeDictionaryKeyCallBacks)
        value_calls = byref(c.kCFTypeDictionaryValueCallBacks)
        matching = c.CFDictionaryCreate(None, keys, values, 2, key_calls, value_calls)
        c.IOHIDEventSystemClientSetMatching(self._client, matching)
        for owned in (matching, *keys, *values):
            c.CFRelease(owned)

    def read(self) -> Rows:
        """`(name, value)` of every thermometer that answers; takes 20 to 50 ms. Names repeat."""
        c = self._c
        services = c.IOHIDEventSystemClientCopyServices(self._client)
        if not services:
            return ()
        try:
            rows = []
            for i in range(c.CFArrayGetCount(services)):
                row = self._row(c.CFArrayGetValueAtIndex(services, i))
                if row is not None:
                    rows.append(row)
            return tuple(rows)
        finally:
            c.CFRelease(services)

    def _row(self, service: Any) -> tuple[str, float] | None:
        """(name, °C) of one service; None for a service without an event.

        The service is borrowed from its array and must not be released; its parts are ours.
        """
        c = self._c
        event = c.IOHIDServiceClientCopyEvent(service, TEMPERATURE_EVENT, 0, 0)
        if not event:
            return None
        value = float(c.IOHIDEventGetFloatValue(event, TEMPERATURE_EVENT << 16))
        c.CFRelease(event)
        name = c.IOHIDServiceClientCopyProperty(service, self._product)
        if not name:
            return "", value
        buffer = ctypes.create_string_buffer(256)
        known = c.CFStringGetCString(name, buffer, 256, UTF8)
        c.CFRelease(name)
        text = buffer.value.decode("utf8", "replace") if known else ""
        return text, value

    def close(self) -> None:
        """Give back what this client owns."""
        for owned in (self._product, self._client):
            self._c.CFRelease(owned)


class KeyData(ctypes.Structure):
    """The 80 bytes of every call.

    Another size is a 'bad argument', which looks like a lack of privileges and is none.
    """

    _fields_ = (
        ("key", c_uint32),
        ("version_and_limits", c_uint8 * 24),
        ("size", c_uint32),
        ("type", c_uint32),
        ("attributes", c_uint8 * 4),
        ("result", c_uint8),
        ("status", c_uint8),
        ("command", c_uint8),
        ("index", c_uint32),
        ("bytes", c_uint8 * 32),
    )


def decode(text: str) -> float | None:
    """The number in "flt :33b36b42", little-endian.

    None for another type or form, and for zeros, which mean 'no data'.
    """
    kind, _, digits = text.partition(":")
    try:
        raw = bytes.fromhex(digits)
    except ValueError:
        return None
    if kind != "flt " or len(raw) != 4 or not any(raw):
        return None
    return float(struct.unpack("<f", raw)[0])


class Smc:
    """One connection to the controller. Raises OSError when it cannot be opened."""

    def __init__(self, library: Path | None = None):
        self._c = c = functions("Smc", library)
        services = self._services()
        task = c.mach_task_self_.value
        connection = c_uint32(0)
        failed = True
        for _, service in sorted(services):  # the keys endpoint first
            failed = c.IOServiceOpen(service, task, 0, byref(connection))
            if not failed:
                break
        for _, service in services:
            c.IOObjectRelease(service)
        if failed:
            raise OSError(f"none of {len(services)} AppleSMC services could be opened")
        self._connection = connection.value
        # On some machines KEY_INFO finds nothing until one call by index was made on the
        # connection.
        self._ask(KeyData(command=KEY_BY_INDEX, index=0))

    def _services(self) -> list[tuple[bool, int]]:
        """(whether it is another than the keys endpoint, service) of all AppleSMC services.

        The caller releases them.
        """
        c = self._c
        iterator = c_uint32(0)
        matching = c.IOServiceMatching(b"AppleSMC")
        if c.IOServiceGetMatchingServices(0, matching, byref(iterator)):  # eats the dictionary
            raise OSError("IOServiceGetMatchingServices failed")
        buffer = ctypes.create_string_buffer(128)
        services = []
        while service := c.IOIteratorNext(iterator.value):
            c.IORegistryEntryGetName(service, buffer)
            services.append((buffer.value != b"AppleSMCKeysEndpoint", service))
        c.IOObjectRelease(iterator.value)
        return services

    def _ask(self, question: KeyData) -> KeyData:
        """One call of the controller. OSError when it refuses."""
        answer = KeyData()
        size = c_size_t(ctypes.sizeof(KeyData))
        code = self._c.IOConnectCallStructMethod(
            self._connection, HANDLE_EVENT, byref(question), size.value, byref(answer), byref(size)
        )
        if code:
            raise OSError(f"IOConnectCallStructMethod answered 0x{code & 0xFFFFFFFF:08x}")
        return answer

    def read(self) -> dict[str, str]:
        """{key: its value} for the KEYS that this machine has."""
        values = {key: self.value(key) for key in KEYS}
        return {key: value for key, value in values.items() if value is not None}

    def value(self, key: str) -> str | None:
        """ "type:bytes in hex" of a key such as "TCMz"; `None` when the machine has no such key."""
        number = int.from_bytes(key.encode("ascii"), "big")
        info = self._ask(KeyData(key=number, command=KEY_INFO))
        if not (0 < info.size <= 32 and info.type):
            return None
        # A fresh struct: leftovers are refused.
        question = KeyData(key=number, command=READ_BYTES, size=info.size, type=info.type)
        answer = self._ask(question)
        if answer.result:
            return None
        kind = info.type.to_bytes(4, "big").decode("ascii", "replace")
        return f"{kind}:{bytes(answer.bytes[: info.size]).hex()}"

    def close(self) -> None:
        """Shut the connection."""
        self._c.IOServiceClose(self._connection)


class Pressure:
    """notify(3) thermal pressure: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping.

    An M1 may say 0 at 100 °C.
    """

    def __init__(self, library: Path | None = None):
        self._c = functions("Pressure", library)
        self._token = ctypes.c_int(-1)
        name = b"com.apple.system.thermalpressurelevel"
        code = self._c.notify_register_check(name, byref(self._token))
        if code:
            raise OSError(f"notify_register_check answered {code}")

    def read(self) -> int:
        """The level now; takes 10 µs."""
        state = ctypes.c_uint64(0)
        code = self._c.notify_get_state(self._token, byref(state))
        if code:
            raise OSError(f"notify_get_state answered {code}")
        return int(state.value)

    def close(self) -> None:
        """Give the token back."""
        self._c.notify_cancel(self._token)


class Apple:
    """All mechanisms of this Mac. OSError where this is no Mac.

    refused: why a mechanism is missing, by its name.
    """

    def __init__(self, library: Path | None = None):
        self._c = functions("Apple", library)
        self._open: dict[str, Hid | Smc | Pressure] = {}
        self.refused: dict[str, str] = {}
        for name, mechanism in (("IOHID", Hid), ("SMC", Smc), ("pressure", Pressure)):
            try:
                self._open[name] = mechanism(library)
            except (OSError, ValueError) as error:  # ValueError: a data symbol is missing
                self.refused[name] = str(error)

    def look(self, mono_s: float, wall_s: float) -> Raw:
        """Read everything once, at these times.

        A mechanism that fails is missing in this look only.
        """
        missing = dict(self.refused)
        values = dict[str, Any]()
        for name, mechanism in self._open.items():
            try:
                values[name] = mechanism.read()
            except (OSError, ValueError) as error:
                missing[name] = str(error)
        return Raw(
            mono_s=mono_s,
            wall_s=wall_s,
            hid=values.get("IOHID", ()),
            smc=values.get("SMC", {}),
            missing=missing,
            pressure=values.get("pressure"),
        )

    def system(self, name: str) -> str | None:
        """A text of `sysctl`, such as "hw.model"; None when it has no such name."""
        buffer = ctypes.create_string_buffer(256)
        size = c_size_t(256)
        if self._c.sysctlbyname(name.encode("ascii"), buffer, byref(size), None, 0):
            return None
        return buffer.value.decode("utf8", "replace")

    def close(self) -> None:
        """Close what was opened, and only that: another run may sample at the same time."""
        for mechanism in self._open.values():
            mechanism.close()
