"""A config.json: read with suspicion, checked for plausibility, completed with its defaults."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.models.architectures import config_checks
from mis_mlx.models.architectures.config_checks import rotary_settings
from mis_mlx.models.architectures.families import FAMILIES, OPENED_AS, family
from mis_mlx.models.architectures.phi3 import has_own_positions
from mis_mlx.models.architectures.shape import Config
from mis_mlx.models.architectures.stored_form import inside_names
from mis_mlx.storage import header_check
from mis_mlx.types import MisError

MOST_BYTES = 10_000_000
say_once = cache(cli.say)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, checked before anything is built from it.

    Program code that the config names is never run. MisError where the file cannot be read or a
    value is not plausible.
    """
    where = folder / "config.json"
    config = _opened_as(read_json(folder, where), where)
    known = FAMILIES.get(str(config.get("model_type")))
    if known:
        with naming(where):
            config = known(config).own_config()
    check_config(config, where)
    if config.pop("auto_map", None):
        say_once(
            f"{where}: names the model's own program code, which is never run: it is read as a "
            f"{config['model_type']}"
        )
    for _, rope in rotary_settings(config):
        if rope.get("short_factor") != rope.get("long_factor"):
            say_once(
                f"{where}: uses LongRoPE's long factors at every length, as mlx-lm does, and never "
                f"the short ones"
            )
            # other programs then compute the same from folders written with this config
            rope["short_factor"] = rope["long_factor"]
    return config


def read_json(folder: Path, where: Path) -> dict[str, Any]:
    """The JSON object in the file `where`, the config.json of `folder`."""
    try:
        if not where.is_file():  # reading a named pipe would wait for ever
            raise OSError
        size = where.stat().st_size
        if size > MOST_BYTES:
            raise header_check.Refused(f"is {size} bytes long, but should be under {MOST_BYTES:,}")
        return header_check.json_object(where.read_bytes())
    except OSError:
        raise MisError(
            f"{folder}: has no readable config.json: give a Hugging Face or MLX model folder"
        ) from None
    except header_check.Refused as why:
        raise MisError(f"{where}: {why}: download the model again") from None


def _opened_as(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """The config of the family that a model contains, or `config` itself.

    A multimodal model contains a text model. A phi3 whose heads rotate as a llama's do is a llama
    with joined matrices.
    """
    kind = str(config.get("model_type"))
    left_out = OPENED_AS.get(kind)
    if left_out is None:
        return config
    if kind in FAMILIES and has_own_positions(config):
        return config
    text = config.get("text_config", {})
    if not isinstance(text, dict):
        raise MisError(
            f"{where}: text_config is {str(text)[:40]}, not a JSON object: download the model again"
        )

    outer = dict[str, Any]()
    for key, value in config.items():
        if not key.endswith("_config") and key not in ("model_type", "architectures"):
            outer[key] = value
    packed = outer.get("quantization")
    if isinstance(packed, dict):
        renamed = dict[str, Any]()
        for name, settings in packed.items():
            for new_name in inside_names(name):
                renamed[new_name] = settings
        outer["quantization"] = renamed
    return {**left_out, **text, **outer}


def check_config(config: Config, where: Path) -> None:
    """Refuse foreign code, unknown model types and sizes that no real model has.

    Each refusal is a MisError of one sentence. where: the file, which the sentence begins with.
    """
    with naming(where):
        _check_type(config)
        family(config).check()
        for key, rope in config_checks.rotary_settings(config):  # a family may not read them itself
            if not isinstance(rope, Mapping):
                raise MisError(f"{key} is {rope!r}, not a JSON object: this config is not usable")
        config_checks.check_packing(config)


@contextlib.contextmanager
def naming(where: Path) -> Iterator[None]:
    """A MisError inside the `with` begins with the file."""
    try:
        yield
    except MisError as error:
        raise MisError(f"{where}: {error}") from None


def _check_type(config: Config) -> None:
    """Refuse a model that wants to run its own code, and a family that is not in the table."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in FAMILIES
    code_keys = ["model_file"]
    if not known:  # nobody needs the code of a known type
        code_keys.append("auto_map")
    for key in code_keys:
        if config.get(key):
            why = f"{key} wants to run the model's own program code; mis_mlx never does that"
            raise MisError(f"{why}: use a model of type {', '.join(FAMILIES)}")
    if known:
        return
    raise MisError(
        f"model_type {kind!r} is not supported: `quantize` takes any type of mlx-lm, all else "
        f"{', '.join(FAMILIES)}"
    )
