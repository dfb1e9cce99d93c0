"""A scenario has two names, and they mean the same wherever one is given."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import pytest

from mis_mlx import cli, distill, flag_help, prune
from mis_mlx.models.architectures import arch, scenarios
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import wheel_model

# What table 1 of the paper, or benchmarks/, has under each mountain name.
KEPT = {
    "stado": {"experts": 0.75},
    "redyk": {"layers": 29 / 30, "ffn": 2 / 3, "vocab": 0.5},
    "gazda": {"layers": 28 / 30, "ffn": 0.5},
    "goral": {"layers": 2 / 3, "ffn": 11 / 14},
    "baca": {"hidden": 0.75},
    "halny": {"ffn": 4 / 7},
    "juhas": {"layers": 2 / 3},
    "zbojnik": {"layers": 0.5, "ffn": 3 / 7},
}
SMOLLM2 = wheel_model.SMOLLM2.files["config.json"]
PAPER = {
    **SMOLLM2,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 96,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("scenario", "paper", "small"),
    [
        # 1206.9, nearest multiple of 256
        ("goral", {"layers": 64, "ffn": 22_528}, {"layers": 20, "ffn": 1280}),
        ("baca", {"hidden": 6144}, {"hidden": 432}),  # 576 * 0.75 = 432 = 3 * lcm(16, 9)
        ("halny", {"ffn": 16_384}, {"ffn": 768}),  # 877.7 lies nearer to 768 than to 1024
        ("juhas", {"layers": 64}, {"layers": 20}),
        ("zbojnik", {"layers": 48, "ffn": 12_288}, {"layers": 15, "ffn": 768}),  # 658.3
    ],
)
def test_sizes_of_scenarios(scenario: str, paper: dict[str, int], small: dict[str, int]) -> None:
    """Exactly table 1's sizes on the paper's teacher; on SmolLM2 the same ratios, rounded to what
    kernels like.

    Nothing else moves. What is given exactly wins over its ratio.
    """
    assert arch.params(SMOLLM2) == 134_515_008
    ratios = scenarios.RATIOS[scenarios.plain(scenario)]
    assert arch.target_shape(PAPER, ratios) == replace(shape_of(PAPER), **paper)
    assert arch.target_shape(SMOLLM2, ratios) == replace(shape_of(SMOLLM2), **small)
    exact = arch.target_shape(SMOLLM2, ratios, ffn=640, layers=None)
    assert exact == replace(shape_of(SMOLLM2), **{**small, "ffn": 640})


def test_every_scenario_has_both_names() -> None:
    """What the annotation admits are all plain names and all mountain names, each once."""
    literal, _ = get_args(scenarios.Scenario)
    names = get_args(literal)
    assert set(names) == {*KEPT, *scenarios.RATIOS, "none"}
    assert len(names) == len(set(names))
    for mountain_name, kept in KEPT.items():
        assert scenarios.RATIOS[scenarios.plain(mountain_name)] == pytest.approx(kept)
    for name in scenarios.PLAIN_NAMES:
        assert scenarios.plain(name) == name
    assert scenarios.plain("tatra") == "tatra"


@pytest.mark.parametrize("settings", [distill.Settings, prune.Settings])
@pytest.mark.parametrize("mountain_name", KEPT)
def test_flags_files_and_python_take_both(
    settings: type, mountain_name: str, tmp_path: Path
) -> None:
    """All give equal settings."""
    name = scenarios.plain(mountain_name)
    file = tmp_path / "settings.yaml"
    file.write_text(f"scenario: {mountain_name}\n")
    needed = ["--mlx-path", "out"] if settings is prune.Settings else []
    by_flag = cli.parse(settings, ["--scenario", mountain_name, *needed])
    by_file = cli.parse(settings, ["-c", str(file), *needed])
    by_plain_name = cli.parse(settings, ["--scenario", name, *needed])
    assert by_flag == by_plain_name
    assert by_flag.scenario == by_file.scenario == name
    assert settings(**{**asdict(by_flag), "scenario": mountain_name}) == by_flag


def test_help_shows_the_plain_names() -> None:
    """As the flag's values; the others stand in the text."""
    shown = flag_help.text(distill.Settings, "distill", every=True)
    (line,) = (line for line in shown.splitlines() if "--scenario" in line)
    assert line.strip().startswith("--scenario {fewer-experts,half-vocab,half-ffn,balanced,narrow,")
    assert "gazda" not in line
    words = " ".join(shown.split())
    assert "redyk, gazda, goral, baca, halny, juhas, zbojnik and stado" in words
