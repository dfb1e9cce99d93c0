"""What every architecture says of a config must hold, whichever family it is.

What it must refuse, too. Here it is asked of configs and of modules that were just made, so it is
quick. What blocks compute is in test_families.py: parity, streams, cuts along every axis, bits, a
whole run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from mis_mlx.maths.importance import Statistics
from mis_mlx.models.architectures import arch, config_checks
from mis_mlx.models.architectures.families import FAMILIES, family, shape_of
from mis_mlx.models.architectures.shape import ALL, weight_count
from mis_mlx.models.opening import load
from mis_mlx.models.opening.config import check_config, read_config
from mis_mlx.pruning import select
from mis_mlx.types import Checkpoint, MisError, TensorAt
from tests import tiny

# one config of each family
CONFIGS: dict[str, dict[str, Any]] = {}
for _changes in (*tiny.KINDS.values(), *tiny.FAMILIES.values()):
    _config = {**tiny.CONFIG, **_changes}
    CONFIGS.setdefault(_config["model_type"], family(_config).own_config())
NEEDED = [
    (name, key, value)
    for name, kind in FAMILIES.items()
    for key, values in (
        *((key, (None,)) for key in kind.stated),
        *((key, (None, 0, "x")) for key in kind.numbers),
    )
    for value in values
]
ONLY = [(name, key, value) for name, kind in FAMILIES.items() for key, value in kind.only]

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "model_configs"
PARAMS = {  # as their cards and papers say
    "Llama-PLLuM-8B": 8_030_261_248,
    "Phi-4-mini-instruct": 3_836_021_760,
    "Phi-3-mini-128k-instruct": 3_821_079_552,
    "gemma-4-e2b": 4_628_569_379,
    "gemma-4-e4b": 7_463_013_418,
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
}
SLIDING = {"full_attention": {"rope_type": "odd"}, "sliding_attention": {}}
YARN = {**tiny.GEMMA4_ROPES, "full_attention": {"rope_type": "yarn"}}
# What one family alone refuses: (family, change, what the sentence names).
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ("gemma3_text", {"rope_parameters": SLIDING}, "odd"),
    ("granite", {"logits_scaling": -1}, "logits_scaling is -1"),
    ("gemma4_text", {"vocab_size_per_layer_input": 128}, "has 128 rows, but the embedding 512"),
    ("gemma4_text", {"num_kv_shared_layers": 7}, "num_kv_shared_layers is 7"),
    ("gemma4_text", {"num_kv_shared_layers": 5}, "none of the first 2 blocks"),
    ("gemma4_text", {"rope_parameters": None}, "rope_parameters must have full_attention"),
    ("gemma4_text", {"rope_parameters": YARN}, "is 'yarn'"),
    ("lfm2", {"layer_types": ["conv"] * 7}, "all blocks are conv"),
    ("lfm2", {"layer_types": ["sliding_attention"] * 7}, "each of conv or full_attention"),
    ("lfm2", {"model_type": "lfm2_moe", "num_experts": 32}, "'lfm2_moe' is not supported"),
    ("qwen3_5_text", {"linear_num_value_heads": 3}, "linear_num_value_heads is 3, which 2 key"),
    ("qwen3_5_text", {"full_attention_interval": 4}, "says full_attention for block 2"),
    ("qwen3_5_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.25, but"),
    ("qwen3_5_text", {"model_type": "qwen3_5_moe"}, "model_type 'qwen3_5_moe' is not supported"),
]
FACTOR = "partial_rotary_factor"
TWO_FACTORS = {FACTOR: 0.5, "rope_parameters": {FACTOR: 0.75}}
YARNED = {FACTOR: 0.5, "rope_scaling": {"type": "yarn", "factor": 2.0}}
NOT_8 = {"type": "longrope", "long_factor": [1.0]}
# The same of config.json as it lies in a folder, where it says things otherwise.
BAD_FILES: list[tuple[str, dict[str, Any], str]] = [
    ("lfm2", {"conv_dim": 128}, "conv_dim is 128, but hidden_size 64"),
    ("lfm2", {"layer_types": ["conv"] * 6 + ["full_attention"]}, "layer_types has another order"),
    ("lfm2", {"block_ff_dim": "x"}, "block_ff_dim is 'x'"),
    ("lfm2", {"norm_eps": None}, "rms_norm_eps is None"),
    ("phi3", {FACTOR: 1.5}, f"{FACTOR} is 1.5"),
    ("phi3", {FACTOR: 0.7}, f"{FACTOR} is 0.7"),
    ("phi3", {FACTOR: 1e999}, "inf"),
    ("phi3", {FACTOR: "x"}, f"{FACTOR} is 'x'"),
    ("phi3", TWO_FACTORS, "is 0.75"),
    ("phi3", YARNED, "is 'yarn', supported: default, longrope"),
    ("phi3", {"rope_scaling": {**tiny.LONG, "type": "su"}}, "is 'su', supported"),
    ("phi3", {"rope_scaling": NOT_8}, "long_factor must be a list of 8"),
    ("phi3", {"rope_scaling": {**tiny.LONG, "short_factor": None}}, "short_factor must be a list"),
    ("phi3", {"rope_scaling": {**tiny.LONG, "long_factor": [0] * 8}}, "long_factor is 0"),
    ("phi3", {"rope_scaling": {**tiny.LONG, "attention_factor": 1.2}}, "has attention_factor"),
    ("phi3", {"rope_scaling": tiny.LONG, "max_position_embeddings": None}, "embeddings is None"),
    ("phi3", {"rope_scaling": tiny.LONG, "original_max_position_embeddings": 1}, "- 1 is 0"),
    ("phi3", {"num_key_value_heads": 4}, "has 128 rows, but config.json says 192"),
]


def refused(config: dict[str, Any], changes: dict[str, Any]) -> str:
    """The sentence that refuses a config with these changes."""
    with pytest.raises(MisError) as caught:
        check_config({**config, **changes}, Path("config.json"))
    return str(caught.value)


def test_every_family_has_a_config() -> None:
    """And it is one that is taken."""
    assert CONFIGS.keys() == FAMILIES.keys()
    for config in CONFIGS.values():
        check_config(config, Path("config.json"))


@pytest.mark.parametrize(("name", "key", "value"), NEEDED)
def test_what_it_needs_is_asked_for(name: str, key: str, value: Any) -> None:
    """In a sentence that names the key, whatever it is instead."""
    assert key in refused(CONFIGS[name], {key: value})


@pytest.mark.parametrize(("name", "key", "value"), ONLY)
def test_no_other_value_is_computed(name: str, key: str, value: Any) -> None:
    """The same of a key with one value alone."""
    other: Any = 8
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, list):
        other = [1]
    elif value is not None:
        other = value + 1
    assert f"{key} is {other!r}" in refused(CONFIGS[name], {key: other})


@pytest.mark.parametrize(("name", "change", "words"), BAD)
def test_what_no_block_computes_is_refused(name: str, change: dict[str, Any], words: str) -> None:
    """Values that nobody's model of the family has, and that mlx-lm computes otherwise, or not."""
    assert words in refused(CONFIGS[name], change)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of a family, made once."""
    root = tmp_path_factory.mktemp("folders")

    def made(name: str) -> Path:
        out = root / name
        if out.exists():
            return out
        return tiny.joined(out) if name == "phi3" else tiny.make(out, **tiny.FAMILIES[name])

    return made


@pytest.mark.parametrize(("name", "change", "words"), BAD_FILES)
def test_what_no_folder_may_say(
    folders: Callable[[str], Path],
    name: str,
    change: dict[str, Any],
    words: str,
    tmp_path: Path,
) -> None:
    """Sizes that contradict each other or the tensors, and positions that nothing computes."""
    for path in folders(name).iterdir():
        if path.name != "config.json":
            os.link(path, tmp_path / path.name)
    config = json.loads((folders(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(MisError) as caught:
        load.open_checkpoint(tmp_path)
    assert words.lower() in str(caught.value).lower()


def published(name: str) -> Mapping[str, Any]:
    """A config as it was published."""
    known = {**tiny.POLISH, **tiny.PHI, **arch.PUBLISHED}
    if name in known:
        return known[name]
    found = json.loads((PUBLISHED / f"{name}.json").read_text())
    return {key: value for key, value in found.items() if key not in ("title", "source")}


@pytest.mark.parametrize("name", PARAMS)
def test_published_models_have_as_many_parameters(name: str, tmp_path: Path) -> None:
    """By the sizes of their tensors; a phi3 of its own code becomes one of the family's."""
    (tmp_path / "config.json").write_text(json.dumps(published(name)))
    config = read_config(tmp_path)
    sizes = [math.prod(shape) for shape in arch.tensors_of(config).values()]
    assert arch.params(config) == sum(sizes)
    assert sum(sizes) == PARAMS[name]
    assert "auto_map" not in config


