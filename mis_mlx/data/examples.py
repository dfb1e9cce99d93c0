"""Rows to align with: conversations, text, or prompts with completions, pairs or checked answers.

Every row is judged before any is used; one MisError lists all faults by line number.

Personal data in them, e-mail addresses, telephone numbers, PESEL and NIP, can be replaced and
counted. A rule, not a guarantee: names and addresses of houses are not looked for. PESEL and NIP
must pass their checksums, so that other numbers stay; a telephone number must be written as one:
with +, in groups, with a Polish prefix.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mis_mlx.data import row_draw, rows, token_windows
from mis_mlx.storage.files import json_sha256
from mis_mlx.types import MisError

SHAPES: rows.Shapes = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "pair": ("prompt", "chosen", "rejected"),
    "answer": ("prompt", "answer"),
}
# with answers worked, right and wrong; task_files.py at bd583ffb made them
BUILT_IN = Path(__file__).parent / "tasks"
LICENSE_CHARACTERS = 500  # of a license file, kept as a note
PERSONAL: dict[str, str] = yaml.safe_load(
    (Path(__file__).parent / "personal.yaml").read_text("utf-8")
)
# token ids (T,) int32, loss_mask (T,) float32: 1 on tokens to be predicted
Sequenced = tuple[np.ndarray, np.ndarray]
PlacedRows = list[rows.Placed]


class Examples(NamedTuple):
    """Rows to train on and held-out ones.

    card: what they are, for the run and the model card. notes: what was done, in words.
    """

    train: Sequence[rows.Placed]
    valid: Sequence[rows.Placed]
    card: Mapping[str, Any]
    notes: Sequence[str]


def load(
    data: str | None,
    shapes: Sequence[str],
    license: str | None = None,
    scrub: bool = False,
    kinds: Sequence[str] = (),
    tokens: int = 0,
) -> Examples:
    """The rows of a folder with train.jsonl and perhaps valid.jsonl, in one of `shapes`.

    Without valid.jsonl a tenth of the prompts is held out, by hash. data None: generated tasks, of
    `kinds`. license: the user's words. scrub: replace personal data. tokens: that the training
    visits; a file too large to be used whole (data/row_draw) is read for so many. MisError lists
    bad rows, of those that are read.
    """
    folder = BUILT_IN
    source = "generated tasks"
    if data is not None:
        folder = Path(data).expanduser()
        source = folder.resolve().name  # not the path: it goes into model cards
    if not (folder / "train.jsonl").is_file():
        raise MisError(
            f"{folder} has no train.jsonl: --data takes a folder with one JSON object per line in "
            f"it"
        )
    train, problems, notes = _read(folder / "train.jsonl", shapes, tokens)
    valid: PlacedRows = []
    if (folder / "valid.jsonl").exists():
        valid, more_problems, more_notes = _read(folder / "valid.jsonl", shapes, tokens=0)
        problems += more_problems
        notes += more_notes
    rows.refuse(problems)
    if data is None and kinds:
        known = sorted({row["task"] for row, _ in train})
        unknown = sorted(set(kinds).difference(known))
        if unknown:
            raise MisError(
                f"there are no tasks called {unknown[0]}: known tasks: {', '.join(known)}"
            )
        train = _of_kinds(train, kinds)
        valid = _of_kinds(valid, kinds)
    if not valid:
        train, valid = _held_out(train)
        notes.append(
            f"no valid.jsonl: {len(valid)} rows of train are held out instead, by a hash of their "
            f"prompts"
        )
    removed: Counter[str] = Counter()
    if scrub:
        for part in (train, valid):
            part[:] = [(_scrubbed(row, removed), place) for row, place in part]
        counts = [f"{count} {kind}" for kind, count in removed.items()]
        listed = ", ".join(counts) or "no personal data"
        notes.append(f"replaced {listed}")
    license = license or _license(folder)
    if not license:
        license = "not stated"
        notes.append("no license or consent is stated for the data: name it with --data-license")
    total = f"{source}: {len(train)} training rows, {len(valid)} held out"
    card = {
        "source": source,
        "licence": license,
        "pii_removed": dict(removed),
        "train_rows": len(train),
        "valid_rows": len(valid),
    }
    return Examples(train, valid, card, [total, *notes])


def _of_kinds(tasks: PlacedRows, kinds: Sequence[str]) -> PlacedRows:
    return [(row, place) for row, place in tasks if row["task"] in kinds]


def _held_out(train: PlacedRows) -> tuple[PlacedRows, PlacedRows]:
    """(the others, the rows of a tenth of the prompts, by hash). MisError where none are left."""
    keys = []
    for row, _ in train:
        messages = row.get("messages", ())
        asked = [message for message in messages if message["role"] != "assistant"]
        keys.append(json_sha256(row.get("prompt", row.get("text", asked))))
    others, held_out = rows.split_off(train, keys)
    if not held_out:
        raise MisError(
            f"{len(others)} rows with {len(set(keys))} prompts, so nothing can be held out: add "
            f"valid.jsonl"
        )
    return others, held_out


def _read(
    path: Path,
    shapes: Sequence[str],
    tokens: int,
) -> tuple[PlacedRows, list[str], list[str]]:
    """(good rows of one file, the faults of the others, what was not read in words).

    A number as an answer becomes text. tokens: as in `load`.
    """
    wanted = {shape: SHAPES[shape] for shape in shapes}

    def fault(row: object) -> str | None:
        if isinstance(row, dict) and type(row.get("answer")) in (int, float):
            row["answer"] = str(row["answer"])
        why = rows.fault(row, wanted)
        if why:
            return why
        assert isinstance(row, dict)
        if "messages" in row:
            roles = [message["role"] for message in row["messages"]]
            if "assistant" not in roles:
                return "no message is the assistant's"
        if "chosen" in row and row["chosen"] == row.get("rejected"):
            return "chosen and rejected are the same"
        return None

    most_bytes = row_draw.drawn_bytes(tokens)
    lines = rows.drawn_lines(path, most_bytes)
    values = rows.parsed_lines(lines.items)
    good, problems = rows.judged(values, f"{path.name} line", fault)
    if not good and not problems:
        problems = [f"{path.name}: it has no rows"]
    return good, problems, lines.note(path.name)


def _license(folder: Path) -> str:
    """The beginning of a license file in the data's folder; empty where there is none."""
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"(?i)licen[cs]e(\.\w+)?", path.name) and path.is_file():
            words = path.read_text("utf-8", errors="replace").split()
            return " ".join(words)[:LICENSE_CHARACTERS]
    return ""


