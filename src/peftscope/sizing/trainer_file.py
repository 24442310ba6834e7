"""Writes the file of a trainer for a run: what ``config_file.py`` reads back as the same question. No torch."""

from __future__ import annotations

from typing import Any, Literal, get_args

import yaml

from peftscope.memory.beside import Beside
from peftscope.models.presets import PRESETS
from peftscope.sizing.trainers import remedies_in
from peftscope.spec import RunSpec

Pasted = Literal["axolotl", "llama-factory", "trl"]
"""The trainers whose files are written."""
ALWAYS_HALF = ("axolotl",)
"""The trainers that load the weights of full fine-tuning in 16 bits."""


class _Code(str):
    """A value that is Python code."""

    __repr__ = str.__str__


KEYS: dict[str, tuple[str, str, str]] = {
    "model": ("base_model", "model_name_or_path", "model"),
    "rank": ("lora_r", "lora_rank", "peft_config.r"),
    "alpha": ("lora_alpha", "lora_alpha", "peft_config.lora_alpha"),
    "dropout": ("lora_dropout", "lora_dropout", "peft_config.lora_dropout"),
    "seq_len": ("sequence_len", "cutoff_len", "args.max_length"),
    "batch_size": ("micro_batch_size", "per_device_train_batch_size", "args.per_device_train_batch_size"),
    "gradient_accumulation": (*("gradient_accumulation_steps",) * 2, "args.gradient_accumulation_steps"),
    "checkpointing": ("gradient_checkpointing", "", "args.gradient_checkpointing"),
    "keeps_activations": ("", "disable_gradient_checkpointing", ""),
    "learning_rate": ("learning_rate", "learning_rate", "args.learning_rate"),
    "epochs": ("num_epochs", "num_train_epochs", "args.num_train_epochs"),
    "optimizer": ("optimizer", "optim", "args.optim"),
}
"""The key that has an option's value in the file of each trainer; empty where it has none."""
_FACTORY = {"stage": "sft", "do_train": True, "bf16": True, "finetuning_type": "full"}
_FACTORY_LORA = _FACTORY | {"finetuning_type": "lora", "lora_target": "all"}
_TRL = {"args.bf16": True, "args.model_init_kwargs": {"dtype": "bfloat16"}}
_TRL_LORA = _TRL | {"peft_config.target_modules": "all-linear", "peft_config.task_type": "CAUSAL_LM"}
_FOUR_BITS = _Code(
    "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
    "bnb_4bit_compute_dtype='bfloat16')"
)
OF_METHOD: dict[tuple[Pasted, str], dict[str, Any]] = {
    ("axolotl", "lora"): {"adapter": "lora", "lora_target_linear": True, "bf16": True},
    ("axolotl", "qlora"): {"adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True, "bf16": True},
    ("axolotl", "full in bf16"): {"bf16": True},
    ("llama-factory", "lora"): _FACTORY_LORA,
    ("llama-factory", "qlora"): _FACTORY_LORA | {"quantization_bit": 4},
    ("llama-factory", "full"): _FACTORY,
    ("llama-factory", "full in bf16"): _FACTORY | {"bf16": False, "pure_bf16": True},
    ("trl", "lora"): _TRL_LORA,
    ("trl", "qlora"): _TRL_LORA | {"args.model_init_kwargs": {"dtype": "bfloat16", "quantization_config": _FOUR_BITS}},
    ("trl", "full"): _TRL | {"args.model_init_kwargs": {"dtype": "float32"}},
    ("trl", "full in bf16"): _TRL,
}
"""The keys of a method with bf16 products; adapters lie on all linear layers."""
YOURS = {"axolotl": "datasets and output_dir", "llama-factory": "dataset, template and output_dir"}
"""The keys that a trainer needs beside."""
IMPORTS = {"peft": "LoraConfig", "transformers": "BitsAndBytesConfig"}
"""The import of TRL's script if it uses it."""
SCRIPT = (
    "from datasets import load_dataset\n{imports}"
    "from trl import SFTConfig, SFTTrainer\n\n"
    "trainer = SFTTrainer(\n    model={model!r},\n{calls}"
    '    train_dataset=load_dataset("json", data_files="my-examples.jsonl", split="train"),\n)\n'
    "trainer.train()\n"
)


def trainer_file(trainer: Pasted, spec: RunSpec, epochs: float, beside: Beside) -> str:
    """Returns the file that makes a trainer do a run of full fine-tuning, LoRA or QLoRA; for TRL it is a script.

    Of ``beside``, the file has Liger's loss and the packed experts.
    """
    values = spec.model_dump() | spec.method.model_dump() | {"epochs": epochs}
    values["model"] = PRESETS[spec.model.lower()].hub_id if spec.model.lower() in PRESETS else spec.model
    values["keeps_activations"] = not spec.checkpointing
    values["optimizer"] = {"adamw": "adamw_torch_fused"}.get(spec.optimizer, spec.optimizer)
    half = " in bf16" if spec.method.trains_base and spec.precision == "bf16" else ""
    keys, place = dict(OF_METHOD[trainer, spec.method.name + half]), get_args(Pasted).index(trainer)
    for option, named in KEYS.items():
        if option in values and named[place]:
            keys[named[place]] = int(values[option]) if option == "alpha" else values[option]
    for option, on in (("loss", beside.loss == "liger"), ("quantize_moe_experts", beside.quantize_moe_experts)):
        keys |= remedies_in(trainer)[option] if on else {}
    if trainer != "trl":
        return f"# Add {YOURS[trainer]}.\n{yaml.safe_dump(keys, sort_keys=False)}"

    def call(name: str, kind: str) -> str:
        given = [(key.partition(".")[2], value) for key, value in keys.items() if key.startswith(f"{name}.")]
        lines = "".join(f"        {key}={value!r},\n" for key, value in given)
        return f"    {name}={kind}(\n{lines}    ),\n" if given else ""

    calls = call("args", "SFTConfig") + call("peft_config", "LoraConfig")
    used = [f"from {package} import {name}\n" for package, name in IMPORTS.items() if name in calls]
    return SCRIPT.format(model=keys["model"], calls=calls, imports="".join(used))
