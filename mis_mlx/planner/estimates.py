"""What a pass over a model takes, and whether it fits: bytes read and written, memory, operations.

Arithmetic on configs and sizes: reads no weights, starts nothing. Does not know what a distillation
is made of (planner/phases). Numbers that come from the engine name their origin, and tests hold the
two together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.compute import streams
from mis_mlx.compute.host_losses import CHUNK, GROUP
from mis_mlx.compute.token_losses import Footprint
from mis_mlx.hardware import rates
from mis_mlx.hardware.memory import process_bytes
from mis_mlx.models import arch, block_inputs, families, mixer_sizes, opening, tensor_shapes
from mis_mlx.models.config import attending, head_size, key_owners, shape_of, versions
from mis_mlx.models.residency import batches_per_pass, pass_bytes
from mis_mlx.models.stream import GROUP_BYTES, HEAD_PART
from mis_mlx.planner.model_size import ModelSize, model_of
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK, as_mis_error
from mis_mlx.types import Budget, Checkpoint, MisError, Precision, duration, gib

SMALL_BYTES = 2**20  # norms, masks, whole pages: too little for a formula
# that Python and MLX take to know of a tensor: its name and place (measured on 24,302)
TENSOR_BYTES = 3 * 1024
BLOCK_WAITS = 2  # for a block's weights, and for the check that its first output is a number
SETTLED_TOKENS = 512  # of the pass by which a type is chosen
# bytes of a parameter that one update moves: these four read, three written, in one kernel
UPDATE_TRAFFIC = 28


@dataclass(frozen=True)
class StageCost:
    """One stage: bytes, memory, operations.

    `pinned` blocks stay in memory between passes; `spooled_bytes` of hidden states lie on disk.
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

    def then(self, other: "StageCost") -> "StageCost":
        """This stage, then `other`: the work adds up, and the larger peak counts.

        Name, pinned blocks and places of hidden states are those of this stage.
        """
        return replace(
            self,
            read_bytes=self.read_bytes + other.read_bytes,
            written_bytes=self.written_bytes + other.written_bytes,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            flops=self.flops + other.flops,
            touched_bytes=self.touched_bytes + other.touched_bytes,
            waits=self.waits + other.waits,
            host_flops=self.host_flops + other.host_flops,
        )

    def repeated(self, times: int) -> "StageCost":
        """This stage `times` times in a row, in the memory of one."""
        return replace(
            self,
            read_bytes=times * self.read_bytes,
            written_bytes=times * self.written_bytes,
            flops=times * self.flops,
            touched_bytes=times * self.touched_bytes,
            waits=times * self.waits,
            host_flops=times * self.host_flops,
        )

    def seconds(self, machine: rates.Rates, hot: bool = False) -> float:
        """The time on a machine of these rates: of disk, arithmetic and memory the slowest.

        The three overlap. The optimizer's updates come on top of the arithmetic, which ends before
        one begins. So do, on a GPU, waits and what numpy computes meanwhile. hot: computing at the
        rates of a hot machine.
        """
        disk = self.read_bytes / machine.read_bytes_per_s
        disk += self.written_bytes / machine.write_bytes_per_s
        slowdown = machine.hot if hot else 1.0
        flops_per_s = machine.training_flops_per_s if self.updated else machine.forward_flops_per_s
        if machine.gpu:  # a CPU's training rate has the updates in it (rates.ELEMENTWISE)
            work = self.flops / (flops_per_s * slowdown)
            work += UPDATE_TRAFFIC * self.updated / machine.memory_bytes_per_s
            host = self.host_flops / (machine.host_flops_per_s * slowdown)
            work += self.waits * machine.wait_s + host
        else:
            work = self.operations / (flops_per_s * slowdown)
        return max(disk, work, self.touched_bytes / machine.memory_bytes_per_s)


def tensor_bytes(m: ModelSize) -> int:
    """Memory to rewrite the largest tensor.

    It lies there as stored, cut and converted; or, of a packed model, de-quantized and converted.
    """
    item = 12
    if not m.packed:
        item = 2 * math.ceil(m.nbytes / m.params) + 2
    largest = max(m.shape.vocab, m.shape.ffn) * m.shape.hidden
    return item * largest + stacked_bytes(m)


def stacked_bytes(m: ModelSize) -> int:
    """A matrix of all experts, each packed, and those put together."""
    return 2 * 5 * m.shape.experts * m.shape.ffn * m.shape.hidden // 8


