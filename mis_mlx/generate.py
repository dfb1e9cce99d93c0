"""Generate text, even with a model bigger than memory.

A pass reads all weights of a model that is bigger than memory. A draft guesses several tokens, and
one pass checks them all.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import token_windows, turns
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge import comparison
from mis_mlx.judge.speed import rounds
from mis_mlx.models.opening import load, resolve
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost
from mis_mlx.models.writing import streamed_batch, text_writer
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress
from mis_mlx.types import Budget, Checkpoint, Count, MisError, Within, gib


@dataclass(frozen=True)
class Settings(cli.Budgeted):
    """Decodes greedily: --budget and --draft-model change the speed, never the text."""

    model: str | None = None
    """folder or hub id; default: SmolLM2-135M-Instruct"""
    draft_model: str | None = None
    """folder of a small student of the model: it guesses tokens, and the model checks many at once;
    no gain where the model fits in memory
    """
    prompt: str = "What is a shepherd?"
    """what the model answers or continues"""
    messages: str | None = None
    """JSON list of {"role", "content"}: the turns of a chat before the prompt; - reads standard
    input
    """
    max_tokens: Count = 100
    """maximum tokens to generate"""
    num_draft_tokens: Annotated[int, Within(0, 16)] = 16
    """tokens guessed per pass"""
    ignore_chat_template: bool = False
    """use the prompt as it is"""
    dry_run: bool = False
    """show bytes and memory, and stop"""


def _prompt_ids(settings: Settings, checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """Token ids of the prompt, behind the turns of --messages.

    MisError where they and the answer exceed the model's context: nothing is cut.
    """
    if settings.messages is None:
        plain = settings.ignore_chat_template
        ids = token_windows.encode_prompt(settings.prompt, tokenizer, plain=plain, today=True)
    else:
        ids = _conversation_ids(settings, checkpoint, tokenizer)
    context = _context_tokens(checkpoint)
    need = len(ids) + settings.max_tokens
    if context and need > context:
        what = "The prompt has" if settings.messages is None else "The conversation has"
        why = (
            f"{what} {len(ids)} tokens and the answer may have {settings.max_tokens}, "
            f"but the context of {checkpoint.path.name} is {context} tokens"
        )
        raise MisError(f"{why}: shorten it, or lower --max-tokens")
    return ids


def _context_tokens(checkpoint: Checkpoint) -> int:
    """The tokens that the model was made for, prompt and answer together; 0: it does not say."""
    return int(checkpoint.config.get("max_position_embeddings") or 0)


def _conversation_ids(settings: Settings, checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """Token ids of all turns and the prompt through the chat template."""
    before = turns.read(settings.messages or turns.STDIN)
    if settings.ignore_chat_template or not tokenizer.has_chat_template:
        why = f"--messages needs a chat template, and {checkpoint.path.name} is used without one"
        raise MisError(f"{why}: leave --messages out, or take a model that has a template")
    asked = [*before, {"role": "user", "content": settings.prompt}]
    try:
        return token_windows.prompt_ids(asked, tokenizer, today=True)
    except Exception as error:  # a template is a program of the model's: it can raise anything
        why = f"the chat template of {checkpoint.path.name} refuses the conversation ({error})"
        raise MisError(f"{why}: leave --messages out") from error


def _whole_bytes(checkpoint: Checkpoint, request: rounds.Request, limit: Budget) -> int:
    """Memory of the whole model in mlx-lm, whose step takes a fraction of a streamed one's time.

    0 where it does not fit, or where mlx-lm's kernels of packed weights are slower than this
    program's copies.
    """
    m = model_of(checkpoint)
    need = rounds.need_bytes(checkpoint, request) + m.text_bytes
    if m.shape.experts or (m.packed and not precision.keeps_packed()):
        return 0
    fits = memory.needed_bytes(need) <= limit.limit_bytes
    return need if fits else 0


def _streamed_plan(
    settings: Settings,
    checkpoint: Checkpoint,
    draft: Checkpoint | None,
    prompt_tokens: int,
) -> StageCost:
    """What one pass of the model costs when its blocks are read from disk."""
    m = model_of(checkpoint)
    length = prompt_tokens + settings.max_tokens
    beside = m.text_bytes + pass_cost.texts_bytes(m, 1, length)
    if draft:  # the draft stays whole, and keeps keys and values too
        small = model_of(draft)
        blocks = small.shape.layers * small.block_work + small.slots_bytes
        beside += pass_cost.texts_bytes(small, 1, length) + small.head_work + blocks
    # A pass has the prompt, ROWS tokens of it at a time, or the guesses and the token before them.
    rows = max(min(prompt_tokens, streamed_batch.ROWS), settings.num_draft_tokens + 1)
    return pass_cost.streamed_pass(
        "one pass",
        m,
        tokens=max(prompt_tokens, rows),
        micro_tokens=rows,
        length=length,
        spool=False,
        beside_bytes=beside,
    )


def _generate(
    settings: Settings,
    checkpoint: Checkpoint,
    draft: Checkpoint | None,
    tokenizer: Any,
    *,
    ids: Sequence[int],
    limit: Budget,
    headroom_bytes: int | None,
) -> dict[str, Any]:
    """Print the text as it is settled; the command's result.

    headroom_bytes: as of `text_writer.opened`.
    """
    began = time.monotonic()
    peak = memory.Peak()
    tokens: list[int] = []
    passes = 0
    printed = ""
    with memory.limited(limit), progress.bar("generate", settings.max_tokens) as show:
        ends = set(tokenizer.eos_token_ids)
        direct = checkpoint.nbytes > limit.limit_bytes
        writer = text_writer.opened(checkpoint, headroom_bytes, direct=direct)
        guesser = None
        if draft:
            guesser = text_writer.opened(draft, None)
        guessed = settings.num_draft_tokens
        for new in writer.settled(ids, settings.max_tokens, ends, draft=guesser, guessed=guessed):
            tokens += [token for token in new if token not in ends]
            passes += 1
            text = tokenizer.decode(tokens)
            if not text.endswith("\ufffd"):  # half of a letter waits for its other half
                print(text[len(printed) :], end="", flush=True)
                printed = text
            # A model that is whole in memory was read once.
            read_bytes = writer.read_bytes or checkpoint.nbytes
            read_of_token = gib(read_bytes / max(1, len(tokens)))
            show(len(tokens), f"{len(tokens) / passes:.1f} tokens/pass  {read_of_token}/token")
    seconds = time.monotonic() - began
    text = tokenizer.decode(tokens)
    print(text[len(printed) :])
    return {
        "text": text,
        "tokens": len(tokens),
        "passes": passes,
        "tokens_per_pass": round(len(tokens) / max(passes, 1), 3),
        "read_bytes": writer.read_bytes or checkpoint.nbytes,
        "peak_bytes": peak.nbytes,
        "budget_bytes": limit.limit_bytes,
        "seconds": round(seconds, 2),
    }


def run(settings: Settings) -> dict[str, Any]:
    """The command: text to stdout as it is settled, its cost at the end."""
    cli.check_ranges(settings)
    checkpoint = load.open_checkpoint(resolve.resolve_model(settings.model).path)
    draft = None
    if settings.draft_model:
        draft = comparison.same_vocabulary(checkpoint, load.open_checkpoint(settings.draft_model))
        text_writer.check_draft(checkpoint, draft)
    limit = memory.budget(settings.budget_bytes)
    estimates.require_tokenizer(limit, model_of(checkpoint))
    tokenizer = load.tokenizer(checkpoint.path)
    ids = _prompt_ids(settings, checkpoint, tokenizer)
    checkpoint = estimates.settle_precision(limit, checkpoint)
    if draft:
        draft = estimates.settle_precision(limit, draft)
    plan = _streamed_plan(settings, checkpoint, draft, len(ids))
    headroom_bytes: int | None = None
    whole_bytes = 0
    if not draft:
        request = rounds.Request(len(ids), settings.max_tokens)
        whole_bytes = _whole_bytes(checkpoint, request, limit)
    if whole_bytes:
        plan = replace(plan, read_bytes=0, peak_bytes=whole_bytes)
        cli.say(f"the whole model is in memory, {gib(whole_bytes)} of {gib(limit.limit_bytes)}")
    else:
        headroom_bytes = memory.headroom_bytes(limit.limit_bytes, plan.peak_bytes)
        cli.say(
            f"a pass reads {gib(plan.read_bytes)} in {gib(plan.peak_bytes)}; {gib(headroom_bytes)} "
            f"are left for weights that stay in memory"
        )
    if settings.dry_run:
        need = memory.needed_bytes(plan.peak_bytes)
        return {
            "read_bytes_per_pass": plan.read_bytes,
            "peak_bytes": need,
            "budget_bytes": limit.limit_bytes,
            "check_failed": need > limit.limit_bytes,
        }
    estimates.require_fit(limit, plan, other=", or fewer --max-tokens or --num-draft-tokens")
    result = _generate(
        settings, checkpoint, draft, tokenizer, ids=ids, limit=limit, headroom_bytes=headroom_bytes
    )
    return {
        **result,
        "prompt_tokens": len(ids),
        "context_tokens": _context_tokens(checkpoint) or None,
    }


if __name__ == "__main__":
    cli.main(Settings, run)
