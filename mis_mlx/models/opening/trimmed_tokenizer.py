"""Trim a tokenizer.json to fewer tokens, exactly, and renumber ids in every file that names them.

Works for byte-level BPE, and for BPE or Unigram with byte fallback: with these, any text can still
be written in the tokens that are left. Ids are rows of the embedding. Does not know which tokens
are worth their row (pruning/vocabulary).
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mis_mlx.models.opening.tokenizer_check import ROWS, present, read_json
from mis_mlx.types import MisError

# Files that would repeat what tokenizer.json says.
REPLACED = ("tokenizer.model", "vocab.json", "merges.txt", ROWS)
# Tokens that no text was ever written with.
RESERVED = re.compile(r"<unused\d+>|<\|reserved_special_token_\d+\|>")
# Spaces too: SentencePiece's, written as bytes, would come back as ▁.
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>|▁+")
# Keys of config.json and generation_config.json whose values are ids.
ID_KEYS = re.compile(r"_token_ids?$|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$")
NAMES = ("additional_special_tokens", "extra_special_tokens")  # lists of tokens, by their text
# Settings of a BPE that are refused.
_REFUSED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


class Vocabulary:
    """The tokens of a model folder's tokenizer.json. MisError where it cannot be trimmed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.spec = read_json(folder / "tokenizer.json")
        model = self.spec.get("model") or {}
        self.unigram = model.get("type") == "Unigram"
        listed = model.get("vocab") or {}
        self.ids: dict[str, int] = {}
        if self.unigram:
            self.ids = {token: i for i, (token, _) in enumerate(listed)}
        else:
            self.ids = dict(listed)
        self._check(model)
        added_tokens = self.spec.get("added_tokens") or ()
        self.added = {token["content"]: int(token["id"]) for token in added_tokens}
        self.texts = {i: text for text, i in (self.ids | self.added).items()}
        self.pairs = [_pair(merge) for merge in model.get("merges") or ()]
        self._ranks = {pair: rank for rank, pair in enumerate(self.pairs)}
        joined = {left + right for left, right in self.pairs}
        self._joined = joined - self.added.keys()

    def _check(self, model: Mapping[str, Any]) -> None:
        """MisError where fewer tokens could not write every text."""
        kind = model.get("type")
        byte_level = '"ByteLevel"' in json.dumps(self.spec.get("pre_tokenizer"))
        has_bytes = byte_level or model.get("byte_fallback")
        unsupported = [key for key in _REFUSED if model.get(key)]
        if kind in ("BPE", "Unigram") and not unsupported and has_bytes:
            return
        reason = f"{unsupported[0]} in use" if unsupported else "without bytes to fall back on"
        why = f"its tokenizer (type {kind}, {reason})"
        remedy = "leave --vocab out"
        if not self.spec:
            why = "a model without a tokenizer.json"
            remedy = "copy the tokenizer files of the model it was made from"
        raise MisError(f"{self.folder}: the vocabulary of {why} cannot be trimmed: {remedy}")

    def parts(self, row: int) -> set[int]:
        """The row, and the rows of all tokens that BPE joins on its way to this one.

        They are the same wherever the token occurs in a text, because nothing was joined across its
        ends there.
        """
        text = self.texts.get(row, "")
        needed = {row}
        if text not in self._joined:
            return needed
        pieces = list(text)
        needed |= {self.ids[piece] for piece in pieces if piece in self.ids}
        no_merge = len(self.pairs)
        while len(pieces) > 1:
            ranks = [self._ranks.get(pair, no_merge) for pair in pairwise(pieces)]
            rank = min(ranks)
            # Merges do not lead to this token: only whole words become it (ignore_merges), or none.
            if rank == no_merge:
                break
            first = ranks.index(rank)
            joined = pieces[first] + pieces[first + 1]
            pieces[first : first + 2] = [joined]
            needed.add(self.ids[joined])
        return needed

    def needed(self, config: Mapping[str, Any]) -> set[int]:
        """Rows that no vocabulary may lack, with their parts.

        Bytes, the unknown token, special and other added tokens except reserved ones, and the
        tokens that the settings name. config: of config.json.
        """
        from tokenizers.pre_tokenizers import ByteLevel

        settings = read_json(self.folder / "tokenizer_config.json")
        named = [_text(value) for key, value in settings.items() if key.endswith("_token")]
        if self.spec["model"].get("byte_fallback"):
            rows = {i for text, i in self.ids.items() if BYTE.fullmatch(text)}
        else:
            rows = {self.ids[letter] for letter in ByteLevel.alphabet() if letter in self.ids}
        for text, i in self.added.items():
            if text in named or not RESERVED.fullmatch(text):
                rows.add(i)
        generation = read_json(self.folder / "generation_config.json")
        settings_ids: list[Any] = [self._unknown()]
        for key, value in chain(config.items(), generation.items()):
            if ID_KEYS.search(key):
                settings_ids.append(value)
        rows |= {i for i in _ids(settings_ids) if i in self.texts}
        return set().union(*map(self.parts, rows))

    def _unknown(self) -> int | None:
        """The unknown token's row; None: there is none."""
        model = self.spec["model"]
        if self.unigram:
            return model.get("unk_id")
        return self.ids.get(model.get("unk_token") or "")

    def chosen(self, needed: Collection[int], counts: np.ndarray, size: int) -> list[int]:
        """`size` rows, rising: those needed, then the most frequent, then the first merges.

        counts (V,): how often each row occurs. A token comes with its parts or not at all. Reserved
        tokens, and rows that are no token, come last.
        """

        by_count = np.argsort(-counts, kind="stable")
        frequent = by_count[: np.count_nonzero(counts)].tolist()
        merged = (self.ids[left + right] for left, right in self.pairs)
        words = [self.texts.get(row, "<unused0>") for row in range(len(counts))]
        rest = sorted(range(len(counts)), key=lambda row: bool(RESERVED.fullmatch(words[row])))
        rows = set(needed)
        for row in chain(frequent, merged, rest):
            if len(rows) == size:
                break
            if row in rows:
                continue
            missing = self.parts(row) - rows
            if len(missing) <= size - len(rows):
                rows |= missing
        return sorted(rows)

    def files(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the tokenizer's files for a model that has only these rows, rising."""
        new = {old: i for i, old in enumerate(rows)}
        for path in present(self.folder):
            if path.name in REPLACED:
                continue
            if path.suffix != ".json" or path.name.startswith("chat_template"):
                yield str(path.relative_to(self.folder)), path.read_bytes()
            elif path.name == "tokenizer.json":
                # Indented, it would take 300 MB for Gemma
                yield path.name, json.dumps(self._tokenizer(new), ensure_ascii=False).encode()
            else:
                settings = self._settings(path, new)
                yield path.name, json.dumps(settings, ensure_ascii=False, indent=2).encode()

    def _tokenizer(self, new: Mapping[int, int]) -> dict[str, Any]:
        """tokenizer.json with the tokens of `new`, {old id: new id}, alone."""
        model = dict(self.spec["model"])
        if self.unigram:
            model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
            model["unk_id"] = _moved(model.get("unk_id"), new, ids=True)
        else:
            vocab = _renumbered(self.ids, new)
            merges = []
            for merge, (left, right) in zip(model["merges"], self.pairs, strict=True):
                # A merge needs both its parts and the token that it makes.
                if vocab.keys() >= {left, right, left + right}:
                    merges.append(merge)
            model["vocab"] = vocab
            model["merges"] = merges
        added = []
        for token in self.spec.get("added_tokens") or ():
            if token["id"] in new:
                added.append({**token, "id": new[token["id"]]})
        spec = {**self.spec, "model": model, "added_tokens": added}
        for key in ("post_processor", "padding"):
            if key in spec:
                spec[key] = _moved(spec[key], new)
        return spec

    def _settings(self, path: Path, new: Mapping[int, int]) -> dict[str, Any]:
        """Any other JSON file of the tokenizer, without the tokens that are gone."""
        settings = moved_ids(read_json(path), new)
        gone = {text for text, i in self.added.items() if i not in new}
        if path.name == "added_tokens.json":
            return _renumbered(settings, new)
        decoder = settings.get("added_tokens_decoder")
        if decoder:
            kept = {int(i): token for i, token in decoder.items() if int(i) in new}
            settings["added_tokens_decoder"] = {str(new[i]): token for i, token in kept.items()}
        for key in NAMES:  # a name without a token would be added again, behind the last row
            if isinstance(settings.get(key), list):
                settings[key] = [token for token in settings[key] if _text(token) not in gone]
        return settings


def moved_ids(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A config.json or generation_config.json with ids renumbered by `new`, {old id: new id}."""
    moved = dict(settings)
    for key, value in settings.items():
        if ID_KEYS.search(key):
            moved[key] = _moved(value, new, ids=True)
    return moved


def _renumbered(ids: Mapping[str, int], new: Mapping[int, int]) -> dict[str, int]:
    """{text: new id} of the tokens that stay."""
    return {text: new[i] for text, i in ids.items() if i in new}


def _pair(merge: Any) -> tuple[str, ...]:
    """The two parts of a merge, which older files write as one text."""
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def _moved(part: Any, new: Mapping[int, int], *, ids: bool = False) -> Any:
    """A part of a settings file with its ids renumbered, at any depth.

    ids: whether numbers here are ids. In a post-processor or padding they are in {"ids": [2]},
    {"sep": ["</s>", 2]} and {"pad_id": 0}.
    """
    if isinstance(part, list):
        return [_moved(item, new, ids=ids) for item in part]
    if isinstance(part, dict):
        return {
            key: _moved(value, new, ids=key in ("ids", "sep", "cls", "pad_id"))
            for key, value in part.items()
        }
    if ids and type(part) is int:
        return new.get(part, part)
    return part


def _ids(part: Any) -> Iterator[int]:
    """Every number in lists of numbers, at any depth."""
    if isinstance(part, list):
        yield from chain.from_iterable(map(_ids, part))
    elif type(part) is int:
        yield part


def _text(token: Any) -> Any:
    """A token in tokenizer_config.json is its text, or an object that has it."""
    return token.get("content") if isinstance(token, dict) else token
