"""The curve of a page: read from what is known, empty where it is not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mis_mlx import cli, distill
from mis_mlx.models.opening import resolve
from mis_mlx.storage import hub
from mis_mlx.studio_page import expected
from tests import tiny

DEFAULT = hub.cache_root() / resolve.DEFAULT.split("/")[-1]
HERE = (DEFAULT / "config.json").is_file()


def test_of_an_unmeasured_model_nothing_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a chat template; and of a folder without a model."""
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    assert expected.curve(str(tiny.talking(tmp_path / "talks"))) == []
    assert expected.curve(str(tiny.make(tmp_path / "plain"))) == []
    assert expected.curve(str(tmp_path)) == []
    assert expected.curve(None) == []


@pytest.mark.thorough
@pytest.mark.skipif(not HERE, reason="the default model is not in the cache: run distill once")
def test_the_default_model_is_known() -> None:
    """Fewer bytes lose more; `distill` takes the flags; near what a real search expected.

    That was 0.099 bits a byte in 67.9 MB (README.md).
    """
    curve = expected.curve(None)
    assert len(curve) > 10
    for point, smaller in itertools.pairwise(curve):
        assert smaller["nbytes"] < point["nbytes"]
        assert smaller["loss"] > point["loss"]
    for point in curve:
        assert cli.parse(distill.Settings, point["flags"]).target_bpw
    near = min(curve, key=lambda point: abs(point["loss"] - 0.099))
    assert near["nbytes"] == pytest.approx(67.9e6, rel=0.03)


def test_scenarios_are_those_of_distill() -> None:
    """Each is taken."""
    names = expected.scenarios()
    assert "balanced" in names
    for name in names:
        assert cli.parse(distill.Settings, ["--scenario", name]).scenario == name
