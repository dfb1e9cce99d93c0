"""AltUp: blocks that pass several versions of the hidden states on, as Gemma 3n's do.

mlx-lm stacks the A versions in front, (A, B, T, D). Here they lie one after the other in the last
axis, (B, T, A D), so that every pass, spool and micro-batch sees ordinary hidden states that are
A times as wide. The embedding enters as the first version; behind the last block their mean goes
through the last norm. AltUp is arXiv 2301.13310.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.maths import losses
from mis_mlx.models.architectures import block_inputs, lookup
from mis_mlx.models.architectures.modules import SideProjection


def magnitude(x: mx.array) -> mx.array:
    """The root mean square of every token: (..., D) -> (..., 1)."""
    return mx.mean(x**2, axis=-1, keepdims=True) ** 0.5


def entered(embedded: mx.array, projections: Sequence[nn.Module]) -> mx.array:
    """The first block's input (..., A D): the embedding (..., D), then one version a projection.

    All versions have the magnitude of the embedding.
    """
    target = magnitude(embedded)
    versions = [embedded]
    for projection in projections:
        version = projection(embedded)
        factor = target / magnitude(version)
        versions.append(version * factor)
    return mx.concatenate(versions, axis=-1)


def left(stacked: mx.array, projections: Sequence[nn.Module]) -> mx.array:
    """The last norm's input (..., D): the mean of all versions in (..., A D).

    The first version counts as it is, the others projected, and with the first one's magnitude.
    """
    count = len(projections) + 1
    first, *others = mx.split(stacked, count, axis=-1)
    target = magnitude(first)
    total = first
    for version, projection in zip(others, projections, strict=True):
        projected = projection(version)
        factor = target / magnitude(projected)
        total = total + projected * factor
    return total / count


def _projections(hidden: int, versions: int) -> list[nn.Module]:
    """Matrices (D, D) for all versions but the first."""
    return [nn.Linear(hidden, hidden, bias=False) for _ in range(1, versions)]


class Entrance(nn.Module):
    """`entered` with the matrices that it needs."""

    def __init__(self, hidden: int, versions: int):
        super().__init__()
        self.altup_projections = _projections(hidden, versions)

    def __call__(self, embedded: mx.array) -> mx.array:
        """(..., D) -> (..., A D)."""
        return entered(embedded, self.altup_projections)


class Exit(nn.Module):
    """`left` with the matrices that it needs, and the last norm."""

    def __init__(self, hidden: int, versions: int, eps: float):
        super().__init__()
        self.altup_unembed_projections = _projections(hidden, versions)
        self.norm = nn.RMSNorm(hidden, eps=eps)

    def __call__(self, stacked: mx.array) -> mx.array:
        """(..., A D) -> (..., D)."""
        return self.norm(left(stacked, self.altup_unembed_projections))


class Door:
    """The way into the first block of a streamed model; what it needs is read at first use.

    hidden: the width of the embedding. read: gives an `Entrance`, evaluated; None: the scaled
    embedding is the first block's input.
    """

    def __init__(self, hidden: int, read: Callable[[], nn.Module] | None):
        self._hidden = hidden
        self._read = read
        self._entrance: nn.Module | None = None

    def enter(self, embedded: mx.array) -> mx.array:
        """The first block's input of the scaled embedding (B, T, D); lazy."""
        if self._read is None:
            return embedded
        if self._entrance is None:
            self._entrance = self._read()
        return self._entrance(embedded)  # type: ignore[no-any-return]

    def back(self, hidden: mx.array, above: mx.array) -> mx.array:
        """Cotangents at the scaled embedding, of those at the first block's input; lazy.

        hidden: that input, whose first version is the embedding.
        """
        if self._entrance is None:
            return above
        _, (below,) = mx.vjp(self._entrance, [hidden[..., : self._hidden]], [above])
        return below


