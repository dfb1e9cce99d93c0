"""Rows to align with: shapes, sentences with line numbers, splits, license, personal data,
tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx.data import examples
from mis_mlx.data.rows import Placed, Row
from mis_mlx.models.opening import load
from mis_mlx.types import Checkpoint, MisError

SHAPES = ("messages", "completion")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GOOD: dict[str, Row] = {
    "messages": {
        "messages": [{"role": "user", "content": "Ile?"}, {"role": "assistant", "content": "Dwa."}]
    },
    "completion": {"prompt": "Ile?", "completion": "Dwa."},
    "text": {"text": "Dwa."},
    "pair": {"prompt": "Ile?", "chosen": "Dwa.", "rejected": "Trzy."},
    "answer": {"prompt": "Ile?", "answer": "2"},
}
BAD: list[tuple[str, object]] = [
    ("completion", {"prompt": "Ile?", "completion": 2}),
    ("messages", {"messages": [{"role": "user", "content": "Ile?"}]}),  # nobody answers
    ("text", {"text": 2}),
    ("pair", {"prompt": "Ile?", "chosen": "Dwa."}),
    ("pair", {"prompt": "Ile?", "chosen": "Dwa.", "rejected": "Dwa."}),
    ("answer", {"prompt": "Ile?", "answer": None}),
]


def write(folder: Path, **files: list[object]) -> Path:
    """`train=[...]` becomes train.jsonl; text lines go in as they are."""
    for name, lines in files.items():
        text = "".join(
            f"{line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)}\n"
            for line in lines
        )
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(llama: Checkpoint) -> Any:
    """A byte-level tokenizer without a chat template."""
    return load.tokenizer(llama.path)


@pytest.mark.parametrize("shape", examples.SHAPES)
def test_rows_of_a_shape(shape: str, tmp_path: Path) -> None:
    """Good ones come back as they were; bad ones are named: how many, and the line."""
    good = GOOD[shape]
    found = examples.load(str(write(tmp_path, train=[good], valid=[good])), [shape])
    assert found.train == [(good, "train.jsonl line 1")]
    assert found.valid == [(good, "valid.jsonl line 1")]
    for row in [bad for kind, bad in BAD if kind == shape]:
        folder = write(tmp_path, train=[good, row], valid=[good])
        with pytest.raises(MisError, match=r"^1 rows .* train\.jsonl line 2: "):
            examples.load(str(folder), [shape])


def test_all_problems_come_in_one_sentence(tmp_path: Path) -> None:
    """Of both files, of every kind, ten of them in words and the others counted."""
    bad: list[object] = ["{not json", {"prompt": "a"}, '{"prompt": "\\ud800", "completion": "b"}']
    folder = write(
        tmp_path, train=[GOOD["completion"], *bad, *[{"x": i} for i in range(9)]], valid=["[]"]
    )
    with pytest.raises(MisError, match=r"^13 rows .* 3 more") as refused:
        examples.load(str(folder), SHAPES)
    assert str(refused.value).count("line ") == 10


@pytest.mark.parametrize("files", [{}, {"train": []}, {"train": [GOOD["completion"]] * 3}])
def test_what_cannot_be_trained_on(files: dict[str, list[object]], tmp_path: Path) -> None:
    """No file, no rows, nothing that could be held out."""
    with pytest.raises(MisError):
        examples.load(str(write(tmp_path, **files)), SHAPES)


def test_equal_prompts_stay_on_one_side(tmp_path: Path) -> None:
    """Without valid.jsonl a part is held out, the same every time, and no prompt is on both
    sides.
    """
    lines: list[object] = [
        {"prompt": f"Ile to {i % 40}?", "completion": f"{i}"} for i in range(120)
    ]
    folder = str(write(tmp_path, train=lines))
    one, other = (examples.load(folder, SHAPES) for _ in range(2))
    assert one == other
    assert len(one.train) + len(one.valid) == 120
    assert 1 <= len(one.valid) < 40
    assert not {row["prompt"] for row, _ in one.train} & {row["prompt"] for row, _ in one.valid}
    assert one.valid[0][1].startswith("train.jsonl line ")


def test_the_license_is_a_file_a_flag_or_missed(tmp_path: Path) -> None:
    """The flag wins; a file beside the data is read; neither is said."""
    folder = str(write(tmp_path, train=[GOOD["completion"]], valid=[GOOD["completion"]]))
    bare = examples.load(folder, SHAPES)
    assert bare.card["licence"] == "not stated"
    assert any("--data-license" in note for note in bare.notes)
    (tmp_path / "license.txt").write_text("CC BY 4.0,\nby the shepherds of Ochotnica")
    assert (
        examples.load(folder, SHAPES).card["licence"] == "CC BY 4.0, by the shepherds of Ochotnica"
    )
    assert examples.load(folder, SHAPES, "asked them all").card["licence"] == "asked them all"


def test_the_built_in_rows_are_of_every_shape_but_messages() -> None:
    """With a license; of the kinds asked for; there is no other kind."""
    for shape in ("completion", "pair", "answer"):
        found = examples.load(None, [shape])
        assert (len(found.train), len(found.valid), found.card["licence"]) == (
            400,
            320,
            "generated by mis_mlx, MIT",
        )
    some = examples.load(None, ["answer"], kinds=["bus", "logic"])
    assert {row["task"] for row, _ in (*some.train, *some.valid)} == {"bus", "logic"}
    assert len(some.train) == 160
    with pytest.raises(MisError, match="chess"):
        examples.load(None, ["answer"], kinds=["chess"])


def test_a_number_as_an_answer_becomes_text(tmp_path: Path) -> None:
    """{"answer": 2} is what many write."""
    rows = [{"prompt": "Ile?", "answer": number} for number in (2, 2.5)]
    found = examples.load(str(write(tmp_path, train=rows[:1], valid=rows[1:])), ["answer"])
    answers = [row["answer"] for row, _ in (*found.train, *found.valid)]
    assert answers == ["2", "2.5"]


PERSONAL = [
    ("pisz do jan.kowalski+owce@baca.com.pl.", "pisz do [e-mail].", {"e-mail": 1}),
    ("PESEL 44051401359, nie 44051401358", "PESEL [PESEL], nie 44051401358", {"PESEL": 1}),
    (
        "NIP: PL1234563218 i 123-456-32-18, ale 123-456-32-19",
        "NIP: [NIP] i [NIP], ale 123-456-32-19",
        {"NIP": 2},
    ),
    (
        "tel. +48 601 202 303 albo 601-202-303",
        "tel. [telephone] albo [telephone]",
        {"telephone": 2},
    ),
    ("(18) 207 12 34 w Nowym Targu", "[telephone] w Nowym Targu", {"telephone": 1}),
    ("call +44 20 7946 0958", "call [telephone]", {"telephone": 1}),
    # with what word processors write in place of blanks and hyphens, with dots, before a hyphen
    (
        "+48\u00a0601\u00a0202\u00a0303, 601\u2011202\u2011303",
        "[telephone], [telephone]",
        {"telephone": 2},
    ),
    ("+48.601.202.303, 601.202.303", "[telephone], [telephone]", {"telephone": 2}),
    ("44051401359- 123\u2011456\u201132\u201118-", "[PESEL]- [NIP]-", {"PESEL": 1, "NIP": 1}),
    ("44131401350, 1234563219", None, {}),  # a thirteenth month, a sum that fails
    ("00000000000", "[telephone]", {"telephone": 1}),
    ("1.2345678, +3.14159265, 2-44051401359, 10.0.0.127", None, {}),
    ("12 345 owiec, 100 200 zł, 7:05, 2026-11-25, 601 + 202 = 803", None, {}),
]


def test_personal_data_is_replaced_and_counted() -> None:
    """E-mail, telephone, PESEL, NIP; other numbers stay."""
    for text, wanted, counts in PERSONAL:
        removed: Counter[str] = Counter()
        assert examples.scrub(text, removed) == (text if wanted is None else wanted)
        assert removed == counts, text


def test_scrubbing_reaches_every_text_of_a_row(tmp_path: Path) -> None:
    """Prompts, answers, turns, and in calls what a setting is named and a number that is one; only
    when asked for.
    """
    arguments = {"a@b.pl": 44051401359, "count": 7, "whole": True}
    call = {"function": {"name": "find", "arguments": arguments}}
    turns = [{"role": role, "content": "a@b.pl"} for role in ("user", "assistant")]
    row = {"messages": [*turns, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    folder = str(
        write(tmp_path, train=[row, {"prompt": "a@b.pl?", "completion": "a@b.pl"}], valid=[row])
    )
    plain, clean = (examples.load(folder, SHAPES, scrub=asked) for asked in (False, True))
    assert plain.card["pii_removed"] == {}
    assert "@" in json.dumps(plain.train)
    assert "@" not in json.dumps([clean.train, clean.valid])
    assert clean.card["pii_removed"] == {"e-mail": 8, "PESEL": 2}
    told = clean.train[0][0]["messages"][-1]["tool_calls"][0]["function"]["arguments"]
    assert told == {"[e-mail]": "[PESEL]", "count": 7, "whole": True}


def split(*rows: Row) -> list[Placed]:
    """Rows in a file of their own."""
    return [(row, f"x.jsonl line {i}") for i, row in enumerate(rows, 1)]


def learned(sequence: examples.Sequenced, tokenizer: Any) -> str:
    """The text that is to be predicted."""
    ids, marks = sequence
    return tokenizer.decode([int(i) for i, mark in zip(ids, marks, strict=True) if mark])


def test_only_the_answer_is_learned_without_a_template(tokenizer: Any) -> None:
    """The prompt's tokens, a completion's, the end; all of them without the mask."""
    rows = split({"prompt": "if x:", "completion": " return y"})
    ((one,),), cut = examples.encode(rows, tokenizer, 64)
    assert cut == 0
    assert learned(one, tokenizer) == " return y<|endoftext|>"
    ((one,),), _ = examples.encode(rows, tokenizer, 64, mask_prompt=False)
    assert learned(one, tokenizer).endswith("if x: return y<|endoftext|>")
    assert one[1].all()


def test_all_of_a_text_is_learned(tokenizer: Any) -> None:
    """To its end, and cut like any row; a row with a prompt is no text, whatever else it has."""
    text = {"text": "if x: return y"}
    ((one,),), cut = examples.encode(split(text), tokenizer, 64)
    assert cut == 0
    assert learned(one, tokenizer) == "if x: return y<|endoftext|>"
    ((short,),), cut = examples.encode(split(text), tokenizer, 4)
    assert (len(short[0]), cut) == (4, 1)
    row = {"prompt": "if x:", "completion": " return y", **text}
    ((other,),), _ = examples.encode(split(row), tokenizer, 64)
    assert learned(other, tokenizer) == " return y<|endoftext|>"


def test_equal_texts_stay_on_one_side(tmp_path: Path) -> None:
    """Without a valid.jsonl, as equal prompts do."""
    rows: list[object] = [{"text": f"text {i // 2}"} for i in range(80)]
    found = examples.load(str(write(tmp_path, train=rows)), ["text"])
    sides = [{row["text"] for row, _ in part} for part in (found.train, found.valid)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_all_turns_of_the_assistant_are_learned(llama: Checkpoint) -> None:
    """By the chat template: nothing of what others said, and no header."""
    tokenizer = load.mlx_lm("utils").load_tokenizer(llama.path)  # its own: others share theirs
    tokenizer.chat_template = TEMPLATE
    said = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    ((one,),), _ = examples.encode(split(row), tokenizer, 128)
    assert learned(one, tokenizer) == "two<|endoftext|>four<|endoftext|>"


def test_pairs_share_their_prompt(tokenizer: Any) -> None:
    """Two sequences a row, alike up to the answers."""
    row = {"prompt": "if x:", "chosen": " a", "rejected": " b"}
    ((chosen, rejected),), _ = examples.encode(split(row), tokenizer, 64, ("chosen", "rejected"))
    prompt = int(np.argmax(chosen[1]))
    assert np.array_equal(chosen[0][:prompt], rejected[0][:prompt])
    assert prompt == int(np.argmax(rejected[1]))
    assert (learned(chosen, tokenizer), learned(rejected, tokenizer)) == (
        " a<|endoftext|>",
        " b<|endoftext|>",
    )


def test_a_prompt_that_fills_the_window_is_a_sentence(tokenizer: Any) -> None:
    """With its line, its tokens and the window; an answer that is cut is counted and taken."""
    rows = split(GOOD["completion"], {"prompt": "for " * 40, "completion": "x"})
    with pytest.raises(MisError, match="x.jsonl line 2: .*--max-seq-length is 16"):
        examples.encode(rows, tokenizer, 16)
    (_, (long,)), cut = examples.encode(
        split(GOOD["completion"], {"prompt": "if", "completion": "y " * 60}), tokenizer, 32
    )
    assert cut == 1
    assert len(long[0]) == len(long[1]) == 32


def test_the_fingerprint_sees_every_token_and_mark(tokenizer: Any) -> None:
    """The same twice, another for another token, mark or order."""
    rows = split(GOOD["completion"], {"prompt": "a", "completion": "b"})
    made, _ = examples.encode(rows, tokenizer, 64)
    ((ids, marks),), *rest = made
    others = (made[::-1], [[(ids + 1, marks)], *rest], [[(ids, 1 - marks)], *rest])
    seen = {examples.fingerprint(each) for each in (made, *others)}
    assert len(seen) == 4
    assert examples.fingerprint([list(row) for row in made]) in seen
