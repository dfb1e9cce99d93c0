"""What a pass over a model takes: bytes read and written, peak memory, float operations; and
whether that fits.

Arithmetic on configs and sizes: reads no weights, starts nothing. Does not know what a distillation
is made of (planner/phases). Numbers that come from the engine name their origin, and tests hold the
two together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.hardware import lanes, rates
from mis_mlx.hardware.memory import COMMANDS_AHEAD, in_flight_bytes, process_bytes
from mis_mlx.maths.losses import PART, chunk_rows
from mis_mlx.models import arch, block_inputs, families, load, policy
from mis_mlx.models.config import Shape, head_size, key_owners, shape_of, versions
from mis_mlx.models.host_losses import CHUNK, GROUP
from mis_mlx.models.stream import GROUP_BYTES, HEAD_PART, pass_bytes, stacked
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK, reported
from mis_mlx.types import Budget, Checkpoint, MisError, duration, gib

SMALL_BYTES = 2**20  # norms, masks, whole pages: what is not worth a formula
SLOT_BYTES = 16 * 2**10  # that a buffer for a block is larger than the block: whole pages
# that Python and MLX take to know of a tensor: its name and place (measured on 24,302)
TENSOR_BYTES = 3 * 1024
# of `losses.kl_sum`, whose memory MLX takes before the first of them is done (measured on a CPU)
CHUNKS_AHEAD = 3
# float32 (n, V) that a chunk makes, five of them alive at a time; a GPU may hold all it has begun
CHUNK_ARRAYS = 12
BLOCK_WAITS = 2  # for a block's weights, and for the look at whether its first output is a number
SETTLED_TOKENS = 512  # of the pass by which a type is chosen
# bytes of a parameter that one update moves: these four read, three written, in one kernel
UPDATE_TRAFFIC = 28
KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ModelSize:
    """A model in bytes: as it lies on disk, and (`*_work`) as it computes."""

    config: Mapping[str, Any]
    shape: Shape
    params: int  # a tied embedding counts once
    block_params: int
    block_bytes: int  # on disk, of the largest block
    head_bytes: int  # on disk
    nbytes: int  # on disk, all of it
    item: int  # bytes of a number in computation: 4 on a CPU, 2 on Metal
    packed: bool
    as_stored: bool  # computes from the bytes that were read, without a converted copy
    tensors: int  # on disk
    gpu: bool = False  # computes on Metal
    here: float = 1.0  # of a block's parameters, those in memory at a time while it streams past
    met: float = 1.0  # and those that a token meets
    side_params: int = 0  # of the table of per-layer inputs and of what is projected beside it

    @property
    def channels(self) -> int:
        """The channels of a token between two blocks: D, or AltUp's A D."""
        return self.shape.hidden * versions(self.config)

    @property
    def blocks_params(self) -> int:
        """Parameters of all blocks; `block_params` are those of the largest."""
        head = self.head_params * (1 if self.shape.tied else 2)
        return self.params - head - self.side_params - self.shape.hidden

    @property
    def wide(self) -> Shape:
        """The shape, with FFN and heads of the largest block."""
        return arch.widest(self.config)

    @property
    def block_work(self) -> int:
        """Bytes of a block that stays in memory."""
        return self.block_bytes + SLOT_BYTES if self.as_stored else self.block_params * self.item

    @property
    def head_params(self) -> int:
        """Parameters of the vocabulary head, V x D."""
        return self.shape.vocab * self.shape.hidden

    @property
    def head_work(self) -> int:
        """Bytes of the vocabulary head in memory."""
        return self.head_bytes if self.packed and self.as_stored else self.head_params * self.item

    @property
    def slots_bytes(self) -> int:
        """The two buffers that blocks, and two that experts, are read into in turn."""
        return 2 * int(self.here * self.block_bytes + SLOT_BYTES * (2 if self.shape.experts else 1))

    def in_flight(self, work: int) -> int:
        """What a GPU holds beside `work` bytes of temporaries that a CPU has freed by then: as much
        again, or what the commands in flight can hold.
        """
        return min(work, in_flight_bytes()) if self.gpu else 0

    @property
    def widened_bytes(self) -> int:
        """Parts of a dense head in half precision, widened for its logits: those that a GPU has in
        flight.
        """
        if not self.gpu or self.packed or self.item == 4:
            return 0
        return 4 * min(COMMANDS_AHEAD * PART, self.head_params)

    def body_bytes(self, workspace: int) -> int:
        """Beside the slots while blocks are made and used: the workspace, and a converted copy if
        one is needed. De-quantizing on a CPU holds a second copy for a moment, because MLX runs
        ahead (measured).
        """
        if self.as_stored:
            return workspace
        part = int(self.here * self.block_work)
        return part + max(workspace, part if self.packed else 0)


