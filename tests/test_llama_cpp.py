"""llama.cpp itself, where llama-cpp-python is installed, opens what `export` writes and computes
what MLX computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGUFReader
from tokenizers import Regex, pre_tokenizers

from mis_mlx import export
from mis_mlx.data import preparation
from mis_mlx.gguf_export import vocab
from mis_mlx.models.architectures import families
from mis_mlx.models.opening import load, resolve
from mis_mlx.models.opening.pre_tokenizers import KNOWN
from tests import tiny
from tests.gguf_export.test_tensors import packed
from tests.test_export import IDS, forward

pytestmark = pytest.mark.slow  # it is no part of what the README installs
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp is not here: pip install -e '.[llama]', 18 minutes"
)

EXPORTED = [kind for kind in tiny.FAMILIES if families.FAMILIES[kind].gguf]
REFUSED = tiny.FAMILIES.keys() - set(EXPORTED)
KINDS: dict[str, dict[str, Any]] = {
    **tiny.KINDS,
    **tiny.MODELS,
    **tiny.PHIS,
    # llama.cpp has no windows in this one, nor have the published models
    "ministral3": {**tiny.MODELS["ministral3"], "layer_types": None, "sliding_window": None},
    "gemma3 of two kinds": {
        **tiny.MODELS["gemma3_text"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "granite with biases": {**tiny.MODELS["granite"], "attention_bias": True, "mlp_bias": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "llama3": {"rope_scaling": {**tiny.LLAMA3, "original_max_position_embeddings": 64}},
}
ODD = [
    "a  b   c\td",
    "line\r\nline\r\n\r\n",
    "\n\n\n x",
    "1234567890 3.14159 1e-5 ١٢٣ ²³ ½",
    "I've I'VE we'll WE'LL don't 'tis",
    "zażółć gęślą jaźń\nŁÓDŹ",
    "Łódź–Kraków — „cudzysłów” …",
    "😀🏔️👨‍👩‍👧 🦙 🇵🇱",
    "日本語のテキスト 中文 한국어",
    "مرحبا بالعالم",
    "naïve e\u0301 é",
    "\u200b\u00a0\u2003x",
    "https://a.b/c?d=e&f=%20#g",
    "if x<=3 and y!=4: z**=2",
    "====>>>----___***",
    "\x01\x7f",
    "camelCase SCREAMING_CASE",
    "100% £5 €7 zł",
    "ﬁ Ⅷ",
    "кириллица Ελληνικά",
    "'''```",
    "\u3000全角",
    " 's 'S 'LL't",
]
PROMPTS = (
    "The with statement",
    "Baca wstał o świcie i",
    "def area(width, height):\n    return",
    "1, 2, 3, 4,",
)


@pytest.fixture
def opened() -> Iterator[Callable[..., Any]]:
    """`opened(file)`: llama.cpp with the file, keys and values in float32; closed after the
    test.
    """
    made: list[Any] = []

    def open_(file: Path, **how: Any) -> Any:
        kv = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        made.append(
            llama_cpp.Llama(
                str(file), n_ctx=256, logits_all=True, verbose=False, n_threads=2, **kv, **how
            )
        )
        return made[-1]

    yield open_
    for model in made:
        model.close()


def exported(model: Path, out: Path, wanted: str | None) -> Path:
    """The GGUF of an export."""
    settings: dict[str, Any] = dict(model=str(model), out=str(out), out_type=wanted)
    done = export.run(export.Settings(**settings))
    return out / done["file"]


def made(folder: Path, kind: str) -> Path:
    """The tiny model of a kind; where errors would grow a thousandfold, a calm one."""
    tiny.make(folder, **KINDS[kind])
    return tiny.calm(folder) if kind == "gemma4_text" else folder


def theirs(model: Any, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits (T, V)."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def continuation(
    logits: Callable[[list[int]], np.ndarray], ids: list[int], count: int
) -> list[int]:
    """`count` tokens, always the most probable one."""
    found = list(ids)
    for _ in range(count):
        found.append(int(logits(found)[-1].argmax()))
    return found[len(ids) :]


def ours(folder: Path, dtype: mx.Dtype) -> Callable[[list[int]], np.ndarray]:
    """MLX's logits (T, V) in float32, of weights rounded to `dtype`; packed ones stay as they
    are.
    """
    checkpoint = load.open_checkpoint(folder)
    model = load.resident_model(checkpoint, mx.float32)
    for name, weight in load.weights(checkpoint, "", mx.float32):
        if mx.issubdtype(weight.dtype, mx.floating):
            model.load_weights([(name, weight.astype(dtype).astype(mx.float32))], strict=False)
    return lambda ids: np.array(model(mx.array(ids)[None])[0])


@pytest.fixture
def as_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLX computes Gemma as llama.cpp does: it looks GELU up in a table of 16-bit numbers."""
    exact = nn.gelu_approx

    def looked_up(x: mx.array) -> mx.array:
        return exact(x.astype(mx.float16).astype(mx.float32)).astype(mx.float16).astype(mx.float32)

    monkeypatch.setattr(nn, "gelu_approx", looked_up)
    # A compiled function would keep what is patched here, for all tests after this one.
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("as_llama_cpp")
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - REFUSED))
def test_it_computes_what_mlx_computes(
    tmp_path: Path, kind: str, opened: Callable[..., Any]
) -> None:
    """Every architecture, biases, every kind of stretched positions: nothing left but the order of
    float32's sums; in Gemma also what falls to the other side in the table of 16-bit numbers in
    which llama.cpp looks GELU up.
    """
    model = made(tmp_path / "m", kind)
    ids = np.random.default_rng(0).integers(1, 512, 200).tolist()
    want = ours(model, mx.float32)(ids)
    atol = 1e-3 if "gemma" in kind else 2e-5
    np.testing.assert_allclose(
        theirs(opened(exported(model, tmp_path / "out", "f32")), ids), want, atol=atol
    )
    assert np.ptp(want) > 0.5


