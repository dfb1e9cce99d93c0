"""Open a model folder and build mlx-lm's modules from it. The only door to mlx_lm, which takes
seconds to import.
"""

import importlib
import inspect
import math
import re
import resource
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths import losses, rounding
from mis_mlx.models import arch, experts, lookup, policy, tokenizer_check
from mis_mlx.models.arch import PER_LAYER
from mis_mlx.models.config import normalised, read_config, say_once, shape_of, softcap
from mis_mlx.models.experts import Each, Expert, Experts
from mis_mlx.models.families import Family, family
from mis_mlx.storage import safetensors
from mis_mlx.storage.block_reader import Reader
from mis_mlx.storage.safetensors import InParts
from mis_mlx.types import Checkpoint, MisError

Raw = Mapping[str, mx.array]  # tensors as stored on disk, by full name
EMBEDDING = "model.embed_tokens."
NORM = "model.norm."
SETTINGS = ("group_size", "bits", "mode")
TABLE_PART = 2**23  # numbers of a table that are read and written at a time
VISION = re.compile(  # what sees or hears
    r"(model\.)?(vision_tower|multi_modal_projector|audio_tower|embed_audio|embed_vision|vision_embedder)\."
)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A folder that passed the gate: headers, config, and that they fit each other. Reads no
    weights.
    """
    folder = Path(path)
    config = read_config(folder)
    tensors = safetensors.index(folder)
    if seeing := set(filter(VISION.match, tensors)):
        what = "see or hear" if family(config).per_layer else "see"
        say_once(
            f"{folder}: the text part is opened, a {family(config).name}, without {len(seeing)} "
            f"tensors that {what}"
        )
        tensors = {name: at for name, at in tensors.items() if name not in seeing}
    checkpoint = Checkpoint(folder, config, arch.inside(tensors, config))
    arch.check_tensors(checkpoint)
    return checkpoint


def mlx_lm(module: str) -> ModuleType:
    """`mlx_lm.<module>`, imported now. It would lower the hard limit on open files, which cannot be
    raised again.
    """
    setrlimit = resource.setrlimit
    resource.setrlimit = lambda *_: None  # type: ignore[assignment]
    try:
        return importlib.import_module(f"mlx_lm.{module}")
    finally:
        resource.setrlimit = setrlimit


def _quantize(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    """Swap the linears and embeddings under `prefix` whose weights are packed on disk for quantized
    ones.
    """
    if arch.is_quantized(checkpoint.tensors) and policy.keeps_packed():
        nn.quantize(
            module,
            class_predicate=lambda p, m: (
                hasattr(m, "to_quantized") and packing(checkpoint, prefix + p)
            ),
        )


def packing(checkpoint: Checkpoint, path: str) -> dict[str, Any]:
    """How the matrix of a module, or of this name, is packed, in mlx-lm's words: group_size, bits,
    mode; empty where it is not. MisError when it is not in MLX's format.
    """
    if f"{(path := path.removesuffix('.weight'))}.scales" not in checkpoint.tensors:
        return {}
    common = checkpoint.config.get("quantization") or {}
    if "bits" not in common:
        why = "the weights are quantized in a format other than MLX's"
        raise MisError(
            f"{checkpoint.path}: {why}: use the unquantized model, or convert it with "
            f"mlx_lm.convert"
        )
    own = common.get(path) or common.get(experts.stacked(path, checkpoint.config))
    return {"mode": "affine"} | {
        k: v for k, v in (own if isinstance(own, dict) else common).items() if k in SETTINGS
    }


def weights(
    checkpoint: Checkpoint,
    prefix: str,
    dtype: mx.Dtype,
    raw: Raw | None = None,
    *,
    cut: str | None = None,
) -> list[tuple[str, mx.array]]:
    """Lazy arrays of every tensor whose name begins with `prefix`, the prefix cut off, floats cast
    to `dtype`.

    raw: the tensors as stored, by full name, where they are in memory already. cut: another prefix,
    to be cut off.
    """
    cut = prefix if cut is None else cut
    names = [n for n in checkpoint.tensors if n.startswith(prefix) and "rotary_emb" not in n]
    if shape_of(checkpoint.config).tied:
        names = [n for n in names if not n.startswith("lm_head.")]
    if raw is not None and family(checkpoint.config).experts:  # of a block: they come on their own
        names = [n for n in names if n in raw]
    raw = safetensors.lazy(checkpoint.tensors, names) if raw is None else raw
    if not policy.keeps_packed() and arch.is_quantized(checkpoint.tensors):
        names = [n for n in names if not n.endswith((".scales", ".biases"))]
        return [(n.removeprefix(cut), dense(checkpoint, n, raw).astype(dtype)) for n in names]
    # Integers are packed weights, or the 8-bit scales of mxfp4 and nvfp4: these stay what they are.
    floats = {n for n in names if mx.issubdtype(raw[n].dtype, mx.floating)}
    return [(n.removeprefix(cut), raw[n].astype(dtype) if n in floats else raw[n]) for n in names]


def dense(checkpoint: Checkpoint, name: str, raw: Raw | None = None) -> mx.array:
    """One weight as stored, or de-quantized to float32 when it is packed. Lazy, if small. `raw` as
    in `weights`.
    """
    stem = name.removesuffix(".weight")
    packed = [n for n in (name, f"{stem}.scales", f"{stem}.biases") if n in checkpoint.tensors]
    arrays = safetensors.lazy(checkpoint.tensors, packed) if raw is None else raw
    if not (settings := packing(checkpoint, stem)):
        return arrays[name]
    large = (
        not policy.keeps_packed() and arrays[name].nbytes * 8 > rounding.OPENED * settings["bits"]
    )
    make = rounding.opened if large else rounding.values
    return make(tuple(arrays[n] for n in packed), *(settings[key] for key in SETTINGS))


def stored_parts(checkpoint: Checkpoint, name: str, rows: np.ndarray | None = None) -> InParts:
    """A tensor as stored, or some of its rows (rising), as many at a time as `TABLE_PART`
    numbers.
    """
    at = checkpoint.tensors[name]
    reader = Reader({name: at})
    rows = np.arange(at.shape[0]) if rows is None else rows
    step = _table_rows(at.shape)
    parts = (reader.rows(at, rows[start : start + step]) for start in range(0, len(rows), step))
    return InParts((at.dtype, (len(rows), *at.shape[1:])), parts)


def dense_parts(checkpoint: Checkpoint, name: str, dtype: str) -> Iterator[mx.array]:
    """The rows of `dense`, as many at a time as `TABLE_PART` numbers, in this type."""
    stem = name.removesuffix(".weight")
    tensors = {
        n: checkpoint.tensors[n]
        for n in (name, f"{stem}.scales", f"{stem}.biases")
        if n in checkpoint.tensors
    }
    reader = Reader(tensors)
    count = checkpoint.tensors[name].shape[0]
    step = _table_rows(arch.tensors_of(checkpoint.config)[name])
    for start in range(0, count, step):
        ids = np.arange(start, min(start + step, count))
        raw = {n: reader.rows(at, ids) for n, at in tensors.items()}
        yield dense(checkpoint, name, raw).astype(policy.DTYPES[dtype])


def _table_rows(shape: Sequence[int]) -> int:
    return max(1, TABLE_PART // math.prod(shape[1:]))


def model_args(config: Mapping[str, Any]) -> Any:
    """mlx-lm's ModelArgs of a config."""
    return mlx_lm(f"models.{family(config).mlx}").ModelArgs.from_dict(normalised(config))