def forward_flops(m: ModelSize, tokens: int, length: int, head: bool = True) -> float:
    """Operations of a forward pass over `tokens` in windows of `length`.

    2 for each parameter a token meets (looking up an embedding is free), and causal attention.
    head: with logits.
    """
    s = m.wide
    attention = s.heads * s.head_dim * length  # 2 products x 2 x length / 2 positions seen
    rows = m.config.get("vocab_size_per_layer_input", 0)
    projected = m.side_params - rows * arch.channels(m.config)
    params = m.active_share * m.blocks_params + attending(m.config) * attention + projected
    if head:
        params += m.head_params
    return 2.0 * tokens * params


def side_bytes(m: ModelSize, tokens: int) -> int:
    """What a pass over so many tokens keeps for later blocks besides hidden states.

    Per-layer channels of every block for each token that occurs, all of them at the most; keys and
    values that several blocks use.
    """
    owners = {owner for owner in key_owners(m.config) if owner is not None}
    shared = sum(2 * m.shape.kv_heads * head_size(m.config, i) for i in owners)
    ends = tensor_shapes.weight_count(arch.end_tensors(m.config))
    numbers = m.side_numbers(tokens)
    return m.item * (numbers + tokens * shared + ends)


def filling_bytes(m: ModelSize, tokens: int) -> int:
    """The peak before any block runs: channels of so many tokens, and what some are made of.

    That is rows as stored and as looked up, what is projected, that behind its norm, and their sum:
    5.4 times the channels, measured.
    """
    at_once = min(m.side_numbers(tokens), block_inputs.PART)
    made_of = 11 * m.item * at_once // 2
    return side_bytes(m, tokens) + made_of


def parallel_windows(m: ModelSize) -> int:
    """How many windows go through a block side by side."""
    return streams.count_on(gpu=m.gpu)


def workspace_bytes(m: ModelSize, tokens: int, length: int) -> int:
    """The most that a block's forward pass over one micro-batch holds, in float32.

    Times the number of micro-batches that go side by side here.
    """
    workspace = parallel_windows(m) * pass_bytes(m.config, tokens, length)
    if m.shape.experts:
        workspace += 2 * GROUP_BYTES
    return workspace


def pass_workspace(m: ModelSize, tokens: int, micro_tokens: int, length: int) -> int:
    """The workspace of a pass over `tokens` in micro-batches; a GPU takes several at once."""
    workspace = workspace_bytes(m, micro_tokens, length)
    if m.gpu:
        batches = math.ceil(tokens / micro_tokens)
        workspace *= min(batches, batches_per_pass(m.config, micro_tokens, length))
    return workspace


def activation_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """What one micro-batch (B, T) keeps for the backward pass: float32, all blocks.

    Measured within 3 %. Gemma's blocks keep more: norms behind attention and MLP, and the terms of
    GELU.
    """
    s = arch.widest(config)
    hidden_arrays = 6
    ffn_arrays = 5
    if families.family(config).post_norms:
        hidden_arrays = 10
        ffn_arrays = 10
    per_token = hidden_arrays * s.hidden * versions(config)
    per_token += ffn_arrays * arch.active_ffn_size(config)
    numbers = s.layers * per_token + mixer_sizes.of_all(config, length)
    # of channels: rows, their projection, that behind its norm, and the sum
    return 4 * batch * length * (numbers + 4 * arch.channels(config))


def backward_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """The most that the backward pass through one block holds, with what its forward pass kept.

    Without the block's gradients. Measured; as much in a Gemma's block, though that keeps more.
    """
    kept = activation_bytes(config, batch, length)
    kept += 4 * batch * length * mixer_sizes.above_mean(config, length)
    arrays = 8 if families.family(config).post_norms else 5
    return 11 * kept // (arrays * shape_of(config).layers)


def keys_bytes(m: ModelSize, tokens: int) -> int:
    """Keys and values of `tokens` tokens, in all blocks."""
    return 2 * attending(m.config) * tokens * m.shape.kv_heads * m.shape.head_dim * m.item


def headroom_bytes(limit_bytes: int, taken_bytes: int, gpu: bool | None = None) -> int:
    """What a budget leaves for things that are welcome but not needed.

    gpu: whose process takes `memory.process_bytes`; default: this one's.
    """
    return max(0, limit_bytes - process_bytes(limit_bytes, gpu) - taken_bytes)


