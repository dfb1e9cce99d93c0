"""Fewer tokens, exactly: what hangs together stays together, every id moves, any text can still be
written.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mis_mlx.models.opening import load, tokenizer_check, trimmed_tokenizer
from mis_mlx.models.opening.trimmed_tokenizer import Vocabulary
from mis_mlx.types import MisError
from tests import tiny

TEXT = (
    "The with statement wraps the execution of a block: for x in y, if not z while 3 < "
    "33.\n\n\tzażółć gęślą jaźń"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<unused0>", "<unused1>"]
CONFIG = {"bos_token_id": 1, "eos_token_id": [2, 1], "pad_token_id": -1, "vocab_size": 1500}


def byte_level(folder: Path) -> None:
    """1,024 tokens; three more added behind, the last of them reserved; a template before every
    text.
    """
    tiny.write_tokenizer(folder, 1024)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|reserved_special_token_7|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", None, [("<|im_start|>", 1024)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def sentencepiece(folder: Path, unigram: bool = False) -> None:
    """A BPE or a Unigram of about 900 tokens, 256 of them bytes, as transformers converts
    SentencePiece's. Of the BPE every longer token is also listed as joined from other parts, later.
    """
    from pydoc_data.topics import topics

    kind: Any = models.Unigram() if unigram else models.BPE(unk_token="<unk>")
    tokenizer = Tokenizer(kind)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer: Any = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    more = {"unk_token": "<unk>"} if unigram else {}
    tokenizer.train_from_iterator(
        [topics[name] for name in sorted(topics)[:30]],
        trainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False, **more),
    )
    spec = json.loads(tokenizer.to_str())
    spelled = [f"<0x{b:02X}>" for b in range(256)]
    model = spec["model"]
    count = len(SPECIAL)
    model["byte_fallback"] = True
    if unigram:
        model["vocab"][count:count] = [[text, 0.0] for text in spelled]
    else:
        tokens = [
            *SPECIAL,
            *spelled,
            *sorted(model["vocab"], key=model["vocab"].__getitem__)[count:],
        ]
        model["vocab"] = {text: i for i, text in enumerate(tokens)}
        model["fuse_unk"] = True
        learned = tokens[count + 256 :]
        known = set(learned)
        there = {tuple(merge) for merge in model["merges"]}
        for token in learned:
            for at in range(1, len(token)):
                pair = (token[:at], token[at:])
                if known.issuperset(pair) and pair not in there:
                    model["merges"].append(list(pair))
    spec["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


KINDS: dict[str, Callable[[Path], None]] = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "unigram": lambda folder: sentencepiece(folder, True),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of each kind that can be trimmed, made once; do not write into
    it.
    """
    made = tmp_path_factory.mktemp("trained")
    KINDS[request.param](made)
    return made


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return shutil.copytree(trained, tmp_path / "whole")