MIXED = {
    "model.layers.0.mlp.up_proj": 3,
    "model.layers.1.mlp.up_proj": 5,
    "model.layers.1.mlp.down_proj": 6,
}
PACKED: dict[str, dict[str, Any]] = {
    "mixed": {"group": 64, "mixed": {**MIXED, "model.embed_tokens": 8}},
    "q4_1": {"group": 128},
    "mxfp4": {"group": 32, "mode": "mxfp4"},
    "nvfp4": {"group": 16, "mode": "nvfp4"},
}


@pytest.mark.parametrize("how", sorted(PACKED))
def test_packed_models_re_wrapped(tmp_path: Path, how: str, opened: Callable[..., Any]) -> None:
    """Q4_1, Q5_1, MXFP4, NVFP4 and Q8_0 blocks: what numpy computes of the file, up to its 8-bit
    activations.
    """
    checkpoint = packed(tmp_path, **PACKED[how])
    file = exported(checkpoint.path, tmp_path / "out", None)
    want = forward(GGUFReader(file), IDS)
    assert np.corrcoef(theirs(opened(file), IDS).ravel(), want.ravel())[0, 1] > 0.999
    # Q8_0's rounding, if any
    np.testing.assert_allclose(want, ours(checkpoint.path, mx.float32)(IDS), atol=0.03)


def test_llama_quantize_takes_the_float16_file(tmp_path: Path, opened: Callable[..., Any]) -> None:
    """The command in docs/export.md, by the library behind it."""
    model = tiny.make(tmp_path / "m", hidden_size=256, head_dim=64, intermediate_size=768)
    source = exported(model, tmp_path / "out", "f16")
    target = tmp_path / "Q4_K_M.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    pointer = ctypes.byref(parameters)
    files = (str(source).encode(), str(target).encode())
    assert llama_cpp.llama_model_quantize(*files, pointer) == 0
    reader = GGUFReader(target)
    assert reader.fields["general.file_type"].contents() == 15
    found = theirs(opened(target), IDS)
    assert np.corrcoef(found.ravel(), ours(model, mx.float32)(IDS).ravel())[0, 1] > 0.9


