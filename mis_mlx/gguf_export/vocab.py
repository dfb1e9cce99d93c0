"""A tokenizer's folder as GGUF keeps it: pieces, scores, types, merges, special ids, chat template.

Writes into a `gguf.GGUFWriter`, not to disk. Follows llama.cpp's conversion/base.py."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mis_mlx.models.opening.pre_tokenizers import known, token_ids
from mis_mlx.models.opening.tokenizer_check import read_json
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
LOOKS_SPECIAL = re.compile(r"<(\||｜).*\1>|<pad>|<mask>|<unused.*>", re.DOTALL)
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "▁"  # SentencePiece's


def add(writer: Any, folder: Path, size: int) -> list[str]:
    """Put the tokenizer into the writer, padded to `size` tokens, the rows of the embedding.

    Returns notes for people. The trap: an absent add_bos_token means true to llama.cpp for some
    pre-tokenizers, so it is always written.
    """
    spec = read_json(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json")
    if not spec:
        raise MisError(
            f"{folder} has no tokenizer.json: copy the tokenizer files of the model it was made "
            f"from"
        )
    letter = token_ids(folder, "a")  # also the library's own judgement of the file
    kind, pre, pieces, notes = _pieces(folder, spec)
    sentencepiece = kind == "llama"
    # llama.cpp's gemma4 joins such pieces by their merges, not by scores.
    merged = sentencepiece and writer.arch == "gemma4"
    pieces |= _added(spec, sentencepiece)
    last = max(pieces)
    if last >= size:
        raise MisError(
            f"{folder}: the tokenizer has token {last}, but the embedding has {size} rows: they "
            f"belong to different models"
        )
    rows = [pieces.get(i, (f"[PAD{i}]", NO_SCORE, UNUSED)) for i in range(size)]
    writer.add_tokenizer_model("gemma4" if merged else kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _, _ in rows])
    writer.add_token_types([type_ for _, _, type_ in rows])
    space = settings.get("add_prefix_space")
    if sentencepiece:
        writer.add_token_scores([score for _, score, _ in rows])
        # Gemma's puts no space in front; its settings do not say so, and llama.cpp would.
        if "add_prefix_space" not in settings:
            space = any(pieces[i][0].startswith(SPACE) for i in letter)
    if isinstance(space, bool):
        writer.add_add_space_prefix(space)
    _add_special(writer, folder, size, letter, load_merges=merged or not sentencepiece)
    return notes


def _add_special(
    writer: Any,
    folder: Path,
    size: int,
    letter: list[int],
    *,
    load_merges: bool,
) -> None:
    """Special ids, chat template and merges. letter: ids of a text, which show a start token."""
    import gguf  # which prune and distill do not need

    try:
        special = gguf.SpecialVocab(folder, load_merges=load_merges, n_vocab=size)
    except ValueError as why:
        raise MisError(
            f"{folder}: the tokenizer's settings are damaged ({str(why)[:120]}): copy them again"
        ) from None
    if "bos" not in special.add_special_token:
        start = special.special_token_ids.get("bos")
        special.add_special_token["bos"] = letter[:1] == [start]
    special.add_to_gguf(writer, quiet=True)


def _pieces(folder: Path, spec: dict[str, Any]) -> tuple[str, str, dict[int, Piece], list[str]]:
    """(llama.cpp's kind of tokenizer, its pre-tokenizer, pieces by id, notes for people).

    Added tokens are not among the pieces.
    """
    model = spec.get("model") or {}
    kind = model.get("type")
    if kind != "BPE":
        raise MisError(
            f"{folder}: a tokenizer of type {kind} has no place in a GGUF of these models: use "
            f"--format hf"
        )
    if model.get("byte_fallback"):
        return "llama", "default", _sentencepiece_pieces(model), []
    pre, digest = known(folder, spec)
    notes = []
    if not pre:
        notes.append(
            f"the pre-tokenizer is not known here by llama.cpp's hash ({digest[:12]}) or by its "
            f"rules, so 'default' is written: llama.cpp may split numbers and punctuation "
            f"differently"
        )
    pieces = {i: (text, 0.0, NORMAL) for text, i in model["vocab"].items()}
    return "gpt2", pre or "default", pieces, notes


def _sentencepiece_pieces(model: Mapping[str, Any]) -> dict[int, Piece]:
    """Pieces by id, with scores by the order of merges: llama.cpp joins the best-scored first."""
    scores = {}
    for number, merge in enumerate(model["merges"]):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        scores["".join(parts)] = -float(number)
    pieces = {}
    for text, i in model["vocab"].items():
        type_ = BYTE if BYTE_PIECE.fullmatch(text) else NORMAL
        pieces[i] = (text, scores.get(text, 0.0), type_)
    return pieces


def _added(spec: dict[str, Any], sentencepiece: bool) -> dict[int, Piece]:
    """Tokens added to the vocabulary; those that look special count as special, as in llama.cpp."""
    pieces = {}
    for token in spec.get("added_tokens") or ():
        text = token["content"]
        type_ = USER_DEFINED
        if token.get("special") or LOOKS_SPECIAL.fullmatch(text):
            type_ = CONTROL
        elif sentencepiece:
            text = text.replace(SPACE, " ")
        pieces[int(token["id"])] = (text, ADDED_SCORE, type_)
    return pieces
