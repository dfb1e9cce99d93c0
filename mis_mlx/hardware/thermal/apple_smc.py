"""Keys of Apple's system management controller: temperatures and watts, no root.

Never writes a key (command 6 does not exist here).
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import POINTER, byref, c_char_p, c_int32, c_size_t, c_uint8, c_uint32, c_void_p

from mis_mlx.hardware.thermal.apple_frameworks import Frameworks, foreign

HANDLE_EVENT = 2  # kSMCHandleYPCEvent
READ_BYTES, KEY_BY_INDEX, KEY_INFO = 5, 8, 9
KEYS_ENDPOINT = b"AppleSMCKeysEndpoint"


class KeyInfo(ctypes.Structure):
    """How a key's bytes are to be read."""

    _fields_ = (("size", c_uint32), ("type", c_uint32), ("attributes", c_uint8))


class KeyData(ctypes.Structure):
    """The 80 bytes of every call. Any other size is answered by 'bad argument', which looks like a
    privilege wall and is not one."""

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


def decode(kind: str, raw: bytes) -> float | None:
    """The float in `raw`, little-endian; `None` for another type, and for bytes of zeros, which mean 'no data'."""
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

    def read(self, key: str) -> tuple[str, bytes] | None:
        """`(type, bytes)` of a key such as "TCMz"; `None` when the machine has no such key."""
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
        return known.type.to_bytes(4, "big").decode("ascii", "replace"), bytes(answer.bytes[: known.size])

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
