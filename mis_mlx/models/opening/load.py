"""Open a model folder and fill mlx-lm's modules from it."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.compute import precision
from mis_mlx.hardware import memory
from mis_mlx.maths import losses, rounding
from mis_mlx.models.architectures import arch, lookup, modules
from mis_mlx.models.architectures.arch import PER_LAYER
from mis_mlx.models.architectures.experts import Expert, ReadExperts
from mis_mlx.models.architectures.families import family, mixture, shape_of
from mis_mlx.models.architectures.stock import mask as mask
from mis_mlx.models.architectures.stock import mlx_lm as mlx_lm
from mis_mlx.models.architectures.stock import window as window
from mis_mlx.models.opening import tokenizer_check
from mis_mlx.models.opening.config import read_config, say_once
from mis_mlx.storage import safetensors
from mis_mlx.storage.block_reader import Reader
from mis_mlx.storage.safetensors import InParts
from mis_mlx.types import UNDECIDED, Checkpoint, MisError, Precision

Raw = Mapping[str, mx.array]  # tensors as stored on disk, by full name
EMBEDDING = "model.embed_tokens."
NORM = "model.norm."
# What has a row for each token: too large to be in memory whole while a model is written.
TABLES = (f"{EMBEDDING}weight", "lm_head.weight", f"{PER_LAYER}weight")
SETTINGS = ("group_size", "bits", "mode")
TABLE_PART = 2**23  # numbers of a table that are read and written at a time
VISION = re.compile(  # tensors of parts that see or hear
    r"(model\.)?(vision_tower|multi_modal_projector|audio_tower|embed_audio|embed_vision"
    r"|vision_embedder)\."
)


def open_checkpoint(
    path: str | Path,
    precision: Precision = UNDECIDED,
) -> Checkpoint:
    """A model folder whose headers and config are checked, and fit each other. Reads no weights.

    precision: what it computes in; nothing is decided here (models/opening/compute_type does).
    """
    folder = Path(path)
    config = read_config(folder)
    tensors = safetensors.index(folder)
    seeing = set(filter(VISION.match, tensors))
    if seeing:
        what = "see or hear" if family(config).side_width else "see"
        say_once(
            f"{folder}: only the text part is opened, a {family(config).name}, without "
            f"{len(seeing)} tensors that {what}"
        )
        tensors = {name: tensor for name, tensor in tensors.items() if name not in seeing}
    inside = arch.inside(tensors, config)
    checkpoint = Checkpoint(folder, config, inside, precision)
    arch.check_tensors(checkpoint)
    return checkpoint


def _quantize(
    module: nn.Module, prefix: str, checkpoint: Checkpoint, without: Collection[str] = ()
) -> None:
    """Replace the layers under `prefix` whose weights are packed on disk by quantized ones.

    A CPU reads packed weights slowly: there the layers stay, and `weights` de-quantizes. without:
    as of `block`.
    """
    if not arch.is_quantized(checkpoint.tensors) or not precision.keeps_packed():
        return

    def settings(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(layer, "to_quantized") or prefix + path in without:
            return False
        return packing(checkpoint, prefix + path)

    nn.quantize(module, class_predicate=settings)


def packing(checkpoint: Checkpoint, path: str) -> dict[str, Any]:
    """How a matrix is packed, in mlx-lm's words: group_size, bits, mode; empty where it is not.

    path: of the matrix or of its module. MisError where the weights are not in MLX's format.
    """
    path = path.removesuffix(".weight")
    if f"{path}.scales" not in checkpoint.tensors:
        return {}
    common = checkpoint.config.get("quantization") or {}
    if "bits" not in common:
        why = "the weights are quantized in a format other than MLX's"
        raise MisError(
            f"{checkpoint.path}: {why}: use the unquantized model, or convert it with "
            f"mlx_lm.convert"
        )
    stacked = family(checkpoint.config).joined(path)
    own = common.get(path) or common.get(stacked)
    stated = own if isinstance(own, dict) else common
    settings = {key: value for key, value in stated.items() if key in SETTINGS}
    return {"mode": "affine"} | settings


def weights(
    checkpoint: Checkpoint,
    prefix: str,
    dtype: mx.Dtype,
    raw: Raw | None = None,
    *,
    cut: str | None = None,
    without: Collection[str] = (),
) -> list[tuple[str, mx.array]]:
    """(name without prefix, lazy array) of every tensor whose name begins with `prefix`.

    Floats are cast as `arch.type_of` says. raw: the tensors as stored, by full name, where they are
    in memory already. cut: another prefix to cut off. without: as of `block`.
    """
    if cut is None:
        cut = prefix
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    names = [name for name in names if "rotary_emb" not in name]  # a computed table
    if shape_of(checkpoint.config).tied:
        names = [name for name in names if not name.startswith("lm_head.")]
    if raw is None:
        raw = safetensors.lazy(checkpoint.tensors, names)
    elif mixture(checkpoint.config):  # a block and its experts are read apart
        names = [name for name in names if name in raw]
    # A layer's own bias is no part of a packed matrix.
    others = [name for name in names if name.rpartition(".")[0] not in without]
    names = [name for name in names if name in others or name.endswith(".bias")]
    unpacks = not precision.keeps_packed() and arch.is_quantized(checkpoint.tensors)
    named = []
    for name in names:
        own_dtype = arch.type_of(checkpoint.config, name, dtype)
        if unpacks:
            if name.endswith((".scales", ".biases")):
                continue
            array = dense(checkpoint, name, raw).astype(own_dtype)
        else:
            array = raw[name]
            # Integers stay what they are: packed weights, or the 8-bit scales of mxfp4 and nvfp4.
            if mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(own_dtype)
        named.append((name.removeprefix(cut), array))
    return named


def dense(checkpoint: Checkpoint, name: str, raw: Raw | None = None) -> mx.array:
    """One weight as stored, or de-quantized to float32 when it is packed. Lazy, if small.

    raw: as in `weights`.
    """
    stem = name.removesuffix(".weight")
    names = _packed_names(checkpoint, name)
    arrays = safetensors.lazy(checkpoint.tensors, names) if raw is None else raw
    settings = packing(checkpoint, stem)
    if not settings:
        return arrays[name]
    packed = tuple(arrays[part] for part in names)
    group, bits, mode = [settings[key] for key in SETTINGS]
    return modules.dequantized(packed, group, bits, mode)


def _packed_names(checkpoint: Checkpoint, name: str) -> list[str]:
    """The names of a weight and of its scales and biases, those that are stored."""
    stem = name.removesuffix(".weight")
    parts = (name, f"{stem}.scales", f"{stem}.biases")
    return [part for part in parts if part in checkpoint.tensors]


def stored_parts(checkpoint: Checkpoint, name: str, rows: np.ndarray | None = None) -> InParts:
    """A tensor as stored, read as many rows at a time as `TABLE_PART` numbers.

    rows: their numbers, rising; default: all.
    """
    tensor = checkpoint.tensors[name]
    reader = Reader({name: tensor})
    ids = np.arange(tensor.shape[0]) if rows is None else rows
    step = _table_rows(tensor.shape)
    starts = range(0, len(ids), step)
    parts = (reader.rows(tensor, ids[start : start + step]) for start in starts)
    spec = (tensor.dtype, (len(ids), *tensor.shape[1:]))
    return InParts(spec, parts)


def dense_parts(checkpoint: Checkpoint, name: str) -> Iterator[mx.array]:
    """The rows of `dense`, as many at a time as `TABLE_PART` numbers, in float32."""
    rows_of = _dense_rows(checkpoint, name)
    count = checkpoint.tensors[name].shape[0]
    step = _table_rows(arch.tensors_of(checkpoint.config)[name])
    for start in range(0, count, step):
        yield rows_of(np.arange(start, min(start + step, count)))


def dense_sample(checkpoint: Checkpoint, name: str) -> mx.array:
    """Evenly spread rows of the first part of `dense_parts`, with about `rounding.SAMPLED` numbers.

    Nothing else of the matrix is read.
    """
    shape = arch.tensors_of(checkpoint.config)[name]
    count = min(shape[0], _table_rows(shape))
    step = max(1, count * math.prod(shape[1:]) // rounding.SAMPLED)
    return _dense_rows(checkpoint, name)(np.arange(0, count, step))


def _dense_rows(checkpoint: Checkpoint, name: str) -> Callable[[np.ndarray], mx.array]:
    """What reads rows of `dense`, by their numbers (n,), in float32."""
    tensors = {part: checkpoint.tensors[part] for part in _packed_names(checkpoint, name)}
    reader = Reader(tensors)

    def rows_of(ids: np.ndarray) -> mx.array:
        raw = {part: reader.rows(tensor, ids) for part, tensor in tensors.items()}
        return dense(checkpoint, name, raw).astype(mx.float32)

    return rows_of


def _table_rows(shape: Sequence[int]) -> int:
    """The number of rows of a table that have `TABLE_PART` numbers."""
    return max(1, TABLE_PART // math.prod(shape[1:]))


def block(
    checkpoint: Checkpoint,
    i: int,
    args: Any,
    dtype: mx.Dtype,
    raw: Raw | None = None,
    read_experts: ReadExperts | None = None,
    without: Collection[str] = (),
) -> nn.Module:
    """mlx-lm's transformer block `i` with its weights, lazy.

    raw: as in `weights`. read_experts: where its experts come from, if they are not parts of it.
    without: paths of packed matrices that the caller brings; their layers have no weights yet.
    """
    prefix = f"model.layers.{i}."
    new = family(checkpoint.config).new_block(args, i)
    experts = mixture(checkpoint.config)
    if experts:  # first, for their matrices are quantized and loaded by their own names
        experts.separate_experts(new, read_experts)
    # Then the layers that are packed on disk, so that the weights find a layer of their kind.
    _quantize(new, prefix, checkpoint, without)
    new.load_weights(weights(checkpoint, prefix, dtype, raw, without=without), strict=not without)
    new.eval()
    return new


def expert(checkpoint: Checkpoint, i: int, e: int, dtype: mx.Dtype, *, raw: Raw) -> Expert:
    """Expert `e` of block `i` with its weights, lazy. raw: as in `weights`."""
    of_experts = mixture(checkpoint.config)
    assert of_experts
    new = of_experts.new_expert()
    prefix = f"model.layers.{i}.{of_experts.mlp}.experts.{e}."
    _quantize(new, prefix, checkpoint)
    new.load_weights(weights(checkpoint, prefix, dtype, raw))
    return new


def _filled(
    layer: nn.Module, prefix: str, checkpoint: Checkpoint, dtype: mx.Dtype, *, raw: Raw | None
) -> nn.Module:
    """A layer that stands alone, packed if its weights under `prefix` ("lm_head.") are; lazy."""
    stem, dot, name = prefix[:-1].rpartition(".")
    owner = nn.Module()  # `_quantize` replaces the layers of a module
    owner[name] = layer
    _quantize(owner, stem + dot, checkpoint)
    owner[name].load_weights(weights(checkpoint, prefix, dtype, raw))
    return owner[name]


def embedding(checkpoint: Checkpoint, dtype: mx.Dtype, raw: Raw | None = None) -> nn.Module:
    """The embedding table (V, D), lazy. `.as_linear` makes it the head of a tied model.

    raw: as in `weights`, or only some rows (n, D) of each of its tensors: then a table of those.
    """
    shape = shape_of(checkpoint.config)
    rows = len(raw[EMBEDDING + "weight"]) if raw else shape.vocab
    return _filled(nn.Embedding(rows, shape.hidden), EMBEDDING, checkpoint, dtype, raw=raw)


def side_model(checkpoint: Checkpoint, dtype: mx.Dtype) -> nn.Module:
    """What makes per-layer inputs of mlx-lm's whole model, lazy; the table's rows are missing."""
    model = family(checkpoint.config).new_model()
    for name in ("embed_tokens", "embed_tokens_per_layer", "layers", "norm"):
        model.model.pop(name)
    _quantize(model.model, "model.", checkpoint)
    model.model.load_weights(weights(checkpoint, "model.per_layer_", dtype, cut="model."))
    return model


def side_rows(checkpoint: Checkpoint, dtype: mx.Dtype, raw: Raw) -> nn.Module:
    """Some rows of the table of per-layer inputs: ids (...) -> (..., L P). Lazy.

    raw: those rows of each of its tensors, as stored.
    """
    config = checkpoint.config
    rows = len(raw[PER_LAYER + "weight"])
    width = shape_of(config).layers * family(config).side_width
    return _filled(nn.Embedding(rows, width), PER_LAYER, checkpoint, dtype, raw=raw)


def final_norm(checkpoint: Checkpoint, dtype: mx.Dtype, raw: Raw | None = None) -> nn.Module:
    """The last RMSNorm, lazy. raw: as in `weights`."""
    norm = family(checkpoint.config).new_norm()
    norm.load_weights(weights(checkpoint, NORM, dtype, raw))
    return norm


def head(checkpoint: Checkpoint, dtype: mx.Dtype, raw: Raw | None = None) -> nn.Module:
    """The vocabulary head as a module hidden (..., D) -> logits (..., V), lazy.

    raw: as in `embedding`.
    """
    shape = shape_of(checkpoint.config)
    if shape.tied:
        table = embedding(checkpoint, dtype, raw)
        table._softcap = family(checkpoint.config).softcap  # for `logits`
        return table
    rows = len(raw["lm_head.weight"]) if raw else shape.vocab
    linear = nn.Linear(shape.hidden, rows, bias=False)
    return _filled(linear, "lm_head.", checkpoint, dtype, raw=raw)


def head_prefix(checkpoint: Checkpoint) -> str:
    """The prefix of the names of the head's tensors."""
    return EMBEDDING if shape_of(checkpoint.config).tied else "lm_head."


