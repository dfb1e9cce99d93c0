"""What the tensors of a mixture's experts are called: one by one, as on the hub and here, or stacked, as in mlx-lm."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mis_mlx.models.config import shape_of
from mis_mlx.models.families import GATED, family
from mis_mlx.types import MisError, TensorAt

STACKED = re.compile(r"(.*\.)(?:switch_mlp|experts)\.(gate_proj|up_proj|down_proj)\.(\w+)")


def tensors_of(config: Mapping[str, Any], together: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a block of a mixture has in the place of an MLP: a router, experts one by one or
    `together`, perhaps one that every token meets."""
    s, of = shape_of(config), family(config)

    def biased(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:-1]} if of.expert_bias else {})

    inside, wide = biased(of.router, s.experts, s.hidden), int(config.get(of.shared_expert) or 0)
    each = [(f"experts.{e}", of.matrices, tuple[int, ...]()) for e in range(s.experts)]
    for place, names, stacked in [(of.switch, GATED, (s.experts,))] if together else each:
        for name in names:
            inside |= biased(
                f"{place}.{name}", *stacked, *((s.hidden, s.ffn) if name == names[2] else (s.ffn, s.hidden))
            )
    for name in GATED if wide else ():
        inside[f"shared_expert.{name}.weight"] = (s.hidden, wide) if name == "down_proj" else (wide, s.hidden)
    if wide:
        inside["shared_expert_gate.weight"] = (1, s.hidden)
    return {f"{of.mlp}.{name}": shape for name, shape in inside.items()}


def expert_of(name: str) -> int | None:
    """The number of the expert in its block that a tensor or module belongs to; None outside of experts."""
    found = re.search(r"\bexperts\.(\d+)\.", name)
    return int(found[1]) if found else None


def one_by_one(path: str, config: Mapping[str, Any]) -> list[str]:
    """What the parts of a matrix that `stacked` names are called; another path alone."""
    of = family(config)
    stem, _, name = path.partition(f"{of.switch}.")
    if (kind := name.split(".")[0]) not in GATED:
        return [path]
    own = name.replace(kind, of.matrices[GATED.index(kind)])
    return [f"{stem}experts.{e}.{own}" for e in range(shape_of(config).experts)]


def stacked(path: str, config: Mapping[str, Any]) -> str:
    """What mlx-lm calls the matrix, of all experts, that an expert's is part of; another path as it is."""
    found = re.fullmatch(r"(.*\.)experts\.\d+\.(\w+)", path)
    of = family(config)
    return f"{found[1]}{of.switch}.{GATED[of.matrices.index(found[2])]}" if found else path


def is_router(name: str) -> bool:
    """Whether this matrix decides which experts a token meets, or how much of the shared one: it is never quantized."""
    return re.search(r"\.(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate)(\.weight|\.bias)?$", name) is not None


def apart(stacked: re.Match[str], name: str, at: TensorAt, config: Mapping[str, Any]) -> Iterator[tuple[str, TensorAt]]:
    """Of experts that mlx_lm.convert has stacked, (E, out, in): each expert's part, by its own name."""
    of, count = family(config), shape_of(config).experts
    if at.shape[0] != count:
        raise MisError(f"{at.file}: {name} has {at.shape[0]} experts, config.json makes it {count}: download it again")
    matrix, size = of.matrices[GATED.index(stacked[2])], at.nbytes // count
    for e in range(count):
        part = replace(at, shape=at.shape[1:], offset=at.offset + e * size, nbytes=size)
        yield f"{stacked[1]}experts.{e}.{matrix}.{stacked[3]}", replace(part, stored=(name, at))