def model_of(
    source: Checkpoint | Mapping[str, Any], gpu: bool | None = None, dtype: Any = None
) -> ModelSize:
    """The sizes of a checkpoint; or of a config alone, stored as its dtype or its quantization
    says. gpu: whether it is to compute on Metal; default: as this process does. dtype: what it is
    to compute in here.
    """
    config = source.config if isinstance(source, Checkpoint) else source
    if gpu is None:
        gpu = policy.keeps_packed()
        dtype = dtype or (
            policy.compute_dtype(source) if isinstance(source, Checkpoint) else policy.usual_dtype()
        )
    s = shape_of(config)
    if dtype is None:  # of an M1, which emulates bfloat16
        dtype = policy.DTYPES["float16" if gpu and families.family(config).float16 else "float32"]
    block = sum(map(math.prod, arch.layer_tensors(config, True).values()))
    params = arch.params(config)
    if isinstance(source, Checkpoint):
        blocks = [0] * s.layers
        floats = set()
        for name, t in source.tensors.items():
            if (i := arch.block_of(name)) is not None:
                blocks[i] += t.nbytes
                floats.add(KINDS.get(t.dtype, t.dtype))
        head = sum(
            t.nbytes for n, t in source.tensors.items() if n.startswith(load.head_prefix(source))
        )
        packed = "U32" in floats
        nbytes = source.nbytes
        block_bytes = max(blocks)
        count = len(source.tensors)
    else:
        settings = config.get("quantization") or {}
        kind = config.get("torch_dtype") or config.get("dtype")
        packed = "bits" in settings
        floats = {kind if kind in policy.DTYPES else "bfloat16"}
        per = (
            settings["bits"] / 8 + 4 / settings["group_size"]
            if packed
            else policy.DTYPES[min(floats)].size
        )
        shapes = arch.tensors_of(config).values()
        # with scales and biases
        count = sum(3 if packed and len(shape) == 2 else 1 for shape in shapes)
        head, nbytes, block_bytes = (int(per * n) for n in (s.vocab * s.hidden, params, block))
    as_stored = gpu if packed else floats == {str(dtype).removeprefix("mlx.core.")}
    known = dtype.size, packed, as_stored, count, gpu, *arch.shares(config)
    sides = sum(map(math.prod, (arch.side_tensors(config) | arch.end_tensors(config)).values()))
    return ModelSize(config, s, params, block, block_bytes, head, nbytes, *known, side_params=sides)


@dataclass(frozen=True)
class StageCost:
    """One stage. `pinned` blocks stay in memory between passes; `spooled_bytes` of hidden states
    lie on disk.
    """

    name: str
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    flops: float
    # weights fetched from memory; counts where there is little to do with each
    touched_bytes: int = 0
    pinned: int = 0
    spooled_bytes: int = 0
    held_tokens: int = 0  # whose hidden states stay in memory
    updated: int = 0  # parameters that the optimizer changes, in all steps together
    waits: int = 0  # how often the host waits for the device
    host_flops: float = 0.0  # of numpy's solvers, which a GPU waits for

    @property
    def operations(self) -> float:
        """Float operations of device and host together."""
        return self.flops + self.host_flops

    def seconds(self, at: rates.Rates, hot: bool = False) -> float:
        """What takes longest: the disk, the arithmetic, or fetching weights from memory; they
        overlap. The optimizer's updates come on top of the arithmetic, which ends before one
        begins. So do, on a GPU, waits and what numpy computes meanwhile.
        """
        disk = self.read_bytes / at.read_bytes_per_s + self.written_bytes / at.write_bytes_per_s
        flops_per_s = at.training_flops_per_s if self.updated else at.forward_flops_per_s
        flops = self.flops if at.gpu else self.operations
        work = flops / (flops_per_s * (at.hot if hot else 1.0))
        if at.gpu:  # a CPU's training rate has the updates in it (rates.ELEMENTWISE)
            work += UPDATE_TRAFFIC * self.updated / at.memory_bytes_per_s
            work += self.waits * at.wait_s + self.host_flops / (
                at.host_flops_per_s * (at.hot if hot else 1.0)
            )
        return max(disk, work, self.touched_bytes / at.memory_bytes_per_s)


