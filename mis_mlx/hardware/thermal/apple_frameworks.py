"""Apple's system libraries, opened through ctypes without root, or one stand-in library for tests."""

import ctypes
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UTF8 = 0x08000100  # kCFStringEncodingUTF8


@dataclass(frozen=True)
class Frameworks:
    """The three libraries every Apple sensor needs."""

    iokit: ctypes.CDLL
    foundation: ctypes.CDLL  # CoreFoundation
    system: ctypes.CDLL


def load(library: Path | None = None) -> Frameworks:
    """Apple's libraries, or `library` in place of all three (the compiled fake of the tests). OSError with a sentence
    when this is no Mac with Apple silicon."""
    if library is not None:
        fake = ctypes.CDLL(str(library))
        return Frameworks(fake, fake, fake)
    if sys.platform != "darwin":
        raise OSError("not a Mac")
    if platform.machine() != "arm64":
        raise OSError(f"Python runs as {platform.machine()} (Intel or Rosetta), the sensors need arm64")
    path = "/System/Library/Frameworks/{0}.framework/{0}"  # the file is only in the dyld cache; it loads
    return Frameworks(
        ctypes.CDLL(path.format("IOKit")),
        ctypes.CDLL(path.format("CoreFoundation")),
        ctypes.CDLL("/usr/lib/libSystem.B.dylib"),
    )


def foreign(library: ctypes.CDLL, name: str, returns: Any, *takes: Any) -> Callable[..., Any]:
    """Function `name` with its types declared: ctypes' default int would cut every pointer to 32 bits. OSError when the
    library has none (a later macOS may drop a private one)."""
    try:
        function = getattr(library, name)
    except AttributeError:
        raise OSError(f"{name} is missing from this macOS") from None
    function.restype = returns
    function.argtypes = list(takes)
    return function