def cut_alike(model: Any, folder: Path, texts: list[str]) -> None:
    """llama.cpp gives the ids that mlx-lm's tokenizer gives, special tokens and begin of text
    included.
    """
    tokenizer = load.tokenizer(folder)
    for text in texts:
        assert model.tokenize(text.encode(), special=True) == tokenizer.encode(text), text


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Two hundred texts and more: Python's manual, its code, Polish, and what tokenizers stumble
    over.
    """
    from pydoc_data.topics import topics

    code = Path(vocab.__file__).read_text(encoding="utf-8")
    found = list[str]()
    for name in sorted(topics)[:40]:
        found += [topics[name][:300], topics[name][700:1000]]
    for row in preparation.load("mis").train[:40]:
        found += [row["text"][:200], row["text"][200:400]]
    found += [code[at : at + 200] for at in range(0, 6000, 200)]
    found += ODD
    found = [text for text in found if text]
    assert len(set(found)) > 200
    return found


def split(name: str) -> Any:
    """Qwen's and Llama 3's way: one regular expression, then bytes without one."""
    pattern = next(
        rule["steps"][0]["pattern"]["Regex"] for rule in KNOWN["rules"] if rule["name"] == name
    )
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "qwen2": split("qwen2"),
    "llama-bpe": split("llama-bpe"),
}


@pytest.mark.parametrize("name", sorted(CUTS))
def test_a_vocabulary_of_ones_own_is_cut_alike(
    tmp_path: Path, name: str, texts: list[str], opened: Callable[..., Any]
) -> None:
    """Pre-tokenizers known by their rules; a file that says another one is caught here."""
    model = tiny.make(tmp_path / "m", vocab_size=2048)
    tokenizer = tiny.bpe(texts, 2048, ["<|endoftext|>"], CUTS[name])
    tokenizer.model.ignore_merges = name == "llama-bpe"
    tokenizer.save(str(model / "tokenizer.json"))
    file = exported(model, tmp_path / "out", "f16")
    assert GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    cut_alike(opened(file), model, [*texts, "x<|endoftext|>y"])


def prompts_through(model: Any, folder: Path) -> tuple[list[list[int]], np.ndarray]:
    """(ids of PROMPTS, llama.cpp's logits of all of them)."""
    ids = [load.tokenizer(folder).encode(prompt) for prompt in PROMPTS]
    return ids, np.concatenate([theirs(model, i) for i in ids])


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "most", "rms"), [("f32", 0.002, 0.0002), ("f16", 0.1, 0.02)])
def test_the_real_teacher(
    tmp_path: Path,
    wanted: str,
    most: float,
    rms: float,
    texts: list[str],
    opened: Callable[..., Any],
) -> None:
    """SmolLM2-135M-Instruct: tokens of 200 texts, the text that follows, and logits of up to 37.

    float32 leaves the order of sums. A float16 file has the same numbers, but llama.cpp rounds to
    float16 what they are multiplied with: 0.03 to 0.05 for the worst of all logits, as when MLX is
    made to do so.
    """
    folder = resolve.resolve_model().path
    model = opened(exported(folder, tmp_path / "out", wanted))
    mine = ours(folder, mx.float16)
    prompts, found = prompts_through(model, folder)
    off = found - np.concatenate([mine(ids) for ids in prompts])
    assert np.abs(off).max() < most
    assert np.sqrt((off**2).mean()) < rms
    for ids in prompts:
        assert continuation(lambda i: theirs(model, i), ids, 24) == continuation(mine, ids, 24)
    chat = load.tokenizer(folder).apply_chat_template(
        [{"role": "user", "content": "Hej!"}], tokenize=False
    )
    cut_alike(model, folder, [*texts, chat])