def resident_blocks(m: ModelSize, headroom_bytes: int) -> int:
    """How many blocks, counted from the first, stay in memory for good in so many bytes."""
    return min(m.shape.layers, headroom_bytes // m.block_work)


def streamed_pass(
    name: str,
    m: ModelSize,
    *,
    tokens: int,
    micro_tokens: int,
    length: int,
    limit_bytes: int = 0,
    head: bool = True,
    spool: bool = True,
    again: bool = False,
    beside_bytes: int = 0,
) -> StageCost:
    """One pass from disk over `tokens`, block by block, as `stream.Stream` does.

    Every block sees all micro-batches. head: with logits at the end. spool: hidden states that find
    no room are written and read once a block. again: one of many alike: what the budget leaves
    holds the head, then blocks 0, 1 ... of the last. beside_bytes: held by others.
    """
    s = m.shape
    workspace = pass_workspace(m, tokens, micro_tokens, length)
    body = m.body_bytes(workspace) + m.in_flight(workspace)
    head_work = 0
    head_read = 0
    logits = 0
    if head:
        head_work = m.head_work
        head_read = m.head_bytes
        logits = Footprint(gpu=m.gpu).logit_bytes(s.vocab, micro_tokens) + m.widened_bytes
        if m.packed and not m.as_stored:  # de-quantizing it, MLX runs ahead here too
            logits = max(logits, head_work * 3 // 2)
    fixed = beside_bytes + m.slots_bytes + SMALL_BYTES + side_bytes(m, tokens)
    peak = fixed + max(body, head_work + logits)
    hidden = tokens * m.hidden_bytes
    held = hidden
    if spool:
        batch_bytes = micro_tokens * m.hidden_bytes
        held = min(hidden, headroom_bytes(limit_bytes, peak, m.gpu) // batch_bytes * batch_bytes)
    moved = (hidden - held) * (s.layers + 1)
    peak += held
    pinned = 0
    with_head = fixed + max(body, logits) + head_work + held
    if again and with_head + process_bytes(limit_bytes, m.gpu) <= limit_bytes:
        pinned = resident_blocks(m, headroom_bytes(limit_bytes, with_head, m.gpu))
        head_read = 0
        peak = with_head + pinned * m.block_work
    # A block's experts are read once a group of tokens (stream.Stream.run_experts).
    groups = math.ceil(hidden * m.config.get("num_experts_per_tok", 0) / GROUP_BYTES)
    reads = 1 + max(0, groups - 1) * (1 - m.memory_share)
    return StageCost(
        name=name,
        read_bytes=int((s.layers - pinned) * m.block_bytes * reads) + head_read + moved,
        written_bytes=moved,
        peak_bytes=max(peak, beside_bytes + filling_bytes(m, tokens)),
        flops=forward_flops(m, tokens, length, head=head),
        pinned=pinned,
        spooled_bytes=hidden - held,
        held_tokens=held // m.hidden_bytes,
        waits=_pass_waits(m, tokens, micro_tokens, length, head=head),
    )


def _pass_waits(
    m: ModelSize,
    tokens: int,
    micro_tokens: int,
    length: int,
    *,
    head: bool,
) -> int:
    """How often the host waits for the device in one pass: block by block, then at the head."""
    batches = math.ceil(tokens / micro_tokens)
    passes = batches
    if m.gpu:
        passes = math.ceil(batches / batches_per_pass(m.config, micro_tokens, length))
    waits = m.shape.layers * (passes + BLOCK_WAITS)
    if head:
        waits += batches
    return waits


def settle_precision(limit: Budget, checkpoint: Checkpoint, wanted: Precision) -> Checkpoint:
    """The model, with what it computes in decided, under a budget.

    Where float16 does not hold it, float32 is an answer only if the budget holds one pass in it,
    streamed from disk.
    """
    return opening.with_precision(checkpoint, wanted, partial(_pass_fits, limit.limit_bytes))


def _pass_fits(limit_bytes: int, checkpoint: Checkpoint, dtype: mx.Dtype) -> bool:
    """Whether one pass of SETTLED_TOKENS fits a budget when the model computes in `dtype`."""
    cost = streamed_pass(
        "",
        model_of(checkpoint, dtype=dtype),
        tokens=SETTLED_TOKENS,
        micro_tokens=SETTLED_TOKENS,
        length=SETTLED_TOKENS,
        spool=False,
    )
    return cost.peak_bytes + process_bytes(limit_bytes) <= limit_bytes


def token_cost(m: ModelSize, length: int, limit_bytes: int) -> StageCost:
    """One token generated after `length` others.

    Blocks are kept from the token before as far as they fit.
    """
    cache = keys_bytes(m, length)
    cost = streamed_pass(
        "one token",
        m,
        tokens=1,
        micro_tokens=1,
        length=length,
        limit_bytes=limit_bytes,
        spool=False,
        again=True,
        beside_bytes=cache,
    )
    return replace(
        cost,
        read_bytes=int(m.active_share * cost.read_bytes),
        touched_bytes=int(m.active_share * m.shape.layers * m.block_work) + m.head_work + cache,
    )


def comparison_cost(models: Sequence[ModelSize], windows: int, length: int) -> StageCost:
    """A pass of each model over the same windows, then their heads in parts (as in comparison).

    Parts of the first one's head and of each other's: two of each, and the temporaries that make
    and read one, logits of CHUNK tokens, and statistics of GROUP tokens.
    """
    tokens = windows * length
    vocab = min(m.shape.vocab for m in models)
    hidden = max(m.shape.hidden for m in models)
    rows = min(HEAD_PART // hidden, vocab)
    head_parts = math.ceil(vocab / rows)
    body = 0
    hidden_bytes = 0  # of a token, in all models
    flops = 0.0
    waits = 0
    for m in models:
        workspace = pass_workspace(m, tokens, length, length)
        body = max(body, m.slots_bytes + m.body_bytes(workspace))
        hidden_bytes += m.hidden_bytes
        flops += forward_flops(m, tokens, length)
        waits += _pass_waits(m, tokens, length, length, head=False)
    heads = [3 * rows * m.head_work // m.shape.vocab for m in models]
    logits = 3 * rows * hidden + 2 * 4 * min(length, CHUNK) * rows
    statistics = 9 * 8 * min(tokens, GROUP + length) * head_parts
    peak = max(body, heads[0] + max(heads) + logits + statistics) + tokens * hidden_bytes
    peak += max(side_bytes(m, tokens) for m in models)
    # two heads and their statistics
    waits += len(models) * 3 * head_parts * math.ceil(tokens / GROUP)
    return StageCost(
        name="measure",
        read_bytes=sum(m.nbytes for m in models),
        written_bytes=0,
        peak_bytes=peak,
        flops=flops,
        waits=waits,
    )


def budget_flag(nbytes: int) -> str:
    """A size as --budget takes it, rounded up: '612MiB'."""
    return f"{math.ceil(nbytes / 2**20)}MiB"


def enough_budget(arrays: int) -> int:
    """The smallest budget for so many bytes and what the process takes besides them."""
    return arrays + process_bytes(arrays + arrays // 5)


def require_fit(
    budget: Budget, *phases: StageCost, other: str = ", or lower --max-seq-length or --batch-size"
) -> None:
    """Refuse before work starts when the largest phase does not fit with its process.

    MisError with both numbers, a budget that is enough, and what else helps.
    """
    worst = max(phases, key=lambda p: p.peak_bytes)
    need = worst.peak_bytes + process_bytes(budget.limit_bytes)
    budget_enough = budget_flag(enough_budget(worst.peak_bytes))
    budget.need(need, worst.name, f"give --budget {budget_enough} or more{other}")


def report_costs(
    phases: Sequence[StageCost], limit_bytes: int, machine: rates.Rates, own_bytes: int = 0
) -> dict[str, Any]:
    """Say what each phase takes; returned is what a --dry-run says of them.

    own_bytes: of the process, in no phase.
    """
    seconds = 0.0
    for p in phases:
        moved = f"{gib(p.read_bytes)} read, {gib(p.written_bytes)} written"
        phase_seconds = p.seconds(machine)
        seconds += phase_seconds
        cli.say(
            f"{p.name}: {gib(p.peak_bytes)} of memory, {moved}, about {duration(phase_seconds)}"
        )
    peak = max(p.peak_bytes for p in phases) + own_bytes
    return {
        "peak_bytes": peak,
        "budget_bytes": limit_bytes,
        "read_bytes": sum(p.read_bytes for p in phases),
        "written_bytes": sum(p.written_bytes for p in phases),
        "seconds": round(seconds),
        "check_failed": peak > limit_bytes,
    }


def machine_rates(name: Literal["here", "m1-air"] = "here", measure: bool = False) -> rates.Rates:
    """Rates of this machine, or the published ones of an M1 Air.

    This machine's are measured now, measured earlier (kept in the cache folder), or assumed.
    """
    if name == "m1-air":
        if measure:
            raise MisError(
                "--measure measures this machine, but --machine m1-air plans for another: leave "
                "one of them out"
            )
        return rates.M1_AIR
    path = hub.cache_root() / "rates.json"
    if not measure:
        return rates.load(path) or rates.assumed()
    with hub.locked(path.parent), as_mis_error(path.parent, "a measurement of the disk"):
        measured = rates.measure(path.parent)
        DISK.replace_text(path, rates.to_json(measured))
    return measured
