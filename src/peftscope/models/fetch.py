"""Fetches base models.

Each fetched folder holds the weights (safetensors), the tokenizer and ``manifest.json`` with source, licence and the
SHA-256 of every file.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem, shown
from peftscope.files.content import REVISION_PATTERN, parse_json, read_text
from peftscope.files.hub import fetch_files
from peftscope.files.resource import Resource
from peftscope.files.wheel import unpacked
from peftscope.models.catalog import BaseModelEntry, HubSource, RandomSource, WheelSource, find_model, model_folder

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "README.md"]
"""The files of a model's folder that are kept: no pickles, no code."""

SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


def fetch_model(name: str, revision: str | None = None) -> Path:
    """Fetches a model if it is missing, and returns its folder.

    Raises:
        InputError: The model cannot be fetched, or its checksum does not match.
    """
    find_model(name)
    if revision is not None and not re.fullmatch(REVISION_PATTERN, revision):
        raise InputError(Problem("revision", f"not a branch, tag or commit (got {shown(revision)})"))
    return model_resource(name, revision).fetch()


def model_resource(name: str, revision: str | None = None) -> Resource:
    """Returns the folder of a model, fetched or not."""
    return Resource(model_folder(name, revision), partial(_fill, name, revision))


def _fill(name: str, revision: str | None, target: Path) -> dict[str, Any]:
    """Fetches a model's files into a folder, and returns its source and licence."""
    entry = find_model(name)
    if entry.terms:
        print(f"{name} is used under its terms: {entry.terms}", file=sys.stderr)
    facts = _FETCHERS[type(entry.source)](name, entry, entry.source, revision, target) or {}
    source = entry.source.model_dump(mode="json")
    own = {"name": name, "revision": revision, "source": source, "licence": _licence(entry, target), "note": entry.note}
    return own | facts


def _licence(entry: BaseModelEntry, folder: Path) -> str:
    """Returns the licence of the entry, or that of the model's card."""
    card = folder / "README.md"
    if entry.licence or not card.is_file():
        return entry.licence or "not stated"
    from huggingface_hub import ModelCard

    return ModelCard.load(card).data.get("license") or "not stated"


def _random(name: str, entry: BaseModelEntry, source: RandomSource, revision: str | None, target: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if entry.shape is None:
        raise InputError(Problem(f"experiments/models.yaml: {name}.shape", "a random model needs a shape"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS).save_pretrained(target)

    if source.like:
        write_random_weights(AutoConfig.for_model(**entry.shape.to_config()), source.seed, target)
        return
    # Larger than the usual 0.02, so that attention in so small a model is not almost uniform.
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.1}
    config = LlamaConfig(**entry.shape.to_config() | special | {"max_position_embeddings": 2048})
    torch.manual_seed(source.seed)
    LlamaForCausalLM(config).save_pretrained(target)


SHARD_BYTES = 2 << 30


def write_random_weights(config: Any, seed: int, target: Path) -> None:
    """Writes a model with random bf16 weights one shard at a time, so that any size needs little memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    torch.manual_seed(seed)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    shards: list[dict[str, Any]] = [{}]
    for name, parameter in model.named_parameters():
        if sum(each.nbytes for each in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        if name not in tied:
            shards[-1][name] = parameter
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}.safetensors"
        values = {name: _random_values(name, like, config.initializer_range) for name, like in shard.items()}
        save_file(values, target / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(each.nbytes for shard in shards for each in shard.values())}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": files}))


def _random_values(name: str, like: Any, spread: float) -> Any:
    """Returns ones for a norm, zeros for a bias, and draws for all other weights, as for an untrained model."""
    import torch

    if like.ndim > 1:
        return torch.empty(like.shape, dtype=torch.bfloat16).normal_(std=spread)
    return (torch.zeros if name.endswith(".bias") else torch.ones)(like.shape, dtype=torch.bfloat16)


def _wheel(name: str, entry: BaseModelEntry, source: WheelSource, revision: str | None, target: Path) -> None:
    where = f"experiments/models.yaml: {name}"
    with unpacked(source, target.parent, f"model {name}", where) as weights:
        if weights.suffix == ".safetensors":
            for path in (p for pattern in _PATTERNS for p in weights.parent.glob(pattern)):
                shutil.copy(path, target)
        else:
            try:
                _convert_gguf(weights, name, target)
            except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                message = f"{source.file} cannot be read as GGUF: {' '.join(str(error).split())}"
                raise InputError(Problem(f"{where}.source.file", message, _ANOTHER)) from None
    if entry.shape:
        path, wanted = target / "config.json", entry.shape.to_config()
        config = parse_json(read_text(path), f"{where}.source.file: config.json") if path.is_file() else wanted
        found: dict[str, tuple[Any, Any]] = {"weights": (_count_values(target), entry.shape.parameters)}
        found |= {key: (config.get(key), wanted[key]) for key in ("model_type", "vocab_size")}
        if differs := [f"{key} {own}, not {other}" for key, (own, other) in found.items() if own != other]:
            message = f"it is not of the shape of {name}: {'; '.join(differs)}"
            raise InputError(Problem(f"{where}.source.file", message, _ANOTHER))


_ANOTHER = "is it the file that it is taken for?"


def _count_values(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _convert_gguf(path: Path, name: str, target: Path) -> None:
    """Converts a GGUF file to a model and a tokenizer in transformers' format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    # transformers treats the loaded model as a quantised one and refuses to save it.
    config = loaded.config
    del config.quantization_config
    config._name_or_path = name
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _hub(name: str, entry: BaseModelEntry, source: HubSource, revision: str | None, target: Path) -> dict[str, str]:
    facts = fetch_files(source.repository, revision or source.revision, _PATTERNS, target)
    shutil.rmtree(target / ".cache", ignore_errors=True)
    if not list(target.glob("*.safetensors")):
        raise InputError(Problem(f"model {name}", "the repository has no safetensors weights"))
    return facts


_FETCHERS: dict[type, Any] = {RandomSource: _random, WheelSource: _wheel, HubSource: _hub}
