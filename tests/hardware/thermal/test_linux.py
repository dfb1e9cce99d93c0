"""Thermometers of Linux, in a made-up /sys."""

from __future__ import annotations

from pathlib import Path

from mis_mlx.hardware.thermal import linux


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_hwmon(tmp_path):
    """Thousandths of a degree, with chip and label; a negative one too; a file of words is left out."""
    hwmon = "class/hwmon/hwmon0"
    write(
        tmp_path,
        {
            f"{hwmon}/name": "k10temp\n",
            f"{hwmon}/temp1_input": "61250\n",
            f"{hwmon}/temp1_label": "Tctl\n",
            f"{hwmon}/temp2_input": "-3000\n",
            f"{hwmon}/temp3_input": "broken\n",
        },
    )
    assert linux.read(tmp_path) == (("hwmon k10temp Tctl", 61.25), ("hwmon k10temp", -3.0))


def test_thermal_zones_when_there_is_no_hwmon(tmp_path):
    """A phone or a small board; a zone that cannot be read is left out."""
    write(
        tmp_path,
        {
            "class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "class/thermal/thermal_zone0/temp": "48200\n",
            "class/thermal/thermal_zone1/type": "gpu-thermal\n",
        },
    )
    assert linux.read(tmp_path) == (("thermal_zone cpu-thermal", 48.2),)


def test_a_virtual_machine_has_none(tmp_path):
    """No file, no row: never 0."""
    assert linux.read(tmp_path) == ()
