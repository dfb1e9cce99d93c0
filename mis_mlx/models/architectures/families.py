"""The table of model families: what a block holds, how it may be cut, and how it learns.

A new family is a new row; nothing else asks for a model's type. This module reads no configs
(models/opening/config does) and no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Config = Mapping[str, Any]  # a config.json
Shapes = dict[str, tuple[int, ...]]  # {tensor: (out, in)}, in forward order
ALL = ("layers", "ffn", "experts", "heads", "kv_heads", "hidden")
DENSE = tuple(axis for axis in ALL if axis != "experts")
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json, as mlx-lm and transformers read it."""

    name: str  # the model_type
    mlx: str  # the module of mlx_lm.models
    gguf: str  # the architecture of llama.cpp; "": the family is not exported
    block: str = ""  # the module that has its TransformerBlock, where it is not `mlx`
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    # whether attention_bias gives o_proj a bias, and mlp_bias the MLP
    other_biases: bool = True
    # RMSNorm of every query and key head, or of all of them as one vector
    head_norms: Literal["", "each", "all"] = ""
    # RMSNorm behind attention and MLP too, so that no output is linear in down_proj
    post_norms: bool = False
    steps: int = 1  # factor of the default's distillation steps: a repair does less for the family
    gain_offset: float = 0.0  # norms multiply by their weights plus this
    tied: bool = False  # where the config does not say
    rope_theta: float = 10_000.0  # where the config has none
    heads_fill_hidden: bool = True  # transformers demands that heads divide the hidden size
    # head_dim is hidden / heads, whatever the config says: neither is cut alone
    head_dim_follows: bool = False
    float16: bool = True  # whether it holds the activations, as far as is known
    joined: bool = False  # q, k and v are rows of one matrix, gate and up of another
    own_positions: bool = False  # they rotate a part of each head, or are LongRoPE's
    partial: bool = False  # plain positions rotate a part of each head
    scaled_queries: bool = False  # by their positions: blocks take the scale as an argument
    # the config's key with a kind for every block, beside layer_types: cut along with the blocks
    kinds: str = ""
    # the config's key of the period with which the kind of a block repeats; mlx-lm counts blocks
    period: str = ""
    # the config's key, or the square root of the hidden size: "sqrt" (in bfloat16), "exact sqrt"
    embedding_scale: str = ""
    logit_divisor: str = ""  # the config's key of the number that logits are divided by
    numbers: tuple[str, ...] = ()  # further keys that the config must have, numbers above 0
    mlp: str = "mlp"  # the part of a block behind attention
    # the config's key of the number of experts in that part; a router chooses some of them
    experts: str = ""
    # the config's key of FFN neurons, of one expert where there are several
    ffn: str = "intermediate_size"
    matrices: tuple[str, str, str] = GATED  # of an expert: gate, up, down
    router: str = "gate"  # the matrix that chooses among experts
    switch: str = "switch_mlp"  # mlx-lm's name of all experts, stacked
    stacked: bool = False  # experts are stacked on disk, too: stock loaders open no other form
    expert_bias: bool = False  # experts and router have biases; the activation is gpt_oss's then
    interleaved: bool = False  # llama.cpp rotates neighbouring rows of q and k by positions
    # a number for each head, in the softmax over positions; kinds of attention by layer_types
    sinks: bool = False
    gates_sum_to_1: bool = False  # over the experts that a token uses, in llama.cpp
    shared_expert: str = ""  # the config's key of the width of an expert that every token uses
    # keys of which mlx-lm computes one value alone, and that value
    only: tuple[tuple[str, Any], ...] = field(default=(), hash=False)
    # keys that a config must have, because mlx-lm and transformers differ without them
    stated: tuple[str, ...] = ()
    # blocks that see all tokens rotate a part of each head, with frequencies of the whole head
    proportional: bool = False
    # the config's key of the number of channels that each block has for every token, in a table
    per_layer: str = ""
    # the config's key of the number of last blocks that use keys and values of an earlier block
    sharing: str = ""
    global_head_dim: str = ""  # the config's key of the head size in blocks that see all tokens
    # the config's key: whether blocks that share keys have twice the FFN neurons
    double_wide: str = ""
    softcap: str = ""  # the config's key of c, where logits are c tanh(z / c)
    block_scale: bool = False  # a number that the output of a block is multiplied by
    # the config's key of the number of versions of the hidden states that blocks pass on (altup)
    versions: str = ""
    # the config's key of the rank of a block's second way around attention
    laurel: str = ""
    # the config's key of the share of FFN neurons that are silent, for every block
    sparsity: str = ""
    # the config's key of a list with the form of every block, whose widths may differ
    blocks: str = ""
    # the family that a student of this one is written as, where its blocks differ in width
    unequal: str = ""
    # the type of a model that contains this one; stock mlx_lm opens no other form
    written_as: str = ""
    # the kind in layer_types of blocks that carry a state of one size, and no keys and values
    stateful: str = ""
    # ends of names of tensors that are float32 in a model of any type, as in mlx-lm
    wide: tuple[str, ...] = ()
    # (part of a tensor's name here, the same part of its name on disk)
    renamed: tuple[tuple[str, str], ...] = ()
    axes: tuple[str, ...] = DENSE  # that can be cut
    why: str = "it has none"  # the other axes cannot be cut; the end of a sentence

    @property
    def own(self) -> set[str]:
        """The keys of config.json that tell this family from others."""
        keys = {
            self.kinds,
            self.period,
            self.embedding_scale,
            self.logit_divisor,
            self.experts,
            self.shared_expert,
        }
        keys |= {self.per_layer, self.sharing, self.global_head_dim, self.double_wide, self.softcap}
        keys |= {self.versions, self.laurel, self.sparsity, self.blocks}
        return {*keys, *self.numbers} - {"", "sqrt", "exact sqrt"}


