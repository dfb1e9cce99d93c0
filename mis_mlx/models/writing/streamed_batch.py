"""Texts side by side: a pass over weights, on disk or in memory, gives every text a token.

A text that begins reads its whole prompt in its first pass: all prompts go through block i, each
alone, before block i+1 is read, and so do the last tokens of the texts that have begun before. What
a prompt gives therefore does not depend on what is beside it; one that comes several times is read
once. The texts that go on share a batch, in which each has positions of its own; shorter ones have
room in front, which a mask hides.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.compute import streams
from mis_mlx.hardware.stage_cost import StageCost, in_turn
from mis_mlx.models.architectures import block_inputs, block_state, experts, side_inputs
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.pass_cost import (
    SMALL_BYTES,
    block_texts_bytes,
    forward_flops,
    head_opening_bytes,
    once_bytes,
    stays,
    streamed_pass,
    texts_bytes,
    whole_bytes,
)
from mis_mlx.models.passing.resident import Resident
from mis_mlx.models.passing.stream import HEAD_PART, Stream, evaluate_now

ROWS = 512  # tokens of a long prompt that go through a block at a time
BLOCK_COPIES = 3  # of what a block keeps, while it grows, loses texts and gets others
LOGIT_COPIES = 6  # logits in float32, log-probabilities, what drawing makes of them (measured)


class Texts(NamedTuple):
    """What is to be written: so many texts behind prompts of at most so many tokens."""

    number: int
    prompt_tokens: int
    max_tokens: int

    @property
    def tokens(self) -> int:
        """Of a text at its end, its prompt included."""
        return self.prompt_tokens + self.max_tokens


class Unit(NamedTuple):
    """What depends on nothing else in a block: the texts that go on, or a prompt.

    numbers: of its batches among those of the pass, in their order: pieces of a prompt. state: what
    the block has read of it, mlx-lm's cache; None where the block takes another block's keys. mask:
    of the texts that go on.
    """

    numbers: Sequence[int]
    state: Any = None
    mask: Any = None


class Batch:
    """The texts that a model is writing, and what its blocks have read of them.

    most: tokens of a prompt that may go through a block at a time, if not ROWS. takes_back: there
    is one text, whose last tokens can be taken back.
    """

    def __init__(
        self, model: Stream | Resident, most: int | None = None, *, takes_back: bool = False
    ):
        self._model = model
        self._rows = min(ROWS, most or ROWS)
        self._takes_back = takes_back
        self._module = load.mlx_lm("models.cache")
        self._states: list[Any] = [None] * model.layers  # of all texts, one a block

    def read(
        self,
        tokens: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]],
        outputs: int = 1,
    ) -> mx.array:
        """One pass: what every text so far has gained (n, t), and the prompts of texts that begin.

        Returns the log-probabilities of the tokens behind each of the last `outputs` of every text,
        in float32: (texts times outputs, V). Texts that begin have the places behind the others.
        """
        model = self._model
        batches = list[mx.array]()
        units = list[Unit]()
        if tokens:
            units.append(Unit([0]))
            batches.append(mx.array([list(new) for new in tokens]))
        beginning = [tuple(prompt) for prompt in prompts]
        begins = dict[tuple[int, ...], Unit]()
        for prompt in dict.fromkeys(beginning):
            pieces = self._pieces(prompt)
            begins[prompt] = Unit(range(len(batches), len(batches) + len(pieces)))
            batches += pieces
        # Where nothing is read from disk a token is one graph; prompts would take too much memory.
        at_once = model.resident and not prompts
        hidden = list(model.embed(batches))
        masks: dict[int | None, Any] = {}
        for i, block in model.blocks():
            if at_once:
                hidden = self._run(i, block, self._going_on(i, block, hidden[0], masks), hidden)
                continue
            begun = begins
            if model.sides.owners[i] is None:
                begun = {key: self._begin(block, unit, hidden) for key, unit in begins.items()}
            visited = list(begun.values())
            if tokens:
                visited.insert(0, self._going_on(i, block, hidden[0], masks))
            self._through(i, block, visited, hidden)
            states = [begun[prompt].state for prompt in beginning]
            self._remember(i, [state for state in states if state is not None])
        units += [begins[prompt] for prompt in beginning]
        last = mx.concatenate([_last(hidden, unit, outputs) for unit in units])
        found = log_probs(model, last)
        kept = [state.state for state in self._states if state is not None]
        evaluate_now(found, kept)
        model.finite(last)
        return found

    def keep(self, places: Sequence[int]) -> None:
        """Let go of all texts but those at these places, which rise."""
        if not places:
            self._states = [None] * len(self._states)
        for state in self._states:
            if state is not None:
                state.filter(mx.array(list(places)))
                evaluate_now(state.state)

    def take_back(self, count: int) -> None:
        """Forget the last tokens of the text."""
        for state in self._states:
            if state is not None:
                state.trim(count)

    def _pieces(self, prompt: Sequence[int]) -> list[mx.array]:
        """A prompt (T,) in parts (1, t) that go through a block one after the other.

        In one where blocks take other blocks' keys, which hold later parts too by then.
        """
        tokens = mx.array(list(prompt))[None]
        if not side_inputs.plain(self._model.config):
            return [tokens]
        starts = range(0, len(prompt), self._rows)
        return [tokens[:, start : start + self._rows] for start in starts]

    def _begin(self, block: nn.Module, unit: Unit, hidden: Sequence[mx.array]) -> Unit:
        """A prompt with a new state of a block, which has room for the prompt and no more."""
        window = load.window(self._model.args, block)
        state = block_state.cache(self._module, block, window, takes_back=self._takes_back)
        state.step = sum(hidden[number].shape[1] for number in unit.numbers)
        return unit._replace(state=state)

    def _going_on(
        self,
        i: int,
        block: nn.Module,
        hidden: mx.array,
        masks: dict[int | None, Any],
    ) -> Unit:
        """The texts that go on, hidden (n, t, D), at block i. masks: of this pass, by window.

        All blocks that look as far back have one mask. Some of them have no keys of their own, so
        it is made at the first one, which has.
        """
        state = self._states[i]
        if not block_state.attends(block):
            return Unit([0], state)
        window = load.window(self._model.args, block)
        if window not in masks:
            masks[window] = state.make_mask(hidden.shape[1], window_size=window)
        return Unit([0], state, masks[window])

    def _through(
        self,
        i: int,
        block: nn.Module,
        units: Sequence[Unit],
        hidden: list[mx.array],
    ) -> None:
        """All units' hidden states (B, T, D) through block i, in place and evaluated."""
        model = self._model
        unit_of = dict[int, Unit]()
        for unit in units:
            unit_of.update(dict.fromkeys(unit.numbers, unit))

        def attend(number: int, states: mx.array) -> tuple[mx.array, mx.array]:
            unit = unit_of[number]
            return experts.attention_part(
                block, states, self._mask(block, unit, states), unit.state
            )

        if isinstance(model, Stream) and model.mixture:  # an expert is read once for all units
            for number, output in enumerate(model.run_experts(block, hidden, attend=attend)):
                hidden[number] = output
        else:
            found = streams.parallel_map(lambda unit: self._run(i, block, unit, hidden), units)
            for unit, outputs in zip(units, found, strict=True):
                for number, output in zip(unit.numbers, outputs, strict=True):
                    hidden[number] = output
        model.finite(hidden[0])

    def _run(
        self, i: int, block: nn.Module, unit: Unit, hidden: Sequence[mx.array]
    ) -> list[mx.array]:
        """A unit's hidden states (B, T, D) behind block i; lazy. hidden: of all units."""
        sides = self._model.sides
        outputs = []
        for number in unit.numbers:
            inputs = sides.inputs(i, number, hidden[number])
            mask = self._mask(block, unit, inputs.hidden)
            output = block_inputs.run(block, inputs, mask, unit.state)
            outputs.append(sides.keep(i, number, output))
        return outputs

    def _mask(
        self,
        block: nn.Module,
        unit: Unit,
        hidden: mx.array,
    ) -> Any:
        """What a unit's hidden states (B, T, D) see in a block."""
        if unit.mask is not None or not block_state.attends(block):
            return unit.mask
        window = load.window(self._model.args, block)
        base = load.mlx_lm("models.base")
        return base.create_attention_mask(hidden, unit.state, window_size=window)

    def _remember(self, i: int, begun: Sequence[Any]) -> None:
        """Put the states of texts that begin into block i's own, behind those of the others."""
        state = self._states[i]
        if begun:
            new = begun[0].merge(begun)
            new.step = block_state.STEP
            if state is None:
                state = new
            else:
                state.extend(new)
            self._states[i] = state
        if state is not None:
            evaluate_now(state.state)