class _Keys:
    """In the place of mlx-lm's cache: keeps what a block attends to, for blocks that share it.

    cache: mlx-lm's own, which goes on being filled. shared: another block's keys and values.
    """

    def __init__(self, cache: Any, shared: tuple[mx.array, mx.array] | None):
        self._cache = cache
        self.kept = shared

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array] | None:
        """All keys and values (B, K, T, d) so far, with these at the end."""
        self.kept = keys, values
        if self._cache is not None:
            self.kept = self._cache.update_and_fetch(keys, values)
        return self.kept

    def keys_and_values(self) -> tuple[mx.array, mx.array] | None:
        """Those that this block, or the one that it takes them from, attended to last.

        mlx_lm's attention calls this where blocks share keys and values.
        """
        return self.kept


@cache
def _block_class(module: ModuleType) -> Any:
    """The block, made of mlx-lm's own of this module."""

    class AltUp(module.Gemma3nAltUp):  # type: ignore[misc, name-defined]
        """mlx-lm's, which clips its coefficients in place: they are put back after every call."""

        def predict(self, x: mx.array) -> mx.array:
            stored = self.prediction_coefs.weight
            predictions: mx.array = super().predict(x)
            self.prediction_coefs.weight = stored
            return predictions

        def correct(self, predictions: mx.array, activated: mx.array) -> mx.array:
            stored = self.correction_coefs.weight
            corrected: mx.array = super().correct(predictions, activated)
            self.correction_coefs.weight = stored
            return corrected

    class Block(module.Gemma3nDecoderLayer):  # type: ignore[misc, name-defined]
        """mlx-lm's, called as the other families' blocks that share keys."""

        def __init__(self, args: Any, i: int, shares_keys: bool):
            super().__init__(args, i, shares_keys)
            self.altup = AltUp(args)
            if shares_keys:  # mlx-lm makes them, and never uses them where there is a cache
                for name in ("k_proj", "v_proj", "k_norm"):
                    self.self_attn.pop(name)

        def __call__(
            self,
            x: mx.array,
            mask: Any = None,
            cache: Any = None,
            per_layer_input: mx.array | None = None,
            shared_kv: tuple[mx.array, mx.array] | None = None,
            offset: Any = None,
        ) -> tuple[mx.array, Any, Any]:
            if offset is None:
                offset = 0
                if cache is not None:
                    # a copy: the cache may count on in the same array
                    offset = mx.array(cache.offset)
            versions = self.config.altup_num_inputs
            apart = mx.unflatten(x, -1, (versions, -1))
            stacked = mx.moveaxis(apart, -2, 0)
            keys = _Keys(cache, shared_kv)
            out = super().__call__(stacked, mask, keys, per_layer_input, offset=offset)
            behind = mx.moveaxis(out, 0, -2)
            flat = mx.flatten(behind, -2)
            return flat, keys.kept, offset

    return Block


def block(module: ModuleType, args: Any, i: int) -> nn.Module:
    """Block i, of random weights. module: mlx_lm.models.gemma3n; args: its TextConfig.

    Called with (x (B, T, A D), mask, cache), the channels of every token, and keys and values of
    another block if it shares them. Gives (hidden states, keys and values, offset).
    """
    own = args.num_hidden_layers - args.num_kv_shared_layers
    made: nn.Module = _block_class(module)(args, i, i >= own)
    return made


