"""A tokenizer's folder as GGUF keeps it: pieces, scores, types, merges, special ids, chat template.

Writes into a `gguf.GGUFWriter`, not to disk. Follows llama.cpp's conversion/base.py."""

import hashlib
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mis_mlx.models.tokenizer_check import ROWS, read_json
from mis_mlx.types import MisError

# GGUF's token types
NORMAL = 1
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
# what llama.cpp's converter gives an added token, and a hole
ADDED_SCORE = -1000.0
NO_SCORE = -10000.0
Piece = tuple[str, float, int]  # text, score, type
# the last two change no cut
USUAL = ("use_regex", True), ("trim_offsets", True), ("trim_offsets", False)
# llama.cpp's pre-tokenizers: the text "probe"; "names", those of our families, by the sha256 of its
# ids. A vocabulary of one's own has another hash, but is cut by the same "rules": steps of
# tokenizer.json but for USUAL, ignore_merges.
KNOWN = read_json(Path(__file__).parent / "pre_tokenizers.json")


def add(writer: Any, folder: Path, size: int) -> list[str]:
    """Put the tokenizer into the writer, padded to `size` tokens, the rows of the embedding.
    Returns notes for people. The trap: an absent add_bos_token means true to llama.cpp for some
    pre-tokenizers, so it is always written.
    """
    import gguf  # which prune and distill do not need

    spec = read_json(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json")
    if not spec:
        raise MisError(
            f"{folder} has no tokenizer.json: copy the tokenizer files of the model it was made "
            f"from"
        )
    letter = _ids(folder, "a")  # also the library's own judgement of the file
    kind, pre, pieces, notes = _pieces(folder, spec)
    spm = kind == "llama"
    pieces |= _added(spec, spm)
    if (last := max(pieces)) >= size:
        raise MisError(
            f"{folder}: the tokenizer has token {last}, the embedding {size} rows: they are of two "
            f"models"
        )
    rows = [pieces.get(i, (f"[PAD{i}]", NO_SCORE, UNUSED)) for i in range(size)]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _, _ in rows])
    writer.add_token_types([type_ for _, _, type_ in rows])
    if spm:
        writer.add_token_scores([score for _, score, _ in rows])
    # Of SentencePiece's, Gemma's puts no space in front; its settings do not say so, and llama.cpp
    # would.
    space = settings.get(
        "add_prefix_space", any(pieces[i][0].startswith("▁") for i in letter) if spm else None
    )
    if isinstance(space, bool):
        writer.add_add_space_prefix(space)
    try:
        special = gguf.SpecialVocab(folder, load_merges=not spm, n_vocab=size)
    except ValueError as why:
        raise MisError(
            f"{folder}: the tokenizer's settings are damaged ({str(why)[:120]}): copy them again"
        ) from None
    if "bos" not in special.add_special_token:
        special.add_special_token["bos"] = letter[:1] == [special.special_token_ids.get("bos")]
    special.add_to_gguf(writer, quiet=True)
    return notes


def _pieces(folder: Path, spec: dict[str, Any]) -> tuple[str, str, dict[int, Piece], list[str]]:
    """(llama.cpp's kind of tokenizer, its pre-tokenizer, pieces by id without added ones, notes for
    people).
    """
    model = spec.get("model") or {}
    if (kind := model.get("type")) != "BPE":
        raise MisError(
            f"{folder}: a tokenizer of type {kind} has no place in a GGUF of these models: use "
            f"--format hf"
        )
    if not model.get("byte_fallback"):
        digest = hashlib.sha256(str(_ids(folder, KNOWN["probe"])).encode()).hexdigest()
        first = spec.get("pre_tokenizer") or {}
        every = first.get("pretokenizers") or [first]
        steps = [{k: v for k, v in step.items() if (k, v) not in USUAL} for step in every]
        rule = {"steps": steps, "ignore_merges": bool(model.get("ignore_merges"))}
        pre = KNOWN["names"].get(digest) or next(
            (r["name"] for r in KNOWN["rules"] if r == r | rule), None
        )
        # a trimmed vocabulary is cut by its parent's rules
        pre = read_json(folder / ROWS).get("pre_tokenizer") or pre
        pieces = {i: (text, 0.0, NORMAL) for text, i in model["vocab"].items()}
        unknown = (
            f"the pre-tokenizer is none that is known here by llama.cpp's hash "
            f"({digest[:12]}) or by its rules: "
        )
        unknown += "'default' is written, llama.cpp may cut numbers and punctuation differently"
        return "gpt2", pre or "default", pieces, [] if pre else [unknown]
    # SentencePiece's: llama.cpp joins the best-scored neighbours first, so the order of merges is
    # the score.
    ranks = {
        "".join(m.split(" ") if isinstance(m, str) else m): -float(n)
        for n, m in enumerate(model["merges"])
    }
    byte = re.compile(r"<0x[0-9A-Fa-f]{2}>").fullmatch
    pieces = {
        i: (t, ranks.get(t, 0.0), BYTE if byte(t) else NORMAL) for t, i in model["vocab"].items()
    }
    return "llama", "default", pieces, []


def pre_tokenizer(folder: Path) -> str | None:
    """llama.cpp's name for how a folder's byte-level tokenizer cuts text; None where it has
    none.
    """
    spec = read_json(folder / "tokenizer.json")
    named = (
        _pieces(folder, spec)[1] if (spec.get("model") or {}).get("type") == "BPE" else "default"
    )
    return None if named == "default" else named


def _ids(folder: Path, text: str) -> list[int]:
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    except Exception as error:  # the library raises bare Exception
        raise MisError(
            f"{folder}/tokenizer.json does not open ({str(error)[:120]}): copy it again"
        ) from None


def _added(spec: dict[str, Any], spm: bool) -> dict[int, Piece]:
    """Tokens that were added to the vocabulary; those that look special count as special, as in
    llama.cpp.
    """
    pieces = {}
    for token in spec.get("added_tokens") or ():
        text = token["content"]
        control = token.get("special") or re.fullmatch(
            r"<(\||｜).*\1>|<pad>|<mask>|<unused.*>", text, re.DOTALL
        )
        plain = text if control or not spm else text.replace("▁", " ")
        pieces[int(token["id"])] = (plain, ADDED_SCORE, CONTROL if control else USER_DEFINED)
    return pieces
