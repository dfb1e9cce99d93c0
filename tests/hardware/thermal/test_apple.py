"""The ctypes calls, run on any system against the compiled stand-in for Apple's libraries."""

from __future__ import annotations

import ctypes
import struct

import pytest

from mis_mlx.hardware.thermal import apple_sensors
from mis_mlx.hardware.thermal.apple_sensors import Apple, Hid, KeyData, Smc, decode


def test_struct_has_the_kernel_s_layout():
    """80 bytes, every field where the kernel looks for it."""
    places = {"size": 28, "result": 40, "status": 41, "command": 42, "index": 44, "bytes": 48}
    assert ctypes.sizeof(KeyData) == 80
    assert {name: getattr(KeyData, name).offset for name in places} == places


def test_reads_leak_nothing(fake_apple):
    """As many objects alive after a hundred reads as before, and none after close."""
    for number in range(20):
        fake_apple.hid(f"PMU tdie{number}", 40.0 + number, event=number % 3 > 0)
    before = fake_apple.live()
    hid = Hid(fake_apple.path)
    opened = fake_apple.live()
    for _ in range(100):
        assert len(hid.read()) == 13
    assert fake_apple.live() == opened
    hid.close()
    assert fake_apple.live() == before


def test_smc_primes_its_connection(fake_apple):
    """A machine that answers 'not found' until one call by index was made is read all the same."""
    fake_apple.require_prime()
    fake_apple.smc_float("TB0T", 30.2)
    smc = Smc(fake_apple.path)
    assert decode(smc.value("TB0T")) == pytest.approx(30.2, abs=1e-4)
    smc.close()


@pytest.mark.parametrize(
    ("kind", "digits", "value"),
    [
        ("flt ", struct.pack("<f", 45.5).hex(), 45.5),
        ("flt ", "00000000", None),
        ("flt ", "01", None),
        ("flt ", "zz", None),
        ("ui8 ", "02", None),
        ("ch8*", "61626364", None),
    ],
)
def test_decode(kind, digits, value):
    """Floats alone are measurements here; all zeros are none."""
    assert decode(f"{kind}:{digits}") == value


def test_a_mac_that_reports_pressure_and_has_lost_keys(fake_apple):
    """Pressure 2 is read; keys gone after a macOS update are absent, not zero; all is given back.
    Closing one of two samplers leaves the other reading.
    """
    fake_apple.level(2)
    fake_apple.hid("PMU tdie1", 42.9)
    fake_apple.smc_float("TVA0", 27.386)
    one = Apple(fake_apple.path)
    mac = Apple(fake_apple.path)
    one.close()
    look = mac.look(0.0, 0.0)
    assert look.pressure == 2
    assert look.hid == (("PMU tdie1", 42.9),)
    assert set(look.smc) == {"TVA0"}
    assert not look.missing
    assert mac.system("hw.model") == "MacBookAir10,1"
    assert mac.system("no.such.name") is None
    mac.close()
    assert fake_apple.open() == 0


def test_a_function_that_macos_dropped_is_named(fake_apple, monkeypatch):
    """A missing private function is an OSError with its name, which the look gives."""
    newer = {"IOKit": {"IOHIDNoSuchThing": "void_p"}}
    monkeypatch.setitem(apple_sensors.DECLARED, "newer", newer)
    with pytest.raises(OSError, match="IOHIDNoSuchThing is missing"):
        apple_sensors.functions("newer", fake_apple.path)
