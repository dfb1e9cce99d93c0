"""What every architecture says of a config must hold, whichever family it is.

Here it is asked of configs and of modules that were just made, so it is quick. What blocks compute
is in test_families.py: parity, streams, cuts along every axis, a whole run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from mis_mlx.models.architectures import arch, config_checks
from mis_mlx.models.architectures.families import FAMILIES, family
from mis_mlx.models.architectures.shape import ALL, weight_count
from mis_mlx.models.opening.config import check_config
from mis_mlx.types import MisError
from tests import tiny

# one config of each family
CONFIGS: dict[str, dict[str, Any]] = {}
for _changes in (*tiny.KINDS.values(), *tiny.FAMILIES.values()):
    _config = {**tiny.CONFIG, **_changes}
    CONFIGS.setdefault(_config["model_type"], family(_config).own_config())
NEEDED = [
    (name, key, value)
    for name, kind in FAMILIES.items()
    for key, values in (
        *((key, (None,)) for key in kind.stated),
        *((key, (None, 0, "x")) for key in kind.numbers),
    )
    for value in values
]
ONLY = [(name, key, value) for name, kind in FAMILIES.items() for key, value in kind.only]


def refused(config: dict[str, Any], changes: dict[str, Any]) -> str:
    """The sentence that refuses a config with these changes."""
    with pytest.raises(MisError) as caught:
        check_config({**config, **changes}, Path("config.json"))
    return str(caught.value)


def test_every_family_has_a_config() -> None:
    """And it is one that is taken."""
    assert CONFIGS.keys() == FAMILIES.keys()
    for config in CONFIGS.values():
        check_config(config, Path("config.json"))


@pytest.mark.parametrize(("name", "key", "value"), NEEDED)
def test_what_it_needs_is_asked_for(name: str, key: str, value: Any) -> None:
    """In a sentence that names the key, whatever it is instead."""
    assert key in refused(CONFIGS[name], {key: value})


@pytest.mark.parametrize(("name", "key", "value"), ONLY)
def test_no_other_value_is_computed(name: str, key: str, value: Any) -> None:
    """The same of a key with one value alone."""
    other: Any = 8
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, list):
        other = [1]
    elif value is not None:
        other = value + 1
    assert f"{key} is {other!r}" in refused(CONFIGS[name], {key: other})


@pytest.mark.parametrize("name", FAMILIES)
def test_lists_have_a_value_for_every_block(name: str) -> None:
    """Those that are cut along with the blocks."""
    config = CONFIGS[name]
    for key in family(config).block_lists:
        if isinstance(config.get(key), list) and key != "block_configs":
            assert f"{key} must be a list of 7" in refused(config, {key: config[key][:-1]})


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_are_of_a_kind_that_it_has(name: str) -> None:
    """Any other one would be computed as a plain one."""
    config = CONFIGS[name]
    for kind in {*config_checks.ROPE_NEEDS, "odd"} - {*family(config).rope_kinds}:
        rope = {"rope_type": kind, "factor": 2.0}
        if kind == "odd" or name != "gemma4_text":  # which reads rope_parameters alone
            refused(config, {"rope_parameters": rope})


@pytest.mark.parametrize("name", FAMILIES)
def test_an_axis_is_cut_or_refused_with_the_reason(name: str) -> None:
    """`axes` and `why`."""
    config = CONFIGS[name]
    architecture = family(config)
    for axis in ALL:
        before = getattr(architecture.shape, axis)
        if axis in architecture.axes:
            continue
        with pytest.raises(MisError) as caught:
            arch.target_shape(config, {}, **{axis: before + 1})
        sentence = str(caught.value)
        assert f"{axis} of a {name} cannot be cut: {architecture.why}" in sentence
    assert arch.target_shape(config, {}) == architecture.shape


@pytest.mark.parametrize("name", FAMILIES)
def test_a_blocks_tensors_are_those_of_its_module(name: str) -> None:
    """Of every block: names and shapes, as mlx-lm makes it."""
    architecture = family(CONFIGS[name])
    args = architecture.model_args()
    for i in range(architecture.layers):
        block = architecture.new_block(args, i)
        theirs = {path: array.shape for path, array in tree_flatten(block.parameters())}
        assert architecture.block_tensors(i, stacked=True) == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_are_said_to_be_alike_are(name: str) -> None:
    """By kinds, counts and sizes."""
    config = CONFIGS[name]
    architecture = family(config)
    shapes = [architecture.block_tensors(i) for i in range(architecture.layers)]
    unlike = [shapes[i] for i in architecture.unlike_blocks()]
    assert all(block in unlike for block in shapes)
    assert sum(architecture.block_counts().values()) == architecture.layers
    largest = weight_count(shapes[architecture.largest_block()])
    assert largest == max(map(weight_count, shapes))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_keeps_what_its_blocks_were(name: str) -> None:
    """Without its second block, where that may go: sizes, kinds and tensors."""
    config = CONFIGS[name]
    architecture = family(config)
    kept = [i for i in range(architecture.layers) if i != 1 or i in architecture.fixed_blocks()]
    if "layers" not in architecture.axes or architecture.period > 1:  # kinds by place
        kept = list(range(architecture.layers))
    wanted = arch.target_shape(config, {}, layers=len(kept))
    student = arch.student_config(config, wanted, kept)
    check_config(student, Path("config.json"))
    for number, i in enumerate(kept):
        assert family(student).block_tensors(number) == architecture.block_tensors(i)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_on_disk_and_back(name: str) -> None:
    """Every tensor and module."""
    architecture = family(CONFIGS[name])
    for tensor in arch.tensors_of(CONFIGS[name]):
        for own in (tensor, tensor.rpartition(".")[0]):
            stored = architecture.stored_name(own)
            if not architecture.whole or architecture.renamed:  # else `inside_names` leads back
                assert architecture.own_name(stored) == own