def tensor_bytes(m: ModelSize) -> int:
    """Bytes to rewrite the largest tensor: as stored, cut and converted; or de-quantized and
    converted.
    """
    per = 12 if m.packed else 2 * math.ceil(m.nbytes / m.params) + 2
    return per * max(m.shape.vocab, m.shape.ffn) * m.shape.hidden + stacked_bytes(m)


def stacked_bytes(m: ModelSize) -> int:
    """A matrix of all experts, each packed, and those put together."""
    return 2 * 5 * m.shape.experts * m.shape.ffn * m.shape.hidden // 8


def forward_flops(m: ModelSize, tokens: int, length: int, head: bool = True) -> float:
    """2 for each parameter a token meets (looking up an embedding is free), and causal
    attention.
    """
    s = m.wide
    attention = s.heads * s.head_dim * length  # 2 products x 2 x length / 2 positions seen
    rows = m.config.get("vocab_size_per_layer_input", 0)
    projected = m.side_params - rows * arch.channels(m.config)
    blocks = m.met * m.blocks_params + s.layers * attention + projected
    return 2.0 * tokens * (blocks + (m.head_params if head else 0))


def side_bytes(m: ModelSize, tokens: int) -> int:
    """What a pass over so many tokens keeps for blocks to come beside hidden states: channels of
    every block for each token that occurs, all of them at the most; keys and values that several
    blocks use.
    """
    owners = {owner for owner in key_owners(m.config) if owner is not None}
    shared = sum(2 * m.shape.kv_heads * head_size(m.config, i) for i in owners)
    ends = sum(map(math.prod, arch.end_tensors(m.config).values()))
    channels = min(tokens, m.shape.vocab) * arch.channels(m.config)
    return m.item * (channels + tokens * shared + ends)


def filling_bytes(m: ModelSize, tokens: int) -> int:
    """The peak before any block runs: channels of so many tokens, and what some are made of.

    That is rows as stored and as looked up, what is projected, that behind its norm, and their sum:
    5.4 times the channels, measured.
    """
    numbers = min(tokens, m.shape.vocab) * arch.channels(m.config)
    return side_bytes(m, tokens) + 11 * m.item * min(numbers, block_inputs.PART) // 2


def together(m: ModelSize) -> int:
    """How many windows go through a block side by side."""
    return 1 if m.gpu else lanes.count()


def workspace_bytes(m: ModelSize, tokens: int, length: int) -> int:
    """The most that a block's forward pass over one micro-batch holds, float32; of as many as go
    side by side here.
    """
    return together(m) * pass_bytes(m.config, tokens, length) + (
        2 * GROUP_BYTES if m.shape.experts else 0
    )


def pass_workspace(m: ModelSize, tokens: int, micro_tokens: int, length: int) -> int:
    """The same of a pass over `tokens` in micro-batches, of which a GPU takes several at once
    (`stream.stacked`).
    """
    one = workspace_bytes(m, micro_tokens, length)
    if not m.gpu:
        return one
    return one * min(math.ceil(tokens / micro_tokens), stacked(m.config, micro_tokens, length))


def activation_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """What one micro-batch (B, T) keeps for the backward pass: float32, all blocks. Measured within
    3 %. Gemma's blocks keep more: norms behind attention and MLP, and the terms of GELU.
    """
    s = arch.widest(config)
    more = families.family(config).sandwich
    per_token = (6 + 4 * more) * s.hidden * versions(config)
    per_token += (5 + 5 * more) * arch.met(config)
    per_token += 2 * (s.heads + s.kv_heads) * s.head_dim + s.heads * length
    sides = 4 * arch.channels(config)  # rows, what is projected, that behind its norm, and the sum
    return 4 * batch * length * (s.layers * per_token + sides)


def backward_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """The most that the way back through one block holds, its gradients not among it; what it kept
    is. Measured; as much in a Gemma's block, though that keeps more.
    """
    kept = activation_bytes(config, batch, length)
    more = families.family(config).sandwich
    return 11 * kept // ((5 + 3 * more) * shape_of(config).layers)


def logit_bytes(vocab: int, tokens: int, host: bool = False, *, gpu: bool = False) -> int:
    """Logits under way: chunks of five float32 arrays (maths/losses); on the host two, of one chunk
    (host_losses). A GPU holds those it needs and those of the commands in flight, one array each,
    for (n, V) fills a command buffer.
    """
    rows = chunk_rows(vocab)
    if host:
        return 2 * min(tokens, rows) * vocab * 4
    chunks = math.ceil(tokens / rows)
    if gpu:
        return min(5 + COMMANDS_AHEAD, CHUNK_ARRAYS * chunks) * rows * vocab * 4
    return 5 * min(CHUNKS_AHEAD, chunks) * rows * vocab * 4


