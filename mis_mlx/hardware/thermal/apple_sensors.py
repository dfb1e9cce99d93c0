"""What a Mac with Apple silicon tells of its heat, no root: HID thermometers, the SMC's keys, thermal pressure.

HID has some 57 thermometers on an M1 Air, by calls that are private, and stable since 2020 (sources:
fermion-star/apple_sensors, vladkens/macmon, exelban/stats). No key is ever written (command 6 does not exist here)."""

import ctypes
import struct
from ctypes import POINTER, byref, c_char_p, c_double, c_int32, c_int64, c_long, c_size_t, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from mis_mlx.hardware.thermal.apple_frameworks import UTF8, Frameworks, foreign, load
from mis_mlx.hardware.thermal.recording import Raw, Rows

APPLE_VENDOR_PAGE, TEMPERATURE_USAGE, TEMPERATURE_EVENT = 0xFF00, 5, 15
SINT32 = 3  # kCFNumberSInt32Type
HANDLE_EVENT = 2  # kSMCHandleYPCEvent
READ_BYTES, KEY_BY_INDEX, KEY_INFO = 5, 8, 9
KEYS_ENDPOINT = b"AppleSMCKeysEndpoint"
# TCMz, the firmware's own hottest spot of the die, exists from M1 on.
KEYS = ("TCMz", "TVA0", "TB0T", "TB1T", "TB2T", "PSTR")
PRESSURE_NAME = b"com.apple.system.thermalpressurelevel"


class Hid:
    """One client of the HID event system, matched to thermometers. Raises OSError when there is none."""

    def __init__(self, libraries: Frameworks):
        self._declare(libraries)
        client = self._create_client(None)
        if not client:
            raise OSError("IOHIDEventSystemClientCreate gave nothing")
        self._client = client
        self._product = self._string(None, b"Product", UTF8)
        self._match_thermometers(libraries)

    def _declare(self, libraries: Frameworks) -> None:
        iokit, cf = libraries.iokit, libraries.foundation
        self._string = foreign(cf, "CFStringCreateWithCString", c_void_p, c_void_p, c_char_p, c_uint32)
        self._text = foreign(cf, "CFStringGetCString", c_uint8, c_void_p, c_char_p, c_long, c_uint32)
        self._count = foreign(cf, "CFArrayGetCount", c_long, c_void_p)
        self._item = foreign(cf, "CFArrayGetValueAtIndex", c_void_p, c_void_p, c_long)
        self._release = foreign(cf, "CFRelease", None, c_void_p)
        self._create_client = foreign(iokit, "IOHIDEventSystemClientCreate", c_void_p, c_void_p)
        self._copy_services = foreign(iokit, "IOHIDEventSystemClientCopyServices", c_void_p, c_void_p)
        self._copy_property = foreign(iokit, "IOHIDServiceClientCopyProperty", c_void_p, c_void_p, c_void_p)
        self._copy_event = foreign(iokit, "IOHIDServiceClientCopyEvent", c_void_p, c_void_p, c_int64, c_int32, c_int64)
        self._float_value = foreign(iokit, "IOHIDEventGetFloatValue", c_double, c_void_p, c_int32)

    def _match_thermometers(self, libraries: Frameworks) -> None:
        """Ask for {"PrimaryUsagePage": 0xff00, "PrimaryUsage": 5} only."""
        iokit, cf = libraries.iokit, libraries.foundation
        array = ctypes.POINTER(c_void_p)
        number = foreign(cf, "CFNumberCreate", c_void_p, c_void_p, c_long, c_void_p)
        dictionary = foreign(cf, "CFDictionaryCreate", c_void_p, c_void_p, array, array, c_long, c_void_p, c_void_p)
        set_matching = foreign(iokit, "IOHIDEventSystemClientSetMatching", c_int32, c_void_p, c_void_p)
        keys = (c_void_p * 2)(*(self._string(None, k, UTF8) for k in (b"PrimaryUsagePage", b"PrimaryUsage")))
        numbers = (c_int32(APPLE_VENDOR_PAGE), c_int32(TEMPERATURE_USAGE))
        values = (c_void_p * 2)(*(number(None, SINT32, byref(n)) for n in numbers))
        callbacks = [
            ctypes.addressof(ctypes.c_char.in_dll(cf, name))
            for name in ("kCFTypeDictionaryKeyCallBacks", "kCFTypeDictionaryValueCallBacks")
        ]
        wanted = dictionary(None, keys, values, 2, *callbacks)
        set_matching(self._client, wanted)
        for owned in (wanted, *keys, *values):
            self._release(owned)

    def read(self) -> Rows:
        """`(name, value)` of every thermometer that answers; takes 20 to 50 ms. Names repeat."""
        services = self._copy_services(self._client)
        if not services:
            return ()
        try:
            rows = (self._row(self._item(services, i)) for i in range(self._count(services)))
            return tuple(row for row in rows if row is not None)
        finally:
            self._release(services)

    def _row(self, service: Any) -> tuple[str, float] | None:
        """One service, which is borrowed from its array and must not be released; its parts are ours."""
        event = self._copy_event(service, TEMPERATURE_EVENT, 0, 0)
        if not event:  # some services have no event
            return None
        value = float(self._float_value(event, TEMPERATURE_EVENT << 16))
        self._release(event)
        name = self._copy_property(service, self._product)
        if not name:
            return "", value
        buffer = ctypes.create_string_buffer(256)
        known = self._text(name, buffer, 256, UTF8)
        self._release(name)
        return (buffer.value.decode("utf8", "replace") if known else ""), value

    def close(self) -> None:
        """Give back what this client owns."""
        for owned in (self._product, self._client):
            self._release(owned)


