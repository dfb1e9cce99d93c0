"""A spool is a list: bit for bit from memory or disk, and nothing stays behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import MisError


def noise(key: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """(2, 5, 7): an odd number of bytes' worth in two dimensions."""
    return mx.random.normal((2, 5, 7), key=mx.random.key(key)).astype(dtype)


def same(a: list[mx.array] | Spool, b: list[mx.array] | Spool) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and mx.array_equal(x, y) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("held", "dtype"), [(0, mx.float32), (2, mx.float16), (2, mx.bfloat16), (99, mx.float32)]
)
def test_it_does_what_a_list_does(tmp_path: Path, dtype: mx.Dtype, held: int) -> None:
    """Append, read, assign over and over, from both ends and by slice."""
    spool = Spool(tmp_path, held)
    plain = []
    random = np.random.default_rng(0)
    for key in range(6):
        spool.append(noise(key, dtype))
        plain.append(noise(key, dtype))
    assert same(spool, plain)
    for key in range(6, 40):
        b = int(random.integers(-6, 6))
        spool[b] = noise(key, dtype)
        plain[b] = noise(key, dtype)
        assert same(spool[b:], plain[b:])
    for b, h in enumerate(spool):  # as a pass through a block does
        spool[b] = h * 2
    assert same(spool, [h * 2 for h in plain])
    assert (spool._fd >= 0) == (held < 6)  # only what does not fit is written


def test_any_array_keeps_its_bits_and_the_file_has_no_name(tmp_path: Path) -> None:
    """A transposed view, values that are no numbers. No file is open when the spool is gone."""
    odd = mx.array([[mx.nan, -0.0, mx.inf], [1e-45, 1.0, -mx.inf]]).T
    spool = Spool(tmp_path, 0)
    spool.append(odd)
    spool.append(odd + 0 * odd)
    assert bytes(memoryview(spool[0])) == bytes(memoryview(mx.contiguous(odd)))
    assert spool[1].shape == (3, 2)
    fd = spool._fd
    assert os.listdir(tmp_path) == []
    assert os.fstat(fd).st_nlink == 0
    del spool
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_file_cut_short_is_not_read_as_zeros(tmp_path: Path) -> None:
    """Somebody truncated it: a sentence, and no endless loop."""
    spool = Spool(tmp_path, 0)
    spool.extend([noise(0), noise(1)])
    os.ftruncate(spool._fd, 300)
    assert mx.array_equal(spool[0], noise(0))
    with pytest.raises(MisError, match="cut short"):
        spool[1]