@pytest.mark.parametrize("name", FAMILIES)
def test_lists_have_a_value_for_every_block(name: str) -> None:
    """Those that are cut along with the blocks."""
    config = CONFIGS[name]
    for key in family(config).block_lists:
        if isinstance(config.get(key), list):
            assert f"{key} must be a list of 7" in refused(config, {key: config[key][:-1]})


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_are_of_a_kind_that_it_has(name: str) -> None:
    """Any other one would be computed as a plain one."""
    config = CONFIGS[name]
    for kind in {*config_checks.ROPE_NEEDS, "odd"} - {*family(config).rope_kinds}:
        rope = {"rope_type": kind, "factor": 2.0}
        if kind == "odd" or name != "gemma4_text":  # which reads rope_parameters alone
            refused(config, {"rope_parameters": rope})


@pytest.mark.parametrize("name", FAMILIES)
def test_an_axis_is_cut_or_refused_with_the_reason(name: str) -> None:
    """`axes` and `why`."""
    config = CONFIGS[name]
    architecture = family(config)
    for axis in ALL:
        before = getattr(architecture.shape, axis)
        if axis in architecture.axes:
            continue
        with pytest.raises(MisError) as caught:
            arch.target_shape(config, {}, **{axis: before + 1})
        sentence = str(caught.value)
        assert f"{axis} of a {name} cannot be cut: {architecture.why}" in sentence
    assert arch.target_shape(config, {}) == architecture.shape


