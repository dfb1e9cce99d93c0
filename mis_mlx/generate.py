"""Generate text with a model, also one bigger than memory; a small draft makes each pass of its
weights count.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mis_mlx import cli
from mis_mlx.evaluation import comparison
from mis_mlx.evaluation.speed import rounds
from mis_mlx.hardware import memory
from mis_mlx.models import load, mlx_generate, policy, resolve, stream, streamed_decode
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress
from mis_mlx.types import Budget, Checkpoint, Count, Whole, gib


@dataclass(frozen=True)
class Settings(cli.Budgeted, policy.Computing):
    """Greedy: the same text as plain decoding, whatever the budget and the draft."""

    model: str | None = None
    """folder or hub id; default: SmolLM2-135M-Instruct"""
    draft_model: str | None = None
    """folder of a small student of the model, whose guesses the model checks many at a time"""
    prompt: str = "What is a shepherd?"
    max_tokens: Count = 100
    num_draft_tokens: Whole = streamed_decode.SIZE - 1
    """guesses in the tree of one pass"""
    ignore_chat_template: bool = False
    """give the prompt as it is"""
    dry_run: bool = False
    """print bytes and memory, and stop"""


def _whole_bytes(checkpoint: Checkpoint, request: rounds.Request, limit: Budget) -> int:
    """Memory of the model whole in mlx-lm, whose step takes a fraction of a streamed one's time; 0
    where it does not fit, or where mlx-lm's kernels of packed weights are slower than this
    program's copies.
    """
    m = estimates.model_of(checkpoint)
    need = rounds.need_bytes(checkpoint, request)
    slow = m.shape.experts or (m.packed and not policy.keeps_packed())
    return 0 if slow or need + memory.process_bytes(limit.limit_bytes) > limit.limit_bytes else need


def _settled(
    s: Settings,
    checkpoint: Checkpoint,
    small: Checkpoint | None,
    ids: Sequence[int],
    ends: set[int],
    room: int | None,
    direct: bool,
) -> tuple[Iterator[list[int]], Callable[[], int]]:
    """(tokens, pass by pass; bytes read so far): of mlx-lm where room is None; else of a model read
    from disk as far as there is no room, with the guesses of a draft.
    """
    if room is None:
        model, _ = mlx_generate.open_model(checkpoint.path)
        stream.load_checked(model, f"{checkpoint.path}: ")
        tokens = mlx_generate.greedy(model, ids, s.max_tokens, where=str(checkpoint.path))
        return ([token] for token in tokens), lambda: checkpoint.nbytes
    big = stream.Stream(checkpoint, policy.compute_dtype(checkpoint), room, direct)
    guesser = stream.Stream(small, policy.compute_dtype(small), None) if small else None
    coming = streamed_decode.decode(big, ids, s.max_tokens, ends, guesser, s.num_draft_tokens + 1)
    return coming, lambda: big.reader.nbytes


def run(settings: Settings) -> dict[str, Any]:
    """The command: text to stdout as it is settled, its cost at the end."""
    s = settings
    policy.use(s.compute_dtype)
    cli.check_ranges(s)
    checkpoint = load.open_checkpoint(resolve.resolve_model(s.model).path)
    small = (
        comparison.same_vocabulary(checkpoint, load.open_checkpoint(s.draft_model))
        if s.draft_model
        else None
    )
    tokenizer = load.tokenizer(checkpoint.path)
    ids = mlx_generate.encode(tokenizer, s.prompt, s.ignore_chat_template)
    limit = memory.budget(s.budget_bytes)
    estimates.settle_precision(limit, checkpoint, *([small] if small else []))
    m = estimates.model_of(checkpoint)
    length = len(ids) + s.max_tokens
    beside = estimates.keys_bytes(m, length)
    if small:  # the draft stays whole, and keeps keys and values too
        draft = estimates.model_of(small)
        blocks = draft.shape.layers * draft.block_work + draft.slots_bytes
        beside += estimates.keys_bytes(draft, length) + draft.head_work + blocks
    rows = max(min(len(ids), streamed_decode.ROWS), s.num_draft_tokens + 1)
    plan = estimates.streamed_pass(
        "one pass", m, max(len(ids), rows), rows, length, spool=False, beside_bytes=beside
    )
    room = estimates.room(limit.limit_bytes, plan.peak_bytes)
    if (
        whole_bytes := 0
        if small
        else _whole_bytes(checkpoint, rounds.Request(len(ids), s.max_tokens), limit)
    ):
        plan = replace(plan, read_bytes=0, peak_bytes=whole_bytes)
        cli.say(f"the model is whole in memory, {gib(whole_bytes)} of {gib(limit.limit_bytes)}")
    else:
        cli.say(
            f"a pass reads {gib(plan.read_bytes)} in {gib(plan.peak_bytes)}; {gib(room)} are left "
            f"to keep some"
        )
    if s.dry_run:
        need = plan.peak_bytes + memory.process_bytes(limit.limit_bytes)
        sizes = {"read_bytes_per_pass": plan.read_bytes, "peak_bytes": need}
        return {
            **sizes,
            "budget_bytes": limit.limit_bytes,
            "check_failed": need > limit.limit_bytes,
        }
    estimates.fit(limit, plan, other=", or fewer --max-tokens or --num-draft-tokens")
    began = time.monotonic()
    peak = memory.Peak()
    tokens = list[int]()
    passes = 0
    text = ""
    with memory.limited(limit), progress.bar("generate", s.max_tokens) as show:
        ends = set(tokenizer.eos_token_ids)
        direct = checkpoint.nbytes > limit.limit_bytes
        settled, read = _settled(
            s, checkpoint, small, ids, ends, None if whole_bytes else room, direct
        )
        for new in settled:
            tokens += [t for t in new if t not in ends]
            passes += 1
            whole = tokenizer.decode(tokens)
            if not whole.endswith("\ufffd"):  # half of a letter waits for its other half
                print(whole[len(text) :], end="", flush=True)
                text = whole
            show(
                len(tokens),
                f"{len(tokens) / passes:.1f} tokens/pass  {gib(read() / max(1, len(tokens)))}/token",
            )
            if ends.intersection(new):
                break
    seconds = time.monotonic() - began
    whole = tokenizer.decode(tokens)
    print(whole[len(text) :])
    return {
        "text": whole,
        "tokens": len(tokens),
        "passes": passes,
        "tokens_per_pass": round(len(tokens) / max(passes, 1), 3),
        "read_bytes": read(),
        "peak_bytes": peak.nbytes,
        "budget_bytes": limit.limit_bytes,
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    cli.main(Settings, run)
