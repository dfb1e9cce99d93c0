"""The air's temperature: witnesses, which one counts, and what happens when the wind changes."""

from __future__ import annotations

import math

import pytest

from mis_mlx.hardware.thermal.ambient import Ambient, Estimate, cold_soak


def test_no_witness_is_none():
    """Never a silent 20 °C."""
    assert Ambient().update(dict(die_c=60.0, battery_c=30.0), 0.0, rested=False) is None


def test_given_is_labelled_given_and_ages():
    """σ² = 0.7² + 1 °C² an hour; alone it is called 'given'."""
    air = Ambient(given_c=-3.0)
    assert air.update(dict(), 0.0, rested=False) == Estimate(-3.0, 0.7, "given")
    later = air.update(dict(), 4 * 3600.0, rested=False)
    assert later.celsius == -3.0
    assert later.sigma_c == pytest.approx(math.sqrt(0.49 + 4))


def test_virtual_ambient():
    """TVA0 reads 1 °C low; ± 2.5 on M1, ± 4 on later chips."""
    assert Ambient().update(dict(virtual_ambient_c=7.0), 0.0, False) == Estimate(
        8.0, 2.5, "SMC TVA0"
    )
    assert (
        Ambient(virtual_sigma_c=4.0).update(dict(virtual_ambient_c=7.0), 0.0, False).sigma_c == 4.0
    )


def test_halny_overrules_what_was_true_before():
    """The user said 8 °C, then TVA0 climbs by 25 °C: the estimate follows."""
    air = Ambient(given_c=8.0)
    for second in range(0, 301, 10):
        estimate = air.update(
            dict(virtual_ambient_c=7.0 + 25 * second / 300), float(second), rested=False
        )
        if second == 0:
            assert estimate.celsius == pytest.approx(8.0)
    assert estimate.celsius == pytest.approx(33.0, abs=0.5)


def test_cold_soak():
    """After a long rest, three sensors within 1.5 °C give their coolest minus 0.3."""
    rested = dict(battery_c=8.3, nand_c=8.9, soc_c=9.1, virtual_ambient_c=8.6)
    assert cold_soak(rested) == Estimate(pytest.approx(8.0), 0.8, "cold soak")
    assert cold_soak(dict(battery_c=8.3, nand_c=8.9, soc_c=12.0)) is None
    assert cold_soak(dict(battery_c=8.3, nand_c=8.9)) is None
    assert "cold soak" in Ambient().update(rested, 0.0, rested=True).source
    assert "cold soak" not in Ambient().update(rested, 0.0, rested=False).source