@pytest.mark.parametrize("name", FAMILIES)
def test_a_blocks_tensors_are_those_of_its_module(name: str) -> None:
    """Of every block: names and shapes, as mlx-lm makes it."""
    architecture = family(CONFIGS[name])
    args = architecture.model_args()
    for i in range(architecture.layers):
        block = architecture.new_block(args, i)
        theirs = {path: array.shape for path, array in tree_flatten(block.parameters())}
        assert architecture.block_tensors(i, stacked=True) == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_are_said_to_be_alike_are(name: str) -> None:
    """By kinds, counts and sizes."""
    config = CONFIGS[name]
    architecture = family(config)
    shapes = [architecture.block_tensors(i) for i in range(architecture.layers)]
    unlike = [shapes[i] for i in architecture.unlike_blocks()]
    assert all(block in unlike for block in shapes)
    largest = weight_count(shapes[architecture.largest_block()])
    assert largest == max(map(weight_count, shapes))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_keeps_what_its_blocks_were(name: str) -> None:
    """Without its second block, where that may go: sizes, kinds and tensors."""
    config = CONFIGS[name]
    architecture = family(config)
    kept = [i for i in range(architecture.layers) if i != 1 or i in architecture.fixed_blocks()]
    if "layers" not in architecture.axes or architecture.period > 1:  # kinds by place
        kept = list(range(architecture.layers))
    wanted = arch.target_shape(config, {}, layers=len(kept))
    student = arch.student_config(config, wanted, kept)
    check_config(student, Path("config.json"))
    for number, i in enumerate(kept):
        assert family(student).block_tensors(number) == architecture.block_tensors(i)


@pytest.mark.parametrize("name", ["gemma4_text", "lfm2"])
def test_blocks_that_others_need_stay(name: str) -> None:
    """Whatever they are worth."""
    fixed = family(CONFIGS[name]).fixed_blocks()
    worth = Statistics(block={i: float(i not in fixed) for i in range(7)})
    asked = select.PruningConfig(scenario="none", layers=len(fixed), importance="rms")
    _, keep = select.select_units(CONFIGS[name], worth, asked)
    assert set(keep.layers) == fixed != set()


