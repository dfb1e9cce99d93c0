"""How large a distillation's student is to be: given, or for a search to choose.

What `distill` asks for, what it refuses, and what it does where nothing was said.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.data import chat_template
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.architectures.shape import ALL
from mis_mlx.models.opening import load
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import packed_format
from mis_mlx.size_search import shape_search
from mis_mlx.types import Checkpoint, MisError

SCENARIO = "none"  # of students whose sizes are searched for
DEFAULT_LOSS = 0.1  # bits a byte that a run allows where nothing is said about sizes
TOOL_BPW = 4.0  # bits a weight, below which calls of tools were seen to drop (docs/compare.md)
GIVE_SIZES = "give sizes, such as --vocab 0.5x, and --target-bpw"  # where there is no search
# Shares of the teacher's rows that a search tries.
VOCABULARIES = "0.75x", "0.5x", "0.375x", "0.25x", "0.125x"
# Settings that say how large the result is.
SIZE_SETTINGS = ("student", "scenario", *ALL, "target_bpw")


def vocabularies(config: Mapping[str, Any], folder: Path | None) -> list[int]:
    """Numbers of rows that a student may have, apart from the teacher's own.

    These are shares of the teacher's rows, as far as its tokenizer allows. folder: where it is;
    None: it allows all of them.
    """
    rows = set[int]()
    all_rows = shape_of(config).vocab
    for share in VOCABULARIES:
        with suppress(MisError):
            rows.add(vocabulary.size(share, folder, all_rows))
    return sorted(rows - {all_rows})


def given_sizes(asked: DistillFlags) -> list[str]:
    """The flags that say how large the student is."""
    given = []
    for name, value in asked.given.items():
        if name in SIZE_SETTINGS:
            given.append(f"--{name.replace('_', '-')} {value}")
    return given


def unsearchable(config: Mapping[str, Any]) -> str:
    """Why a search refuses a model of this config; empty where it does not."""
    shape = shape_of(config)
    if shape.experts:
        return (
            "search supports dense models only, and --experts of prune and distill cuts a mixture "
            "of experts"
        )
    group = max(shape_search.GROUPS)
    for key, width in family(config).further_widths().items():
        if width % group:
            return (
                f"a search rounds in groups of {group} weights, which {key} ({width}) does "
                f"not divide by"
            )
    if (
        family(config).attending < shape.layers
    ):  # matrices are of more widths than a shape says then
        try:
            packed_format.formats_of(config, shape_search.group_of(shape) or group)
        except MisError as error:
            return str(error).partition(":")[0]
    if not shape_search.group_of(shape):
        return "the rows of this teacher's matrices are not divisible by 32"
    return ""


def asked_loss(asked: DistillFlags, teacher: Checkpoint) -> float | None:
    """The loss that a search is to keep within, in bits a byte: as asked for, or the default.

    None where --bytes alone was given, and where there is no search: sizes were given, or a
    scenario gives them, or it is said why. MisError where flags ask for a search that cannot be.
    """
    why = unsearchable(teacher.config)
    sizes = given_sizes(asked)
    if asked.lose is None and not asked.bytes:
        if sizes or asked.vocab is not None or asked.target == "conditions":
            return None
        if why:
            cli.say(f"nothing is cut, for no search measures what that costs: {why}: {GIVE_SIZES}")
            return None
        return DEFAULT_LOSS
    flags = flags_of(asked.lose, asked.bytes)
    if why:
        raise MisError(f"{flags} cannot be searched for, because {why}: {GIVE_SIZES}")
    if sizes:
        raise MisError(f"{flags} chooses sizes and bits: leave out {', '.join(sizes)}, or {flags}")
    if asked.bytes and not asked.quantize:
        raise MisError(
            f"{flags} chooses bits, but --quantize 0 turns them off: leave one of them out"
        )
    return asked.lose


def warn_of_few_bits(teacher: Checkpoint, bpw: float | None) -> None:
    """Say where a model that is told of tools gets so few bits a weight that its calls may suffer.

    Its loss on answers says nothing of them.
    """
    if (
        bpw is None
        or bpw >= TOOL_BPW
        or not chat_template.knows_tools(load.tokenizer(teacher.path))
    ):
        return
    cli.say(
        f"{bpw:.2f} bits a weight are few for calls of tools: Qwen2.5-Coder-0.5B answered 93 of "
        f"160 correctly, 88 in 4.5 bits and 76 in 3.5: for tools give --target-bpw 4.5, without "
        f"--lose and --bytes"
    )


def flags_of(lose: float | None, nbytes: str | None) -> str:
    """The flags that ask for a search: '--lose 0.1 --bytes 50MB'."""
    flags = []
    if lose is not None:
        flags.append(f"--lose {lose:g}")
    if nbytes:
        flags.append(f"--bytes {nbytes}")
    return " ".join(flags)


def sizes_of(
    asked: DistillFlags, teacher: Checkpoint, *, streams: bool
) -> dict[str, tuple[int, ...]]:
    """Sizes of every axis that are tried: tokens, and FFN where --bytes needs it.

    MisError where no student has so few bytes.
    """
    config = teacher.config
    vocab = vocabularies(config, teacher.path)
    sizes = shape_search.axis_sizes(config, vocab)
    if asked.vocab is not None:
        sizes["vocab"] = (vocabulary.rows_left(teacher, asked),)
    if not asked.bytes:
        return sizes
    most_bytes = cli.parse_bytes(asked.bytes, "--bytes")
    if shape_search.within(config, sizes, most_bytes):
        return sizes
    # No student with fewer neurons was measured where a family reads in order; where tokens have
    # rows of their own in each block, tables are most of a model.
    whole = streams or family(config).in_order or family(config).side_width
    if not whole:
        sizes = {**shape_search.axis_sizes(config, vocab, ffn=True), "vocab": sizes["vocab"]}
    if whole or not shape_search.within(config, sizes, most_bytes):
        raise shape_search.too_few_bytes(config, sizes, asked.bytes, most_bytes)
    cli.say("tokens and bits alone do not get that small: the FFN may be cut, too")
    return sizes


def unsearched(asked: DistillFlags) -> dict[str, Any]:
    """Settings of sizes where no search chooses them: the teacher's own where none was given."""
    others = asked.vocab is not None or asked.target == "conditions"
    if given_sizes(asked) or others or asked.expected_loss is not None:
        return {}
    return {"scenario": SCENARIO}


def likely_student(
    config: Mapping[str, Any],
    folder: Path | None,
    sizes: shape_search.Sizes | None = None,
    most_bytes: float = math.inf,
) -> dict[str, Any]:
    """The settings of a student such as a search chooses.

    Searches take a quarter of the tokens first; where no tokens can go, bits alone. folder: of the
    model, if there is one, with its tokenizer; else this is taken for one that can be trimmed.
    Mixtures keep all tokens and experts, for there is no search. sizes, most_bytes: of a search
    for bytes: the student of most neurons, then of most tokens in the usual bits or nearly so.
    """
    before = shape_of(config)
    if sizes is not None and math.isfinite(most_bytes):

        def rank(choice: shape_search.Choice) -> tuple[int, float, int]:
            return choice.shape.ffn, min(choice.bpw, shape_search.USUAL_BPW), choice.shape.vocab

        return max(shape_search.within(config, sizes, most_bytes), key=rank).flags(before)
    rows = vocabularies(config, folder)
    if not rows or before.experts:
        return {"scenario": SCENARIO}
    return {"scenario": SCENARIO, "vocab": str(rows[-1])}
