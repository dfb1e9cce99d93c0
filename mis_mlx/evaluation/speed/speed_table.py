"""What timed models look like to people: cells of a table, what bounds each, one line for a README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mis_mlx.evaluation.speed import roofline
from mis_mlx.evaluation.speed.timing import Request
from mis_mlx.hardware.machine_info import about
from mis_mlx.types import Row

METRICS = (
    ("params", "parameters, millions", ".1f"),
    ("weights_mb", "weights on disk, MB (10^6)", ".1f"),
    ("load_s", "time to load, s", ".2f"),
    ("ttft_ms", "time to first token, ms", ".0f"),
    ("ttft_best_ms", "– at best here", ".0f"),
    ("ttft_cached_ms", "– the prompt in the cache", ".0f"),
    ("prefill_tps", "prefill, tokens/s", ".0f"),
    ("tpot_ms", "time per output token, ms", ".1f"),
    ("itl_p95_ms", "– p95 of the gaps", ".1f"),
    ("decode_tps", "decode, tokens/s", ".2f"),
    ("moved_mb", "– memory it reads per token, MB", ".1f"),
    ("decode_best_tps", "– at best here, tokens/s", ".1f"),
    ("reached", "– reached of that", ".0%"),
    ("m1_best_tps", "– at best on an M1 (68 GB/s), computed", ".0f"),
    ("peak_mb", "peak memory, MB", ".0f"),
    ("joules", "energy above idle, J/token, an estimate", ".3f"),
)

Facts = Mapping[str, Mapping[str, Any]]  # by model


def rows(fixed: Facts, measured: Facts) -> list[Row]:
    """Mean ± standard deviation of what was timed, plain values of the rest."""
    found = []
    for name, values in measured.items():
        f = fixed[name]
        found += [Row(name, "params", f["params"] / 1e6), Row(name, "weights_mb", f["weight_bytes"] / 1e6)]
        found.append(Row(name, "m1_best_tps", f["m1_best_tps_computed"]))
        for metric, value in values.items():
            if isinstance(value, Mapping):
                mean, sd, n = value["mean"], value["sd"], value["n"]
                found.append(Row(name, metric, mean, mean - sd, mean + sd, n) if n > 1 else Row(name, metric, mean))
                if "p95" in value:
                    found.append(Row(name, metric.replace("_ms", "_p95_ms"), value["p95"]))
            elif metric != "bound":
                found.append(Row(name, metric, value))
    return found


def sentences(fixed: Facts, measured: Facts, r: Request) -> list[str]:
    """What bounds each model, what its size alone should give over the first one's, and one line for a README."""
    alone = [
        {"name": n, "kind": fixed[n]["format"], "best": v["decode_best_tps"], "bound": v["bound"],
         "tps": v["decode_tps"]["median"]}
        for n, v in measured.items()
    ]  # fmt: skip
    said = [roofline.bound(facts) for facts in alone]
    said += [roofline.against(alone[0], facts) for facts in alone[1:]]
    m = about()
    where = f"on {m['chip']} ({m['computes_on']}), {m['memory_gib']} GiB, {m['release']}, mlx {m['mlx']}"
    for name, v in measured.items():
        first, rate = v["ttft_ms"], v["decode_tps"]
        said.append(
            f"{name} {where}, p{r.prompt} g{r.answer} d{r.depth} b{r.batch} n{rate['n']}: "
            f"TTFT {first['mean']:.0f} ± {first['sd']:.0f} ms, decode {rate['mean']:.2f} ± {rate['sd']:.2f} tokens/s"
        )
    return said