class _Inner(SideProjection):
    """A whole model but for its head: token ids -> the head's input."""

    def __init__(self, module: ModuleType, args: Any, owners: Sequence[int | None]):
        layers = args.num_hidden_layers
        width = args.hidden_size_per_layer_input
        super().__init__(args.hidden_size, layers, width, args.rms_norm_eps)
        self._module = module
        self._args = args
        self._owners = owners
        rows = args.vocab_size_per_layer_input
        hidden = args.hidden_size
        versions = args.altup_num_inputs
        self.embed_tokens = lookup.Embedding(args.vocab_size, hidden)
        self.embed_tokens_per_layer = lookup.Embedding(rows, layers * width)
        self.altup_projections = _projections(hidden, versions)
        self.altup_unembed_projections = _projections(hidden, versions)
        self.layers = [block(module, args, i) for i in range(layers)]
        self.norm = nn.RMSNorm(hidden, eps=args.rms_norm_eps)

    def side_channels(self, tokens: mx.array, embedded: mx.array) -> mx.array:
        """(B, T, L, P) of token ids (B, T), embedded (B, T, D) as for the first block.

        Tokens behind the end of the table have the row of token 0, as in mlx-lm.
        """
        known = tokens < self._args.vocab_size_per_layer_input
        rows = self.embed_tokens_per_layer(mx.where(known, tokens, 0))
        return self.channels(rows, embedded)

    def enter(self, embedded: mx.array) -> mx.array:
        """The first block's input (B, T, A D)."""
        return entered(embedded, self.altup_projections)

    def leave(self, stacked: mx.array) -> mx.array:
        """The head's input (B, T, D), of the last block's output (B, T, A D)."""
        return self.norm(left(stacked, self.altup_unembed_projections))

    def _masks(self, embedded: mx.array, caches: Sequence[Any]) -> list[Any]:
        """The attention mask of every block, one for each kind, before any cache is filled."""
        of_kind: dict[bool, Any] = {}
        masks = []
        for i, layer in enumerate(self.layers):
            sliding = layer.self_attn.is_sliding
            if sliding not in of_kind:  # the first block of a kind has keys of its own
                window = self._args.sliding_window if sliding else None
                keys = caches[i] if caches else None
                create = self._module.create_attention_mask
                of_kind[sliding] = create(embedded, keys, window_size=window)
            masks.append(of_kind[sliding])
        return masks

    def __call__(  # type: ignore[override]
        self, tokens: mx.array, cache: Sequence[Any] | None = None
    ) -> mx.array:
        """(B, T) -> (B, T, D). cache: mlx-lm's, one for each block that makes keys and values."""
        embedded = self.embed_tokens(tokens) * self._args.hidden_size**0.5
        channels = self.side_channels(tokens, embedded)
        sides = block_inputs.Sides(self._owners, lambda i, b: channels[:, :, i])
        caches = list(cache or ())
        masks = self._masks(embedded, caches)
        hidden = self.enter(embedded)
        for i, layer in enumerate(self.layers):
            inputs = sides.inputs(i, 0, hidden)
            own = caches[i] if i < len(caches) else None
            outputs = block_inputs.run(layer, inputs, masks[i], own)
            hidden = sides.keep(i, 0, outputs)
        return self.leave(hidden)


class Model(nn.Module):
    """A whole model of random weights, used as mlx-lm's other models are.

    `model` gives the head's input and has tensors by our names. module, args: as of `block`.
    owners: as of `block_inputs.Sides`.
    """

    def __init__(self, module: ModuleType, args: Any, owners: Sequence[int | None]):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = _Inner(module, args, owners)
        self._module = module

    def __call__(self, tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Token ids (B, T) -> logits (B, T, V)."""
        hidden = self.model(tokens, cache)
        table = self.model.embed_tokens
        z = table.as_linear(hidden)
        cap = self.args.final_logit_softcapping
        return losses.apply_softcap(z, cap)

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks."""
        return self.model.layers  # type: ignore[no-any-return]

    def make_cache(self) -> list[Any]:
        """A key-value cache for each block that makes keys and values of its own."""
        caches = list[Any]()
        for i, owner in enumerate(self.model._owners):
            if owner is not None:
                continue
            if self.layers[i].self_attn.is_sliding:
                window = self.args.sliding_window
                caches.append(self._module.RotatingKVCache(max_size=window, keep=0))
            else:
                caches.append(self._module.KVCache())
        return caches
