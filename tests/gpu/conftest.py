"""Tests marked `gpu` are skipped where MLX has no GPU; elsewhere they run on it, in a suite that
stands on the CPU.
"""

from __future__ import annotations

import mlx.core as mx
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without Metal and CUDA: skipped, with the reason."""
    if not mx.is_available(mx.gpu):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(
                    pytest.mark.skip(reason="mx.gpu is not available: needs Metal, or mlx[cuda]")
                )