def block(
    checkpoint: Checkpoint,
    i: int,
    args: Any,
    dtype: mx.Dtype,
    raw: Raw | None = None,
    each: Each | None = None,
) -> nn.Module:
    """mlx-lm's transformer block `i` with its weights, lazy. `raw` as in `weights`. each: where its
    experts come from, if they are not to be parts of it (`Experts`).
    """
    of = family(checkpoint.config)
    prefix = f"model.layers.{i}."
    new = _new_block(of, args, i)
    if of.experts:
        _apart(new, checkpoint.config, each)
    _quantize(new, prefix, checkpoint)
    new.load_weights(weights(checkpoint, prefix, dtype, raw))
    new.eval()
    return new


def expert(checkpoint: Checkpoint, i: int, e: int, dtype: mx.Dtype, raw: Raw) -> Expert:
    """Expert `e` of block `i` with its weights, lazy. `raw` as in `weights`."""
    s = shape_of(checkpoint.config)
    of = family(checkpoint.config)
    oai = mlx_lm("models.activations").SwigluOAI if of.expert_bias else None
    new = Expert(of, s.hidden, s.ffn, oai() if oai else mlx_lm("models.switch_layers").SwiGLU())
    _quantize(new, prefix := f"model.layers.{i}.{of.mlp}.experts.{e}.", checkpoint)
    new.load_weights(weights(checkpoint, prefix, dtype, raw))
    return new


