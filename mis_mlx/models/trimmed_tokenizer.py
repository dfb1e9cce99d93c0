"""A tokenizer.json of fewer tokens, exactly: what hangs together, what must stay, and every file
that names ids.

For byte-level BPE, and for BPE or Unigram with byte fallback: there any text can still be written
with what is left. Ids are rows of the embedding. Does not know which tokens are worth their row
(pruning/vocabulary).
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mis_mlx.models.tokenizer_check import ROWS, present, read_json
from mis_mlx.types import MisError

# would say again what tokenizer.json says
REPLACED = ("tokenizer.model", "vocab.json", "merges.txt", ROWS)
# tokens that no text was ever written with
RESERVED = re.compile(r"<unused\d+>|<\|reserved_special_token_\d+\|>")
# spaces too: SentencePiece's, written as bytes, would come back as ▁
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>|▁+")
# of config.json's kind
ID_KEYS = re.compile(r"_token_ids?$|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$")
NAMES = ("additional_special_tokens", "extra_special_tokens")  # lists of tokens, by their text


class Vocabulary:
    """The tokens of a model folder's tokenizer.json. MisError where these cannot be fewer."""

    def __init__(self, folder: Path):
        self.folder, self.spec = folder, read_json(folder / "tokenizer.json")
        model = self.spec.get("model") or {}
        self.unigram = model.get("type") == "Unigram"
        listed = model.get("vocab") or {}
        self.ids: dict[str, int] = (
            {t: i for i, (t, _) in enumerate(listed)} if self.unigram else dict(listed)
        )
        byte_level = '"ByteLevel"' in json.dumps(self.spec.get("pre_tokenizer"))
        odd = [
            key
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
            if model.get(key)
        ]
        if (
            model.get("type") not in ("BPE", "Unigram")
            or odd
            or not (byte_level or model.get("byte_fallback"))
        ):
            what = (
                f"type {model.get('type')}, "
                f"{f'{odd[0]} in use' if odd else 'without bytes to fall back on'}"
            )
            remedy = (
                "leave --vocab out"
                if self.spec
                else "copy the tokenizer files of the model it was made from"
            )
            why = f"its tokenizer ({what})" if self.spec else "a model without a tokenizer.json"
            raise MisError(f"{folder}: the vocabulary of {why} cannot be trimmed: {remedy}")
        self.added = {
            token["content"]: int(token["id"]) for token in self.spec.get("added_tokens") or ()
        }
        self.texts = {i: text for text, i in (self.ids | self.added).items()}
        self.pairs = [
            tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
            for m in model.get("merges") or ()
        ]
        self._ranks = {pair: rank for rank, pair in enumerate(self.pairs)}
        self._joined = {a + b for a, b in self.pairs} - self.added.keys()

    def parts(self, row: int) -> set[int]:
        """The row, and those of all that BPE joins on its way to that token: the same wherever the
        token comes up in a text, since nothing was joined across its ends there.
        """
        text = self.texts.get(row, "")
        needed = {row}
        if text not in self._joined:
            return needed
        pieces = list(text)
        needed |= {self.ids[piece] for piece in pieces if piece in self.ids}
        while len(pieces) > 1:
            rank, at = min(
                (self._ranks.get(pair, len(self.pairs)), at)
                for at, pair in enumerate(pairwise(pieces))
            )
            # a token that only whole words are (ignore_merges), or none
            if rank == len(self.pairs):
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
            needed.add(self.ids[pieces[at]])
        return needed

    def needed(self, config: Mapping[str, Any]) -> set[int]:
        """Rows that no vocabulary may lack: bytes, the unknown token, special and other added
        tokens but for reserved ones, and what the settings name.
        """
        from tokenizers.pre_tokenizers import ByteLevel

        settings = read_json(self.folder / "tokenizer_config.json")
        named = [_text(value) for key, value in settings.items() if key.endswith("_token")]
        model: dict[str, Any] = self.spec["model"]
        unknown = (
            model.get("unk_id") if self.unigram else self.ids.get(model.get("unk_token") or "")
        )
        rows = {
            i for text, i in self.added.items() if text in named or not RESERVED.fullmatch(text)
        }
        if model.get("byte_fallback"):
            rows |= {i for text, i in self.ids.items() if BYTE.fullmatch(text)}
        else:
            rows |= {self.ids[letter] for letter in ByteLevel.alphabet() if letter in self.ids}
        named_ids = chain(config.items(), read_json(self.folder / "generation_config.json").items())
        ids = _ids([unknown, *(value for key, value in named_ids if ID_KEYS.search(key))])
        rows |= {i for i in ids if i in self.texts}
        return set().union(*map(self.parts, rows))

    def chosen(self, needed: Collection[int], counts: np.ndarray, size: int) -> list[int]:
        """`size` rows, rising: those needed, the most frequent by `counts` (V,), then the first
        merges; a token comes with its parts or not at all. Reserved ones, and rows that are no
        token, come last.
        """
        rest = sorted(
            range(len(counts)),
            key=lambda row: bool(RESERVED.fullmatch(self.texts.get(row, "<unused0>"))),
        )
        frequent = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
        rows = set(needed)
        for row in chain(frequent, (self.ids[a + b] for a, b in self.pairs), rest):
            if len(rows) == size:
                break
            if row not in rows and len(more := self.parts(row) - rows) <= size - len(rows):
                rows |= more
        return sorted(rows)

    def files(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the tokenizer's files for a model that has only these rows, rising."""
        new = {old: i for i, old in enumerate(rows)}
        for path in present(self.folder):
            if path.name in REPLACED:
                continue
            if path.suffix != ".json" or path.name.startswith("chat_template"):
                yield path.name, path.read_bytes()
                continue
            content = (
                self._tokenizer(new) if path.name == "tokenizer.json" else self._settings(path, new)
            )
            # indented, it would take 300 MB of Gemma's tokens
            indent = None if path.name == "tokenizer.json" else 2
            yield path.name, json.dumps(content, ensure_ascii=False, indent=indent).encode()

    def _tokenizer(self, new: Mapping[int, int]) -> dict[str, Any]:
        model = dict(self.spec["model"])
        left = {text for text, i in self.ids.items() if i in new}
        if self.unigram:
            model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
            model["unk_id"] = _moved(model.get("unk_id"), new, True)
        else:
            model["vocab"] = {text: new[i] for text, i in self.ids.items() if i in new}
            merges = zip(model["merges"], self.pairs, strict=True)
            model["merges"] = [merge for merge, (a, b) in merges if left.issuperset((a, b, a + b))]
        added = [
            {**t, "id": new[t["id"]]} for t in self.spec.get("added_tokens") or () if t["id"] in new
        ]
        spec = {**self.spec, "model": model, "added_tokens": added}
        return {
            **spec,
            **{
                key: _moved(spec.get(key), new)
                for key in ("post_processor", "padding")
                if key in spec
            },
        }

    def _settings(self, path: Path, new: Mapping[int, int]) -> dict[str, Any]:
        settings = moved_ids(read_json(path), new)
        gone = {text for text, i in self.added.items() if i not in new}
        if path.name == "added_tokens.json":
            return {text: new[i] for text, i in settings.items() if i in new}
        if tokens := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {
                str(new[int(i)]): t for i, t in tokens.items() if int(i) in new
            }
        for key in NAMES:  # a name without a token would be added again, behind the last row
            if isinstance(settings.get(key), list):
                settings[key] = [token for token in settings[key] if _text(token) not in gone]
        return settings


def moved_ids(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A config.json or generation_config.json whose ids are the new ones."""
    return {
        key: _moved(value, new, True) if ID_KEYS.search(key) else value
        for key, value in settings.items()
    }


def _moved(part: Any, new: Mapping[int, int], ids: bool = False) -> Any:
    """Numbers that are `ids` become new ones; of a post-processor or padding those in {"ids": [2]},
    {"sep": ["</s>", 2]}, {"pad_id": 0}, at any depth."""
    if isinstance(part, list):
        return [_moved(each, new, ids) for each in part]
    if isinstance(part, dict):
        return {
            key: _moved(each, new, key in ("ids", "sep", "cls", "pad_id"))
            for key, each in part.items()
        }
    return new.get(part, part) if ids and type(part) is int else part


def _ids(part: Any) -> Iterator[int]:
    """Every number in lists of numbers, at any depth."""
    if isinstance(part, list):
        yield from chain.from_iterable(map(_ids, part))
    elif type(part) is int:
        yield part


def _text(token: Any) -> Any:
    """A token in tokenizer_config.json is its text, or an object that has it."""
    return token.get("content") if isinstance(token, dict) else token
