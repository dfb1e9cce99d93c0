"""A journal: what work has found so far, so that a kill costs one record and nothing is done twice.

A file of JSON objects, one a line, that is only ever added to. A record is found by its key; of
two with one key the later one counts. Lines that a crash tore are skipped, and so are those without
a key: another version may have written them. What the records depend on is in the file's name, or
in its first line. Several processes may add to one file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, as_mis_error
from mis_mlx.types import MisError

Record = dict[str, Any]
PLAIN = str | int | float | None  # what the values of a key are
Key = tuple[Any, ...]  # the values of a journal's `key`, None where a record has no such field


@dataclass(frozen=True)
class Journal:
    """A journal in the file `path`, which need not exist.

    key: the fields that a record is found by; a record has the first of them in any case. identity:
    what all records depend on; None: the name of the file says it.
    """

    path: Path
    key: tuple[str, ...]
    identity: Mapping[str, Any] | None = None

    def read(self) -> dict[Key, Record]:
        """{key: its record}, in the file's order; {} where there is none of this identity."""
        if self.identity is not None and not self._is_ours():
            return {}
        found = {}
        for record in run_folder.records(self.path):
            key = self.key_of(record)
            if key[0] is not None and all(isinstance(value, PLAIN) for value in key):
                found[key] = record
        return found

    def key_of(self, record: Mapping[str, Any]) -> Key:
        """The key of a record, or of a part of one that has all of the key."""
        return tuple(record.get(name) for name in self.key)

    def begin(self) -> dict[Key, Record]:
        """What it holds; its folder is made. A file of another identity is begun anew."""
        with as_mis_error(self.path.parent, self.path.name):
            DISK.make_folder(self.path.parent)
        if self.identity is not None and not self._is_ours():
            first = json.dumps(self.identity, ensure_ascii=False)
            DISK.replace_text(self.path, f"{first}\n")
        return self.read()

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record: at once, so that work that is stopped loses little.

        MisError where the disk refuses, or another process has begun the file anew.
        """
        if self.identity is not None and not self._is_ours():
            raise MisError(
                f"{self.path} was begun anew by another process, with other settings: stop one of "
                f"the two, and start this one again"
            )
        DISK.append(self.path, json.dumps(record, ensure_ascii=False))

    def add_missing(self, source: "Journal") -> None:
        """Add another journal's records of which the keys are missing here."""
        present = self.read()
        for key, record in source.read().items():
            if key not in present:
                self.add(record)

    def _is_ours(self) -> bool:
        """Whether the first line says this identity."""
        first = next(run_folder.parsed(self.path), None)
        return first == json.loads(json.dumps(self.identity))
