"""What the keys of each trainer's files mean, and the defaults that its documentation gives. No torch.

Each function reads one trainer's file. Each default names the file that it was read from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem, shown
from peftscope.files.content import parse_json, read_text
from peftscope.memory.config_file import Reading, flatten
from peftscope.memory.sharding import read_sharding
from peftscope.memory.trainer_keys import (
    COPIES,
    read_attention,
    read_batches,
    read_checkpointing,
    read_half,
    read_length,
    read_model,
    read_optimizer,
    read_packing,
    read_regime,
    read_saved_modules,
    read_savings,
    read_targets,
    read_variant,
    set_optimizer,
)

TORCHTUNE_OPTIMIZERS: dict[str, tuple[str, str | None]] = {
    "torch.optim.AdamW": ("adamw", "foreach"),
    "torch.optim.SGD": ("sgd", "foreach"),
    "bitsandbytes.optim.AdamW8bit": ("adamw_8bit", None),
    "bitsandbytes.optim.PagedAdamW": ("paged_adamw", None),
    "bitsandbytes.optim.PagedAdamW8bit": ("paged_adamw_8bit", None),
}

TORCHTUNE_MODULES = {"output_proj": "o_proj"}
"""torchtune's names of modules that have another name in transformers."""

# A commit stands where the default was read in the code itself; the others come from documentation and excerpts.
AXOLOTL = "axolotl, utils/schemas"
FACTORY = "LLaMA-Factory, hparams"
TRL_MODEL = "TRL at bc13ae6, trainer/model_config.py"
TRL_BASE = "TRL at 13e421b, trainer/base_config.py"
TRL_SFT = "TRL, trainer/sft_config.py"
TORCHTUNE = "torchtune, docs.pytorch.org/torchtune"
PEFT = "PEFT 0.21, tuners/lora/config.py"

EIGHT_BIT = "an 8-bit base"


def recognise(path: Path, content: dict[str, Any]) -> tuple[str, Callable[[Reading], None]]:
    """Returns the trainer that a file belongs to, and the function that reads it.

    Raises:
        InputError: The keys are those of no known trainer.
    """
    keys = set(content)
    if "peft_type" in keys:
        return "PEFT", read_peft
    if keys & {"optimizer_kwargs", "model_id", "use_gc"} and path.suffix == ".json":
        return "PEFT", read_peft
    if any(isinstance(content.get(key), dict) and "_component_" in content[key] for key in ("model", "tokenizer")):
        return "torchtune", read_torchtune
    if "base_model" in keys and keys & {"sequence_len", "micro_batch_size", "datasets", "adapter", "num_epochs"}:
        return "axolotl", read_axolotl
    if "model_name_or_path" in keys and keys & {"finetuning_type", "stage", "cutoff_len", "template"}:
        return "LLaMA-Factory", read_llama_factory
    if "model_name_or_path" in keys:
        handbook = keys & {"dataset_mixture", "dataset_mixer"}
        return "alignment-handbook" if handbook else "TRL", read_trl
    raise InputError(Problem(str(path), *_strange(keys)))


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