def _last(hidden: Sequence[mx.array], unit: Unit, count: int) -> mx.array:
    """The last `count` hidden states of every text of a unit: (texts times count, D)."""
    states = hidden[unit.numbers[-1]]
    if count > states.shape[1]:
        states = mx.concatenate([hidden[number] for number in unit.numbers], axis=1)
    return states[:, -count:].reshape(-1, states.shape[-1])


def log_probs(model: Stream | Resident, hidden: mx.array) -> mx.array:
    """Hidden states (n, D) behind the last block -> log-probabilities (n, V) in float32; lazy."""
    (last,) = model.norm([hidden])
    logits = load.logits(model.head(), last).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def resident_bytes(m: ModelSize, at_once: int, tokens: int) -> int:
    """Memory of a model that writes, whole in memory: weights, keys and values, logits.

    tokens: of a text, its prompt included. Keys and values are there up to three times.
    """
    kept = 3 * texts_bytes(m, at_once, tokens + block_state.STEP)
    return whole_bytes(m) + kept + at_once * LOGIT_COPIES * 4 * m.shape.vocab


def writing_cost(
    m: ModelSize, texts: Texts, at_once: int, headroom_bytes: int | None = 0
) -> StageCost:
    """The cost of a model that is read once for a token of `at_once` texts.

    The first pass reads their prompts. New texts begin in the passes of those that go on, so that
    there are no more passes than if all of a batch ended together. What stays in the bytes left is
    read once. headroom_bytes: None: the model is whole in memory, and every pass fetches it there.
    """
    batches = math.ceil(texts.number / at_once)
    if headroom_bytes is None:
        met_bytes = int(m.active_share * m.shape.layers * m.block_work) + m.head_work
        return StageCost(
            name="write",
            read_bytes=m.nbytes,
            peak_bytes=resident_bytes(m, at_once, texts.tokens),
            flops=forward_flops(m, texts.number * texts.tokens, texts.tokens),
            touched_bytes=texts.max_tokens * batches * met_bytes,
        )
    share = stays(m, headroom_bytes).share

    def passes(tokens: int, times: int) -> StageCost:
        one = _pass_cost(m, at_once, tokens, longest=texts.tokens)
        return replace(one, read_bytes=int(share * one.read_bytes)).repeated(times)

    return in_turn(
        "write",
        passes(max(1, texts.prompt_tokens), batches),
        passes(1, batches * (texts.max_tokens - 1)),
        StageCost("weights that stay", read_bytes=int((1 - share) * once_bytes(m))),
    )


