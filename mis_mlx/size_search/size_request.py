"""How large a distillation's student is to be: given, or for a search to choose.

What `distill` asks for, what it refuses, and what it does where nothing was said.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.hardware import memory
from mis_mlx.models.architectures import families
from mis_mlx.models.architectures.shape import ALL
from mis_mlx.models.architectures.sizes import attending, reads_in_order, shape_of, side_width
from mis_mlx.quantization import packed_format
from mis_mlx.size_search import candidates, shape_search
from mis_mlx.types import Budget, Checkpoint, MisError, gib

SCENARIO = "none"  # of students whose sizes are searched for
DEFAULT_LOSS = 0.1  # bits a byte that a run allows where nothing is said about sizes
GIVE_SIZES = "give sizes, such as --vocab 0.5x, and --target-bpw"  # where there is no search
# Settings that say how large the result is; formats other than affine have bits of their own.
SIZE_SETTINGS = ("student", "scenario", *ALL, "target_bpw", "q_mode")


@dataclass(frozen=True, kw_only=True)
class SizeRequest:
    """What a distillation says about its student's size.

    lose: bits per byte that it may lose. bytes: as --bytes. given: sizes, as flags. others: whether
    something else than these decides a size. quantizes: whether bits are to be chosen. limit: for
    memory.
    """

    lose: float | None
    bytes: str | None
    given: tuple[str, ...]
    others: bool
    quantizes: bool
    limit: Budget

    def flags(self, lose: float | None) -> str:
        """The flags that ask for a search, with this loss."""
        flags = []
        if lose is not None:
            flags.append(f"--lose {lose:g}")
        if self.bytes:
            flags.append(f"--bytes {self.bytes}")
        return " ".join(flags)


def request_of(asked: DistillFlags) -> SizeRequest:
    """What the flags of `distill` say about sizes."""
    given = []
    for name, value in asked.given.items():
        if name in SIZE_SETTINGS and (name, value) != ("q_mode", "affine"):
            given.append(f"--{name.replace('_', '-')} {value}")
    others = asked.vocab is not None or asked.target == "conditions"
    limit = memory.budget(asked.budget_bytes)
    return SizeRequest(
        lose=asked.lose,
        bytes=asked.bytes,
        given=tuple(given),
        others=others,
        quantizes=asked.quantize != 0,
        limit=limit,
    )


def unsearchable(config: Mapping[str, Any]) -> str:
    """Why a search refuses a model of this config; empty where it does not."""
    shape = shape_of(config)
    if shape.experts:
        return (
            "search supports dense models only, and --experts of prune and distill cuts a mixture "
            "of experts"
        )
    group = max(shape_search.GROUPS)
    for key, width in families.family(config).further_widths().items():
        if width % group:
            return (
                f"a search rounds in groups of {group} weights, which {key} ({width}) does "
                f"not divide by"
            )
    if attending(config) < shape.layers:  # matrices are of more widths than a shape says then
        try:
            packed_format.formats_of(config, shape_search.group_of(shape) or group)
        except MisError as error:
            return str(error).partition(":")[0]
    return ""


def allowed_loss(request: SizeRequest, teacher: Checkpoint) -> float | None:
    """The loss that a search is to keep within: as asked for, or the default.

    None where --bytes alone was given, and where there is no search: sizes were given, or a
    scenario gives them, which is said with the reason.
    """
    if request.lose is not None or request.bytes:
        return request.lose
    if request.given or request.others:
        return None
    why = unsearchable(teacher.config) or _undecided(teacher)
    if why:
        cli.say(f"nothing is cut, for no search measures what that costs: {why}: {GIVE_SIZES}")
        return None
    return DEFAULT_LOSS


def _undecided(teacher: Checkpoint) -> str:
    """Why there is no search for this teacher's sizes unasked; empty where there is one."""
    if not shape_search.group_of(shape_of(teacher.config)):
        return "the rows of this teacher's matrices are not divisible by 32"
    return ""


def streams(teacher: Checkpoint, limit: Budget) -> bool:
    """Whether every pass of a search reads this teacher from disk."""
    return 2 * teacher.nbytes > limit.limit_bytes


def why_whole_blocks(teacher: Checkpoint, limit: Budget) -> str:
    """Why a search that is told no axes leaves blocks as they are; empty where it cuts them."""
    kind = teacher.config["model_type"]
    if streams(teacher, limit):
        return f"the teacher ({gib(teacher.nbytes)}) is read from disk"
    if reads_in_order(teacher.config):
        return f"no student of a {kind} with fewer neurons was ever measured"
    if side_width(teacher.config):
        return f"most of a {kind} is tables with a row for each token"
    return ""


def unsearched(asked: DistillFlags) -> dict[str, Any]:
    """Settings of sizes where no search chooses them: the teacher's own where none was given."""
    request = request_of(asked)
    if request.given or request.others or asked.expected_loss is not None:
        return {}
    return {"scenario": SCENARIO}


def refuse_impossible(request: SizeRequest, flags: str, teacher: Checkpoint) -> None:
    """MisError where `flags` ask for a search that cannot be.

    Sizes are given beside it, or no search knows the teacher.
    """
    why = unsearchable(teacher.config)
    if why:
        raise MisError(f"{flags} cannot be searched for, because {why}: {GIVE_SIZES}")
    if request.given:
        taken = ", ".join(request.given)
        raise MisError(f"{flags} chooses sizes and bits: leave out {taken}, or {flags}")
    if request.bytes and not request.quantizes:
        raise MisError(
            f"{flags} chooses bits, but --quantize 0 turns them off: leave one of them out"
        )


def likely_student(config: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """The settings of a student such as a search chooses.

    Searches take tokens and bits first; where no tokens can go, bits alone. folder: of the model,
    if there is one, with its tokenizer; else this is taken for one that can be trimmed. Mixtures
    keep all tokens and experts, for there is no search.
    """
    rows = candidates.vocabularies(config, folder)
    if not rows or shape_of(config).experts:
        return {"scenario": SCENARIO}
    return {"scenario": SCENARIO, "vocab": str(rows[-1])}


def likely_sizes(teacher: Checkpoint) -> dict[str, Any]:
    """`likely_student`, which a --dry-run plans in place of a search's choice, and says so."""
    likely = likely_student(teacher.config, teacher.path)
    kept = "every token"
    if "vocab" in likely:
        kept = f"{int(likely['vocab']):,} tokens"
    cli.say(
        f"the plan below keeps every block and {kept}, as a search usually does; if a small "
        f"--bytes cuts blocks, repair and training take longer"
    )
    return likely
