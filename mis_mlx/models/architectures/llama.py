"""Plain decoders: Llama and Mistral."""

from mis_mlx.models.architectures.base import Architecture


class Llama(Architecture):
    """The base."""

    name = "llama"
    mlx = "llama"
    gguf = "llama"
    gguf_ropes = ("default", "linear", "yarn", "llama3")
    interleaved = True


class Mistral(Architecture):
    """A llama under another name."""

    name = "mistral"
    mlx = "llama"
    gguf = "llama"
    gguf_ropes = ("default", "linear", "yarn", "llama3")
    interleaved = True
