"""How a trainer's file shards a model over cards: FSDP's keys, and the files of DeepSpeed and accelerate. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftscope.errors import shown
from peftscope.files.content import parse_json, read_text

if TYPE_CHECKING:
    from peftscope.memory.config_file import Reading

NAMED_STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "single_gpu": 0, "multi_gpu": 0, "fsdp1": 3, "fsdp2": 3}
"""The names that TRL gives to accelerate's files, and the stage of ZeRO that each stands for."""
STRATEGIES = {
    "no_shard": 0,
    "3": 0,
    "shard_grad_op": 2,
    "2": 2,
    "hybrid_shard": 2,
    "4": 2,
    "hybrid_shard_zero2": 2,
    "5": 2,
    "false": 2,
}
"""FSDP's strategies that leave weights whole, by name or number, and the stage of each; false: after a forward pass."""
MIXED = "accelerate 1.15, utils/fsdp_utils.py:820 and accelerator.py:2037; DeepSpeed does the same"
"""What keeps trained weights in fp32 under mixed precision."""
OFFLOADS = {"optimizer": "optimizer", "param": "parameters"}
"""What DeepSpeed's keys call the parts that it offloads, and the option for each, the larger last."""
STRATEGY_KEYS = ("reshard_after_forward", "fsdp_reshard_after_forward", "fsdp_sharding_strategy", "sharding_strategy")
"""The keys of ``fsdp_config`` that name the strategy."""
FULL_STAGE = 3
"""The stage of ZeRO that shards weights, gradients and states, as FSDP's full shard does."""


def read_sharding(reading: Reading, *, mixed: bool) -> None:
    """Notes how the file shards the model, and over how many cards if a companion file says it.

    Args:
        reading: The file.
        mixed: Whether it trains in mixed precision. Shards of trained weights are in fp32 then, and layers compute in
            bf16, whatever the weights were loaded in.

    Raises:
        InputError: A companion file is missing or cannot be read.
    """
    named = reading.values.get("accelerate_config")
    if isinstance(named, str) and named in NAMED_STAGES:
        reading.get("accelerate_config")
        _note_stage(reading, "accelerate_config", NAMED_STAGES[named])
    elif named is not None:
        _read_accelerate(reading, reading.companion("accelerate_config"))
    if reading.values.get("deepspeed") is not None:
        _read_deepspeed(reading, "deepspeed", reading.companion("deepspeed"))
    _read_fsdp(reading)
    if reading.sharded and mixed:
        if reading.options["method"] == "full":
            reading.options["precision"] = "bf16"
        reading.assume("master_weights", "fp32", MIXED)


def _read_accelerate(reading: Reading, content: Any) -> None:
    key = "accelerate_config"
    if not isinstance(content, dict):
        reading.refuse(key, "must name a file of accelerate", "give --gpus and leave it out")
        return
    if isinstance(content.get("num_processes"), int):
        reading.cards = content["num_processes"]
        reading.understood.append(f"{key}: num_processes: {reading.cards}")
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind == "FSDP":
        inner = _inner(reading, content, "fsdp_config")
        strategy = inner.get("fsdp_reshard_after_forward", inner.get("fsdp_sharding_strategy"))
        _note_strategy(reading, key, [strategy], inner.get("fsdp_version"))
        if inner.get("fsdp_offload_params"):
            _set_offload(reading, key, "parameters")
    elif kind == "DEEPSPEED":
        inner = _inner(reading, content, "deepspeed_config")
        if "deepspeed_config_file" in inner:
            folder = (reading.path.parent / reading.values[key]).parent
            path = folder / str(inner["deepspeed_config_file"])
            _read_deepspeed(reading, key, parse_json(read_text(path), str(path)))
            return
        _note_stage(reading, key, inner.get("zero_stage", 2))
        for what, option in OFFLOADS.items():
            if inner.get(f"offload_{what}_device") not in (None, "none"):
                _set_offload(reading, key, option)
    elif kind == "MULTI_GPU":
        _note_stage(reading, key, 0)


def _inner(reading: Reading, content: dict[str, Any], name: str) -> dict[str, Any]:
    inner = content.get(name) or {}
    if isinstance(inner, dict):
        return inner
    reading.refuse("accelerate_config", f"{name} must be a mapping (got {shown(inner)})", "correct accelerate's file")
    return {}


def _read_deepspeed(reading: Reading, key: str, content: Any) -> None:
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    if not isinstance(zero, dict):
        reading.refuse(key, "names no file of DeepSpeed with `zero_optimization`", "give DeepSpeed's JSON")
        return
    _note_stage(reading, key, zero.get("stage", 0))
    for what, option in OFFLOADS.items():
        asked = zero.get(f"offload_{what}")
        if isinstance(asked, dict) and asked.get("device", "cpu") != "none":
            _set_offload(reading, key, option)


def _read_fsdp(reading: Reading) -> None:
    asked = reading.get("fsdp")
    words = asked.replace(",", " ").split() if isinstance(asked, str) else asked if isinstance(asked, list) else []
    strategy = reading.get(*(f"fsdp_config.{key}" for key in STRATEGY_KEYS))
    version = reading.get("fsdp_version", "fsdp_config.fsdp_version")
    if not (words or asked is True or strategy is not None or version):
        return
    key = "fsdp" if asked else "fsdp_config"
    _note_strategy(reading, key, [*words, strategy], version)
    for name in ("fsdp_config.fsdp_offload_params", "fsdp_config.offload_params"):
        if reading.get(name):
            _set_offload(reading, name, "parameters")
    if "offload" in words:
        _set_offload(reading, key, "parameters")


def _note_strategy(reading: Reading, key: str, words: list[Any], version: Any) -> None:
    """Notes the stage that FSDP's strategy stands for; without any it shards in full."""
    stages = [STRATEGIES[word] for word in (str(word).lower() for word in words) if word in STRATEGIES]
    _note_stage(reading, key, min(stages, default=FULL_STAGE))
    if str(version) == "2" and not stages:
        reading.options["sharding"], reading.keys["sharding"] = "fsdp2", key


def _note_stage(reading: Reading, key: str, stage: Any) -> None:
    if stage not in (0, 1, 2, FULL_STAGE):
        reading.refuse(key, f"an unknown stage of ZeRO (got {shown(stage)})", "0, 1, 2 or 3")
    elif stage == FULL_STAGE:
        reading.sharded = reading.sharded or key
        reading.understood.append(f"{key}: weights, gradients and states are sharded")
        return
    reading.whole = reading.whole or key
    if stage:
        reading.not_modelled.append(f"{key}: shards over cards, but not the weights; the answer is an upper bound")


def _set_offload(reading: Reading, key: str, what: str) -> None:
    """Sets what lies on the host; parameters include the optimizer's states."""
    reading.options["offload"], reading.keys["offload"] = what, key