def read_axolotl(reading: Reading) -> None:
    """Reads an axolotl file."""
    read_model(reading, "base_model")
    reading.refuse_any(
        {
            "load_in_8bit": EIGHT_BIT,
            "unfrozen_parameters": "training a part of the weights",
            "peft_layers_to_transform": "adapting only some layers",
            "lora_target_parameters": "adapting parameters that are no modules",
            "relora": "ReLoRA",
            "rl": "training by preferences or rewards",
            "gptq": "a GPTQ base",
            "quantization": "another quantisation",
        }
    )
    read_length(reading, "sequence_len", 512, AXOLOTL)
    reading.take("batch_size", "micro_batch_size", default=1, source=AXOLOTL)
    reading.take("gradient_accumulation", "gradient_accumulation_steps", default=1, source=AXOLOTL)
    if reading.get("val_set_size", "test_datasets") not in (None, 0, 0.0):
        reading.take("eval_batch_size", "eval_batch_size")
    read_checkpointing(reading, default=False, source=AXOLOTL)
    flags = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
    for key, kernel in flags.items():
        if reading.get(key) is True:
            reading.options["attention"] = kernel
    read_attention(reading, "attn_implementation")
    read_packing(reading, "sample_packing")
    read_optimizer(reading, "optimizer", AXOLOTL)
    adapter = reading.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        reading.refuse("adapter", f"not modelled (got {shown(adapter)})", "lora, qlora, or none for full fine-tuning")
    four_bit = bool(reading.get("load_in_4bit")) or (adapter == "qlora" and "load_in_4bit" not in reading.values)
    if adapter:
        reading.take("rank", "lora_r")
        reading.need("rank", "axolotl has no default for lora_r")
        reading.take("alpha", "lora_alpha")
        reading.take("dropout", "lora_dropout", default=0.0, source=AXOLOTL)
        linear = reading.get("lora_target_linear")
        named = reading.get("lora_target_modules")
        if linear or named:
            read_targets(reading, "lora_target_linear" if linear else "lora_target_modules", "all" if linear else named)
        read_variant(reading, four_bit, dora="peft_use_dora", rslora="peft_use_rslora")
        read_saved_modules(reading, "lora_modules_to_save")
        if four_bit:
            key, source = "bnb_config_kwargs.bnb_4bit_use_double_quant", "axolotl at ae7395e, loaders/model.py"
            reading.take("double_quant", key, default=True, source=source)
    else:
        reading.options["method"] = "full"
        if four_bit:
            reading.refuse("load_in_4bit", "a 4-bit base needs an adapter", "set adapter: qlora")
    half = read_half(reading, default="axolotl's default is bf16: auto")
    reading.options["precision"] = "bf16" if half else "fp32"
    mixed = half and reading.values.get("bf16") != "full"
    read_regime(reading, "axolotl", autocast=mixed)
    read_sharding(reading, mixed=mixed)
    read_savings(reading)


def read_llama_factory(reading: Reading) -> None:
    """Reads a LLaMA-Factory file."""
    read_model(reading, "model_name_or_path")
    reading.refuse_any(
        {
            "use_adam_mini": "Adam-mini",
            "use_galore": "GaLore",
            "use_apollo": "APOLLO",
            "use_badam": "BAdam",
            "use_muon": "Muon",
            "use_llama_pro": "block expansion",
            "moe_aux_loss_coef": "a mixture of experts",
            "mixture_of_depths": "mixture of depths",
            "adapter_name_or_path": "a second adapter",
        }
    )
    stage, kind = reading.get("stage") or "sft", reading.get("finetuning_type") or "lora"
    if stage not in ("sft", "pt"):
        reading.refuse("stage", f"not modelled (got {shown(stage)}), which has other batches or a second model", "sft")
    read_length(reading, "cutoff_len", 2048, f"{FACTORY}/data_args.py")
    read_batches(reading)
    if reading.get("disable_gradient_checkpointing"):
        reading.options["checkpointing"] = False
    else:
        reading.assume("checkpointing", True, f"on unless disable_gradient_checkpointing, {FACTORY}/model_args.py")
    read_attention(reading, "flash_attn")
    if reading.get("neat_packing"):
        reading.options["packing"] = True
    elif reading.get("packing"):
        reading.assumed.append(
            "packing without neat_packing: full rows, each seen as one text, without a mask of blocks"
        )
    read_optimizer(reading, "optim", COPIES)
    bits = reading.get("quantization_bit")
    if bits not in (None, 4) or reading.get("quantization_method") not in (None, "bnb"):
        what = f"{bits} bits by {reading.values.get('quantization_method') or 'bnb'}"
        reading.refuse("quantization_bit", f"a base in {what} is not modelled", "use 4 bits by bnb, or leave it out")
    if kind == "lora":
        rank = reading.get("lora_rank")
        reading.take("rank", "lora_rank", default=8, source=f"{FACTORY}/finetuning_args.py")
        twice = 2 * (rank if isinstance(rank, int) else 8)
        reading.take("alpha", "lora_alpha", default=twice, source="twice the rank, finetuning_args.py")
        reading.take("dropout", "lora_dropout", default=0.0, source=f"{FACTORY}/finetuning_args.py")
        if (named := reading.get("lora_target")) is not None:
            read_targets(reading, "lora_target", named)
        else:
            reading.assume("targets", "all-linear", f"lora_target is all, {FACTORY}/finetuning_args.py")
        read_variant(reading, bits == 4, dora="use_dora", rslora="use_rslora", plus="loraplus_lr_ratio")
        read_saved_modules(reading, "additional_target")
        if reading.get("pissa_init") and reading.options["method"] == "lora":
            reading.options["method"] = "pissa"
        if bits == 4:
            source = f"{FACTORY}/model_args.py"
            reading.take("double_quant", "double_quantization", default=True, source=source)
    elif kind == "full":
        reading.options["method"] = "full"
    else:
        reading.refuse("finetuning_type", f"not modelled (got {shown(kind)})", "use lora or full")
    half = read_half(reading, default="")
    pure = bool(reading.get("pure_bf16"))
    if kind == "full" and not pure:
        reading.options["precision"] = "amp" if half else "fp32"
        reading.assumed.append("trained weights are upcast to fp32 unless pure_bf16, LLaMA-Factory's model/adapter.py")
    else:
        reading.options["precision"] = "bf16"
        if pure and kind == "lora":
            reading.options["adapter_dtype"] = "base"
        if not pure and not half:
            reading.assumed.append("precision=bf16: the base keeps the dtype of its checkpoint")
    read_regime(reading, "llama-factory", autocast=half and not pure)
    read_sharding(reading, mixed=half and not pure)
    read_savings(reading)


