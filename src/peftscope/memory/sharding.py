"""How a trainer's file shards a model over cards: FSDP's keys, and the files of DeepSpeed and accelerate. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftscope.errors import shown
from peftscope.files.content import parse_json, read_text

if TYPE_CHECKING:
    from peftscope.memory.config_file import Reading

NAMED_STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "single_gpu": 0, "multi_gpu": 0, "fsdp1": 3, "fsdp2": 3}
"""The names that TRL gives to accelerate's files, and the stage of ZeRO that each stands for."""
OFFLOADS = {"optimizer": "optimizer", "param": "parameters"}
"""What DeepSpeed's keys call the parts that it offloads, and the option for each, the larger last."""
FULL_STAGE = 3
"""The stage of ZeRO that shards weights, gradients and states, as FSDP's full shard does."""


def read_sharding(reading: Reading) -> None:
    """Notes how the file shards the model, and over how many cards if a companion file says it.

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
        _note_stage(reading, key, FULL_STAGE)
        inner = content.get("fsdp_config") or {}
        if str(inner.get("fsdp_version", 1)) == "2":
            reading.options["sharding"], reading.keys["sharding"] = "fsdp2", key
        if inner.get("fsdp_offload_params"):
            _set_offload(reading, key, "parameters")
    elif kind == "DEEPSPEED":
        inner = content.get("deepspeed_config") or {}
        if "deepspeed_config_file" in inner:
            folder = (reading.path.parent / reading.values[key]).parent
            path = folder / str(inner["deepspeed_config_file"])
            _read_deepspeed(reading, key, parse_json(read_text(path), str(path)))
            return
        _note_stage(reading, key, inner.get("zero_stage", 2))
        for what, option in OFFLOADS.items():
            if inner.get(f"offload_{what}_device") not in (None, "none"):
                _set_offload(reading, key, option)


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
    strategy = reading.get("fsdp_config.fsdp_sharding_strategy", "fsdp_config.reshard_after_forward")
    version = reading.get("fsdp_version", "fsdp_config.fsdp_version")
    if not (words or asked is True or strategy or version):
        return
    key = "fsdp" if asked else "fsdp_config"
    if {str(word).lower() for word in [*words, strategy]} & {"shard_grad_op", "no_shard", "hybrid_shard", "2", "3"}:
        _note_stage(reading, key, 2)
    else:
        _note_stage(reading, key, FULL_STAGE)
        if version == 2:
            reading.options["sharding"], reading.keys["sharding"] = "fsdp2", "fsdp_version"
    for name in ("fsdp_config.fsdp_offload_params", "fsdp_config.offload_params"):
        if reading.get(name):
            _set_offload(reading, name, "parameters")
    if "offload" in words:
        _set_offload(reading, key, "parameters")


def _note_stage(reading: Reading, key: str, stage: Any) -> None:
    if stage not in (0, 1, 2, FULL_STAGE):
        reading.refuse(key, f"an unknown stage of ZeRO (got {shown(stage)})", "0, 1, 2 or 3")
    elif stage == FULL_STAGE:
        reading.sharded = reading.sharded or key
        reading.understood.append(f"{key}: weights, gradients and states are sharded")
    elif stage:
        reading.not_modelled.append(f"{key}: shards over cards, but not the weights; the answer is an upper bound")


def _set_offload(reading: Reading, key: str, what: str) -> None:
    """Sets what lies on the host; parameters include the optimizer's states."""
    reading.options["offload"], reading.keys["offload"] = what, key