def logits(head_module: nn.Module, hidden: mx.array) -> mx.array:
    """hidden (..., D) -> logits (..., V) through a tied embedding or an untied head."""
    if not hasattr(head_module, "as_linear"):
        return head_module(hidden)
    return _capped(head_module.as_linear(hidden), head_module)


def wide_logits(head_module: nn.Module, hidden: mx.array) -> mx.array:
    """`logits` in float32, not rounded before a loss is taken of them; a packed head stays so."""
    if "scales" in head_module:
        z = logits(head_module, hidden.astype(mx.float32))
        return z.astype(mx.float32)
    z = losses.wide_product(hidden, head_module.weight)
    return _capped(z, head_module)


def _capped(z: mx.array, head_module: nn.Module) -> mx.array:
    """Logits z through the softcap of the model that the head belongs to."""
    return losses.apply_softcap(z, getattr(head_module, "_softcap", 0.0))


def resident_model(checkpoint: Checkpoint, dtype: mx.Dtype) -> nn.Module:
    """The whole model as mlx-lm's Model, lazy; the caller evaluates and counts it.

    `model.model` gives the head's input, as everywhere here.
    """
    architecture = family(checkpoint.config)
    model = architecture.new_model()
    table = model.model.embed_tokens
    model.model.embed_tokens = lookup.Embedding(*table.weight.shape)
    architecture.prepare(model)
    named = weights(checkpoint, "", dtype)
    _quantize(model, "", checkpoint)
    model.load_weights(named)
    model.eval()
    architecture.finish(model)
    model._embedding_scale = architecture.embedding_scale(dtype)  # for `embedded`
    model.model.embed_tokens._softcap = family(checkpoint.config).softcap  # for `logits`
    model._config = checkpoint.config
    return model