def _apart(block: nn.Module, config: Mapping[str, Any], each: Each | None = None) -> None:
    """Experts one by one where mlx-lm has them stacked; `each` as of `Experts`, default: modules of
    this block.
    """
    s = shape_of(config)
    of = family(config)
    part = block[of.mlp]
    activation = part.pop(of.switch).activation
    part.experts = Experts(
        (Expert(of, s.hidden, s.ffn, activation) for _ in range(0 if each else s.experts)), each
    )
    if of.switch != "experts":  # an attribute beside the module's tree, in which they are once
        object.__setattr__(part, of.switch, part.experts)


def _new_block(of: Family, args: Any, i: int) -> nn.Module:
    """Block `i` as mlx-lm makes it, of random weights; called with (x, mask, cache)."""
    module = mlx_lm(f"models.{of.block or of.mlx}")
    kind = next(
        kind
        for name, kind in vars(module).items()
        if name.endswith(("TransformerBlock", "DecoderLayer"))
    )
    if "layer_idx" in inspect.signature(kind).parameters:
        new: nn.Module = kind(args, layer_idx=i)
        return new
    types = getattr(args, "layer_types", None)
    slides = {"use_sliding": types[i] == "sliding_attention"} if types else {}
    new = kind(args, **({} if of.sinks else slides))
    if of.sinks:
        new.use_sliding = slides["use_sliding"]
    if of.kinds and not getattr(args, of.kinds)[i]:
        new.self_attn.rope = mlx_lm(f"models.{of.mlx}").NoPE()
    return _uniform(new) if of.scaled_queries else new


def window(args: Any, block: nn.Module) -> int | None:
    """How many tokens back this block sees; None: all."""
    slides = getattr(block, "use_sliding", False) or getattr(block.self_attn, "is_sliding", False)
    return args.sliding_window if slides else None


def mask(args: Any, block: nn.Module, hidden: mx.array) -> Any:
    """The attention mask mlx-lm itself would give this block for `hidden` (B, T, D)."""
    return mlx_lm("models.base").create_attention_mask(
        hidden, None, window_size=window(args, block)
    )


def embedding_scale(config: Mapping[str, Any], dtype: mx.Dtype) -> mx.array | None:
    """What the embedding is multiplied by on its way into the first block, as mlx-lm does it; None:
    nothing.
    """
    key = family(config).embedding_scale
    if key == "exact sqrt":
        return mx.array(config["hidden_size"] ** 0.5, dtype)
    if key == "sqrt":
        return mx.array(config["hidden_size"] ** 0.5, mx.bfloat16).astype(dtype)
    return mx.array(float(config[key]), dtype) if key and config.get(key) else None


def _uniform(block: nn.Module) -> nn.Module:
    """A block that may be called like every other one: without what its queries grow by, which it
    works out itself.
    """

    class Block(type(block)):  # type: ignore[misc]
        def __call__(self, x: mx.array, *given: Any, cache: Any = None) -> mx.array:
            return super().__call__(x, *(given if len(given) > 1 else (None, *given)), cache=cache)

    block.__class__ = Block
    return block