def keys_bytes(m: ModelSize, tokens: int) -> int:
    """Keys and values of `tokens` tokens, in all blocks."""
    return 2 * m.shape.layers * tokens * m.shape.kv_heads * m.shape.head_dim * m.item


def room(limit_bytes: int, taken_bytes: int, gpu: bool | None = None) -> int:
    """What a budget leaves for what is welcome but not needed, after `memory.process_bytes`, whose
    `gpu` it is.
    """
    return max(0, limit_bytes - process_bytes(limit_bytes, gpu) - taken_bytes)


def pins(m: ModelSize, room_bytes: int) -> int:
    """How many blocks, counted from the first, stay in memory for good in this much of it."""
    return min(m.shape.layers, room_bytes // m.block_work)


def streamed_pass(
    name: str,
    m: ModelSize,
    tokens: int,
    micro_tokens: int,
    length: int,
    limit_bytes: int = 0,
    *,
    head: bool = True,
    spool: bool = True,
    again: bool = False,
    beside_bytes: int = 0,
) -> StageCost:
    """One pass from disk over `tokens`, block by block, all micro-batches in each, as
    `stream.Stream` does. head: with logits at the end. spool: hidden states that find no room are
    written and read once a block. again: one of many alike: what the budget leaves holds the head,
    then blocks 0, 1 ... of the last. beside_bytes: held by others.
    """
    s = m.shape
    head_work = m.head_work if head else 0
    workspace = pass_workspace(m, tokens, micro_tokens, length)
    body = m.body_bytes(workspace) + m.in_flight(workspace)
    logits = logit_bytes(s.vocab, micro_tokens, gpu=m.gpu) + m.widened_bytes if head else 0
    if head and m.packed and not m.as_stored:
        logits = max(logits, head_work * 3 // 2)  # de-quantizing it, MLX runs ahead here too
    fixed = beside_bytes + m.slots_bytes + SMALL_BYTES + side_bytes(m, tokens)
    peak = fixed + max(body, head_work + logits)
    kept_head = fixed + max(body, logits) + head_work
    hidden = tokens * m.channels * m.item
    batch = micro_tokens * m.channels * m.item
    held = min(hidden, room(limit_bytes, peak, m.gpu) // batch * batch) if spool else hidden
    moved = (hidden - held) * (s.layers + 1)
    keeps = 0
    head_read = m.head_bytes if head else 0
    peak = peak + held
    if again and kept_head + held + process_bytes(limit_bytes, m.gpu) <= limit_bytes:
        keeps = pins(m, room(limit_bytes, kept_head + held, m.gpu))
        head_read = 0
        peak = kept_head + held + keeps * m.block_work
    peak = max(peak, beside_bytes + filling_bytes(m, tokens))
    # A block's experts are read once a group of tokens (stream.Stream.mixed).
    parts = 1 + max(
        0, math.ceil(hidden * m.config.get("num_experts_per_tok", 0) / GROUP_BYTES) - 1
    ) * (1 - m.here)
    read = int((s.layers - keeps) * m.block_bytes * parts) + head_read + moved
    flops = forward_flops(m, tokens, length, head)
    batches = math.ceil(tokens / micro_tokens)
    passes = math.ceil(batches / stacked(m.config, micro_tokens, length)) if m.gpu else batches
    return StageCost(
        name,
        read,
        moved,
        peak,
        flops,
        pinned=keeps,
        spooled_bytes=hidden - held,
        held_tokens=held // (m.channels * m.item),
        waits=s.layers * (passes + BLOCK_WAITS) + (batches if head else 0),
    )


def settle_precision(limit: Budget, *models: Checkpoint) -> None:
    """Decide, before a run computes anything, which of its models the budget holds in float32:
    those of which one pass streamed from disk fits. Matters where float16 does not hold a model
    (`policy.settle`).
    """
    for model in models:

        def fits(dtype: mx.Dtype, model: Checkpoint = model) -> bool:
            m = model_of(model, dtype=dtype)
            one = streamed_pass("", m, SETTLED_TOKENS, SETTLED_TOKENS, SETTLED_TOKENS, spool=False)
            return one.peak_bytes + process_bytes(limit.limit_bytes) <= limit.limit_bytes

        policy.settle(model, fits)


def token(m: ModelSize, length: int, limit_bytes: int) -> StageCost:
    """One token generated after `length` others, blocks kept from the token before as far as they
    fit.
    """
    cache = keys_bytes(m, length)
    made = streamed_pass(
        "one token", m, 1, 1, length, limit_bytes, spool=False, again=True, beside_bytes=cache
    )
    touched = int(m.met * m.shape.layers * m.block_work) + m.head_work + cache
    return replace(made, read_bytes=int(m.met * made.read_bytes), touched_bytes=touched)


def compared(models: Sequence[ModelSize], windows: int, length: int) -> StageCost:
    """A pass of each model over the same windows, then parts of the first one's head and of each
    other's: two of each, and what one is made from and looked at with, logits of CHUNK tokens, what
    is known of GROUP (as in comparison).
    """
    tokens = windows * length
    vocab = min(m.shape.vocab for m in models)
    hidden = max(m.shape.hidden for m in models)
    rows = min(HEAD_PART // hidden, vocab)
    body = max(
        m.slots_bytes + m.body_bytes(pass_workspace(m, tokens, length, length)) for m in models
    )
    parts = [3 * rows * m.head_work // m.shape.vocab for m in models]
    beside = 3 * rows * hidden + 2 * 4 * min(length, CHUNK) * rows
    found = 9 * 8 * min(tokens, GROUP + length) * math.ceil(vocab / rows)
    peak = max(body, parts[0] + max(parts) + beside + found) + tokens * sum(
        m.channels * m.item for m in models
    )
    peak += max(side_bytes(m, tokens) for m in models)
    flops = sum(forward_flops(m, tokens, length) for m in models)
    waits = sum(
        streamed_pass("", m, tokens, length, length, head=False, spool=False).waits for m in models
    )
    # two heads and what was found
    waits += len(models) * 3 * math.ceil(vocab / rows) * math.ceil(tokens / GROUP)
    return StageCost("measure", sum(m.nbytes for m in models), 0, peak, flops, waits=waits)


def flag(nbytes: int) -> str:
    """A size as --budget takes it, rounded up: '612MiB'."""
    return f"{math.ceil(nbytes / 2**20)}MiB"


def enough(arrays: int) -> int:
    """The smallest budget for so many bytes and what the process takes beside them."""
    return arrays + process_bytes(arrays + arrays // 5)


def fit(
    budget: Budget, *phases: StageCost, other: str = ", or lower --max-seq-length or --batch-size"
) -> None:
    """Refuse before work starts, when the largest phase and what the process takes beside it do not
    fit: MisError with both numbers, a budget that is enough, and what else helps.
    """
    worst = max(phases, key=lambda p: p.peak_bytes)
    need = worst.peak_bytes + process_bytes(budget.limit_bytes)
    budget.need(need, worst.name, f"give --budget {flag(enough(worst.peak_bytes))} or more{other}")


def told(
    phases: Sequence[StageCost], limit_bytes: int, at: rates.Rates, own_bytes: int = 0
) -> dict[str, Any]:
    """Say what each phase takes; returned is what a --dry-run says of them. own_bytes: of the
    process, in no phase.
    """
    for p in phases:
        moved = f"{gib(p.read_bytes)} read, {gib(p.written_bytes)} written"
        cli.say(
            f"{p.name}: {gib(p.peak_bytes)} of memory, {moved}, about {duration(p.seconds(at))}"
        )
    peak = max(p.peak_bytes for p in phases) + own_bytes
    return {
        "peak_bytes": peak,
        "budget_bytes": limit_bytes,
        "read_bytes": sum(p.read_bytes for p in phases),
        "written_bytes": sum(p.written_bytes for p in phases),
        "seconds": round(sum(p.seconds(at) for p in phases)),
        "check_failed": peak > limit_bytes,
    }


def machine_rates(name: Literal["here", "m1-air"] = "here", measure: bool = False) -> rates.Rates:
    """Published rates of an M1 Air, or this machine's: measured now, earlier (kept in the cache
    folder), or assumed.
    """
    if name == "m1-air":
        if measure:
            raise MisError(
                "--measure measures this machine, --machine m1-air is another: leave one of them "
                "out"
            )
        return rates.M1_AIR
    path = hub.cache_root() / "rates.json"
    if not measure:
        return rates.load(path) or rates.assumed()
    with hub.locked(path.parent), reported(path.parent, "a measurement of the disk"):
        found = rates.measure(path.parent)
        DISK.replace_text(path, rates.to_json(found))
    return found