def embedded(model: nn.Module, tokens: mx.array) -> mx.array:
    """The scaled embedding (B, T, D), of a model that `resident_model` has made."""
    rows = model.model.embed_tokens(tokens)
    scale = model._embedding_scale
    return rows if scale is None else rows * scale  # type: ignore[no-any-return]


def activation_dtype(model: nn.Module) -> mx.Dtype:
    """The type that a resident model computes in."""
    return model.model.norm.weight.dtype  # type: ignore[no-any-return]


def head_weight(model: nn.Module) -> mx.array:
    """The (V, D) matrix that makes logits in a resident model; float32 where it is packed."""
    layer = model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens
    if "scales" in layer:
        return modules.dense_weight(layer)
    return layer.weight  # type: ignore[no-any-return]


def logit_softcap(model: nn.Module) -> float:
    """`config.softcap` of a resident model."""
    return family(model._config).softcap


def tokenizer(path: Path) -> Any:
    """mlx-lm's tokenizer wrapper of a model folder. Foreign code is refused, not asked about."""
    return opened_tokenizer(tokenizer_check.check_tokenizer(path))


# a run's teacher and student
@lru_cache(maxsize=2)
def opened_tokenizer(checked: tokenizer_check.Tokenizer) -> Any:
    """`tokenizer` of files that were checked."""
    memory.give_back(cache=False)  # what else was read must not lie beside it
    try:
        return mlx_lm("utils").load_tokenizer(
            checked.folder,
            {"trust_remote_code": False},
            eos_token_ids=list(checked.ends) or None,
        )
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        why = f"{checked.folder}: the tokenizer does not open ({text})"
        raise MisError(f"{why}: copy the tokenizer files again") from None
    finally:
        memory.give_back(cache=False)  # of 262 thousand tokens 120 MiB stay of 720
