"""The first sentences about a finished run: what its student costs, and what it loses."""

from collections.abc import Mapping, Sequence
from typing import Any

from mis_mlx.distillation import summary
from mis_mlx.reporting import html

MODELS = ("4-bit", "distilled")  # the first one that a result knows is the student


def sentences(result: Mapping[str, Any], lose: float | None) -> Sequence[str]:
    """Sentences from a run's result: size, loss, loops; what was expected.

    lose: the loss that was allowed. Figures that the result does not have are left out.
    """
    name = next((name for name in MODELS if f"bytes_{name}" in result), "")
    values = {
        "quantized": name == "4-bit",
        "nbytes": result.get(f"bytes_{name}"),
        "teacher_bytes": result.get("bytes_teacher"),
        "prompts": result.get("answers_prompts"),
        "excess": result.get(f"answers_excess_{name}"),
        "loops": result.get(f"loops_{name}"),
        "teacher_loops": result.get("loops_teacher"),
        "bits": result.get(f"bits_per_byte_{name}"),
        "teacher_bits": result.get("bits_per_byte_teacher"),
    }
    lines = html.document("verdict.md", values).splitlines()
    if "expected_loss" in result:
        lines.append(summary.expectation_sentence(result, lose))
    return [line for line in lines if line]