def _pass_cost(m: ModelSize, at_once: int, tokens: int, *, longest: int) -> StageCost:
    """One pass in which `at_once` texts read so many tokens each, and draw one.

    What all blocks keep of all texts is in memory, and copies of what one block keeps. longest:
    tokens of a text at its end.
    """
    places = longest + block_state.STEP
    shared = {owner for owner in family(m.config).key_owners() if owner is not None}
    copies = BLOCK_COPIES + len(shared)
    kept = texts_bytes(m, at_once, places) + copies * block_texts_bytes(m, at_once, places)
    piece = tokens
    if side_inputs.plain(m.config):
        piece = min(tokens, ROWS)
    cost = streamed_pass(
        "",
        m,
        tokens=at_once * tokens,
        micro_tokens=max(at_once, piece),
        length=longest,
        head=False,
        spool=False,
        beside_bytes=kept,
    )
    logits = at_once * LOGIT_COPIES * 4 * m.shape.vocab
    held = kept + m.slots_bytes + SMALL_BYTES + m.head_work
    # A part of the head as it is stored, and converted.
    part_bytes = min(m.head_params, HEAD_PART) * (math.ceil(m.nbytes / m.params) + m.item)
    return replace(
        cost,
        read_bytes=cost.read_bytes + m.head_bytes,
        flops=cost.flops + 2.0 * at_once * m.head_params,
        peak_bytes=max(cost.peak_bytes, held + max(head_opening_bytes(m), part_bytes, logits)),
    )
