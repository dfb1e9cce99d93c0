"""config.json: what is refused, in one sentence each, and what is spelled out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening.config import read_config
from mis_mlx.types import MisError
from tests import tiny

GONE = object()
BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000"),
    ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_hidden_layers": GONE}, "num_hidden_layers is None"),
    ({"hidden_size": -64}, "hidden_size is -64"),
    ({"hidden_size": 2**40}, "hidden_size is"),
    ({"intermediate_size": [768]}, "intermediate_size is"),
    ({"vocab_size": 10**12}, "vocab_size is"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": 5000}, "num_attention_heads is 5000"),
    ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3 key-value heads"),
    ({"head_dim": 100_000}, "head_dim is 100000"),
    ({"head_dim": 15}, "head_dim is 15"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ({"rope_theta": True}, "rope_theta is True"),
    ({"rope_parameters": "default"}, "rope_parameters is 'default', supported:"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
    ({"rope_scaling": {"type": "spiral"}}, "rope_scaling is 'spiral', supported:"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is None"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention", "magic", "magic"]}, "layer_types"),
    ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is None"),
    ({"layer_types": 3}, "layer_types"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"model_type": "../llama"}, "is not supported"),
    ({"model_type": ["llama"]}, "is not supported"),
    ({"model_type": GONE}, "model_type None is not supported"),
    ({"model_file": "evil.py"}, "model_file wants to run"),
    ({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}, "auto_map wants to run"),
    ({"rope_scaling": {"type": [1]}}, "rope_scaling is [1], supported:"),
    ({**tiny.FAMILIES["gemma4_text"], "rope_scaling": 0}, "rope_scaling is 0"),
    *(({"quantization": {"bits": b, "group_size": 64}}, f"bits is {b}") for b in (None, 0, -1)),
    *(({"quantization": {"bits": 4, "group_size": g}}, f"size is {g}") for g in (0, 1.5, True)),
    ({"quantization": {"bits": 4, "group_size": 64, "lm_head": {"bits": 0}}}, "lm_head: bits is 0"),
    (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is 0.5, but a llama rotates whole heads",
    ),
]
BROKEN = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[1]", "not a JSON object"),
    (b"null", "not a JSON object"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"hidden_size": NaN}', "NaN"),
    (b'{"hidden_size": 64, "hidden_size": 65}', "twice"),
    (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b" " * 10_000_001, "10000001 bytes"),
]


def write(folder: Path, changes: dict[str, Any]) -> Path:
    config = {k: v for k, v in {**tiny.CONFIG, **changes}.items() if v is not GONE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=[s[:30] for _, s in BAD])
def test_a_bad_config_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    """Names the file and the value, in one line, and nothing else escapes."""
    with pytest.raises(MisError) as caught:
        read_config(write(tmp_path, changes))
    said = str(caught.value)
    assert sentence in said
    assert str(tmp_path / "config.json") in said
    assert "\n" not in said


@pytest.mark.parametrize(("content", "sentence"), BROKEN, ids=[s + str(len(c)) for c, s in BROKEN])
def test_what_is_not_json_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    """Empty, cut off, deep, huge, NaN, a key that comes twice."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MisError, match=sentence) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_config_at_all(tmp_path: Path) -> None:
    """An empty folder, a folder in its place, and no folder."""
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(MisError, match=r"no readable config\.json"):
            read_config(folder)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(MisError, match=r"no readable config\.json"):
        read_config(tmp_path)


def test_rope_scaling_survives_both_spellings() -> None:
    """A llama 3 rope: from rope_parameters to rope_scaling, and what a student's config says of
    it.
    """
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 256}
    config = {k: v for k, v in tiny.CONFIG.items() if k != "rope_theta"}
    config |= {"rope_parameters": {**rope, "rope_theta": 5e5}}
    full = family(config).normalised()
    assert (full["rope_theta"], full["rope_scaling"]) == (5e5, rope)
    made = arch.student_config(config, shape_of(config), (0, 1, 2), "float32")
    assert made["rope_parameters"] == {**rope, "rope_theta": 5e5}


def test_what_is_absent_is_spelled_out() -> None:
    """kv heads = heads, head_dim = hidden / heads, untied, theta of the kind."""
    config = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4}
    full = family(config).normalised()
    assert (full["num_key_value_heads"], full["head_dim"], full["tie_word_embeddings"]) == (
        4,
        16,
        False,
    )
    assert full["rope_theta"] == 1_000_000.0
    assert family({**config, "model_type": "llama"}).normalised()["rope_theta"] == 10_000.0
    assert (
        str(shape_of(tiny.CONFIG))
        == "3 layers, hidden 64, FFN 768, 4 heads, 2 kv heads, 512 tokens"
    )
