"""A command's settings by parts: each stage gets the part that it reads, not all of them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

Part = TypeVar("Part")


def part_of(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """The settings of one `kind`, a dataclass, out of `values` by name.

    Fields that have no value there keep their defaults.
    """
    own = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            own[field.name] = values[field.name]
    return kind(**own)
