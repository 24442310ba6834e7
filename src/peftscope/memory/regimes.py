"""The precision, preparation and output of trainers, as they are by default. No torch.

``--as`` asks about a trainer's regime. Batch, length, rank and targets are what a person chooses, and stay theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from peftscope.methods import METHODS

Trainer = Literal["trl", "axolotl", "llama-factory", "torchtune", "unsloth", "peft"]


class Regime(NamedTuple):
    """The defaults of a trainer.

    Attributes:
        version: The release that was read.
        settings: Options, their values, and the lines that say so, in the release unless they name another.
        beside: What else it does, which the options cannot say; empty if nothing.
    """

    version: str
    settings: Mapping[str, tuple[Any, str]]
    beside: str = ""


_HUGGING_FACE: dict[str, tuple[Any, str]] = {
    "keep_logits": (False, "transformers 5.24.0, trainer.py:2217: compute_loss returns the loss alone"),
    "optimizer_implementation": ("fused", "transformers 5.24.0, training_args.py:811: adamw_torch_fused"),
}

REGIMES: dict[Trainer, Regime] = {
    "trl": Regime(
        "TRL 1.16.0",
        {
            "autocast": (True, "trl/trainer/base_config.py:108: bf16 unless fp16"),
            "kbit_preparation": ("none", "trl/trainer/sft_trainer.py:870: get_peft_model alone"),
            "adapter_dtype": ("base", "trl/trainer/sft_trainer.py:911: bf16 on a quantised base"),
            "checkpointing": (True, "trl/trainer/base_config.py:62"),
            "loss": ("chunked", "trl/trainer/sft_trainer.py:1144: add_fused_lm_head"),
            **_HUGGING_FACE,
        },
        "before 1.15, all logits: --loss plain, or --logprobs full; up to 0.24 also --kbit-preparation trl, and "
        "--adapter-dtype fp32",
    ),
    "axolotl": Regime(
        "axolotl 0.19.0",
        {
            "autocast": (
                True,
                "axolotl/utils/schemas/config.py:561: bf16, which transformers' Trainer runs as autocast",
            ),
            "kbit_preparation": (
                "none",
                "axolotl/loaders/model.py:471 and 1173: what PEFT prepared goes back to bf16, norms included",
            ),
            **_HUGGING_FACE,
        },
    ),
    "llama-factory": Regime(
        "LLaMA-Factory 0.9.5",
        {
            "autocast": (True, "hparams/parser.py:438 recommends bf16: true, as in all its examples"),
            "kbit_preparation": ("none", "hparams/model_args.py:153: upcast_layernorm is off"),
            "adapter_dtype": ("fp32", "model/adapter.py:325: trained weights are cast to fp32"),
            "modules_to_save_dtype": ("fp32", "model/adapter.py:325: trained weights are cast to fp32"),
            "checkpointing": (True, "hparams/model_args.py:145: on unless disable_gradient_checkpointing"),
            **_HUGGING_FACE,
        },
    ),
    "torchtune": Regime(
        "torchtune 0.6.1",
        {
            "autocast": (False, "recipes/lora_finetune_single_device.py:67: dtype=bf16 for activations, too"),
            "kbit_preparation": ("none", "recipes/lora_finetune_single_device.py:431: all in one dtype"),
            "adapter_dtype": ("base", "recipes/lora_finetune_single_device.py:431: all in one dtype"),
            "checkpointing": (True, "recipes/configs/llama3/8B_qlora_single_device.yaml:88"),
            "keep_logits": (False, "recipes/lora_finetune_single_device.py:659: del logits"),
            "optimizer_implementation": ("fused", "recipes/configs/llama3/8B_qlora_single_device.yaml:59"),
        },
        "its configurations compute the loss over chunks of the tokens, which is not modelled: an upper bound",
    ),
    "unsloth": Regime(
        "Unsloth at 015bdef, with unsloth-zoo at ce232d6",
        {
            "autocast": (True, "transformers' Trainer runs bf16 as autocast"),
            "kbit_preparation": ("none", "unsloth/kernels/rms_layernorm.py: norms return the precision of their input"),
            "adapter_dtype": ("fp32", "unsloth_zoo/training_utils.py:331: float32_mixed_precision"),
            "padding": ("none", "unsloth/models/llama.py: training drops the mask"),
            "checkpointing": (True, 'unsloth/models/llama.py:3079: use_gradient_checkpointing="unsloth"'),
            "offload_activations": (True, "unsloth_zoo/gradient_checkpointing.py:259"),
            "loss": ("cut-cross-entropy", "unsloth_zoo/fused_losses/cross_entropy_loss.py: chunks of tokens"),
            **_HUGGING_FACE,
        },
        "its kernels keep less within a layer, which is left out; its loss takes up to half of what is free, at most "
        "4 GiB, which is left out too; its notebooks have --optimizer adamw_8bit; other jobs than sft are not read",
    ),
    "peft": Regime(
        "PEFT 0.21.2",
        {
            "autocast": (False, "a plain loop enters no autocast"),
            "kbit_preparation": ("peft", "peft/utils/other.py:158: prepare_model_for_kbit_training"),
            "adapter_dtype": ("fp32", "peft/mapping_func.py: autocast_adapter_dtype=True"),
            "keep_logits": (True, "a plain loop keeps its output until the next step"),
        },
    ),
}


def settings_of(trainer: Trainer, method: str, given: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns what a trainer sets for a method beside the options that are given, with the lines that say so."""
    foreign = {"adapter_dtype", "kbit_preparation"} - METHODS[method].model_fields.keys()
    foreign |= set() if METHODS[method].supports_checkpointing else {"checkpointing", "offload_activations"}
    foreign |= {"offload_activations"} if given.get("checkpointing") is False else set()
    foreign |= set() if given.get("precision", "bf16") == "bf16" else {"autocast"}
    foreign |= {"loss"} if given.get("job", "sft") != "sft" else set()
    copies = given.get("modules_to_save") and given.get("autocast") is not False
    foreign |= set() if copies else {"modules_to_save_dtype"}
    foreign |= set() if given.get("optimizer", "adamw") in ("adamw", "sgd") else {"optimizer_implementation"}
    quantised = "kbit_preparation" in METHODS[method].model_fields or given.get("load_in_8bit")
    foreign |= {"adapter_dtype"} if trainer == "trl" and not quantised else set()
    settings = REGIMES[trainer].settings
    return {name: said for name, said in settings.items() if name not in foreign and name not in given}
