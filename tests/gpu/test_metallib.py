"""Kernels that our paths need, by name, in MLX's library for Metal: without a Mac, by opt-in.

    .venv/bin/pip download --no-deps --only-binary :all: --platform macosx_14_0_arm64 \\
        --python-version 3.12 --dest FOLDER mlx-metal==VERSION    # 45 MB; VERSION: of mlx here
    MIS_MLX_METAL_WHEEL=FOLDER/mlx_metal-....whl scripts/mis test tests/gpu/test_metallib.py

A kernel that is missing there ends a run on a Mac with "unable to load kernel".
"""

from __future__ import annotations

import os
import re
import zipfile
from importlib.metadata import version
from itertools import product

import pytest

from mis_mlx.maths.rounding import CANDIDATE_BITS, GROUPS

WHEEL = os.environ.get("MIS_MLX_METAL_WHEEL")
LIBRARY = "mlx/lib/mlx.metallib"
TYPES = ("float", "float16_t", "bfloat16_t")
PACKED = ("quantize", "dequantize", "qmv", "qmv_fast", "qmm_t", "qmm_t_splitk", "qmm_n", "qvm")
HEADS = (64, 96, 128, 256)
FUSED_HEADS = (64, 128)  # attention over many queries at once
NAME = rb"(?:affine|mxfp4|nvfp4|sdpa_vector|steel_attention)_[a-zA-Z0-9_]+"

pytestmark = pytest.mark.skipif(not WHEEL, reason="MIS_MLX_METAL_WHEEL names no mlx-metal wheel")


@pytest.fixture(name="names", scope="module")
def _names() -> frozenset[str]:
    """The names of all kernels of these kinds in the wheel's library, and what they begin with."""
    assert WHEEL
    with zipfile.ZipFile(WHEEL) as wheel:
        library = wheel.read(LIBRARY)
    whole = {name.decode() for name in re.findall(NAME, library)}
    begun = set[str]()
    for name in whole:
        parts = name.split("_")
        begun |= {"_".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return frozenset(begun)


def test_it_is_the_library_of_this_mlx() -> None:
    """Another version has other kernels."""
    assert version("mlx") in os.path.basename(WHEEL or "")


@pytest.mark.parametrize("kernel", PACKED)
def test_packed_weights_of_every_format(kernel: str, names: frozenset[str]) -> None:
    """All bits that a matrix can be given, in all groups, beside all types."""
    bits = {*CANDIDATE_BITS, 2, 4, 8}  # of other people's models, too
    wanted = {
        f"affine_{kernel}_{dtype}_gs_{group}_b_{b}"
        for dtype, group, b in product(TYPES, {*GROUPS, 32, 64, 128}, bits)
    }
    assert wanted - names == set()


@pytest.mark.parametrize(("mode", "group", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4)])
def test_floating_formats(mode: str, group: int, bits: int, names: frozenset[str]) -> None:
    """What mixtures are published in."""
    wanted = {
        f"{mode}_{kernel}_{dtype}_gs_{group}_b_{bits}" for kernel, dtype in product(PACKED, TYPES)
    }
    assert wanted - names == set()


def test_attention(names: frozenset[str]) -> None:
    """One query against many keys for each head size, many queries for two of them."""
    wanted = {f"sdpa_vector_{dtype}_{d}_{d}" for dtype, d in product(TYPES, HEADS)}
    for dtype, d in product(("float32", "float16", "bfloat16"), FUSED_HEADS):
        block = {64: "bq32_bk32", 128: "bq32_bk16"}[d]
        wanted.add(f"steel_attention_{dtype}_{block}_bd{d}_bv{d}")
    assert wanted - names == set()