def read_trl(reading: Reading) -> None:
    """Reads a file of TRL's command line or of alignment-handbook, which is built on TRL."""
    read_model(reading, "model_name_or_path")
    reading.refuse_any(
        {
            "load_in_8bit": EIGHT_BIT,
            "lora_target_parameters": "adapting parameters that are no modules",
        }
    )
    for key in ("beta", "ref_model", "num_generations", "reward_model_path", "max_prompt_length"):
        if reading.values.get(key) is not None:
            reading.refuse(key, "belongs to preference or reward training, which is not modelled", "give an SFT file")
    read_length(reading, "max_length", 1024, TRL_SFT, "max_seq_length")
    read_batches(reading)
    read_checkpointing(reading, default=True, source=TRL_BASE)
    read_attention(reading, "attn_implementation")
    read_packing(reading, "packing")
    if reading.get("padding_free"):
        reading.assumed.append("padding_free: the rows of a batch hold no padding, so each is taken as full")
    read_optimizer(reading, "optim", COPIES)
    four_bit = bool(reading.get("load_in_4bit"))
    if reading.get("use_peft"):
        reading.take("rank", "lora_r", default=16, source=TRL_MODEL)
        reading.take("alpha", "lora_alpha", default=32, source=TRL_MODEL)
        reading.take("dropout", "lora_dropout", default=0.05, source=TRL_MODEL)
        if (named := reading.get("lora_target_modules")) is not None:
            read_targets(reading, "lora_target_modules", named)
        read_variant(reading, four_bit, dora="use_dora", rslora="use_rslora")
        read_saved_modules(reading, "lora_modules_to_save")
        if four_bit:
            reading.take(
                "double_quant", "use_bnb_nested_quant", default=False, source=f"use_bnb_nested_quant, {TRL_MODEL}"
            )
    else:
        reading.options["method"] = "full"
        if four_bit:
            reading.refuse("load_in_4bit", "a 4-bit base needs an adapter", "set use_peft: true")
    weights, half = (
        reading.get("dtype", "torch_dtype"),
        read_half(reading, default=f"bf16 is true unless fp16, {TRL_BASE}"),
    )
    if weights is None and not four_bit:
        reading.assumed.append("weights in fp32: the file gives no dtype, and versions differ; --precision bf16 if not")
    narrow = four_bit or weights in ("bfloat16", "float16", "auto")
    reading.options["precision"] = "bf16" if narrow else "amp" if half else "fp32"
    read_regime(reading, "trl", autocast=half and narrow)
    read_sharding(reading, mixed=half)
    read_savings(reading)