def opened(folder: Path) -> Tokenizer:
    """Its tokenizer.json, as the library opens it."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def trimmed(folder: Path, size: int | None = None, text: str = TEXT) -> tuple[Path, list[int]]:
    """(a folder with the tokenizer trimmed to `size` rows, or to what must stay and `text` uses;
    its rows).
    """
    whole = opened(folder)
    tokens = Vocabulary(folder)
    # three rows are no token
    counts = np.bincount(whole.encode(text).ids, minlength=whole.get_vocab_size() + 3)
    needed = tokens.needed(CONFIG)
    used = needed.union(*map(tokens.parts, np.flatnonzero(counts).tolist()))
    rows = tokens.chosen(needed, counts, size or len(used))
    out = folder.parent / f"of {len(rows)}"
    out.mkdir()
    for name, content in tokens.files(rows):
        (out / name).write_bytes(content)
    return out, rows


def strings(count: int) -> list[str]:
    """Text of all planes of Unicode, from all lengths; control characters, and spaces in a row."""
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        tops = rng.choices([128, 0x250, 0x3000, 0x11000, 0x20000], k=rng.randrange(24))
        letters = [rng.choice([rng.randrange(top), 32, 10, 0x142]) for top in tops]
        texts.append("".join(chr(c) for c in letters if not 0xD800 <= c < 0xE000))
    return texts


def test_text_that_chose_the_tokens_has_the_same_ones(folder: Path) -> None:
    """Trimmed to what a text uses, that text is cut where it was."""
    out, rows = trimmed(folder)
    ids, whole = opened(out).encode(TEXT).ids, opened(folder).encode(TEXT).ids
    assert len(rows) < 0.75 * opened(folder).get_vocab_size()
    assert [rows[i] for i in ids] == whole


def test_any_text_can_still_be_written(folder: Path) -> None:
    """Ten thousand strings come back from as few tokens as there can be, as they do from all of
    them.
    """
    small = opened(trimmed(folder, text="Afrykarium")[0])
    for text in strings(10_000):
        assert small.decode(small.encode(text).ids) == text


def test_the_parts_of_every_token_are_there(folder: Path) -> None:
    """Of BPE: whatever joins to a kept token is kept, in its order; no merge is of a token that
    left.
    """
    out, _ = trimmed(folder, 512)
    spec, whole = (json.loads((f / "tokenizer.json").read_text())["model"] for f in (out, folder))
    if spec["type"] == "Unigram":
        assert [p for p in whole["vocab"] if p in spec["vocab"]] == spec["vocab"]
        return
    assert sorted(spec["vocab"].values()) == list(range(len(spec["vocab"])))
    joined = [a + b for a, b in spec["merges"]]
    assert [m for m in whole["merges"] if m in spec["merges"]] == spec["merges"]
    for first, second in spec["merges"]:
        assert {first, second, first + second} <= spec["vocab"].keys()
    reachable = {a + b for a, b in whole["merges"]} & spec["vocab"].keys()
    assert reachable == set(joined)
    small = Tokenizer(models.BPE(spec["vocab"], [tuple(m) for m in spec["merges"]]))
    big = Tokenizer(models.BPE(whole["vocab"], [tuple(m) for m in whole["merges"]]))
    alone = [text for text in reachable if len(big.encode(text).ids) == 1]
    assert len(alone) > 50
    assert all(len(small.encode(text).ids) == 1 for text in alone)


def test_all_rows_are_the_identity(folder: Path) -> None:
    """Every file says what it said."""
    tokens = Vocabulary(folder)
    for name, content in tokens.files(range(2000)):
        assert json.loads(content) == json.loads((folder / name).read_text())


def test_rows_are_the_needed_the_frequent_and_then_the_first_merges(folder: Path) -> None:
    """A longer list holds the shorter one; reserved tokens and rows without a token come last."""
    tokens = Vocabulary(folder)
    total = opened(folder).get_vocab_size() + 3
    counts = np.bincount(opened(folder).encode(TEXT).ids, minlength=total)
    needed = tokens.needed(CONFIG)
    sizes = [tokens.chosen(needed, counts, size) for size in (total, total - 3, 600, 500)]
    assert list(map(len, sizes)) == [total, total - 3, 600, 500]
    assert sizes[0] == list(range(total))
    assert all(set(few) <= set(more) for more, few in pairwise(sizes))
    reserved = {i for text, i in tokens.added.items() if "nused" in text or "reserved" in text}
    assert reserved
    assert not reserved & set(sizes[2])
    assert needed <= set(sizes[3])


def test_ids_move_wherever_they_are(tmp_path: Path) -> None:
    """Post-processor, padding, settings of the tokenizer, of the model and of generation; a
    reserved token is named nowhere any more; what are no ids stay.
    """
    byte_level(tmp_path)
    tokenizer = opened(tmp_path)
    tokenizer.enable_padding(pad_id=1025, pad_token="<|im_end|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = ["<|im_start|>", {"content": "<|reserved_special_token_7|>"}]
    decoder = {str(i): {"content": text} for text, i in Vocabulary(tmp_path).added.items()}
    settings = {
        "eos_token": "<|im_end|>",
        "additional_special_tokens": names,
        "added_tokens_decoder": decoder,
    }
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "model_max_length": 1024})
    )
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<|im_end|>": 1025, "<|reserved_special_token_7|>": 1026})
    )
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    (tmp_path / "vocab.json").write_text("{}")
    generation = {
        "eos_token_id": [1025, 0],
        "suppress_tokens": [1024, 300],
        "max_length": 1024,
        "pad_token_id": None,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokens = Vocabulary(tmp_path)
    rows = tokens.chosen(tokens.needed(CONFIG), np.zeros(1027, int), 512)
    files = {name: json.loads(c) for name, c in tokens.files(rows) if name.endswith(".json")}
    start = 510
    end = 511
    assert [rows[start], rows[end]] == [1024, 1025]
    assert 300 in rows
    assert [(t["content"], t["id"]) for t in files["tokenizer.json"]["added_tokens"]] == [
        ("<|endoftext|>", 0),
        ("<|im_start|>", start),
        ("<|im_end|>", end),
    ]
    assert files["tokenizer.json"]["post_processor"]["special_tokens"]["<|im_start|>"]["ids"] == [
        start
    ]
    assert (files["tokenizer.json"]["padding"]["pad_id"], files["added_tokens.json"]) == (
        end,
        {"<|im_end|>": end},
    )
    assert files["tokenizer_config.json"]["additional_special_tokens"] == ["<|im_start|>"]
    assert files["tokenizer_config.json"]["added_tokens_decoder"].keys() == {
        "0",
        str(start),
        str(end),
    }
    assert files["tokenizer_config.json"]["model_max_length"] == 1024
    assert files["generation_config.json"] == {
        **generation,
        "eos_token_id": [end, 0],
        "suppress_tokens": [start, rows.index(300)],
    }
    new = {old: i for i, old in enumerate(rows)}
    moved = trimmed_tokenizer.moved_ids(
        {**CONFIG, "eos_token_id": [1025, 0], "hidden_size": 64}, new
    )
    assert moved == {**CONFIG, "bos_token_id": new[1], "eos_token_id": [end, 0], "hidden_size": 64}
    assert "chat_template.jinja" in dict(tokens.files(rows))
    assert "vocab.json" not in files
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|im_end|>", 1025), ("<|im_start|>", 1024)
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    processor = json.loads(dict(Vocabulary(tmp_path).files(rows))["tokenizer.json"])[
        "post_processor"
    ]
    assert (processor["sep"], processor["cls"]) == (["<|im_end|>", end], ["<|im_start|>", start])


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_stock_readers_have_the_same_ids(tmp_path: Path, kind: str) -> None:
    """transformers and mlx-lm, of 200 odd texts."""
    from transformers import AutoTokenizer

    (tmp_path / "whole").mkdir()
    KINDS[kind](tmp_path / "whole")
    out, _ = trimmed(tmp_path / "whole", 600)
    config = {**tiny.CONFIG, "vocab_size": 600}
    (out / "config.json").write_text(json.dumps(config))
    tokenizer_check.check_tokenizer(out)
    readers = [AutoTokenizer.from_pretrained(out), load.mlx_lm("utils").load_tokenizer(out)]
    for text in strings(200):
        assert [opened(out).encode(text).ids] * 2 == [reader.encode(text) for reader in readers]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 0}}},
            r"tokenizer \(type WordLevel, without bytes",
        ),
        (
            {"pre_tokenizer": None},
            r"\(type BPE, without bytes to fall back on\) cannot be trimmed: leave --vocab out",
        ),
        (
            {"model": {"type": "BPE", "dropout": 0.1, "vocab": {}, "merges": []}},
            r"\(type BPE, dropout in use\)",
        ),
        (None, r"a model without a tokenizer.json cannot be trimmed: copy the tokenizer files"),
    ],
)
def test_another_kind_is_refused(tmp_path: Path, change: dict[str, Any] | None, why: str) -> None:
    """One sentence: which kind, and what to do."""
    byte_level(tmp_path)
    path = tmp_path / "tokenizer.json"
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(MisError, match=why):
        Vocabulary(tmp_path)
