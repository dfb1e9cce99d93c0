"""Metal or a CPU, and the types that models compute in.

Metal is quick in float16 and has kernels for packed weights. A CPU emulates half precision and
reads packed weights about 30 times slower than dense float32, so there everything becomes float32.

What one model computes in is decided when it is opened (models/opening/compute_type), and its
checkpoint says so. Nothing is remembered here.
"""

import os
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mis_mlx.hardware import rates
from mis_mlx.types import UNDECIDED, Checkpoint, MisError, Precision

POLICY = "MIS_MLX_POLICY"  # in the environment, so child processes inherit it
DTYPES: dict[str, mx.Dtype] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}


# keyword-only, so that a command's own fields come first where they are given in order
@dataclass(frozen=True, kw_only=True)
class Computing:
    """The flag of every command that computes with a model, which is opened with `precision`."""

    compute_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """data type for computation; default: float32 on a CPU, float16 on Metal. If activations
    overflow float16: float32 on M1 and M2 where it fits, otherwise bfloat16
    """

    @property
    def precision(self) -> Precision:
        """What the flag asks for."""
        return Precision(asked=self.compute_dtype)


def policy() -> Literal["metal", "cpu"]:
    """The policy that holds: the device's own, or what MIS_MLX_POLICY says, on any device."""
    forced = os.environ.get(POLICY)
    if forced not in (None, "", "metal", "cpu"):
        raise MisError(f"{POLICY} is {forced!r}: set it to metal or cpu, or unset it")
    if forced:
        return "metal" if forced == "metal" else "cpu"
    return "metal" if rates.on_gpu() else "cpu"


def keeps_packed() -> bool:
    """Whether packed weights compute as they are; else they are de-quantized when they are read.

    The numbers are the same.
    """
    return policy() == "metal"


def compiles() -> bool:
    """Whether chains of element-wise operations are compiled to one kernel each.

    A GPU launches fewer kernels then. A CPU has no launches, and computes what is compiled one
    element after the other. The numbers are the same.
    """
    return policy() == "metal"


def stacks() -> bool:
    """Whether several windows go through a block in one pass.

    A GPU waits for the end of every pass. A CPU takes windows one by one, side by side.
    """
    return policy() == "metal"


def numpy_is_quicker() -> bool:
    """Whether a CPU computes, on which MLX's exp takes several times as long as numpy's, or as a
    power.
    """
    return policy() == "cpu"


def usual_dtype(wanted: Precision = UNDECIDED) -> mx.Dtype:
    """The type that a command's models compute in: the one asked for, or the policy's.

    A model whose activations float16 does not hold computes in another one, unless one is asked
    for.
    """
    if wanted.asked:
        return DTYPES[wanted.asked]
    return mx.float16 if policy() == "metal" else mx.float32


def dtype_of(checkpoint: Checkpoint) -> mx.Dtype:
    """The type that a model computes in: as decided when it was opened, else the usual one."""
    decided = checkpoint.precision.dtype
    if decided:
        return DTYPES[decided]
    return usual_dtype(checkpoint.precision)


def name_of(dtype: mx.Dtype) -> str:
    """A type as --compute-dtype spells it: 'float16'."""
    return str(dtype).removeprefix("mlx.core.")
