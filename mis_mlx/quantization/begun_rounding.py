"""What a rounding has done so far, in a folder: one that was killed does not do it again.

What sensitivity found, and the matrices of every block that is rounded. A block goes on
from the outputs of those before it, and these follow from their rounded weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mis_mlx.maths import rounding
from mis_mlx.models.passing import stream
from mis_mlx.quantization.bit_allocation import TokenWeights
from mis_mlx.quantization.packed_format import PARTS, Format, Formats, RoundedBlock
from mis_mlx.storage import checkpoint as protocol

LAYOUT = "layout"  # one step: the format of every matrix, what led to it, and tokens' weights
BLOCKS = "blocks"  # a step of the commit protocol for each block, named by its number
ALL = 10**8  # steps that are kept: a number above any model's blocks


class BegunRounding:
    """What is in `folder`. Hold the lock of the run that it belongs to.

    Whoever opens it again has the same model, windows and settings.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._blocks: dict[int, protocol.Saved] = {}
        for saved in protocol.whole_steps(folder / BLOCKS):
            self._blocks[saved.number] = saved

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return len(self._blocks)

    def layout(self) -> tuple[Formats, dict[str, Any], TokenWeights] | None:
        """What `keep_layout` got; None where there is nothing, or a damaged file."""
        for saved in protocol.whole_steps(self._folder / LAYOUT):
            arrays = protocol.load_arrays(saved, "weights")
            stream.evaluate_now(arrays)
            formats = {path: Format(*values) for path, values in saved.state["formats"].items()}
            weights: TokenWeights = {
                int(block): [arrays[f"{block}.{b}"] for b in range(count)]
                for block, count in saved.state["weights"].items()
            }
            return formats, saved.state["report"], weights
        return None

    def keep_layout(
        self, formats: Formats, report: Mapping[str, Any], weights: TokenWeights
    ) -> None:
        """Keep the chosen formats, the costs behind the choice, and by what tokens count."""
        arrays = {
            f"{block}.{b}": array
            for block, of_it in weights.items()
            for b, array in enumerate(of_it)
        }
        protocol.save_step(
            self._folder / LAYOUT,
            0,
            arrays={"weights": arrays},
            state={
                "formats": formats,
                "report": report,
                "weights": {block: len(of_it) for block, of_it in weights.items()},
            },
            keep=ALL,
        )

    def block(self, number: int) -> RoundedBlock | None:
        """The rounded matrices of a block, evaluated; None where they are still to be made."""
        saved = self._blocks.get(number)
        if saved is None:
            return None
        arrays = protocol.load_arrays(saved, "matrices")
        stream.evaluate_now(arrays)
        matrices: dict[str, rounding.Packed] = {}
        for path in saved.state["paths"]:
            matrices[path] = tuple(arrays[f"{path}.{part}"] for part in PARTS)
        return matrices

    def expert_tokens(self, number: int) -> list[int]:
        """What `keep_block` got with this block."""
        tokens: list[int] = self._blocks[number].state.get("expert_tokens", [])
        return tokens

    def keep_block(
        self, number: int, rounded: RoundedBlock, expert_tokens: Sequence[int] = ()
    ) -> None:
        """Keep the rounded matrices of a block, all of them affine.

        expert_tokens: how many tokens each expert was rounded by.
        """
        arrays = {}
        for path, packed in rounded.items():
            for part, array in zip(PARTS, packed, strict=True):
                arrays[f"{path}.{part}"] = array
        protocol.save_step(
            self._folder / BLOCKS,
            number,
            arrays={"matrices": arrays},
            state={"paths": list(rounded), "expert_tokens": list(expert_tokens)},
            keep=ALL,
        )