class KeyInfo(ctypes.Structure):
    """How a key's bytes are to be read."""

    _fields_ = (("size", c_uint32), ("type", c_uint32), ("attributes", c_uint8))


class KeyData(ctypes.Structure):
    """The 80 bytes of every call. Another size is a 'bad argument', which looks like a privilege wall and is none."""

    _fields_ = (
        ("key", c_uint32),
        ("version_and_limits", c_uint8 * 24),  # never used here
        ("info", KeyInfo),
        ("result", c_uint8),
        ("status", c_uint8),
        ("command", c_uint8),
        ("index", c_uint32),
        ("bytes", c_uint8 * 32),
    )


def decode(text: str) -> float | None:
    """The number in "flt :33b36b42", little-endian; `None` for another type or form, and for zeros: 'no data'."""
    kind, _, digits = text.partition(":")
    try:
        raw = bytes.fromhex(digits)
    except ValueError:
        return None
    return float(struct.unpack("<f", raw)[0]) if kind == "flt " and len(raw) == 4 and any(raw) else None


class Smc:
    """One connection to the controller. Raises OSError when it cannot be opened."""

    def __init__(self, libraries: Frameworks):
        iokit = libraries.iokit
        pointer = c_void_p
        self._call = foreign(
            iokit,
            "IOConnectCallStructMethod",
            *(c_int32, c_uint32, c_uint32, pointer, c_size_t, pointer, POINTER(c_size_t)),
        )
        self._shut = foreign(iokit, "IOServiceClose", c_int32, c_uint32)
        self._connection = _connect(libraries)
        self._info: dict[str, KeyInfo | None] = {}
        # On some machines KEY_INFO finds nothing until one call by index was made on the connection.
        self._ask(KeyData(command=KEY_BY_INDEX, index=0))

    def _ask(self, question: KeyData) -> KeyData:
        answer, size = KeyData(), c_size_t(ctypes.sizeof(KeyData))
        code = self._call(self._connection, HANDLE_EVENT, byref(question), size.value, byref(answer), byref(size))
        if code:
            raise OSError(f"IOConnectCallStructMethod answered 0x{code & 0xFFFFFFFF:08x}")
        return answer

    def read(self) -> dict[str, str]:
        """{key: its value} of those of KEYS that there are."""
        values = {key: self.value(key) for key in KEYS}
        return {key: value for key, value in values.items() if value is not None}

    def value(self, key: str) -> str | None:
        """ "type:bytes in hex" of a key such as "TCMz"; `None` when the machine has no such key."""
        number = int.from_bytes(key.encode("ascii"), "big")
        if key not in self._info:
            info = self._ask(KeyData(key=number, command=KEY_INFO)).info
            self._info[key] = info if 0 < info.size <= 32 and info.type else None
        known = self._info[key]
        if known is None:
            return None
        question = KeyData(key=number, command=READ_BYTES)  # a fresh struct: leftovers are refused
        question.info.size, question.info.type = known.size, known.type
        answer = self._ask(question)
        if answer.result:
            return None
        kind = known.type.to_bytes(4, "big").decode("ascii", "replace")
        return f"{kind}:{bytes(answer.bytes[: known.size]).hex()}"

    def close(self) -> None:
        """Shut the connection."""
        self._shut(self._connection)


