"""A table a trainer: what the keys of its files mean, and the defaults that its documentation gives. No torch.

A row says the option, its key, the trainer's default, and the file that the default was read from; see ``Row``.
To add a key, add a row. Rows are read from top to bottom, so that those of the method stand above those of its options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem
from peftscope.sizing import trainer_keys as keys
from peftscope.sizing.reading import OWN, Row, flatten
from peftscope.sizing.trainer_keys import four_bit, noted, refused, saving

# A commit stands where the default was read in the code itself; the others come from documentation and excerpts.
SCHEMAS = "axolotl, utils/schemas"
MODEL_ARGS = "LLaMA-Factory, hparams/model_args.py"
UNLESS_DISABLED = f"on unless disable_gradient_checkpointing, {MODEL_ARGS}"
TUNING_ARGS = "LLaMA-Factory, hparams/finetuning_args.py"
TRL_MODEL = "TRL at bc13ae6, trainer/model_config.py"
TRL_BASE = "TRL at 13e421b, trainer/base_config.py"
TORCHTUNE = "torchtune, docs.pytorch.org/torchtune"
BUILDERS = f"{TORCHTUNE}, model builders"
PEFT = "PEFT 0.21, tuners/lora/config.py"
ADALORA = "PEFT 0.21, tuners/adalora/config.py"
COPIES = "transformers 5.24, training_args.py"

SAME_NAMES = ("adamw_8bit", "adamw_torch_4bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion_8bit", "muon")
OPTIMIZERS: dict[str, tuple[str, str | None]] = {
    "adamw_torch": ("adamw", "foreach"),
    "adamw_torch_fused": ("adamw", "fused"),
    "adamw_hf": ("adamw", "foreach"),
    **{name: (name, None) for name in SAME_NAMES},
    "adamw_bnb_8bit": ("adamw_8bit", None),
    "adamw_torch_8bit": ("adamw_8bit", None),
    "paged_adamw_32bit": ("paged_adamw", None),
    "sgd": ("sgd", "foreach"),
    "lion_32bit": ("lion", None),
    "galore_adamw": ("galore", None),
    "apollo_adamw": ("apollo", None),
}
"""transformers' names of optimizers. Source: ``OptimizerNames`` in transformers 5.24, training_args.py."""
TORCHTUNE_OPTIMIZERS: dict[str, tuple[str, str | None]] = {
    "torch.optim.AdamW": ("adamw", "foreach"),
    "torch.optim.SGD": ("sgd", "foreach"),
    "bitsandbytes.optim.AdamW8bit": ("adamw_8bit", None),
    "torchao.optim.AdamW8bit": ("adamw_8bit", None),
    "torchao.prototype.low_bit_optim.AdamW8bit": ("adamw_8bit", None),
    "bitsandbytes.optim.PagedAdamW": ("paged_adamw", None),
    "bitsandbytes.optim.PagedAdamW8bit": ("paged_adamw_8bit", None),
}
PEFT_OPTIMIZERS = {"AdamW": ("adamw", "foreach")}

