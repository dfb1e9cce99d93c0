"""The size of a model: bytes on disk, and bytes as it computes.

Arithmetic on configs and on the sizes in files' headers: reads no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mis_mlx.compute import precision
from mis_mlx.hardware.memory import COMMANDS_AHEAD, in_flight_bytes
from mis_mlx.maths.losses import PART
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.architectures.shape import Shape, weight_count
from mis_mlx.models.opening import load
from mis_mlx.types import Checkpoint

SLOT_BYTES = 16 * 2**10  # by which a buffer for a block is larger than the block: whole pages
# Of a token: an open tokenizer with some text; most of the moment when it opens, when mlx-lm and
# transformers read its file as JSON and tokenizers once more. Measured on Gemma 3, Qwen 2.5 and
# SmolLM2: 262, 152 and 49 thousand tokens. Libraries, 60 MiB of any process, are not in it.
TEXT_BYTES = 900
OPENING_BYTES = 3300
KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class BlockFactors:
    """What a block was measured to hold, as parts of what formulas say; 1: not measured.

    Of three functions of passing/residency: pass_bytes, activation_bytes and backward_bytes.
    """

    forward: float = 1.0
    kept: float = 1.0
    backward: float = 1.0


BY_FORMULA = BlockFactors()


@dataclass(frozen=True)
class ModelSize:
    """A model in bytes: as it lies on disk, and (`*_work`) as it computes."""

    config: Mapping[str, Any]
    shape: Shape
    params: int  # a tied embedding counts once
    largest_block_params: int
    block_bytes: int  # on disk, of the largest block
    head_bytes: int  # on disk
    nbytes: int  # on disk, all of it
    item: int  # bytes of a number in computation: 4 on a CPU, 2 on Metal
    packed: bool
    as_stored: bool  # computes from the bytes that were read, without a converted copy
    tensors: int  # on disk
    gpu: bool = False  # computes on Metal
    memory_share: float = (
        1.0  # share of a block's parameters in memory at a time while it streams past
    )
    active_share: float = 1.0  # share of a block's parameters that a token uses
    side_params: int = 0  # of the table of per-layer inputs and of its projection
    block_factors: BlockFactors = BY_FORMULA

    @property
    def all_block_params(self) -> int:
        """Parameters of all blocks."""
        return self.params - self.tables_params - self.side_params - self.shape.hidden

    @property
    def tables_params(self) -> int:
        """Parameters of embedding and head; tied ones count once."""
        return self.head_params if self.shape.tied else 2 * self.head_params

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a token's hidden state between two blocks (D,) in computation."""
        return self.shape.hidden * self.item

    @property
    def wide(self) -> Shape:
        """The shape, with FFN and heads of the largest block."""
        return family(self.config).widest

    @property
    def block_work(self) -> int:
        """Bytes of a block that stays in memory."""
        if self.as_stored:
            return self.block_bytes + SLOT_BYTES
        return self.largest_block_params * self.item

    @property
    def text_bytes(self) -> int:
        """Bytes of an open tokenizer with some text."""
        return TEXT_BYTES * self.shape.vocab

    @property
    def opening_bytes(self) -> int:
        """Bytes of the process while a tokenizer opens."""
        return OPENING_BYTES * self.shape.vocab

    @property
    def head_params(self) -> int:
        """Parameters of the vocabulary head, V x D."""
        return self.shape.vocab * self.shape.hidden

    @property
    def head_work(self) -> int:
        """Bytes of the vocabulary head in memory."""
        if self.packed and self.as_stored:
            return self.head_bytes
        return self.head_params * self.item

    @property
    def whole_work(self) -> int:
        """Bytes of the whole model in memory, as it computes."""
        if self.packed and self.as_stored:
            return self.nbytes
        return self.params * self.item

    @property
    def slots_bytes(self) -> int:
        """The two buffers that blocks are read into in turn; a mixture has two more for experts."""
        buffers = 2 if self.shape.experts else 1
        return 2 * int(self.memory_share * self.block_bytes + SLOT_BYTES * buffers)

    def side_numbers(self, tokens: int) -> int:
        """Numbers in the per-layer channels of all blocks, for each token that occurs."""
        occurring = min(tokens, self.shape.vocab)
        return occurring * arch.channels(self.config)

    def in_flight(self, work: int) -> int:
        """Temporaries that a GPU still holds when a CPU has freed them.

        As much again as `work` bytes, but no more than the commands in flight can hold.
        """
        return min(work, in_flight_bytes()) if self.gpu else 0

    @property
    def widened_bytes(self) -> int:
        """Parts of a half-precision head, widened for its logits: those a GPU has in flight."""
        if not self.gpu or self.packed or self.item == 4:
            return 0
        return 4 * min(COMMANDS_AHEAD * PART, self.head_params)

    def body_bytes(self, workspace: int) -> int:
        """Memory besides the slots while a block is made and used.

        That is the workspace, and a converted copy if one is needed. De-quantizing on a CPU holds
        a second copy for a moment, because MLX runs ahead (measured).
        """
        if self.as_stored:
            return workspace
        copy = int(self.memory_share * self.block_work)
        if self.packed:
            return copy + max(workspace, copy)
        return copy + workspace


