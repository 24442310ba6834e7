"""Keys that several trainers share, and what each means for memory. No torch."""

from __future__ import annotations

from typing import Any

from peftscope.errors import shown
from peftscope.memory.config_file import Reading
from peftscope.memory.regimes import REGIMES, Trainer, settings_of

HUGGING_FACE_OPTIMIZERS: dict[str, tuple[str, str | None]] = {
    "adamw_torch": ("adamw", "foreach"),
    "adamw_torch_fused": ("adamw", "fused"),
    "adamw_hf": ("adamw", "foreach"),
    "adamw_8bit": ("adamw_8bit", None),
    "adamw_bnb_8bit": ("adamw_8bit", None),
    "paged_adamw": ("paged_adamw", None),
    "paged_adamw_32bit": ("paged_adamw", None),
    "paged_adamw_8bit": ("paged_adamw_8bit", None),
    "sgd": ("sgd", "foreach"),
}
"""transformers' names of optimizers. Source: ``OptimizerNames`` in transformers 5.24, training_args.py."""

ATTENTION = {
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_2",
    "kernels-community/flash-attn2": "flash_attention_2",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_2",
    "sdpa": "sdpa",
    "eager": "eager",
    "disabled": "eager",
}

COPIES = "transformers 5.24, training_args.py"


def read_model(reading: Reading, *keys: str) -> None:
    """Reads the name of the base."""
    name = reading.get(*keys)
    if isinstance(name, str) and name:
        reading.model = name
        reading.keys["model"] = next(key for key in keys if reading.values.get(key) == name)


def read_length(reading: Reading, key: str, default: int, source: str, *older: str) -> None:
    """Reads the longest sequence, under its key of today or an older one."""
    reading.take("seq_len", key, *older, default=default, source=f"{key} of {source}")


def read_batches(reading: Reading) -> None:
    """Reads the batches of transformers' ``TrainingArguments``; those of the evaluation only if there is one."""
    reading.take("batch_size", "per_device_train_batch_size", default=8, source=COPIES)
    reading.take("gradient_accumulation", "gradient_accumulation_steps", default=1, source=COPIES)
    strategy = reading.get("eval_strategy", "evaluation_strategy")
    evaluates = [reading.get(key) for key in ("val_size", "do_eval")]
    if any(evaluates) or strategy not in (None, "no", False):
        reading.take("eval_batch_size", "per_device_eval_batch_size", default=8, source=COPIES)


def read_checkpointing(reading: Reading, *, default: bool, source: str) -> None:
    """Reads whether activations are recomputed."""
    if isinstance(kind := reading.values.get("gradient_checkpointing"), str):  # axolotl: unsloth, offload
        reading.options["checkpointing"] = True
        reading.overstates("gradient_checkpointing", f"{kind}: recomputed activations on the host")
    else:
        reading.take("checkpointing", "gradient_checkpointing", default=default, source=source)


def read_attention(reading: Reading, key: str) -> None:
    """Reads the attention kernel. Without one, the family of the model decides."""
    name = reading.get(key)
    if isinstance(name, str) and name in ATTENTION:
        reading.options["attention"], reading.keys["attention"] = ATTENTION[name], key
    elif name not in (None, "auto"):
        reading.refuse(key, f"not modelled (got {shown(name)})", f"use {', '.join(ATTENTION)}, or give --attention")
    elif "attention" not in reading.options and reading.given.get("attention") is None:
        reading.assumed.append(f"{key}: the kernel that transformers chooses, sdpa for most families")


def read_packing(reading: Reading, key: str) -> None:
    """Reads whether rows are packed. Flash attention packs without a mask: its rows are answered as full rows."""
    attention = reading.given.get("attention") or reading.options.get("attention")
    if not reading.get(key):
        return
    if attention == "flash_attention_2":
        reading.assumed.append(f"{key} with flash attention: rows of the whole length without a mask stand in for it")
    else:
        reading.take("packing", key)


def read_optimizer(reading: Reading, key: str, source: str) -> None:
    """Reads the optimizer under transformers' names; ``source`` is where its default stands."""
    name = reading.get(key)
    if name is None:
        reading.assumed.append(f"optimizer=adamw (fused): {key} is adamw_torch_fused, {source}")
        name = "adamw_torch_fused"
    set_optimizer(reading, key, HUGGING_FACE_OPTIMIZERS.get(str(name)), str(name))


def set_optimizer(reading: Reading, key: str, known_as: tuple[str, str | None] | None, name: str) -> None:
    """Sets the optimizer and its implementation, or refuses one that is not known."""
    if reading.given.get("optimizer") is not None:
        return
    if known_as is None:
        reading.refuse(key, f"an optimizer that is not modelled (got {shown(name)})", "give --optimizer")
        return
    reading.options["optimizer"], reading.keys["optimizer"] = known_as[0], key
    if known_as[1]:
        reading.options["optimizer_implementation"] = known_as[1]


