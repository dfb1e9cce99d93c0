"""Temperatures from Apple's HID event system: some 57 services on an M1 Air, no root.

The calls are private, stable since 2020 (sources: fermion-star/apple_sensors, vladkens/macmon, exelban/stats).
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_double, c_int32, c_int64, c_long, c_uint8, c_uint32, c_void_p
from typing import Any

from mis_mlx.hardware.thermal.apple_frameworks import UTF8, Frameworks, foreign
from mis_mlx.hardware.thermal.recording import Rows

APPLE_VENDOR_PAGE = 0xFF00
TEMPERATURE_USAGE = 5
TEMPERATURE_EVENT = 15
SINT32 = 3  # kCFNumberSInt32Type


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
