"""Python's manual, which comes with every Python, as English text in three splits."""

import hashlib
from collections.abc import Mapping, Sequence

from mis_mlx.data.rows import Row


def splits() -> Mapping[str, Sequence[Row]]:
    """One document per help topic of Python's manual."""
    from pydoc_data.topics import topics

    parts: dict[str, list[Row]] = {
        "train": [],
        "valid": [],
        "test": [],
    }
    for name in without_repeats(topics):
        # The topic's name alone decides, whatever other topics a version of Python has.
        key = f"GÓRAL-{name}".encode()
        digest = hashlib.sha256(key).hexdigest()
        bucket = int(digest[:8], 16) % 100
        split = "test"
        if bucket < 80:
            split = "train"
        elif bucket < 85:
            split = "valid"
        row = {"text": topics[name]}
        parts[split].append(row)
    return parts


def without_repeats(topics: Mapping[str, str]) -> list[str]:
    """Sorted names of the topics that are not mostly a part of a longer one.

    A quarter of the manual is there twice: it could stand in training and be held out, too.
    """
    names = []
    seen: set[str] = set()
    # longest first: a part comes after the topic that holds it
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            if len(paragraph.strip()) > 40:
                paragraphs.append(" ".join(paragraph.split()))
        known = [paragraph for paragraph in paragraphs if paragraph in seen]
        repeated = sum(map(len, known))
        if 2 * repeated <= sum(map(len, paragraphs)):
            names.append(name)
        seen.update(paragraphs)
    return sorted(names)
