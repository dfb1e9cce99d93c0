"""The compiled stand-in for Apple's libraries."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest


class FakeApple:
    """Scripts the stand-in: what its HID services, SMC keys and pressure say."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.fake_hid.argtypes = [ctypes.c_char_p, ctypes.c_double, ctypes.c_int]
        self._library.fake_level.argtypes = [ctypes.c_uint64]
        self._library.fake_footprint.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self._library.fake_model.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self._library.fake_reset()

    def hid(self, name: str, value: float, *, event: bool = True) -> None:
        self._library.fake_hid(name.encode(), value, int(event))

    def smc_float(self, key: str, value: float) -> None:
        code = int.from_bytes(key.encode(), "big"), int.from_bytes(b"flt ", "big")
        self._library.fake_smc(*code, 4, struct.pack("<f", value))

    def level(self, level: int) -> None:
        self._library.fake_level(level)

    def footprint(self, now: int, most: int) -> None:
        """Bytes of any process that is asked about; 0: there is no answer."""
        self._library.fake_footprint(now, most)

    def model(self, name: str, virtual: bool) -> None:
        """What hw.model and kern.hv_vmm_present say."""
        self._library.fake_model(name.encode(), int(virtual))

    def require_prime(self) -> None:
        self._library.fake_require_prime()

    def live(self) -> int:
        """Objects created and not released."""
        return self._library.fake_live()

    def open(self) -> int:
        """Connections and tokens that were not given back."""
        return self._library.fake_open()


@pytest.fixture(scope="session")
def fake_apple_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for Apple's libraries")
    library = tmp_path_factory.mktemp("apple") / "libfakeapple.so"
    source = Path(__file__).with_name("fake_apple.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


@pytest.fixture
def fake_apple(fake_apple_library: Path) -> FakeApple:
    return FakeApple(fake_apple_library)