def read_targets(reading: Reading, key: str, named: Any) -> None:
    """Reads target modules: a list, names with commas between, or all linear layers."""
    names = [name.strip() for name in named.split(",")] if isinstance(named, str) else named
    reading.keys["targets"] = key
    if names in (["all"], ["all-linear"], ["all_linear"]):
        reading.options["targets"] = "all-linear"
    elif not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        reading.refuse(key, f"must be a list of modules (got {shown(named)})", "list them, or give --targets")
    elif any(set(name) & set("*^$|()[]\\+") for name in names):
        reading.refuse(key, f"a pattern is not read (got {shown(named)})", "list the modules, or give --targets")
    else:
        reading.options["targets"] = names


def read_variant(reading: Reading, four_bit: bool, *, dora: str, rslora: str = "", plus: str = "") -> None:
    """Sets the method: LoRA, or the variant whose key is switched on; QLoRA if the base has 4 bits."""
    variants = {"dora": dora, "rslora": rslora, "lora-plus": plus}
    chosen = [(method, key) for method, key in variants.items() if key and reading.get(key)]
    reading.options["method"] = "qlora" if four_bit else chosen[0][0] if chosen else "lora"
    if four_bit and (heavier := [key for method, key in chosen if method == "dora"]):
        reading.refuse(heavier[0], "DoRA on a 4-bit base is not modelled", "leave out one of the two")
    elif len(chosen) + four_bit > 1:
        others = ", ".join(key for _, key in chosen)
        reading.assumed.append(f"{others}: together they take what {reading.options['method']} takes")


def read_half(reading: Reading, *, default: str) -> bool:
    """Returns whether products are in 16 bits. A default in words means that they are if no key says otherwise."""
    brain, half = reading.get("bf16"), reading.get("fp16")
    if half and half != "auto":
        reading.assumed.append("fp16 takes the bytes of bf16, but for the scaler of the loss")
        return True
    if brain is None and default:
        reading.assumed.append(default)
        return True
    return brain in (True, "auto", "full", "true")


def read_regime(reading: Reading, trainer: Trainer, *, autocast: bool) -> None:
    """Sets what the trainer does to precision and output, beside the keys of its file."""
    always = "keep_logits"
    names = ("autocast", "kbit_preparation", "modules_to_save_dtype", always) if autocast else (always,)
    decided = reading.options | {name: value for name, value in reading.given.items() if value is not None}
    for name, (value, source) in settings_of(trainer, decided.get("method", "lora"), decided).items():
        if name in names:
            reading.assume(name, value, f"{REGIMES[trainer].version}, {source}")


SAVED_MODULES = ("embed_tokens", "lm_head")
"""Modules of which a copy can be trained beside an adapter."""


def read_saved_modules(reading: Reading, key: str) -> None:
    """Reads the modules that are trained in full beside the adapter: a list, or names with commas between."""
    named = reading.values.get(key)
    if named in (None, "", []):
        reading.get(key)
        return
    names = [name.strip() for name in named.split(",")] if isinstance(named, str) else named
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    names = [name.rpartition(".")[2] for name in names] if known else []
    if not names or not set(names) <= set(SAVED_MODULES):
        remedy = f"use {' and '.join(SAVED_MODULES)}, or leave it out"
        reading.refuse(key, f"training these modules beside the adapter is not modelled (got {shown(named)})", remedy)
        return
    reading.get(key)
    reading.options["modules_to_save"], reading.keys["modules_to_save"] = names, key


FUSED_LOSSES = {
    "use_liger_kernel": "liger",
    "enable_liger_kernel": "liger",
    "liger_fused_linear_cross_entropy": "liger",
    "cut_cross_entropy": "cut-cross-entropy",
}
"""Keys that switch a fused loss on, and which."""

SAVINGS = {
    "use_liger_kernel": "Liger's norms, activations and rotary embeddings",
    "enable_liger_kernel": "Liger's norms, activations and rotary embeddings",
    "liger_rms_norm": "Liger's norms",
    "liger_glu_activation": "Liger's activations",
    "liger_swiglu": "Liger's activations",
    "liger_rope": "Liger's rotary embeddings",
    "liger_cross_entropy": "Liger's loss in place",
    "chunked_cross_entropy": "a loss over chunks of the tokens",
    "use_unsloth": "unsloth's kernels",
    "use_unsloth_gc": "recomputed activations on the host",
    "activation_offloading": "activations on the host",
    "lora_mlp_kernel": "fused kernels of LoRA",
    "lora_qkv_kernel": "fused kernels of LoRA",
    "lora_o_kernel": "fused kernels of LoRA",
}
"""Keys that save memory in a way that the calculator does not model, and what each switches on."""


def read_savings(reading: Reading) -> None:
    """Reads which fused loss is on, and notes the keys that save memory in a way that is not modelled."""
    for key, loss in FUSED_LOSSES.items():
        if reading.get(key) not in (None, False):
            reading.options["loss"], reading.keys["loss"] = loss, key
    for key, what in SAVINGS.items():
        reading.overstates(key, what)