@dataclass(frozen=True)
class _Stored:
    """A model as it lies on disk, in bytes."""

    packed: bool
    dtypes: set[str]  # of the blocks' tensors, but for those that are float32 in any model
    block_bytes: int  # of the largest block
    head_bytes: int
    nbytes: int
    tensors: int


def model_of(
    source: Checkpoint | Mapping[str, Any], gpu: bool | None = None, dtype: Any = None
) -> ModelSize:
    """The sizes of a checkpoint, or of a config alone.

    A config alone is taken to be stored as its dtype or its quantization says. gpu: whether the
    model computes on Metal; default: as this process does. dtype: the type it computes in here;
    default: the checkpoint's; a config alone has the policy's usual one.
    """
    config = source.config if isinstance(source, Checkpoint) else source
    if gpu is None:
        gpu = precision.keeps_packed()
        if dtype is None and isinstance(source, Checkpoint):
            dtype = precision.dtype_of(source)
        dtype = dtype or precision.usual_dtype()
    shape = shape_of(config)
    if dtype is None:
        # That of an M1, which emulates bfloat16.
        half = gpu and family(config).float16
        dtype = precision.DTYPES["float16" if half else "float32"]
    block_params = weight_count(arch.layer_tensors(config, True))
    params = arch.params(config)
    if isinstance(source, Checkpoint):
        stored = _stored(source, shape.layers)
    else:
        stored = _declared(config, shape, params, block_params)
    as_stored = stored.dtypes == {precision.name_of(dtype)}
    if stored.packed:
        as_stored = gpu
    memory_share, active_share = arch.expert_shares(config)
    sides = family(config).side_tensors()
    return ModelSize(
        config=config,
        shape=shape,
        params=params,
        largest_block_params=block_params,
        block_bytes=stored.block_bytes,
        head_bytes=stored.head_bytes,
        nbytes=stored.nbytes,
        item=dtype.size,
        packed=stored.packed,
        as_stored=as_stored,
        tensors=stored.tensors,
        gpu=gpu,
        memory_share=memory_share,
        active_share=active_share,
        side_params=weight_count(sides),
    )


def _stored(checkpoint: Checkpoint, layers: int) -> _Stored:
    """The sizes that the headers of a checkpoint's files tell."""
    blocks = [0] * layers
    dtypes = set[str]()
    for name, tensor in checkpoint.tensors.items():
        number = arch.block_of(name)
        if number is not None:
            blocks[number] += tensor.nbytes
            if not family(checkpoint.config).always_float32(name):
                dtypes.add(KINDS.get(tensor.dtype, tensor.dtype))
    prefix = load.head_prefix(checkpoint)
    return _Stored(
        packed="U32" in dtypes,
        dtypes=dtypes,
        block_bytes=max(blocks),
        head_bytes=sum(t.nbytes for n, t in checkpoint.tensors.items() if n.startswith(prefix)),
        nbytes=checkpoint.nbytes,
        tensors=len(checkpoint.tensors),
    )


def _declared(config: Mapping[str, Any], shape: Shape, params: int, block_params: int) -> _Stored:
    """The sizes of files that hold a model in the dtype or the quantization of its config."""
    quantization = config.get("quantization") or {}
    packed = "bits" in quantization
    dtype = config.get("torch_dtype") or config.get("dtype")
    if dtype not in precision.DTYPES:
        dtype = "bfloat16"
    if packed:
        item = quantization["bits"] / 8 + 4 / quantization["group_size"]
    else:
        item = precision.DTYPES[dtype].size
    tensors = 0
    for size in arch.tensors_of(config).values():
        tensors += 3 if packed and len(size) == 2 else 1  # with scales and biases
    return _Stored(
        packed=packed,
        dtypes={dtype},
        block_bytes=int(item * block_params),
        head_bytes=int(item * (shape.vocab * shape.hidden)),
        nbytes=int(item * params),
        tensors=tensors,
    )