def read_torchtune(reading: Reading) -> None:
    """Reads a torchtune file."""
    component = str(reading.get("model._component_") or "")
    builder = component.rpartition(".")[2]
    adapter, _, bare = builder.partition("_") if builder.startswith(("lora_", "qlora_")) else ("", "", builder)
    reading.model, reading.keys["model"] = bare or None, "model._component_"
    reading.refuse_any(
        {
            "optimizer_in_bwd": "the optimizer in the backward pass",
            "model.apply_lora_to_output": "an adapter on the output",
            "tensor_parallel_dim": "tensor parallelism",
            "context_parallel_dim": "context parallelism",
        }
    )
    reading.take("seq_len", "tokenizer.max_seq_len")
    reading.need("seq_len", "tokenizer.max_seq_len is not set: torchtune cuts nothing, so the data decide the length")
    reading.take("batch_size", "batch_size", default=1, source="the file has no batch_size")
    reading.take("gradient_accumulation", "gradient_accumulation_steps", default=1, source=TORCHTUNE)
    if reading.get("run_val_every_n_steps"):
        reading.take("eval_batch_size", "batch_size_val")
    reading.take("checkpointing", "enable_activation_checkpointing", default=False, source=TORCHTUNE)
    reading.take("packing", "dataset.packed", default=False, source=TORCHTUNE)
    four_bit = adapter == "qlora" or bool(reading.get("model.quantize_base"))
    if adapter:
        reading.take("rank", "model.lora_rank", default=8, source=f"{TORCHTUNE}, model builders")
        reading.take("alpha", "model.lora_alpha", default=16, source=f"{TORCHTUNE}, model builders")
        reading.take("dropout", "model.lora_dropout", default=0.0, source=f"{TORCHTUNE}, model builders")
        modules = reading.get("model.lora_attn_modules")
        if isinstance(modules, list):
            modules = [TORCHTUNE_MODULES.get(str(name), name) for name in modules]
            modules += ["gate_proj", "up_proj", "down_proj"] if reading.get("model.apply_lora_to_mlp") else []
            read_targets(reading, "model.lora_attn_modules", modules)
        reading.need("targets", "model.lora_attn_modules is not set, and torchtune has no default")
        reading.assume("adapter_dtype", "base", "torchtune builds the adapter in the dtype of the model")
        read_variant(reading, four_bit, dora="model.use_dora")
        if four_bit:
            reading.assume("double_quant", True, "torchao's NF4Tensor quantises its scales")
    else:
        reading.options["method"] = "full"
    read_regime(reading, "torchtune", autocast=False)
    width = reading.get("dtype") or "bf16"
    if width not in ("bf16", "fp32"):
        reading.refuse("dtype", f"must be bf16 or fp32 (got {shown(width)})")
    reading.options["precision"] = "bf16" if four_bit else width
    if "optimizer._component_" in reading.values:
        name = str(reading.get("optimizer._component_"))
        set_optimizer(reading, "optimizer._component_", TORCHTUNE_OPTIMIZERS.get(name), name)
        if reading.get("optimizer.fused") and reading.options.get("optimizer") in ("adamw", "sgd"):
            reading.options["optimizer_implementation"] = "fused"
    for key in ("custom_sharded_layers", "fsdp_cpu_offload", "data_parallel_shard_dim", "fsdp_sharding_strategy"):
        if key in reading.values:
            reading.get(key)
            reading.sharded = reading.sharded or key
    if reading.get("fsdp_cpu_offload"):
        reading.options["offload"], reading.keys["offload"] = "parameters", "fsdp_cpu_offload"
    reading.overstates("enable_activation_offloading", "activations on the host")
    if "Linear" in str(reading.get("loss._component_")) or "Chunked" in str(reading.values.get("loss._component_")):
        reading.overstates("loss._component_", "a loss over chunks of the tokens")


