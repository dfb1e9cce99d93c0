"""What is said of the machine that a number was measured on."""

from __future__ import annotations

import json

from mis_mlx.hardware import rates


def test_about_names_no_machine() -> None:
    """Chip, memory, system and versions; no host name."""
    import platform

    said = rates.about()
    assert said["memory_gib"] > 0
    assert said["mlx"]
    assert said["chip"]
    assert platform.node() not in json.dumps(said)
    assert 1 <= said["cores_used"] <= said["cores"]
