"""The base model of a question about memory: a preset, a config.json, or a hub id. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftscope.errors import InputError, Problem, shown
from peftscope.files.content import HUB_ID_PATTERN, parse_json, read_text
from peftscope.files.hub import check_reached, mirrored
from peftscope.models.presets import PRESETS, SIMULATED, did_you_mean, same_shape
from peftscope.models.shapes import ModelShape
from peftscope.models.stored import Stored, stored_as
from peftscope.models.vision import KINDS, Vision, text_of, vision_of

ENDINGS: dict[str, dict[str, Any]] = {
    "-bnb-4bit": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "-awq": {"quant_method": "awq"},
    "-gptq": {"quant_method": "gptq"},
    "-gptq-int4": {"quant_method": "gptq"},
}
"""The ``quantization_config`` of checkpoints whose hub id ends so, as far as it decides memory."""
DYNAMIC = "dynamic 4 bits: what this checkpoint keeps of its layers in 16 bits comes on top"
"""The note of an answer on a checkpoint whose hub id ends with -unsloth-bnb-4bit."""


@dataclass(frozen=True)
class Model:
    """A base model, as far as it decides memory.

    Attributes:
        name: The name, as the question gave it.
        config: The content of its ``config.json``.
        shape: Its sizes, or None if the closed form does not know its family.
        why_no_shape: The reason why there is no shape.
        variant_of: The preset that it is a variant of by its name, if its own configuration was not read.
        stored: How its linear layers are stored, if its checkpoint is quantised or is loaded in 8 bits.
        unpacked: What else an answer says of a quantised checkpoint: that it is unpacked to train, or a part is not so.
        vision: Its vision tower, if that is modelled; ``config`` is then that of the language model.
    """

    name: str
    config: dict[str, Any]
    shape: ModelShape | None
    why_no_shape: str = ""
    variant_of: str = ""
    stored: Stored | None = None
    unpacked: str = ""
    vision: Vision | None = None

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that its positions allow, or None if its configuration states no limit."""
        limits = [self.config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
        return next((limit for limit in limits if isinstance(limit, int)), None)


def describe_model(name: str) -> Model:
    """Returns the model with this name: a preset, the path of a ``config.json``, a name in models.yaml, or a hub id.

    Raises:
        InputError: The name is none of these, or the model's configuration cannot be read.
    """
    if preset := next((one for key, one in PRESETS.items() if name.lower() in (key, one.hub_id.lower())), None):
        return Model(name, preset.shape.to_config(), preset.shape, vision=preset.vision)
    if known := next((known for key, known in SIMULATED.items() if name.lower() in (key, known.hub_id.lower())), None):
        why = f"model_type {known.config['model_type']} is not one of its kinds"
        return Model(name, known.config, None, why, vision=known.vision)
    path = Path(name)
    if path.suffix == ".json" or os.path.isdir(path):
        return _read_config(name, path / "config.json" if os.path.isdir(path) else path)
    if name.startswith((".", "/", "~")):
        raise InputError(Problem("model", f"no such file or folder: {name}", "give the path of a config.json"))
    from peftscope.models.catalog import find_model

    with suppress(InputError):  # models.yaml is missing, or does not know the name
        if (shape := find_model(name).shape) is not None:
            return Model(name, shape.to_config(), shape)
    if not _in_mirror(name) and (same := same_shape(name)):
        lower = name.lower()
        stored = next((stored_as(how)[0] for ending, how in ENDINGS.items() if lower.endswith(ending)), None)
        more = DYNAMIC if lower.endswith("-unsloth-bnb-4bit") else ""
        return replace(describe_model(same), name=name, variant_of=same, stored=stored, unpacked=more)
    if "/" not in name:
        hint = f"{did_you_mean(name, [*PRESETS, *SIMULATED])}; or give the path of a config.json, or a hub id org/name"
        raise InputError(Problem("model", f"unknown model (got {name!r})", hint))
    return _read_config(name, _downloaded_config(name))


def _in_mirror(name: str) -> bool:
    folder = mirrored(name) if "/" in name else None
    return folder is not None and (folder / "config.json").is_file()


def _downloaded_config(hub_id: str) -> Path:
    if _in_mirror(hub_id):
        return Path(str(mirrored(hub_id))) / "config.json"
    remedy = "give a preset (`peftscope models` lists them), or the path of its config.json"
    if not re.fullmatch(HUB_ID_PATTERN, hub_id):
        raise InputError(Problem("model", f"there is no {hub_id!r} here, and it is no id of the hub", remedy))
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ModuleNotFoundError:
        message = f"the config.json of {hub_id!r} is on the hub, and huggingface_hub is not installed"
        raise InputError(Problem("model", message, f"pip install huggingface_hub, or {remedy}")) from None

    if isinstance(cached := try_to_load_from_cache(hub_id, "config.json"), str):
        return Path(cached)
    check_reached(f"model: the config.json of {hub_id!r}", remedy)
    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # network and hub fail in many ways, and the user needs one line
        kind = type(error).__name__
        said = {
            "GatedRepoError": "its owner has to let you in (`hf auth login`)",
            "RepositoryNotFoundError": "the hub has no such model",
        }
        reason = said.get(kind, f"the hub refuses it ({kind})")
        raise InputError(Problem("model", f"cannot fetch the config.json of {hub_id!r}: {reason}", remedy)) from None


def _read_config(name: str, path: Path) -> Model:
    try:
        config = parse_json(read_text(path), str(path))
    except InputError as error:
        raise InputError(replace(problem, where=f"model: {problem.where}") for problem in error.problems) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(Problem("model", f"{path} has no `model_type`", "give the config.json of a causal model"))
    if reason := _not_modelled(config):
        raise InputError(Problem("model", f"{path}: {reason[0]}", reason[1]))
    try:
        stored, unpacked = stored_as(config.pop("quantization_config", None))
        vision = None
        if config["model_type"] in KINDS and isinstance(config.get("vision_config"), dict):
            kind, tower, config = config["model_type"], config["vision_config"], text_of(config)
            vision = vision_of(kind, tower, config["hidden_size"])
        shape = ModelShape.from_config(config)
        kept = shape.to_config() if vision else config
        return Model(name, kept, shape, stored=stored, unpacked=unpacked, vision=vision)
    except KeyError as error:
        remedy = "give the config.json of a causal model"
        raise InputError(Problem("model", f"{path}: `{error.args[0]}` is missing", remedy)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join((str(path), *map(str, first["loc"])))
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f" (got {shown(first['input'])})"
        raise InputError(Problem("model", f"{where}: {message}{got}")) from None
    except ValueError as error:
        if stored:
            message = f"{path}: no closed form, and {stored.name} is not simulated"
            raise InputError(Problem("model", message, "give the config.json of its 16-bit base")) from None
        return Model(name, config, None, str(error), unpacked=unpacked, vision=vision)
    except (TypeError, ZeroDivisionError):
        remedy = "check that all its sizes are whole numbers above 0"
        raise InputError(Problem("model", f"{path} does not describe a model", remedy)) from None


ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "modernbert")
"""The most used families of encoders, by ``model_type``."""


def _not_modelled(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns why a configuration is not that of a causal model in plain weights, and what to do, or None."""
    names = config.get("architectures")
    name = next(iter(names if isinstance(names, list) else []), config["model_type"])
    causal = "give the config.json of a causal model"
    if config.get("is_encoder_decoder"):
        return f"{name} is an encoder-decoder, which is not modelled", causal
    if config["model_type"] in ENCODERS:
        return f"{name} is an encoder, which is not modelled", causal
    if re.search(r"For(Sequence|Token)Classification$|ForQuestionAnswering$", str(name)):
        return f"{name} has another head than a causal model, which is not modelled", causal
    return None