AS_FLASH = (
    *("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "fa2", "fa3"),
    *("kernels-community/vllm-flash-attn3", "xformers", "flex_attention"),
)
NOT_FLASH = {"sdpa": "sdpa", "eager": "eager", "disabled": "eager", "auto": None}
ATTENTION = dict.fromkeys(AS_FLASH, "flash_attention_2") | NOT_FLASH
"""Names of attention kernels, and the option for each; auto: transformers chooses. xformers and flex_attention keep the
output and a sum a row, as flash attention does, which stands in for them."""

PEFT_METHODS = {name: name.replace("_", "-") for name in ("lora", "adalora", "ia3", "prompt_tuning", "prefix_tuning")}

EVALUATION = "eval_strategy evaluation_strategy val_size do_eval"
BATCHES = (
    Row("batch_size", "per_device_train_batch_size", 8, COPIES),
    Row("gradient_accumulation", "gradient_accumulation_steps", 1, COPIES),
    Row("eval_batch_size", "per_device_eval_batch_size", 8, COPIES, only_with=EVALUATION),
)
"""Rows of transformers' ``TrainingArguments``. The evaluation has a batch only if there is one."""

SWITCH = {"true": True, "false": None}
LIGER = {"true": "liger", "false": None}
LOSSES = (
    Row("loss", "use_liger_kernel", words=LIGER),
    Row("loss", "enable_liger_kernel", words=LIGER),
    Row("loss", "liger_fused_linear_cross_entropy", words=LIGER),
    Row("loss", "cut_cross_entropy", words={"true": "cut-cross-entropy", "false": None}),
)
"""Rows of fused losses. TRL since 1.15 has one of its own, and of Liger the kernels of layers alone."""
SAVINGS = (
    saving("use_liger_kernel", "Liger's norms, activations and rotary embeddings"),
    saving("enable_liger_kernel", "Liger's norms, activations and rotary embeddings"),
    saving("liger_rms_norm", "Liger's norms"),
    saving("liger_glu_activation", "Liger's activations"),
    saving("liger_swiglu", "Liger's activations"),
    saving("liger_rope", "Liger's rotary embeddings"),
    saving("liger_cross_entropy", "Liger's loss in place"),
    saving("flash_attn_cross_entropy", "flash-attn's loss in place"),
    saving("chunked_cross_entropy", "a loss over chunks of the tokens"),
    saving("use_unsloth", "unsloth's kernels"),
    Row("offload_activations", "use_unsloth_gc", words=SWITCH),
    saving("activation_offloading", "activations on the host"),
    saving("lora_mlp_kernel", "fused kernels of LoRA"),
    saving("lora_qkv_kernel", "fused kernels of LoRA"),
    saving("lora_o_kernel", "fused kernels of LoRA"),
)
"""Rows of other savings, which trainers built on transformers share."""

AXOLOTL_EVALUATION = "val_set_size test_datasets"
ROUTERS = "the loss of the routers, a few bytes a token and expert, is left out"
AXOLOTL_ROWS = (
    Row("model", "base_model", read=keys.read_model),
    Row("load_in_8bit", "load_in_8bit", words=SWITCH),
    refused("unfrozen_parameters", "training a part of the weights"),
    refused("peft_layers_to_transform", "adapting only some layers"),
    refused("lora_target_parameters", "adapting parameters that are no modules"),
    refused("relora", "ReLoRA"),
    noted("model_config.output_router_logits", f"output_router_logits: {ROUTERS}"),
    refused("gptq", "a GPTQ base"),
    refused("quantization", "another quantisation"),
    Row("seq_len", "sequence_len", 512, f"sequence_len of {SCHEMAS}"),
    Row("batch_size", "micro_batch_size", 1, SCHEMAS),
    Row("gradient_accumulation", "gradient_accumulation_steps", 1, SCHEMAS),
    Row("eval_batch_size", "eval_batch_size", None, SCHEMAS, keys.read_evaluation, only_with=AXOLOTL_EVALUATION),
    Row("checkpointing", "gradient_checkpointing", False, SCHEMAS, keys.read_checkpointing),
    Row("attention", "flash_attention", words={"true": "flash_attention_2", "false": None}),
    Row("attention", "sdp_attention", words={"true": "sdpa", "false": None}),
    Row("attention", "eager_attention", words={"true": "eager", "false": None}),
    Row("attention", "attn_implementation", read=keys.read_attention, words=ATTENTION),
    Row("packing", "sample_packing", read=keys.read_packing),
    Row("optimizer", "optimizer", "adamw_torch_fused", SCHEMAS, keys.read_optimizer, OPTIMIZERS),
    Row("method", "adapter", "full", words={"lora": "lora", "qlora": "qlora"}),
    four_bit("load_in_4bit", "set adapter: qlora"),
    Row("rank", "lora_r", need="axolotl has no default for lora_r"),
    Row("alpha", "lora_alpha"),
    Row("dropout", "lora_dropout", 0.0, SCHEMAS),
    Row("targets", "lora_target_linear", words={"true": "all-linear", "false": None}),
    Row("targets", "lora_target_modules", read=keys.read_targets),
    Row("dora rslora", "peft_use_dora peft_use_rslora", read=keys.read_variant),
    Row("modules_to_save", "lora_modules_to_save", read=keys.read_saved_modules),
    Row("double_quant", "bnb_config_kwargs.bnb_4bit_use_double_quant", True, "axolotl at ae7395e, loaders/model.py"),
    Row("precision", "bf16 fp16", read=keys.read_axolotl_precision),
    Row("loss", "plugins", read=keys.read_plugins),
    Row("quantize_moe_experts", "quantize_moe_experts", words=SWITCH),
    *LOSSES,
    *SAVINGS,
)

FACTORY_ROWS = (
    Row("model", "model_name_or_path", read=keys.read_model),
    refused("use_adam_mini", "Adam-mini"),
    refused("use_badam", "BAdam"),
    refused("use_llama_pro", "block expansion"),
    noted("moe_aux_loss_coef", f"moe_aux_loss_coef: {ROUTERS}"),
    refused("mixture_of_depths", "mixture of depths"),
    refused("adapter_name_or_path", "a second adapter"),
    Row("method", "finetuning_type", "lora", words={"lora": "lora", "full": "full"}),
    Row("seq_len", "cutoff_len", 2048, "cutoff_len of LLaMA-Factory, hparams/data_args.py"),
    *BATCHES,
    Row("checkpointing", "disable_gradient_checkpointing", True, UNLESS_DISABLED, words={"true": False, "false": None}),
    Row("attention", "flash_attn", read=keys.read_attention, words=ATTENTION),
    Row("packing", "neat_packing packing", read=keys.read_factory_packing),
    Row("optimizer", "optim", "adamw_torch_fused", COPIES, keys.read_optimizer, OPTIMIZERS),
    Row("optimizer", "use_galore", words={"true": "galore", "false": None}),
    Row("optimizer", "use_apollo", words={"true": "apollo", "false": None}),
    Row("optimizer", "use_muon", words={"true": "muon", "false": None}),
    Row("optimizer_in_bwd", "galore_layerwise", words=SWITCH, only_with="use_galore"),
    Row("optimizer_in_bwd", "apollo_layerwise", words=SWITCH, only_with="use_apollo"),
    Row("optimizer_rank", "galore_rank", 16, TUNING_ARGS, only_with="use_galore"),
    Row("optimizer_rank", "apollo_rank", 16, TUNING_ARGS, only_with="use_apollo"),
    Row("load_in_8bit", "quantization_bit", words={"4": None, "8": True}),
    Row("", "quantization_method", words={"bnb": None, "bitsandbytes": None}),
    four_bit("quantization_bit", "set finetuning_type: lora"),
    Row("rank", "lora_rank", 8, TUNING_ARGS),
    Row("alpha", "lora_alpha", 16, "twice the rank, finetuning_args.py", keys.read_factory_alpha),
    Row("dropout", "lora_dropout", 0.0, TUNING_ARGS),
    Row("targets", "lora_target", "all-linear", f"lora_target is all, {TUNING_ARGS}", keys.read_targets),
    Row("dora rslora lora-plus pissa", "use_dora use_rslora loraplus_lr_ratio pissa_init", read=keys.read_variant),
    Row("modules_to_save", "additional_target", read=keys.read_saved_modules),
    Row("double_quant", "double_quantization", True, MODEL_ARGS),
    Row("precision", "bf16 fp16 pure_bf16", read=keys.read_factory_precision),
    *LOSSES,
    *SAVINGS,
)

TRL_ROWS = (
    Row("model", "model_name_or_path", read=keys.read_model),
    Row("load_in_8bit", "load_in_8bit", words=SWITCH),
    refused("lora_target_parameters", "adapting parameters that are no modules"),
    Row("seq_len", "max_length max_seq_length", 1024, "max_length of TRL, trainer/sft_config.py"),
    *BATCHES,
    Row("checkpointing", "gradient_checkpointing", True, TRL_BASE, keys.read_checkpointing),
    Row("attention", "attn_implementation", read=keys.read_attention, words=ATTENTION),
    Row("packing", "packing", read=keys.read_packing),
    noted("padding_free", "padding_free: the rows of a batch hold no padding, so each is taken as full"),
    Row("optimizer", "optim", "adamw_torch_fused", COPIES, keys.read_optimizer, OPTIMIZERS),
    Row("method", "use_peft", "full", words={"true": "lora", "false": "full"}),
    four_bit("load_in_4bit", "set use_peft: true"),
    Row("rank", "lora_r", 16, TRL_MODEL),
    Row("alpha", "lora_alpha", 32, TRL_MODEL),
    Row("dropout", "lora_dropout", 0.05, TRL_MODEL),
    Row("targets", "lora_target_modules", read=keys.read_targets),
    Row("dora rslora", "use_dora use_rslora", read=keys.read_variant),
    Row("modules_to_save", "lora_modules_to_save", read=keys.read_saved_modules),
    Row("double_quant", "use_bnb_nested_quant", False, f"use_bnb_nested_quant, {TRL_MODEL}"),
    Row("precision", "bf16", True, f"bf16 is true unless fp16, {TRL_BASE}", keys.read_trl_precision),
    *SAVINGS,
)
"""TRL's command line, and alignment-handbook, which is built on TRL."""

UNCUT = "tokenizer.max_seq_len is not set: torchtune cuts nothing, so the data decide the length"
UNTARGETED = "model.lora_attn_modules is not set, and torchtune has no default"
SHARDED = "custom_sharded_layers fsdp_cpu_offload data_parallel_shard_dim fsdp_sharding_strategy"
TORCHTUNE_ROWS = (
    Row("model", "model._component_", read=keys.read_torchtune_model),
    Row("optimizer_in_bwd", "optimizer_in_bwd", words=SWITCH),
    refused("model.apply_lora_to_output", "an adapter on the output"),
    Row("", "tensor_parallel_dim", words={"1": None}),
    Row("", "context_parallel_dim", words={"1": None}),
    Row("seq_len", "tokenizer.max_seq_len", need=UNCUT),
    Row("batch_size", "batch_size", 1, "the file has no batch_size"),
    Row("gradient_accumulation", "gradient_accumulation_steps", 1, TORCHTUNE),
    Row("eval_batch_size", "batch_size_val", None, TORCHTUNE, keys.read_evaluation, only_with="run_val_every_n_steps"),
    Row("checkpointing", "enable_activation_checkpointing", False, TORCHTUNE),
    Row("packing", "dataset.packed", False, TORCHTUNE),
    four_bit("model.quantize_base", "use a builder of LoRA"),
    Row("rank", "model.lora_rank", 8, BUILDERS),
    Row("alpha", "model.lora_alpha", 16, BUILDERS),
    Row("dropout", "model.lora_dropout", 0.0, BUILDERS),
    Row("targets", "model.lora_attn_modules", read=keys.read_torchtune_targets, need=UNTARGETED),
    Row("adapter_dtype", "", "base", "torchtune builds the adapter in the dtype of the model"),
    Row("dora", "model.use_dora", read=keys.read_variant),
    Row("double_quant", "", True, "torchao's NF4Tensor quantises its scales"),
    Row("precision", "dtype", "bf16", "", keys.read_torchtune_precision, {"bf16": "bf16", "fp32": "fp32"}),
    Row("optimizer", "optimizer._component_", read=keys.read_optimizer, words=TORCHTUNE_OPTIMIZERS),
    Row("optimizer_implementation", "optimizer.fused", read=keys.read_torchtune_implementation),
    Row("sharding", SHARDED, read=keys.read_torchtune_shards),
    Row("offload", "fsdp_cpu_offload", words={"true": "parameters", "false": None}),
    saving("enable_activation_offloading", "activations on the host"),
    saving("ac_mode", "recomputation of a part of the layers"),
    Row("loss", "loss._component_", read=keys.read_torchtune_loss),
)

WITHOUT_ADAPTER = "no adapter_config.json lies beside, as in PEFT's method comparison"
PEFT_ROWS = (
    Row("", read=keys.read_peft_companions),
    Row("model", "base_model_name_or_path model_id", read=keys.read_model),
    Row("method", "peft_type", "full", WITHOUT_ADAPTER, words=PEFT_METHODS),
    refused("ensure_weight_tying", "one trained copy of tied weights"),
    refused("layers_to_transform", "adapting only some layers"),
    refused("layer_replication", "replicated layers"),
    refused("rank_pattern", "a rank that differs from module to module"),
    refused("trainable_token_indices", "training embeddings"),
    refused("target_parameters", "adapting parameters that are no modules"),
    refused("exclude_modules", "leaving out modules by name"),
    refused("lora_bias", "a bias of the adapter"),
    refused("bias", "training biases"),
    Row("targets", "target_modules", read=keys.read_targets),
    Row("modules_to_save", "modules_to_save", read=keys.read_saved_modules),
    Row("rank", "init_lora_weights", read=keys.read_peft_start),
    Row("rank", "r", 8, PEFT),
    Row("init_r", "init_r", 12, ADALORA),
    Row("target_r", "target_r", 8, ADALORA),
    Row("alpha", "lora_alpha", 8, PEFT),
    Row("dropout", "lora_dropout", 0.0, PEFT),
    Row("dora rslora", "use_dora use_rslora", read=keys.read_variant),
    Row("feedforward", "feedforward_modules"),
    Row("virtual_tokens", "num_virtual_tokens", need="num_virtual_tokens is not set"),
    Row("seq_len", "max_seq_length", need="an adapter's file says no length of a sequence"),
    Row("batch_size", "batch_size", need="an adapter's file says no batch size"),
    Row("checkpointing", "use_gc", False, "the file does not say it"),
    Row("precision", "dtype use_amp", read=keys.read_peft_precision),
    Row("attention", "attn_implementation", read=keys.read_attention, words=ATTENTION),
    Row("adapter_dtype", "autocast_adapter_dtype", words={"false": "base", "true": None}),
    Row("optimizer", "optimizer_type", read=keys.read_optimizer, words=PEFT_OPTIMIZERS),
)
"""PEFT's ``adapter_config.json``, and the ``training_params.json`` of PEFT's method comparison."""

AXOLOTL_KEYS = {"sequence_len", "micro_batch_size", "datasets", "adapter", "num_epochs"}
TRAINERS: tuple[tuple[str, tuple[Row, ...], list[set[str]]], ...] = (
    ("PEFT", PEFT_ROWS, [{"peft_type"}]),
    ("PEFT", PEFT_ROWS, [{".json"}, {"optimizer_kwargs", "model_id", "use_gc"}]),
    ("torchtune", TORCHTUNE_ROWS, [{"model._component_", "tokenizer._component_"}]),
    ("axolotl", AXOLOTL_ROWS, [{"base_model"}, AXOLOTL_KEYS]),
    ("LLaMA-Factory", FACTORY_ROWS, [{"model_name_or_path"}, {"finetuning_type", "stage", "cutoff_len", "template"}]),
    ("alignment-handbook", TRL_ROWS, [{"model_name_or_path"}, {"dataset_mixture", "dataset_mixer"}]),
    ("TRL", TRL_ROWS, [{"model_name_or_path"}]),
)
"""The trainers, their tables, and sets of keys: a file belongs to the first trainer of which it has a key of each set.
The suffix of the file counts as a key."""


def _sizes(rows: tuple[Row, ...]) -> dict[str, dict[str, Any]]:
    """Returns the keys of a trainer whose values are sizes, which a remedy makes smaller."""
    sizes = ("batch_size", "eval_batch_size", "gradient_accumulation", "seq_len")
    return {row.option: {row.keys[0]: OWN} for row in rows if row.option in sizes}


_TRL: dict[str, dict[str, Any]] = {
    **_sizes(TRL_ROWS),
    "reference": {"precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True},
    "optimizer": {"optim": "adamw_8bit"},
    "method": {"load_in_4bit": True},
    "adapter": {"use_peft": True, "lora_target_modules": "all-linear"},
}
REMEDIES: dict[str, dict[str, dict[str, Any]]] = {
    "axolotl": {
        **_sizes(AXOLOTL_ROWS),
        "loss": {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_fused_linear_cross_entropy": True},
        "checkpointing": {"gradient_checkpointing": True},
        "optimizer": {"optimizer": "adamw_8bit"},
        "method": {"adapter": "qlora", "load_in_4bit": True},
        "quantize_moe_experts": {"quantize_moe_experts": True},
        "adapter": {"lora_r": 16, "lora_alpha": 32, "lora_target_linear": True},
    },
    "LLaMA-Factory": {
        **_sizes(FACTORY_ROWS),
        "loss": {"enable_liger_kernel": True},
        "checkpointing": {"disable_gradient_checkpointing": False},
        "optimizer": {"optim": "adamw_8bit"},
        "method": {"quantization_bit": 4},
        "adapter": {"finetuning_type": "lora"},
    },
    "TRL": _TRL,
    "alignment-handbook": _TRL,
    "torchtune": {
        **_sizes(TORCHTUNE_ROWS),
        "checkpointing": {"enable_activation_checkpointing": True},
        "optimizer": {"optimizer._component_": "bitsandbytes.optim.AdamW8bit", "optimizer.fused": None},
        "method": {"model._component_": lambda builder: builder.replace(".lora_", ".qlora_")},
    },
}
"""The keys with which a remedy changes an option; ``adapter`` are those that give a fully trained base an adapter. A
list is appended to that of the file, a function changes the file's value, and None takes a key out. Options that a
trainer lacks here are changed on the command line."""


def remedies_in(trainer: str) -> dict[str, dict[str, Any]]:
    """Returns the keys with which a remedy changes each option in a trainer's file; none if they are unknown."""
    return next((keys for name, keys in REMEDIES.items() if name.lower() == trainer.lower()), {})


def recognise(path: Path, content: dict[str, Any]) -> tuple[str, tuple[Row, ...]]:
    """Returns the trainer that a file belongs to, and its table.

    Raises:
        InputError: The keys are those of no known trainer.
    """
    found = {*content, *flatten(content), path.suffix}
    for trainer, rows, marks in TRAINERS:
        if all(found & mark for mark in marks):
            return trainer, rows
    raise InputError(Problem(str(path), *_strange(set(content))))


def _strange(keys: set[str]) -> tuple[str, str]:
    """Returns what is wrong with a file of no known trainer, and what to do."""
    if {"model_type", "hidden_size"} <= keys:
        return "a model's config.json, not a trainer's file", "give it as MODEL, without --config"
    if keys & {"compute_environment", "distributed_type", "zero_optimization"}:
        return "a file of accelerate or DeepSpeed, which names no model", "give the trainer's file that goes with it"
    if keys & {"axes", "experiment", "stages"}:
        return "looks like an experiment of peftscope", "use peftscope expand"
    known = "axolotl (base_model), LLaMA-Factory (finetuning_type), TRL and alignment-handbook (model_name_or_path), "
    known += "torchtune (model._component_), PEFT (peft_type)"
    shown_keys = ", ".join(sorted(keys)[:5]) or "none"
    return f"not the file of a known trainer (its keys: {shown_keys})", f"known, by their keys: {known}"
