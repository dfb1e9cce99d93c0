"""Which files of an export and of the packed model go to a hub repository, and where in it."""

from pathlib import Path

from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import tokenizer_check
from mis_mlx.types import Checkpoint

SUBFOLDER = "mlx"  # of the packed model, beside a folder for transformers


def packed_files(checkpoint: Checkpoint) -> list[Path]:
    """What mlx_lm reads of a model folder that MLX has packed; [] of another folder."""
    if not arch.is_quantized(checkpoint.tensors):
        return []
    folder = checkpoint.path
    weights = folder.glob("model*.safetensors*")  # an index ends in .json
    others = tokenizer_check.present(folder)
    return [folder / "config.json", *sorted(weights), *sorted(others)]


def parts(out: Path, checkpoint: Checkpoint, form: str) -> dict[str, Path]:
    """{path in the repository: file}: the exported folder and the packed model.

    form: of the export. A GGUF lies beside the packed model, which mlx_lm then opens by the
    repository's name. A folder for transformers has a config.json of its own, so that the packed
    model goes into a subfolder.
    """
    result = {}
    inside = Path(SUBFOLDER if form == "hf" else "")
    for path in packed_files(checkpoint):
        result[str(inside / path.relative_to(checkpoint.path))] = path
    for path in sorted(out.iterdir()):
        if path.is_file():
            result[path.name] = path
    return result