@pytest.mark.parametrize("name", FAMILIES)
def test_names_on_disk_and_back(name: str) -> None:
    """Every tensor and module."""
    architecture = family(CONFIGS[name])
    for tensor in arch.tensors_of(CONFIGS[name]):
        for own in (tensor, tensor.rpartition(".")[0]):
            stored = architecture.stored_name(own)
            if not architecture.whole or architecture.renamed:  # else `inside_names` leads back
                assert architecture.own_name(stored) == own


@pytest.mark.parametrize(
    ("kind", "sizes", "sentence"),
    [
        ("llama", {"layers": 0}, "--layers 0 is outside 1 to 3"),
        ("llama", {"ffn": 769}, "--ffn 769 is outside 1 to 768"),
        ("llama", {"hidden": -4}, "--hidden -4 is outside"),
        ("qwen2", {"hidden": 48}, "a qwen2 cannot change hidden"),
    ],
)
def test_a_shape_no_loader_accepts_is_refused(
    kind: str, sizes: dict[str, int], sentence: str
) -> None:
    """One sentence with the number and what to choose."""
    with pytest.raises(MisError, match=sentence):
        arch.target_shape({**tiny.CONFIG, **tiny.KINDS[kind]}, {}, **sizes)


def test_student_config_is_what_transformers_reads(tmp_path: Path) -> None:
    """AutoConfig opens it, and sees the sizes, theta and tying that were meant."""
    transformers = pytest.importorskip("transformers")
    for kind, changes in tiny.KINDS.items():
        teacher = {
            **tiny.CONFIG,
            **changes,
            "rope_theta": 5e5,
            "quantization": {"bits": 4, "group_size": 64},
        }
        shape = replace(shape_of(teacher), layers=2, ffn=512)
        made = arch.student_config(teacher, shape, (0, 2), "float16")
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(made))
        read = transformers.AutoConfig.from_pretrained(folder)
        assert read.model_type == teacher["model_type"]
        assert (read.num_hidden_layers, read.intermediate_size, read.hidden_size) == (2, 512, 64)
        assert read.num_key_value_heads == 2
        assert read.tie_word_embeddings == teacher["tie_word_embeddings"]
        assert getattr(read, "quantization", None) is None
        assert read.to_dict()["rope_parameters"]["rope_theta"] == 5e5


def checkpoint(tensors: dict[str, tuple[int, ...]]) -> Checkpoint:
    """The tiny llama whose files list these."""
    file = Path("model.safetensors")
    at = {n: TensorAt(file, "F32", shape=s, offset=0, nbytes=0) for n, s in tensors.items()}
    return Checkpoint(Path("folder"), tiny.CONFIG, at)


def test_files_and_config_must_agree() -> None:
    """A tensor missing, of another shape, or with no place: named, with both shapes."""
    good = arch.tensors_of(tiny.CONFIG)
    arch.check_tensors(checkpoint(good))
    q = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(MisError, match=rf"lists {q} \[64, 64\]"):
        arch.check_tensors(checkpoint({n: s for n, s in good.items() if n != q}))
    with pytest.raises(MisError, match=rf"{q} is \[32, 64\], but config.json says \[64, 64\]"):
        arch.check_tensors(checkpoint({**good, q: (32, 64)}))
    with pytest.raises(
        MisError, match=r"holds model\.layers\.3\.x\.weight, which a llama of 3 layers"
    ):
        arch.check_tensors(checkpoint({**good, "model.layers.3.x.weight": (1,)}))
    with pytest.raises(MisError, match=r"q_proj\.bias"):
        arch.check_tensors(checkpoint({**good, q.replace("weight", "bias"): (64,)}))
    # tied models often carry a copy
    arch.check_tensors(checkpoint({**good, "lm_head.weight": (512, 64)}))
    whole = checkpoint(good)
    norm = replace(whole.tensors["model.norm.weight"], dtype="I32")
    with pytest.raises(
        MisError,
        match=r"model\.norm\.weight is stored as I32, but weights must be F32, F16 or BF16",
    ):
        arch.check_tensors(replace(whole, tensors={**whole.tensors, "model.norm.weight": norm}))
