"""What gguf_export/vocab.py writes, read as llama.cpp does, cuts text as the tokenizer does."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mis_mlx.gguf_export import vocab
from mis_mlx.models.opening.pre_tokenizers import KNOWN
from mis_mlx.types import MisError
from tests import tiny

TEXT = "The with statement wraps the execution of a block: for x in y, if not z while 3 < 33."
PROBE_SHA256 = "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
NORMAL = 1
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6


def facts(folder: Path, size: int) -> tuple[dict[str, Any], list[str]]:
    """({key without `tokenizer.`: value}, notes)."""
    writer = GGUFWriter(None, "llama")
    notes = vocab.add(writer, folder, size)
    found = {
        k.removeprefix("tokenizer.").removeprefix("ggml."): v.value
        for k, v in writer.kv_data[0].items()
    }
    return found, notes


def greedy(text: str, f: dict[str, Any]) -> list[int]:
    """llama.cpp's SentencePiece (llm_tokenizer_spm): join the best-scored neighbours first."""
    ids = {token: i for i, token in enumerate(f["tokens"])}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (f["scores"][ids[a + b]], -i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in ids
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out: list[int] = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return out


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    """A folder with the tiny byte-level BPE of 512 tokens."""
    tiny.write_tokenizer(tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    """Put `changes` into a JSON file."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def test_bpe_cuts_text_as_the_original(bpe: Path) -> None:
    """Pieces and merges alone make the same tokenizer again; Polish and emoji come back."""
    f, _ = facts(bpe, 512)
    merges = [tuple(m.split(" ")) for m in f["merges"]]
    again = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(f["tokens"])}, merges=merges))
    again.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    again.decoder = decoders.ByteLevel()
    before = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    for text in (TEXT, "Zażółć gęślą jaźń 🦙, 832 m n.p.m."):
        assert again.encode(text).ids == before.encode(text).ids
        assert len(again.encode(text).ids) > 10
        assert again.decode(again.encode(text).ids) == text
    assert f["model"] == "gpt2"
    assert len(f["merges"]) > 100
    assert "scores" not in f


def test_types_and_special_ids(bpe: Path) -> None:
    """Added tokens that are special, or look it, are control, others user-defined."""
    spec = json.loads((bpe / "tokenizer.json").read_text())
    more = [{**spec["added_tokens"][0], "id": 512, "content": "<|x|>", "special": False}]
    more += [{**spec["added_tokens"][0], "id": 513, "content": "mountain", "special": False}]
    edit(bpe / "tokenizer.json", added_tokens=[*spec["added_tokens"], *more])
    edit(bpe / "tokenizer_config.json", pad_token="<|x|>", chat_template="{{ messages }}")
    f, _ = facts(bpe, 520)
    kinds = [f["token_type"][i] for i in (0, 1, 512, 513, 514)]
    assert kinds == [CONTROL, NORMAL, CONTROL, USER_DEFINED, UNUSED]
    assert f["tokens"][512:516] == ["<|x|>", "mountain", "[PAD514]", "[PAD515]"]
    assert len(f["tokens"]) == 520
    assert (f["bos_token_id"], f["eos_token_id"], f["padding_token_id"]) == (0, 0, 512)
    assert f["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("adds", [True, False])
def test_add_bos_is_what_the_tokenizer_does(bpe: Path, adds: bool) -> None:
    """Always written: llama.cpp's own guess differs. A setting overrules the file."""
    if adds:
        tokenizer = Tokenizer.from_file(str(bpe / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(
            "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        tokenizer.save(str(bpe / "tokenizer.json"))
    assert facts(bpe, 512)[0]["add_bos_token"] is adds
    # which transformers puts into force when it loads
    edit(bpe / "tokenizer_config.json", add_bos_token=not adds)
    assert facts(bpe, 512)[0]["add_bos_token"] is not adds


def test_pre_tokenizer_by_llama_cpps_hash(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known hash gives its name, then the rules do; else a note with it, and 'default'."""
    f, notes = facts(bpe, 512)
    assert f["pre"] == "gpt-2"
    assert notes == []
    spec = json.loads((bpe / "tokenizer.json").read_text())
    edit(bpe / "tokenizer.json", pre_tokenizer={**spec["pre_tokenizer"], "add_prefix_space": True})
    f, notes = facts(bpe, 512)
    ids = Tokenizer.from_file(str(bpe / "tokenizer.json")).encode(KNOWN["probe"]).ids
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    assert f["pre"] == "default"
    assert len(notes) == 1
    assert digest[:12] in notes[0]
    monkeypatch.setitem(KNOWN["names"], digest, "smollm")
    f, notes = facts(bpe, 512)
    assert f["pre"] == "smollm"
    assert notes == []


def test_the_probe_is_llama_cpps_to_the_letter() -> None:
    """The sha256 of the text in ggml-org/llama.cpp's conversion/base.py; one other letter would
    know no tokenizer.
    """
    assert hashlib.sha256(KNOWN["probe"].encode()).hexdigest() == PROBE_SHA256
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in KNOWN["names"])


def test_merges_with_byte_fallback_become_scores(tmp_path: Path) -> None:
    """Llama 2's: merges in order are scores in order; bytes and added tokens have their types."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator([topics["if"], topics["for"]], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"] |= {f"<0x{b:02X}>": 300 + b for b in range(256)}
    spec["added_tokens"].append(
        {**spec["added_tokens"][0], "id": 556, "content": "▁hello▁there", "special": False}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    edit(tmp_path / "tokenizer_config.json", add_prefix_space=False, add_bos_token=True)
    f, notes = facts(tmp_path, 560)
    before = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("if the statement is", "ż for"):
        assert greedy(text, f) == before.encode(text).ids
    assert f["model"] == "llama"
    assert f["pre"] == "default"
    assert notes == []
    kinds = [f["token_type"][i] for i in (1, 299, 300, 556, 557)]
    assert kinds == [CONTROL, NORMAL, BYTE, USER_DEFINED, UNUSED]
    assert f["tokens"][556] == " hello there"
    assert f["scores"][556:558] == [-1000.0, -10000.0]
    assert f["add_space_prefix"] is False
    assert f["add_bos_token"] is True
    edit(tmp_path / "tokenizer_config.json", add_prefix_space=None)
    assert "add_space_prefix" not in facts(tmp_path, 560)[0]
    for pre, space in (
        (pre_tokenizers.Metaspace(), True),
        (pre_tokenizers.Metaspace(prepend_scheme="never"), False),
    ):
        spec["pre_tokenizer"] = json.loads(pre.__getstate__())
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        (tmp_path / "tokenizer_config.json").write_text("{}")  # as Gemma's, which does not say
        assert facts(tmp_path, 560)[0]["add_space_prefix"] is space


def test_what_cannot_go_along_is_a_sentence(bpe: Path) -> None:
    """None, a foreign kind, damaged JSON, and one that is longer than the embedding."""

    def refused(why: str, size: int = 512) -> None:
        with pytest.raises(MisError, match=why):
            facts(bpe, size)

    refused("token 511, but the embedding has 500 rows", 500)
    edit(bpe / "config.json", pad_token_id=-1)
    refused("settings are damaged .*pad: -1")
    edit(bpe / "tokenizer.json", model={"type": "BPE"})
    refused("tokenizer.json does not open")
    for kind in (
        models.WordLevel({"a": 0}, unk_token="a"),
        models.Unigram([("<unk>", 0.0), ("a", -1.5)], unk_id=0),
    ):
        Tokenizer(kind).save(str(bpe / "tokenizer.json"))
        refused(f"of type {type(kind).__name__} has no place")
    (bpe / "tokenizer.json").write_text("{")
    refused("tokenizer.json: it is not valid JSON .* copy the tokenizer files again")
    (bpe / "tokenizer.json").unlink()
    refused("has no tokenizer.json")