def _connect(libraries: Frameworks) -> int:
    """A connection to the keys endpoint if there is one, else to the first AppleSMC service that opens."""
    iokit = libraries.iokit
    matching = foreign(iokit, "IOServiceMatching", c_void_p, c_char_p)
    find = foreign(iokit, "IOServiceGetMatchingServices", c_int32, c_uint32, c_void_p, POINTER(c_uint32))
    following = foreign(iokit, "IOIteratorNext", c_uint32, c_uint32)
    name_of = foreign(iokit, "IORegistryEntryGetName", c_int32, c_uint32, c_char_p)
    open_ = foreign(iokit, "IOServiceOpen", c_int32, c_uint32, c_uint32, c_uint32, POINTER(c_uint32))
    release = foreign(iokit, "IOObjectRelease", c_int32, c_uint32)
    task = c_uint32.in_dll(libraries.system, "mach_task_self_").value
    iterator = c_uint32(0)
    if find(0, matching(b"AppleSMC"), byref(iterator)):  # eats the matching dictionary
        raise OSError("IOServiceGetMatchingServices failed")
    buffer, services = ctypes.create_string_buffer(128), []
    while service := following(iterator.value):
        name_of(service, buffer)
        services.append((buffer.value != KEYS_ENDPOINT, service))
    release(iterator.value)
    connection = c_uint32(0)
    opened = any(not open_(s, task, 0, byref(connection)) for _, s in sorted(services))
    for _, service in services:
        release(service)
    if not opened:
        raise OSError(f"none of {len(services)} AppleSMC services could be opened")
    return connection.value


class Pressure:
    """notify(3) thermal pressure: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping. An M1 may say 0 at 100 °C."""

    def __init__(self, libraries: Frameworks):
        system = libraries.system
        register = foreign(system, "notify_register_check", c_uint32, c_char_p, POINTER(ctypes.c_int))
        self._get = foreign(system, "notify_get_state", c_uint32, ctypes.c_int, POINTER(ctypes.c_uint64))
        self._cancel = foreign(system, "notify_cancel", c_uint32, ctypes.c_int)
        self._token = ctypes.c_int(-1)
        code = register(PRESSURE_NAME, byref(self._token))
        if code:
            raise OSError(f"notify_register_check answered {code}")

    def read(self) -> int:
        """The level now; takes 10 µs."""
        state = ctypes.c_uint64(0)
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
        types = (ctypes.c_int, c_char_p, c_void_p, POINTER(c_size_t), c_void_p, c_size_t)
        buffer, size = ctypes.create_string_buffer(256), c_size_t(256)
        if foreign(self._libraries.system, "sysctlbyname", *types)(name.encode("ascii"), buffer, byref(size), None, 0):
            return None
        return buffer.value.decode("utf8", "replace")

    def close(self) -> None:
        """Close what was opened, and only that: another run may sample at the same time."""
        for mechanism in self._open.values():
            mechanism.close()
