"""What a rounding has done so far, in a folder: one that was killed does not do it again.

The formats that sensitivity chose, and the matrices of every block that is rounded. A block goes on
from the outputs of those before it, and these follow from their rounded weights.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mis_mlx.maths import rounding
from mis_mlx.models.passing import stream
from mis_mlx.quantization.packed_format import PARTS, Format, Formats, RoundedBlock
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, as_mis_error
from mis_mlx.types import MisError

LAYOUT = "layout.json"  # the format of every matrix, and what led to it
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

    def layout(self) -> tuple[Formats, dict[str, Any]] | None:
        """What `keep_layout` got; None where there is nothing, or a damaged file."""
        try:
            stored = run_folder.stored_settings(self._folder, LAYOUT)
        except MisError:
            return None
        formats = {path: Format(*values) for path, values in stored["formats"].items()}
        return formats, stored["report"]

    def keep_layout(self, formats: Formats, report: Mapping[str, Any]) -> None:
        """Keep the chosen formats, and the costs behind the choice."""
        with as_mis_error(self._folder.parent, "what is rounded so far"):
            DISK.make_folder(self._folder)
        text = json.dumps({"formats": formats, "report": report})
        DISK.replace_text(self._folder / LAYOUT, text)

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
