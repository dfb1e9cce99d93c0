"""What all pages of one server share."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mis_mlx.studio_page import studio_state


def test_a_curve_that_is_not_known_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later, and until it is known: a search in a terminal may have measured it."""
    answers: list[Any] = [None, [], [{"loss": 0.1}], AssertionError]
    asked = 0

    async def io_bound(ask: Any) -> Any:
        nonlocal asked
        asked += 1
        return answers[asked - 1]

    nicegui: Any = SimpleNamespace(run=SimpleNamespace(io_bound=io_bound))
    studio = studio_state.Studio(more=(), nicegui=nicegui)

    def curve() -> list[dict[str, Any]]:
        return asyncio.run(studio.curve("model"))

    assert [curve(), curve(), asked] == [[], [], 1]  # not at every move of a slider
    monkeypatch.setattr(studio_state, "UNKNOWN_S", 0.0)
    assert curve() == []
    assert [curve(), curve(), asked] == [[{"loss": 0.1}], [{"loss": 0.1}], 3]
