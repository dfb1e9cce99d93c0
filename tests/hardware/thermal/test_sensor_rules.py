"""Which raw values are believed, by dumps of real machines and by every kind of nonsense seen."""

from __future__ import annotations

import math

from mis_mlx.hardware.thermal.recording import Raw
from mis_mlx.hardware.thermal.sensor_rules import Frozen, judge
from tests.hardware.recorded import smc_float


def look(**parts) -> Raw:
    return Raw(0.0, 0.0, **parts)


def test_only_garbage_gives_none_with_a_reason():
    """Parked, impossible, constant, NaN and unnamed values leave nothing, and say why."""
    values = judge(
        look(
            hid=(
                *(
                    ("GPU MTR Temp Sensor1", 30.0),
                    ("ANE MTR Temp Sensor1", 30.0),
                    ("PMU tdev1", -9202.86),
                ),
                *(("PMU tcal", 51.85), ("PMU2 TR0Z", 51.85), ("", 0.0), ("noname", 0.0)),
                *(("pACC MTR Temp Sensor2", math.nan), ("PMU tdie1", 0.0), ("PMU tdie2", 400.0)),
                *(("gas gauge battery", 0.0), ("gas gauge battery", math.inf)),
            ),
            smc={
                "TCMz": smc_float(6.7),
                "Tp2a": smc_float(-4.0),
                "TVA0": smc_float(0.0),
                "TB0T": "flt :zz",
            },
        )
    )
    measured = ("die_c", "soc_c", "battery_c", "nand_c", "virtual_ambient_c", "power_w")
    assert [values[name].value for name in measured] == [None] * 6
    assert values["die_c"].reason == "none of 16 sensors gives a plausible value"


def test_a_parked_gpu_is_not_the_hottest_spot():
    """In the cold its 30.0 °C would be; 31 °C is a temperature."""
    cold = ("pACC MTR Temp Sensor2", 12.0)
    assert judge(look(hid=(cold, ("GPU MTR Temp Sensor1", 30.02))))["die_c"].value == 12.0
    assert judge(look(hid=(cold, ("GPU MTR Temp Sensor1", 31.0))))["die_c"].value == 31.0


def test_winter_outdoors():
    """Below zero the battery and TVA0 are believed; only die sensors have a floor."""
    values = judge(look(hid=(("gas gauge battery", -3.5),), smc={"TVA0": smc_float(-8.0)}))
    assert (values["battery_c"].value, values["virtual_ambient_c"].value) == (-3.5, -8.0)


def test_duplicates():
    """Six gauges of one battery give their median, many die sensors their maximum."""
    gauges = tuple(("gas gauge battery", value) for value in (45.0, 32.0, 32.5, 32.5, 32.0, 89.0))
    dies = (("pACC MTR Temp Sensor2", 88.0), ("pACC MTR Temp Sensor3", 95.0), ("PMU tdie1", 90.0))
    values = judge(look(hid=(*gauges, *dies)))
    assert values["battery_c"].value == 32.5
    assert values["die_c"].value == 95.0


def test_linux_names():
    """Die sensors are told from the board's and the disk's by chip name."""
    rows = (
        ("psutil coretemp Package id 0", 61.0),
        ("psutil nvme Composite", 70.0),
        ("psutil acpitz", 99.0),
    )
    assert judge(look(linux=rows))["die_c"].value == 61.0
    assert judge(look(linux=(("thermal_zone cpu-thermal", 48.2),)))["die_c"].value == 48.2
    assert judge(look(linux=(("psutil nvme Composite", 70.0),)))["die_c"].value is None


def test_a_stuck_sensor_is_noticed_when_the_power_changes():
    """Bit-equal for 120 s counts only if the power moved by more than 3 W."""
    stuck = Frozen()
    idle = Frozen()
    alive = Frozen()
    for second in range(120):
        assert not stuck.stuck(second, 80.0, 5.0 + second / 10)
        assert not idle.stuck(second, 80.0, 5.0)
        assert not alive.stuck(second, 80.0 + second % 2, 5.0 + second / 10)
    assert stuck.stuck(120, 80.0, 17.0)
    assert not idle.stuck(120, 80.0, 5.0)
    assert not alive.stuck(120, 80.0, 17.0)
    assert not stuck.stuck(121, 80.1, 17.0)
