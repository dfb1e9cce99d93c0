"""The air's temperature: witnesses, their weights, and what happens when the wind changes."""

from __future__ import annotations

import math
import random
from itertools import chain

import pytest

from mis_mlx.hardware.thermal.ambient import Ambient, BatteryNode, Estimate, cold_soak, fuse


def test_no_witness_is_none():
    """Never a silent 20 °C."""
    assert Ambient().update(dict(die_c=60.0, battery_c=30.0), 0.0, rested=False) is None


def test_inverse_variance_by_pencil():
    """20 ± 1 and 26 ± 2: weights 1 and 1/4, mean 21.2; two sensors of one case stay at ± 1.5."""
    both = fuse([Estimate(26.0, 2.0, "b"), Estimate(20.0, 1.0, "a")])
    assert both.celsius == pytest.approx(21.2)
    assert both.sigma_c == 1.5
    assert both.source == "a + b"


def test_three_sigma_outliers_are_not_heard():
    """From 20 ± 1, a witness at 31 ± 2 is 4.9 σ away; one at 26 is 2.7 σ away."""
    heard = fuse([Estimate(20.0, 1.0, "a"), Estimate(31.0, 2.0, "b")])
    assert (heard.celsius, heard.sigma_c, heard.source) == (20.0, 1.0, "a")
    assert "b" in fuse([Estimate(20.0, 1.0, "a"), Estimate(26.0, 2.0, "b")]).source


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
    """The user said 8 °C, then TVA0 climbs by 25 °C: the old value loses its say, the estimate
    follows.
    """
    air = Ambient(given_c=8.0)
    for second in range(0, 301, 10):
        estimate = air.update(
            dict(virtual_ambient_c=7.0 + 25 * second / 300), float(second), rested=False
        )
        if second == 0:
            assert estimate.celsius == pytest.approx(8.0)
    assert estimate.celsius == pytest.approx(33.0, abs=0.5)


def test_cold_soak():
    """After a long rest, three sensors within 1.5 °C give their coolest minus 0.3; else they do
    not.
    """
    rested = dict(battery_c=8.3, nand_c=8.9, soc_c=9.1, virtual_ambient_c=8.6)
    assert cold_soak(rested) == Estimate(pytest.approx(8.0), 0.8, "cold soak")
    assert cold_soak(dict(battery_c=8.3, nand_c=8.9, soc_c=12.0)) is None
    assert cold_soak(dict(battery_c=8.3, nand_c=8.9)) is None
    assert "cold soak" in Ambient().update(rested, 0.0, rested=True).source
    assert "cold soak" not in Ambient().update(rested, 0.0, rested=False).source


def simulated_error(tau_s: float, seed: int) -> list[tuple[float, float]]:
    """`(error, claimed σ)` of each estimate in four hours of an air at 23 °C, 40 min idle, 80 min
    load.
    """
    noise = random.Random(seed)
    node = BatteryNode()
    battery_c = 26.0
    out = []
    for look in range(4 * 720):
        now_s = look * 5.0
        power_w = noise.gauss(3.0, 0.3) if now_s % 7200 < 2400 else noise.gauss(13.0, 0.5)
        battery_c += 5.0 / tau_s * (-(battery_c - 23.0) + 0.8 * power_w)
        seen = round(battery_c + noise.gauss(0, 0.1), 1)
        estimate = node.update(dict(battery_c=seen, power_w=power_w), now_s)
        if estimate is not None:
            out.append((estimate.celsius - 23.0, estimate.sigma_c))
    return out


@pytest.mark.parametrize("tau_s", [1500.0, 1050.0, 2100.0])
def test_battery_model_claims_no_more_than_it_knows(tau_s):
    """Also with a battery a third faster or slower than supposed, the error stays within 3 claimed
    σ.
    """
    estimates = list(chain.from_iterable(simulated_error(tau_s, seed) for seed in range(3)))
    assert len(estimates) >= 6
    assert all(abs(error) < 3 * sigma for error, sigma in estimates)
    assert all(sigma >= 1.5 for _, sigma in estimates)


def test_battery_model_is_silent_while_charging_or_without_power():
    """Charging heats the battery from inside; without the power there is nothing to correct by."""
    charging = BatteryNode()
    blind = BatteryNode()
    for look in range(300):
        values = dict(battery_c=30.0, power_w=5.0, battery_percent=50.0 + look // 100)
        assert charging.update(values, look * 5.0) is None
        assert blind.update(dict(battery_c=30.0), look * 5.0) is None


def test_battery_model_settles_on_a_steady_machine():
    """Battery at 30.0 °C with 5 W: the first window says 30 − 0.7 · 5 = 26.5 °C."""
    node = BatteryNode()
    estimates = [node.update(dict(battery_c=30.0, power_w=5.0), look * 5.0) for look in range(121)]
    found = [estimate for estimate in estimates if estimate is not None]
    assert found[0].celsius == pytest.approx(26.5, abs=1e-6)
    assert found[0].source == "battery model"
