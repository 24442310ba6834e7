"""How a trainer's file shards a model over cards: FSDP's keys, and the files of DeepSpeed and accelerate. No torch."""

from __future__ import annotations

from typing import Any

from peftscope.errors import shown
from peftscope.methods import METHODS
from peftscope.sizing.reading import Reading, beside, flatten, read_content

NAMED_STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "single_gpu": 0, "multi_gpu": 0, "fsdp1": 3, "fsdp2": 3}
"""The names that TRL gives to accelerate's files, and the stage of ZeRO that each stands for."""
HALF_SHARDED = ("shard_grad_op", "2", "hybrid_shard", "4", "hybrid_shard_zero2", "5", "false")
STRATEGIES = {"no_shard": 0, "3": 0} | dict.fromkeys(HALF_SHARDED, 2)
"""FSDP's strategies that leave weights whole, by name or number, and the stage of each; false: after a forward pass."""
MIXED = "accelerate 1.15, utils/fsdp_utils.py:820 and accelerator.py:2037; DeepSpeed does the same"
"""The settings that keep trained weights in fp32 under mixed precision."""
OFFLOADS = {"optimizer": "optimizer", "param": "parameters"}
"""DeepSpeed's names of the parts that it offloads, and the option for each, the larger last."""
STRATEGY_KEYS = (
    "fsdp_config.reshard_after_forward",
    "fsdp_config.fsdp_reshard_after_forward",
    "fsdp_config.fsdp_sharding_strategy",
    "fsdp_config.sharding_strategy",
)
"""The keys that name FSDP's strategy, in a trainer's file and in accelerate's."""
SWITCHES: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("fsdp_config.fsdp_offload_params", "fsdp_config.offload_params"), ("offload", "parameters")),
    "fsdp_config.fsdp_activation_checkpointing": ("checkpointing", True),
    "fsdp_config.activation_checkpointing": ("checkpointing", True),
}
"""The keys that leave FSDP's shards on the host, or with which it recomputes activations itself: what each sets."""
FULL_STAGE = 3
"""The stage of ZeRO that shards weights, gradients and states, as FSDP's full shard does."""
PARTIAL_STAGE = 2
"""The stage that shards gradients and states."""


def read_sharding(reading: Reading, *, mixed: bool) -> None:
    """Notes how the file shards the model, and over how many cards if a companion file says it.

    ``mixed``: it trains in mixed precision. Shards of trained weights are in fp32 then, and layers compute in bf16,
    whatever the weights were loaded in.

    Raises:
        InputError: A companion file is missing or cannot be read.
    """
    named = reading.values.get("accelerate_config")
    if isinstance(named, str) and named in NAMED_STAGES:
        reading.get("accelerate_config")
        _note_stage(reading, "accelerate_config", NAMED_STAGES[named], {} if named.startswith("zero") else None)
    elif named is not None:
        _read_accelerate(reading, "accelerate_config")
    if reading.values.get("deepspeed") is not None:
        _read_deepspeed(reading, "deepspeed", reading.companion("deepspeed"))
    _read_fsdp(reading)
    if reading.sharded and mixed:
        if reading.options["method"] == "full":
            reading.options["precision"] = "bf16"
        reading.assume("master_weights", "fp32", MIXED)
        if reading.by_deepspeed and "adapter_dtype" in METHODS[reading.options["method"]].model_fields:
            reading.assumed = [line for line in reading.assumed if "adapter_dtype=" not in line]
            reading.assume("adapter_dtype", "base", "DeepSpeed at 38327e0, runtime/engine.py:1231: .bfloat16() of all")
            reading.options.pop("modules_to_save_dtype", None)


