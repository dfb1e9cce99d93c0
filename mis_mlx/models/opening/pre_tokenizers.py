"""How byte-level tokenizers cut text before they merge: llama.cpp's names for it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mis_mlx.models.opening.tokenizer_check import ROWS, read_json
from mis_mlx.types import MisError

# the last two change no cut
USUAL = ("use_regex", True), ("trim_offsets", True), ("trim_offsets", False)
# llama.cpp's pre-tokenizers: the text "probe"; "names", those of our families, by the sha256 of its
# ids. A vocabulary of one's own has another hash, but is cut by the same "rules": steps of
# tokenizer.json but for USUAL, ignore_merges.
KNOWN = read_json(Path(__file__).parent / "pre_tokenizers.json")


def known(folder: Path, spec: Mapping[str, Any]) -> tuple[str | None, str]:
    """(llama.cpp's name for how a folder's tokenizer cuts text, the hash it knows that by).

    The name is None where neither the hash nor the rules are known. A trimmed vocabulary is cut by
    its parent's rules, so its folder keeps the name.
    """
    digest = hashlib.sha256(str(token_ids(folder, KNOWN["probe"])).encode()).hexdigest()
    name = KNOWN["names"].get(digest) or _by_rules(spec)
    return read_json(folder / ROWS).get("pre_tokenizer") or name, digest


def _by_rules(spec: Mapping[str, Any]) -> str | None:
    """The known pre-tokenizer that cuts by the same rules; None where there is none."""
    first = spec.get("pre_tokenizer") or {}
    steps = []
    for step in first.get("pretokenizers") or [first]:
        steps.append({key: value for key, value in step.items() if (key, value) not in USUAL})
    rule = {"steps": steps, "ignore_merges": bool(spec["model"].get("ignore_merges"))}
    for entry in KNOWN["rules"]:
        if entry == entry | rule:
            return entry["name"]
    return None


def pre_tokenizer(folder: Path) -> str | None:
    """llama.cpp's name for how a folder's byte-level tokenizer cuts text; None without one."""
    spec = read_json(folder / "tokenizer.json")
    model = spec.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    return known(folder, spec)[0]


def token_ids(folder: Path, text: str) -> list[int]:
    """Ids of a text by the tokenizer of a folder. MisError where it does not open."""
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    except Exception as error:  # the library raises bare Exception
        raise MisError(
            f"{folder}/tokenizer.json does not open ({str(error)[:120]}): copy it again"
        ) from None
