"""Rows to align with: conversations, prompts with completions, with chosen and rejected answers,
with checked ones.

Every row is judged before any is used; what is wrong is listed by line number in one MisError.

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

from mis_mlx.data import rows, token_windows
from mis_mlx.storage.files import json_sha256
from mis_mlx.types import MisError

SHAPES: rows.Shapes = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "pair": ("prompt", "chosen", "rejected"),
    "answer": ("prompt", "answer"),
}
# with answers worked, right and wrong; benchmarks/task_files.py made them
BUILT_IN = Path(__file__).parent / "tasks"
LICENCE_CHARACTERS = 500  # of a licence file, kept as a note
PERSONAL: dict[str, str] = yaml.safe_load(
    (Path(__file__).parent / "personal.yaml").read_text("utf-8")
)
# token ids (T,) int32, learn (T,) float32: 1 on tokens to be predicted
Sequenced = tuple[np.ndarray, np.ndarray]


class Examples(NamedTuple):
    """Rows to train on and held-out ones; for the run and the model card what they are; and what
    was done, in words.
    """

    train: Sequence[rows.Placed]
    valid: Sequence[rows.Placed]
    card: Mapping[str, Any]
    notes: Sequence[str]


def load(
    data: str | None,
    shapes: Sequence[str],
    licence: str | None = None,
    scrub: bool = False,
    kinds: Sequence[str] = (),
) -> Examples:
    """The rows of a folder with train.jsonl and perhaps valid.jsonl (else a tenth of the prompts is
    held out, by hash), in one of `shapes`; None: generated tasks, of `kinds`. licence: what the
    user says. scrub: replace personal data.
    """
    folder = BUILT_IN if data is None else Path(data).expanduser()
    if not (folder / "train.jsonl").is_file():
        raise MisError(
            f"{folder} has no train.jsonl: --data takes a folder with one JSON object per line in "
            f"it"
        )
    # not the path: it goes into model cards
    source = "generated tasks" if data is None else folder.resolve().name
    train, problems = _read(folder / "train.jsonl", shapes)
    valid = list[rows.Placed]()
    notes = list[str]()
    if (folder / "valid.jsonl").exists():
        valid, more = _read(folder / "valid.jsonl", shapes)
        problems += more
    rows.refuse(problems)
    if data is None and kinds:
        known = sorted({row["task"] for row, _ in train})
        if unknown := sorted(set(kinds).difference(known)):
            raise MisError(f"there are no tasks called {unknown[0]}: known are {', '.join(known)}")
        train, valid = ([one for one in part if one[0]["task"] in kinds] for part in (train, valid))
    if not valid:
        asked = (
            [m for m in row.get("messages", ()) if m["role"] != "assistant"] for row, _ in train
        )
        keys = [
            json_sha256(row.get("prompt", other))
            for (row, _), other in zip(train, asked, strict=True)
        ]
        train, valid = rows.split_off(train, keys)
        if not valid:
            raise MisError(
                f"{len(train)} rows with {len(set(keys))} prompts: nothing can be held out: add "
                f"valid.jsonl"
            )
        notes.append(
            f"no valid.jsonl: {len(valid)} rows of train are held out for it, by hash of their "
            f"prompts"
        )
    removed: Counter[str] = Counter()
    if scrub:
        train, valid = (
            [(_scrubbed(row, removed), at) for row, at in part] for part in (train, valid)
        )
        notes.append(
            "replaced "
            + (", ".join(f"{n} {kind}" for kind, n in removed.items()) or "no personal data")
        )
    if not (licence := licence or _licence(folder)):
        licence = "not stated"
        notes.append("no licence or consent is stated for the data: name it with --data-licence")
    notes.insert(0, f"{source}: {len(train)} rows to train on, {len(valid)} held out")
    card = {"source": source, "licence": licence, "pii_removed": dict(removed)}
    return Examples(
        train, valid, {**card, "train_rows": len(train), "valid_rows": len(valid)}, notes
    )


def _read(path: Path, shapes: Sequence[str]) -> tuple[list[rows.Placed], list[str]]:
    """(good rows, what is wrong with the others) of one file; a number as an answer is text."""

    def fault(row: object) -> str | None:
        if isinstance(row, dict) and type(row.get("answer")) in (int, float):
            row["answer"] = str(row["answer"])
        if why := rows.fault(row, {shape: SHAPES[shape] for shape in shapes}):
            return why
        assert isinstance(row, dict)
        if "messages" in row and not any(m["role"] == "assistant" for m in row["messages"]):
            return "no message is the assistant's"
        return (
            "chosen and rejected are the same"
            if "chosen" in row and row["chosen"] == row.get("rejected")
            else None
        )

    good, problems = rows.judged(rows.parsed(path), f"{path.name} line", fault)
    return good, problems if good or problems else [f"{path.name}: it has no rows"]


def _licence(folder: Path) -> str:
    """The beginning of a licence file beside the data; empty where there is none."""
    files = sorted(
        p
        for p in folder.iterdir()
        if re.fullmatch(r"(?i)licen[cs]e(\.\w+)?", p.name) and p.is_file()
    )
    return (
        " ".join(files[0].read_text("utf-8", errors="replace").split())[:LICENCE_CHARACTERS]
        if files
        else ""
    )


def _scrubbed(value: Any, removed: Counter[str]) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(part, removed) for key, part in value.items()}
    if isinstance(value, list):
        return [_scrubbed(part, removed) for part in value]
    return scrub(value, removed) if isinstance(value, str) else value


def is_pesel(text: str) -> bool:
    """Whether 11 digits are a PESEL: the checksum fits, and the first six are a day of the
    calendar, roughly.
    """
    total = sum(w * int(d) for w, d in zip((1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1), text, strict=True))
    return total % 10 == 0 and 1 <= int(text[2:4]) % 20 <= 12 and 1 <= int(text[4:6]) <= 31


def is_nip(text: str) -> bool:
    """Whether ten digits, hyphens and PL allowed, are a NIP: the checksum fits."""
    digits = [int(c) for c in text if c.isdigit()]
    total = sum(w * d for w, d in zip((6, 5, 7, 2, 3, 4, 5, 6, 7), digits, strict=False))
    return any(digits) and total % 11 == digits[9]


def scrub(text: str, removed: Counter[str]) -> str:
    """`text` with "[e-mail]", "[PESEL]" and so on in their places; `removed` counts them by
    kind.
    """
    for kind, pattern in PERSONAL.items():
        valid = {"PESEL": is_pesel, "NIP": is_nip}.get(kind, bool)
        for match in reversed([m for m in re.finditer(pattern, text) if valid(m[0])]):
            text = f"{text[: match.start()]}[{kind}]{text[match.end() :]}"
            removed[kind] += 1
    return text


def encode(
    placed: Sequence[rows.Placed],
    tokenizer: Any,
    length: int,
    answers: Sequence[str] = (),
    mask_prompt: bool = True,
) -> tuple[list[list[Sequenced]], int]:
    """(token sequences of every row, how many of these were cut at `length`). answers: keys of the
    row that are each an answer to its prompt, and make a sequence each; none: the row is a
    conversation, all of whose assistant's turns are learned, or prompt/completion. MisError lists
    rows whose prompt fills the window and those the template refuses.
    """
    token_windows.end_of(tokenizer)
    templated = getattr(tokenizer, "chat_template", None) is not None
    encoded = list[list[Sequenced]]()
    cut = 0
    problems = list[str]()
    for row, at in placed:
        sequences = list[Sequenced]()
        for one in [{"prompt": row["prompt"], "completion": row[key]} for key in answers] or [row]:
            try:
                how = (
                    token_windows.conversation
                    if templated or "messages" in one
                    else token_windows.plain
                )
                ids, learn = how(one, tokenizer, mask_prompt)
            # a template is a program that came with the model: it can raise anything
            except Exception as error:
                problems.append(
                    f"{at}: the chat template refuses it ({' '.join(str(error).split())[:80]})"
                )
                break
            if not any(learn[1:length]):
                taken = next((i for i, flag in enumerate(learn) if flag), len(ids))
                why = f"the prompt takes {taken} tokens, --max-seq-length is {length}"
                problems.append(f"{at}: {why}: no answer is left")
                break
            cut += len(ids) > length
            sequences.append(
                (np.array(ids[:length], np.int32), np.array(learn[:length], np.float32))
            )
        encoded.append(sequences)
    rows.refuse(problems)
    return encoded, cut


def fingerprint(encoded: Iterable[Sequence[Sequenced]]) -> str:
    """sha256 of token ids and masks, in hex: the same on every machine."""
    digest = hashlib.sha256()
    for row in encoded:
        for ids, learn in row:
            digest.update(
                len(ids).to_bytes(8, "little")
                + ids.astype("<i4").tobytes()
                + learn.astype("<f4").tobytes()
            )
    return digest.hexdigest()