def _scrubbed(value: Any, removed: Counter[str]) -> Any:
    if isinstance(value, dict):
        return {scrub(key, removed): _scrubbed(part, removed) for key, part in value.items()}
    if isinstance(value, list):
        return [_scrubbed(part, removed) for part in value]
    if isinstance(value, str):
        return scrub(value, removed)
    # A number stays one, unless it is personal data.
    clean = scrub(str(value), removed)
    return value if clean == str(value) else clean


def is_pesel(text: str) -> bool:
    """Whether 11 digits are a PESEL: the checksum fits, and the first six are roughly a date."""
    weights = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)
    total = sum(weight * int(digit) for weight, digit in zip(weights, text, strict=True))
    month = int(text[2:4]) % 20
    day = int(text[4:6])
    return total % 10 == 0 and 1 <= month <= 12 and 1 <= day <= 31


def is_nip(text: str) -> bool:
    """Whether ten digits, hyphens and PL allowed, are a NIP: the checksum fits."""
    digits = [int(char) for char in text if char.isdigit()]
    weights = (6, 5, 7, 2, 3, 4, 5, 6, 7)
    total = sum(weight * digit for weight, digit in zip(weights, digits, strict=False))
    return any(digits) and total % 11 == digits[9]


def scrub(text: str, removed: Counter[str]) -> str:
    """`text` with "[e-mail]", "[PESEL]" and so on in place of data; `removed` counts by kind."""
    checks = {"PESEL": is_pesel, "NIP": is_nip}
    for kind, pattern in PERSONAL.items():
        valid = checks.get(kind, bool)
        matches = [match for match in re.finditer(pattern, text) if valid(match[0])]
        for match in reversed(matches):  # from the end, so that places before it stay right
            before = text[: match.start()]
            text = f"{before}[{kind}]{text[match.end() :]}"
            removed[kind] += 1
    return text


def encode(
    placed: Sequence[rows.Placed],
    tokenizer: Any,
    length: int,
    answers: Sequence[str] = (),
    *,
    mask_prompt: bool = True,
    limit: str = "",
) -> tuple[list[list[Sequenced]], int]:
    """(token sequences of every row, how many of these were cut at `length`).

    answers: keys of the row, each an answer to its prompt, which make a sequence each. Without them
    the row is a conversation, all of whose assistant's turns are learned, prompt/completion, or
    text, all of which is learned.
    MisError lists rows whose prompt fills the window and those the template refuses; limit: what
    it says of `length`.
    """
    limit = limit or f"--max-seq-length is {length}"
    token_windows.end_token(tokenizer)
    templated = getattr(tokenizer, "chat_template", None) is not None
    encoded = []
    cut = 0
    problems = []
    for row, place in placed:
        versions = [{"prompt": row["prompt"], "completion": row[key]} for key in answers]
        sequences: list[Sequenced] = []
        for version in versions or [row]:
            try:
                if "messages" in version or (templated and "prompt" in version):
                    ids, loss_mask = token_windows.conversation(version, tokenizer, mask_prompt)
                elif "prompt" in version:
                    ids, loss_mask = token_windows.plain(version, tokenizer, mask_prompt)
                else:
                    ((text, learned),) = token_windows.marked([version], tokenizer)
                    ids = text.tolist()
                    loss_mask = learned.tolist()
            # a template is a program that came with the model: it can raise anything
            except Exception as error:
                why = " ".join(str(error).split())[:80]
                problems.append(f"{place}: the chat template refuses it ({why})")
                break
            if not any(loss_mask[1:length]):
                taken = loss_mask.index(1) if 1 in loss_mask else len(ids)
                why = f"the prompt takes {taken} tokens, but {limit}"
                problems.append(f"{place}: {why}: no room is left for an answer")
                break
            cut += len(ids) > length
            kept = np.array(ids[:length], np.int32)
            sequences.append((kept, np.array(loss_mask[:length], np.float32)))
        encoded.append(sequences)
    rows.refuse(problems)
    return encoded, cut


def fingerprint(encoded: Iterable[Sequence[Sequenced]]) -> str:
    """sha256 of token ids and masks, in hex: the same on every machine."""
    digest = hashlib.sha256()
    for row in encoded:
        for ids, loss_mask in row:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i4").tobytes())
            digest.update(loss_mask.astype("<f4").tobytes())
    return digest.hexdigest()