def read_peft(reading: Reading) -> None:
    """Reads PEFT's ``adapter_config.json``, or the ``training_params.json`` of PEFT's method comparison.

    The base, the length and the batch come from ``training_params.json`` beside it and from the nearest
    ``default_training_params.json`` above it, where PEFT's comparison keeps them.
    """
    folder, values = reading.path.parent, reading.values
    adapter = folder / "adapter_config.json"
    companions = [folder / "training_params.json"] + [
        above / "default_training_params.json" for above in [folder, *folder.resolve().parents][:5]
    ]
    for path in [*([adapter] if "peft_type" not in values else []), *companions]:
        if path.is_file() and path.resolve() != reading.path.resolve():
            reading.understood.append(f"read {path}, a companion")
            content = parse_json(read_text(path), str(path)) or {}
            if not isinstance(content, dict):
                problem = Problem(str(path), f"must be a mapping (got {shown(content)})", "correct it, or move it away")
                raise InputError(problem)
            more = flatten(content)
            values |= {key: value for key, value in more.items() if values.get(key) is None}
            if path.name == "default_training_params.json":
                break
    read_model(reading, "base_model_name_or_path", "model_id")
    kind = reading.get("peft_type")
    if kind is None:
        reading.options["method"] = "full"
        reading.assumed.append("method=full: no adapter_config.json lies beside, as in PEFT's method comparison")
    else:
        _peft_method(reading, str(kind).upper())
    reading.take("seq_len", "max_seq_length")
    reading.need("seq_len", "an adapter's file says no length of a sequence")
    reading.take("batch_size", "batch_size")
    reading.need("batch_size", "an adapter's file says no batch size")
    reading.take("checkpointing", "use_gc", default=False, source="the file does not say it")
    weights = reading.get("dtype")
    wide = weights == "float32"
    reading.options["precision"] = "bf16" if not wide else "amp" if reading.get("use_amp") else "fp32"
    if weights is None:
        reading.assumed.append("precision=bf16: the file does not say it; --precision replaces it")
    read_attention(reading, "attn_implementation")
    if reading.get("autocast_adapter_dtype") is False and reading.options["method"] != "full":
        reading.options["adapter_dtype"] = "base"
    optimizer = reading.get("optimizer_type")
    if optimizer is not None:
        set_optimizer(reading, "optimizer_type", {"AdamW": ("adamw", "foreach")}.get(str(optimizer)), str(optimizer))
    if reading.get("batch_size_eval"):
        reading.assumed.append("evaluation has the batch of the training: batch_size_eval is for generating answers")


def _peft_method(reading: Reading, kind: str) -> None:
    reading.refuse_any(
        {
            "ensure_weight_tying": "one trained copy of tied weights",
            "layers_to_transform": "adapting only some layers",
            "layer_replication": "replicated layers",
            "rank_pattern": "a rank that differs from module to module",
            "trainable_token_indices": "training embeddings",
            "target_parameters": "adapting parameters that are no modules",
            "exclude_modules": "leaving out modules by name",
            "lora_bias": "a bias of the adapter",
            "bias": "training biases",
        }
    )
    if (named := reading.get("target_modules")) is not None:
        read_targets(reading, "target_modules", named)
    if kind not in ("PROMPT_TUNING", "PREFIX_TUNING"):
        read_saved_modules(reading, "modules_to_save")
    if kind == "LORA":
        start = reading.get("init_lora_weights")
        reading.take("rank", "r", default=8, source=PEFT)
        reading.take("alpha", "lora_alpha", default=8, source=PEFT)
        reading.take("dropout", "lora_dropout", default=0.0, source=PEFT)
        read_variant(reading, False, dora="use_dora", rslora="use_rslora")
        special = {"pissa": "pissa", "loftq": "loftq"}.get(str(start).split("_")[0])
        if special and reading.options["method"] == "lora":
            reading.options["method"] = special
    elif kind == "IA3":
        reading.options["method"] = "ia3"
        reading.take("feedforward", "feedforward_modules", convert=lambda names: names or None)
    elif kind == "ADALORA":
        reading.options["method"] = "adalora"
        reading.take("init_r", "init_r", default=12, source="PEFT 0.21, tuners/adalora/config.py")
        reading.take("target_r", "target_r", default=8, source="PEFT 0.21, tuners/adalora/config.py")
        reading.take("alpha", "lora_alpha", default=8, source=PEFT)
        reading.take("dropout", "lora_dropout", default=0.0, source=PEFT)
    elif kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        reading.options["method"] = kind.lower().replace("_", "-")
        reading.take("virtual_tokens", "num_virtual_tokens")
        reading.need("virtual_tokens", "num_virtual_tokens is not set")
    else:
        reading.options["method"] = "lora"
        known = "LORA, ADALORA, IA3, PROMPT_TUNING or PREFIX_TUNING"
        reading.refuse("peft_type", f"not modelled (got {shown(kind)})", f"use {known}")
