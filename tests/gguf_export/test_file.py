"""gguf_export/tensors.py: the file, against gguf-py's own reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter, quants

from mis_mlx.gguf_export import tensors
from mis_mlx.gguf_export.tensors import Part
from mis_mlx.storage.files import DISK

VALUES = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
PARTS = [
    Part("a.weight", "", (5, 64), "Q8_0"),
    Part("b.weight", "", (5, 64), "F16"),
    Part("c.weight", "", (3,), "F32"),
]


def test_the_reader_finds_what_was_written(tmp_path: Path) -> None:
    """Facts, shapes, types and bytes, every tensor where a multiple of 32 bytes begins; the size as
    foretold.
    """
    writer = GGUFWriter(None, "llama")
    writer.add_context_length(77)
    arrays = {
        "a.weight": quants.quantize(VALUES, quants.GGMLQuantizationType.Q8_0),
        "b.weight": VALUES.astype(np.float16).view(np.uint8),
        "c.weight": VALUES[0, :3].copy().view(np.uint8),
    }
    slabs = [iter([arrays["a.weight"][i : i + 2] for i in (0, 2, 4)])]  # of 2, 2 and 1 rows
    slabs += [iter([arrays[name]]) for name in ("b.weight", "c.weight")]
    path = tmp_path / "x.gguf"
    tensors.write(path, tensors.head(writer, PARTS), parts=PARTS, rows=slabs, files=DISK)
    reader = GGUFReader(path)
    assert reader.fields["llama.context_length"].contents() == 77
    assert [
        Part(t.name, "", tuple(reversed(t.shape.tolist())), t.tensor_type.name)
        for t in reader.tensors
    ] == PARTS
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
        assert tensor.data.tobytes() == arrays[tensor.name].tobytes()
    assert path.stat().st_size == reader.data_offset + tensors.padded_bytes(PARTS)