MIXED = ("layers", "ffn", "experts")
MIXED_WHY = "this is not implemented for mixtures of experts"
ROWS = (
    Family("llama", "llama", "llama", interleaved=True, unequal="nemotron-nas"),
    Family("mistral", "llama", "llama", interleaved=True),
    # A llama whose blocks differ in width.
    Family(
        "nemotron-nas",
        "nemotron-nas",
        "deci",
        blocks="block_configs",
        rope_theta=500_000.0,
        head_dim_follows=True,
        interleaved=True,
        axes=("layers",),
        why="its blocks have widths of their own",
    ),
    Family(
        "qwen2",
        "qwen2",
        "qwen2",
        qkv_bias=True,
        other_biases=False,
        rope_theta=1e6,
        head_dim_follows=True,
    ),
    Family(
        "qwen3",
        "qwen3",
        "qwen3",
        qkv_bias=False,
        other_biases=False,
        head_norms="each",
        heads_fill_hidden=False,
    ),
    # Every fourth block has no rotary positions; llama.cpp counts them by place.
    Family(
        "smollm3",
        "smollm3",
        "smollm3",
        block="llama",
        kinds="no_rope_layers",
        tied=True,
        interleaved=True,
    ),
    # Queries grow with the logarithm of the position.
    Family(
        "ministral3",
        "ministral3",
        "mistral3",
        scaled_queries=True,
        qkv_bias=False,
        other_biases=False,
        rope_theta=1e6,
        heads_fill_hidden=False,
        interleaved=True,
    ),
    Family(
        "granite",
        "granite",
        "granite",
        embedding_scale="embedding_multiplier",
        logit_divisor="logits_scaling",
        head_dim_follows=True,
        numbers=("residual_multiplier", "attention_multiplier"),
        interleaved=True,
    ),
    Family(
        "phi3",
        "phi3",
        "phi3",
        qkv_bias=False,
        other_biases=False,
        joined=True,
        own_positions=True,
        head_dim_follows=True,
        axes=("layers", "ffn"),
        why="its heads are rows of one matrix, which cannot be cut",
    ),
    Family(
        "gemma3_text",
        "gemma3_text",
        "gemma3",
        qkv_bias=False,
        other_biases=False,
        head_norms="each",
        post_norms=True,
        steps=2,
        gain_offset=1.0,
        tied=True,
        rope_theta=1e6,
        heads_fill_hidden=False,
        float16=False,
        period="sliding_window_pattern",
        embedding_scale="sqrt",
        numbers=("rope_local_base_freq", "query_pre_attn_scalar"),
        axes=("layers", "ffn", "heads", "kv_heads"),
        why="its blocks have norms after attention and MLP, so channels cannot be ranked or "
        "rotated",
    ),
    Family(
        "gemma4_text",
        "gemma4_text",
        "gemma4",
        qkv_bias=False,
        other_biases=False,
        head_norms="each",
        post_norms=True,
        steps=2,
        tied=True,
        rope_theta=1e6,
        heads_fill_hidden=False,
        float16=False,
        embedding_scale="exact sqrt",
        numbers=(
            "hidden_size_per_layer_input",
            "global_head_dim",
            "sliding_window",
            "vocab_size_per_layer_input",
        ),
        stated=(
            "num_kv_shared_layers",
            "use_double_wide_mlp",
            "final_logit_softcapping",
            "layer_types",
        ),
        only=(
            ("attention_k_eq_v", False),
            ("enable_moe_block", False),
            ("tie_word_embeddings", True),
        ),
        proportional=True,
        per_layer="hidden_size_per_layer_input",
        sharing="num_kv_shared_layers",
        global_head_dim="global_head_dim",
        double_wide="use_double_wide_mlp",
        softcap="final_logit_softcapping",
        block_scale=True,
        axes=("layers", "ffn"),
        why="its heads have two sizes, and norms follow attention and MLP",
    ),
    Family(
        "gemma3n_text",
        "gemma3n",
        "gemma3n",
        qkv_bias=False,
        other_biases=False,
        head_norms="each",
        post_norms=True,
        steps=2,
        tied=True,
        rope_theta=1e6,
        heads_fill_hidden=False,
        float16=False,
        embedding_scale="exact sqrt",
        numbers=(
            "hidden_size_per_layer_input",
            "vocab_size_per_layer_input",
            "sliding_window",
            "rope_local_base_freq",
            "final_logit_softcapping",
            "num_kv_shared_layers",
            "altup_coef_clip",
        ),
        stated=("layer_types", "activation_sparsity_pattern", "altup_correct_scale"),
        only=(("rope_scaling", None), ("tie_word_embeddings", True)),
        per_layer="hidden_size_per_layer_input",
        sharing="num_kv_shared_layers",
        softcap="final_logit_softcapping",
        versions="altup_num_inputs",
        laurel="laurel_rank",
        sparsity="activation_sparsity_pattern",
        written_as="gemma3n",
        axes=("layers", "ffn"),
        why="its blocks pass several versions of the hidden states on, and norms stand behind "
        "attention and MLP",
    ),
    # Two blocks of three have a short causal convolution in place of attention.
    Family(
        "lfm2",
        "lfm2",
        "lfm2",
        block="qwen3",
        qkv_bias=False,
        other_biases=False,
        head_norms="each",
        tied=True,
        rope_theta=1e6,
        head_dim_follows=True,
        stateful="conv",
        renamed=(
            (".mlp.gate_proj.", ".feed_forward.w1."),
            (".mlp.up_proj.", ".feed_forward.w3."),
            (".mlp.down_proj.", ".feed_forward.w2."),
            (".self_attn.o_proj.", ".self_attn.out_proj."),
            (".self_attn.q_norm.", ".self_attn.q_layernorm."),
            (".self_attn.k_norm.", ".self_attn.k_layernorm."),
            (".input_layernorm.", ".operator_norm."),
            (".post_attention_layernorm.", ".ffn_norm."),
            ("model.norm.", "model.embedding_norm."),
        ),
        numbers=("conv_L_cache",),
        stated=("layer_types",),
        only=(("conv_bias", False), ("rope_scaling", None), ("tie_word_embeddings", True)),
    ),
    # Three blocks of four have a gated delta rule in place of attention, whose output has a gate.
    Family(
        "qwen3_5_text",
        "qwen3_5",
        "",
        qkv_bias=False,
        other_biases=False,
        head_norms="each",
        rope_theta=1e5,
        heads_fill_hidden=False,
        partial=True,
        period="full_attention_interval",
        stateful="linear_attention",
        wide=(".A_log",),
        written_as="qwen3_5",
        renamed=(
            ("model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ),
        numbers=(
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
        ),
        only=(("rope_scaling", None), ("attention_bias", False), ("num_experts", 0)),
        axes=("layers", "ffn"),
        why="the heads of a gated delta rule and of gated attention are not ranked yet",
    ),
    Family(
        "qwen3_moe",
        "qwen3_moe",
        "qwen3moe",
        qkv_bias=False,
        other_biases=False,
        head_norms="each",
        rope_theta=1e6,
        heads_fill_hidden=False,
        experts="num_experts",
        ffn="moe_intermediate_size",
        numbers=("num_experts_per_tok",),
        gates_sum_to_1=True,
        only=(("mlp_only_layers", []), ("decoder_sparse_step", 1)),
        axes=MIXED,
        why=MIXED_WHY,
    ),
    Family(
        "qwen2_moe",
        "qwen2_moe",
        "qwen2moe",
        qkv_bias=True,
        other_biases=False,
        rope_theta=1e6,
        head_dim_follows=True,
        experts="num_experts",
        ffn="moe_intermediate_size",
        shared_expert="shared_expert_intermediate_size",
        numbers=("num_experts_per_tok",),
        only=(
            ("norm_topk_prob", False),
            ("mlp_only_layers", []),
            ("decoder_sparse_step", 1),
            ("tie_word_embeddings", False),
        ),
        axes=MIXED,
        why=MIXED_WHY,
    ),
    Family(
        "mixtral",
        "mixtral",
        "llama",
        qkv_bias=False,
        other_biases=False,
        rope_theta=1e6,
        head_dim_follows=True,
        mlp="block_sparse_moe",
        experts="num_local_experts",
        matrices=("w1", "w3", "w2"),
        gates_sum_to_1=True,
        interleaved=True,
        numbers=("num_experts_per_tok",),
        only=(("sliding_window", None),),
        axes=MIXED,
        why=MIXED_WHY,
    ),
    Family(
        "gpt_oss",
        "gpt_oss",
        "gpt-oss",
        rope_theta=150_000.0,
        heads_fill_hidden=False,
        experts="num_local_experts",
        gates_sum_to_1=True,
        router="router",
        switch="experts",
        stacked=True,
        expert_bias=True,
        sinks=True,
        float16=False,
        numbers=("num_experts_per_tok",),
        only=(("attention_bias", True), ("swiglu_limit", 7.0), ("tie_word_embeddings", False)),
        axes=("ffn", "experts"),
        why=MIXED_WHY,
    ),
    Family(
        "olmoe",
        "olmoe",
        "olmoe",
        other_biases=False,
        head_norms="all",
        head_dim_follows=True,
        experts="num_experts",
        numbers=("num_experts_per_tok",),
        only=(("clip_qkv", None), ("attention_bias", False)),
        axes=MIXED,
        why=MIXED_WHY,
    ),
)
FAMILIES = {row.name: row for row in ROWS}
# other types that contain one of these families: which one, and the values they may leave out
OPENED_AS: dict[str, dict[str, Any]] = {
    # its matrices are joined, but its heads rotate as a llama's
    "phi3": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": 262_208,
        "rope_theta": 1e6,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131_072,
    },
    "gemma4": {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"]},
    "gemma3n": {"model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"]},
    "qwen3_5": {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]},
}
# architectures of the types that `Family.written_as` names
WRAPPERS = {
    "gemma3n": "Gemma3nForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}


def known_family(config: Config) -> Family | None:
    """The row of a config that was not checked yet; None where there is none."""
    return FAMILIES.get(str(config.get("model_type")))


def family(config: Config) -> Family:
    """The row of a config that was checked (`config.check_config`)."""
    return FAMILIES[config["model_type"]]


def of_family(config: Config, name: str) -> dict[str, Any]:
    """A copy of a config that says it is of the family `name`."""
    return {**config, "model_type": name}