def _read_accelerate(reading: Reading, key: str) -> None:
    content = reading.companion(key)
    if not isinstance(content, dict):
        reading.refuse(key, "must name a file of accelerate", "give --gpus and leave it out")
        return
    flat = flatten(content)
    if isinstance(flat.get("num_processes"), int):
        reading.cards = flat["num_processes"]
        reading.understood.append(f"{key}: num_processes: {reading.cards}")
    kind = str(flat.get("distributed_type", "NO")).upper()
    inner = f"{kind.lower()}_config"
    if flat.get(inner):
        reading.refuse(key, f"{inner} must be a mapping (got {shown(flat[inner])})", "correct accelerate's file")
    elif kind == "FSDP":
        strategy = next((flat[name] for name in STRATEGY_KEYS if flat.get(name) is not None), None)
        _note_strategy(reading, key, [strategy], flat.get("fsdp_config.fsdp_version"))
        for option, value in (said for name, said in SWITCHES.items() if flat.get(name)):
            reading.set(option, value, key)
    elif kind == "DEEPSPEED" and (file := flat.get(f"{inner}.deepspeed_config_file")):
        path = beside(beside(reading.path, reading.values[key]), str(file))
        _read_deepspeed(reading, key, read_content(path))
    elif kind == "DEEPSPEED":
        zero: dict[str, Any] = {"stage": flat.get(f"{inner}.zero_stage", 2)}
        for what in OFFLOADS:
            zero[f"offload_{what}"] = {"device": flat.get(f"{inner}.offload_{what}_device") or "none"}
        _read_deepspeed(reading, key, {"zero_optimization": zero})
    elif kind == "MULTI_GPU":
        _note_stage(reading, key, 0)


def _read_deepspeed(reading: Reading, key: str, content: Any) -> None:
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    if not isinstance(zero, dict):
        reading.refuse(key, "names no file of DeepSpeed with `zero_optimization`", "give DeepSpeed's JSON")
        return
    _note_stage(reading, key, zero.get("stage", 0), zero)
    for what, option in OFFLOADS.items():
        asked = zero.get(f"offload_{what}")
        if isinstance(asked, dict) and asked.get("device", "cpu") != "none":
            reading.set("offload", option, key)


def _read_fsdp(reading: Reading) -> None:
    asked = reading.get("fsdp")
    words = asked.replace(",", " ").split() if isinstance(asked, str) else asked if isinstance(asked, list) else []
    strategy = reading.get(*STRATEGY_KEYS)
    version = reading.get("fsdp_version", "fsdp_config.fsdp_version", "fsdp_config.version")
    if not (words or asked is True or strategy is not None or version):
        return
    key = "fsdp" if asked else "fsdp_config"
    # Source: transformers 5.24, training_args.py:2826. axolotl fills in 1.
    usual = 1 if reading.trainer.startswith("axolotl") else 2
    _note_strategy(reading, key, [*words, strategy], version or usual)
    for name, (option, value) in SWITCHES.items():
        if reading.get(name):
            reading.set(option, value, name)
    if isinstance(shards := reading.get("dp_shard_size"), int):
        reading.cards = shards
    if "offload" in words:
        reading.set("offload", "parameters", key)


def _note_strategy(reading: Reading, key: str, words: list[Any], version: Any) -> None:
    """Notes the stage that FSDP's strategy stands for; without any it shards in full."""
    stages = [STRATEGIES[word] for word in (str(word).lower() for word in words) if word in STRATEGIES]
    _note_stage(reading, key, min(stages, default=FULL_STAGE))
    if not stages:
        reading.set("sharding", "fsdp2" if str(version) == "2" else "fsdp1", key)


def _note_stage(reading: Reading, key: str, stage: Any, zero: dict[str, Any] | None = None) -> None:
    """Notes how much is sharded; ``zero`` is what a file says of it if DeepSpeed shards."""
    if stage not in (0, 1, 2, FULL_STAGE):
        reading.refuse(key, f"an unknown stage of ZeRO (got {shown(stage)})", "0, 1, 2 or 3")
    elif stage == FULL_STAGE or (stage == PARTIAL_STAGE and zero is not None):
        reading.sharded = reading.sharded or key
        what = "weights, gradients and states" if stage == FULL_STAGE else "gradients and states"
        reading.understood.append(f"{key}: {what} are sharded")
        reading.by_deepspeed = reading.by_deepspeed or zero is not None
        if zero is not None and stage == PARTIAL_STAGE:
            reading.set("sharding", "zero2", key)
            # Source: DeepSpeed, runtime/zero/config.py. A second buffer as large serves overlap_comm.
            size = 0 if zero.get("reduce_bucket_size") == "auto" else zero.get("reduce_bucket_size", 5e8)
            if zero.get("contiguous_gradients") is False:
                reading.not_modelled.append(f"{key}: contiguous_gradients: false may change memory; answered as true")
            if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < 1e15:
                reading.refuse(key, f"reduce_bucket_size must be a number or auto (got {shown(size)})", "correct it")
                return
            reading.set("reduce_bucket", int(size) * (2 if zero.get("overlap_comm") is True else 1), key)
        return
    reading.whole = reading.whole or key
    if stage:
        reading.not_modelled.append(f"{key}: shards over cards, but not the weights; the answer is an upper bound")
