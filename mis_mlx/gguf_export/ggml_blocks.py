"""Integers and scales that MLX packed, as the blocks of ggml's types."""

import numpy as np

BLOCK = 32  # weights of a Q4_1 or Q5_1 block


def of_floats(q: np.ndarray, scales: np.ndarray, mode: str) -> np.ndarray:
    """mxfp4 and nvfp4: 4-bit integers (rows, in) and 8-bit scales as blocks of both.

    A block of mxfp4 is one scale and 32 weights. In nvfp4 four scales stand together, in front of
    their four groups of 16.
    """
    scales_of_block = 1
    group = BLOCK
    if mode == "nvfp4":
        scales_of_block = 4
        group = 16
    scales = scales.reshape(len(q), -1, scales_of_block)
    nibbles = _halves(q, group).reshape(*scales.shape[:2], -1)
    return np.concatenate([scales, nibbles], axis=-1).reshape(len(q), -1)


def of_groups(q: np.ndarray, halves: np.ndarray, bits: int) -> np.ndarray:
    """Q4_1 and Q5_1: integers (rows, in) behind scale and bias, float16 (rows, in / 32, 2)."""
    block = [halves.view(np.uint8)]
    if bits == 5:
        # Q5_1 keeps the fifth bits of a block's 32 weights in 4 bytes of their own.
        fifth = np.packbits(q >> 4, axis=1, bitorder="little")
        block.append(fifth.reshape(*halves.shape[:2], -1))
    block.append(_halves(q & 15, BLOCK))
    return np.concatenate(block, axis=-1).reshape(len(q), -1)


def _halves(q: np.ndarray, block: int) -> np.ndarray:
    """4-bit integers (rows, in) as bytes (rows, in / block, block / 2).

    Weight j of a block is the low nibble of byte j, weight j + block / 2 the high one.
    """
    blocks = q.reshape(len(q), -1, block)
    low = blocks[..., : block // 2]
    high = blocks[..., block // 2 :]
    return low | (high << 4)
