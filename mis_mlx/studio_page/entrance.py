"""How the browser is opened: by a file that leads to the page, so that the token is in no command
line. Everybody on a machine can read those.
"""

import contextlib
import html
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mis_mlx.storage.files import DISK
from mis_mlx.studio_page import runs
from mis_mlx.types import MisError

PAGE = '<!doctype html><meta http-equiv="refresh" content="0;url={}"><title>mis_mlx studio</title>'


@contextlib.contextmanager
def redirecting(address: str, wanted: bool) -> Iterator[Path | None]:
    """A page that leads to the address and that this user alone can read.

    None where it is not wanted, or cannot be written. It goes at the end. It lies with what the
    page writes, and not where temporary files do: a browser in a sandbox has those of its own.
    """
    path = None
    if not wanted:
        yield path
        return
    with contextlib.suppress(OSError, MisError):
        runs.make_books()
        number, name = tempfile.mkstemp(".html", ".tmp-open-", runs.BOOKS)  # of mode 0600
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(PAGE.format(html.escape(address)))
        path = Path(name).absolute()
    try:
        yield path
    finally:
        if path:
            DISK.discard(path)