def _divided(norm: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """The last norm, with its output divided by what the config has logits divided by, so that no
    head has to.
    """
    divisor = float(config.get(family(config).logit_divisor) or 1.0)
    if divisor == 1.0:
        return norm

    class Norm(type(norm)):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(x) / divisor

    norm.__class__ = Norm
    return norm


def embedding(checkpoint: Checkpoint, dtype: mx.Dtype, raw: Raw | None = None) -> nn.Module:
    """The embedding table (V, D), lazy. `.as_linear` makes it the head of a tied model. `raw` as in
    `weights`, or only some rows (n, D) of each of its tensors: then a table of those.
    """
    s = shape_of(checkpoint.config)
    owner = nn.Module()
    owner.embed_tokens = nn.Embedding(len(raw[EMBEDDING + "weight"]) if raw else s.vocab, s.hidden)
    _quantize(owner, "model.", checkpoint)
    owner.embed_tokens.load_weights(weights(checkpoint, EMBEDDING, dtype, raw))
    return owner.embed_tokens


class SideProjection(nn.Module):
    """What makes the channels that every block gets for each token: half of the table's, half
    projected from the embedding, as mlx-lm computes them.
    """

    def __init__(self, hidden: int, layers: int, width: int, eps: float):
        super().__init__()
        self.per_layer_model_projection = nn.Linear(hidden, layers * width, bias=False)
        self.per_layer_projection_norm = nn.RMSNorm(width, eps=eps)
        self._hidden = hidden
        self._width = width

    def __call__(self, rows: mx.array, embedded: mx.array) -> mx.array:
        """rows (n, L P) of the table, embedded (n, D) as the first block gets it -> (n, L, P)."""
        projected = self.per_layer_model_projection(embedded) * self._hidden**-0.5
        projected = self.per_layer_projection_norm(mx.unflatten(projected, -1, (-1, self._width)))
        rows = mx.unflatten(rows * self._width**0.5, -1, (-1, self._width))
        return (projected + rows) * 2.0**-0.5


def side_projection(checkpoint: Checkpoint, dtype: mx.Dtype) -> SideProjection:
    """With its weights, lazy."""
    config = checkpoint.config
    s = shape_of(config)
    width = config[family(config).per_layer]
    made = SideProjection(s.hidden, s.layers, width, config["rms_norm_eps"])
    _quantize(made, "model.", checkpoint)
    made.load_weights(weights(checkpoint, "model.per_layer_", dtype, cut="model."))
    return made


def side_rows(checkpoint: Checkpoint, dtype: mx.Dtype, raw: Raw) -> nn.Module:
    """A table of those rows of the per-layer inputs that are in `raw`, as stored: ids (...) ->
    (..., L P). Lazy.
    """
    width = (
        shape_of(checkpoint.config).layers * checkpoint.config[family(checkpoint.config).per_layer]
    )
    owner = nn.Module()
    owner.embed_tokens_per_layer = nn.Embedding(len(raw[PER_LAYER + "weight"]), width)
    _quantize(owner, "model.", checkpoint)
    owner.embed_tokens_per_layer.load_weights(weights(checkpoint, PER_LAYER, dtype, raw))
    return owner.embed_tokens_per_layer


def final_norm(checkpoint: Checkpoint, dtype: mx.Dtype, raw: Raw | None = None) -> nn.Module:
    """The last RMSNorm, lazy. `raw` as in `weights`."""
    config, of = checkpoint.config, family(checkpoint.config)
    kind = mlx_lm(f"models.{of.mlx}").RMSNorm if of.gain_offset else nn.RMSNorm
    norm = kind(config["hidden_size"], eps=config["rms_norm_eps"])
    norm.load_weights(weights(checkpoint, NORM, dtype, raw))
    return _divided(norm, config)


def head(checkpoint: Checkpoint, dtype: mx.Dtype, raw: Raw | None = None) -> nn.Module:
    """The vocabulary head as a module hidden (..., D) -> logits (..., V), lazy. `raw` as in
    `embedding`.
    """
    s = shape_of(checkpoint.config)
    owner = nn.Module()
    if s.tied:
        table = embedding(checkpoint, dtype, raw)
        table._softcap = softcap(checkpoint.config)
        return table
    owner.lm_head = nn.Linear(s.hidden, len(raw["lm_head.weight"]) if raw else s.vocab, bias=False)
    _quantize(owner, "", checkpoint)
    owner.lm_head.load_weights(weights(checkpoint, "lm_head.", dtype, raw))
    return owner.lm_head


def head_prefix(checkpoint: Checkpoint) -> str:
    """What the names of the head's tensors begin with."""
    return EMBEDDING if shape_of(checkpoint.config).tied else "lm_head."


def logits(head_module: nn.Module, hidden: mx.array) -> mx.array:
    """hidden (..., D) -> logits (..., V) through a tied embedding or an untied head."""
    if not hasattr(head_module, "as_linear"):
        return head_module(hidden)
    return losses.capped(head_module.as_linear(hidden), getattr(head_module, "_softcap", 0.0))


def wide_logits(head_module: nn.Module, hidden: mx.array) -> mx.array:
    """`logits` in float32, not rounded before a loss is taken of them; a packed head stays
    packed.
    """
    if "scales" in head_module:
        return logits(head_module, hidden.astype(mx.float32)).astype(mx.float32)
    return losses.capped(
        losses.wide_product(hidden, head_module.weight), getattr(head_module, "_softcap", 0.0)
    )


def resident(checkpoint: Checkpoint, dtype: mx.Dtype) -> nn.Module:
    """The whole model as mlx-lm's Model, lazy; the caller evaluates and counts it against the
    budget. `model.model` gives what goes into the head, as everywhere here.
    """
    of = family(checkpoint.config)
    model = mlx_lm(f"models.{of.mlx}").Model(model_args(checkpoint.config))
    tables = ["embed_tokens", *(["embed_tokens_per_layer"] if of.per_layer else [])]
    for table in tables:
        model.model[table] = lookup.Embedding(*model.model[table].weight.shape)
    for block in model.model.layers if of.experts else ():
        _apart(block, checkpoint.config)
    named = weights(checkpoint, "", dtype)
    if hasattr(model, "sanitize") and not of.experts:
        model.sanitize(dict(named))  # Gemma finds out in there whether it has a head
    _quantize(model, "", checkpoint)
    model.load_weights(named)
    model.eval()
    if of.scaled_queries:
        model.model.layers = [_uniform(block) for block in model.model.layers]
    if of.logit_divisor:
        model.model.norm = _divided(model.model.norm, checkpoint.config)
        model.logits_scaling = 1.0
    model._embedding_scale = embedding_scale(checkpoint.config, dtype)  # for `embedded`
    model._config = checkpoint.config
    return model


def embedded(model: nn.Module, tokens: mx.array) -> mx.array:
    """What goes into the first block (B, T, D) of a model that `resident` has made."""
    rows = model.model.embed_tokens(tokens)
    scale = model._embedding_scale
    return rows if scale is None else rows * scale  # type: ignore[no-any-return]


def activation_dtype(model: nn.Module) -> mx.Dtype:
    """The type that a resident model computes in, whatever its weights are packed as."""
    return model.model.norm.weight.dtype  # type: ignore[no-any-return]


def head_weight(model: nn.Module) -> mx.array:
    """The (V, D) matrix that makes logits in a resident model; de-quantized, in float32, where it
    is packed.
    """
    layer = model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens
    return dense_weight(layer) if "scales" in layer else layer.weight


def logit_softcap(model: nn.Module) -> float:
    """`config.softcap` of a resident model."""
    return softcap(model._config)


def dense_weight(linear: nn.Module) -> mx.array:
    """The (out, in) float32 matrix of a linear layer or embedding, quantized or not. Lazy."""
    if isinstance(linear, nn.QuantizedLinear | nn.QuantizedEmbedding):
        how = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        return mx.dequantize(linear.weight, linear.scales, linear.get("biases"), **how).astype(
            mx.float32
        )
    return linear.weight.astype(mx.float32)


def tokenizer(path: Path) -> Any:
    """mlx-lm's tokenizer wrapper of a model folder. Foreign code is refused, not asked about."""
    return opened_tokenizer(path, tokenizer_check.check_tokenizer(path))


# a run's teacher and student: of 262 thousand tokens one takes 120 MiB, to open it 680
@lru_cache(maxsize=2)
def opened_tokenizer(path: Path, _digest: bytes) -> Any:
    """The same, tried; _digest: of its files."""
    try:
        return mlx_lm("utils").load_tokenizer(path, {"trust_remote_code": False})
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        raise MisError(
            f"{path}: the tokenizer does not open ({text}): copy the tokenizer files again"
        ) from None
