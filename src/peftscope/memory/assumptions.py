"""The assumptions behind an answer, one sentence each. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from peftscope.hardware.cards import CONTEXT_BYTES, Gpu
from peftscope.memory.beside import JOBS, passes_of
from peftscope.memory.formula.states import OTHER_OPTIMIZERS
from peftscope.memory.question import Question
from peftscope.memory.trace import Block
from peftscope.spec import RunSpec
from peftscope.words import MIB, counted, spoken_bytes


@cache
def library_versions() -> str:
    """Returns the installed versions of the libraries whose code decides what a step keeps."""
    versions = []
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    return ", ".join(versions)


WAYS = {
    "zero3": "weights, gradients and states (FSDP, ZeRO-3)",
    "zero2": "gradients, states and 32-bit copies of trained weights (DeepSpeed's ZeRO-2 at 02aa38c, formula only)",
    "fsdp1": "weights, gradients and states (FSDP's flat parameters, formula only)",
    "fsdp2": "weights, gradients and states (torch's fully_shard, formula only)",
}
"""The tensors that each way of sharding spreads over the cards."""


def _evaluation(question: Question) -> str:
    """Returns what is assumed about the evaluation."""
    if not question.evaluates:
        return "no evaluation: none is asked for"
    text = f"evaluation with batch_size={question.spec.eval_batch_size}"
    if not question.gathered_rows:
        return f"{text}, without optimizer states"
    return (
        f"{text}, beside optimizer states, with the logits of {question.gathered_rows} items that transformers' "
        "Trainer gathers (formula only)"
    )


def unquantised_experts(question: Question, blocks: Iterable[Block]) -> list[str]:
    """Returns what a 4-bit base leaves of its experts as they are, in one sentence or none."""
    if not question.spec.method.quantization() and not question.model.stored:
        return []
    size = sum(block.size for block in blocks if block.kind == "weights" and ".experts." in f"{block.module}.")
    bits = 16 if getattr(question.spec.method, "kbit_preparation", "none") == "none" else 32
    skipped = f"in {bits} bits: under transformers 5 bitsandbytes skips fused parameters (its issue 1849)"
    return [f"experts: {spoken_bytes(size)} {skipped}; axolotl's quantize_moe_experts packs them"] if size else []


LOGPROBS = {
    "chunked": "as in TRL 1.16.0 (since 1.15): tiles of logits at the positions that carry a loss",
    "whole": "as in LLaMA-Factory (formula only): log-softmax of all rows at once, beside their logits in 32 bits",
    "full": "as in TRL 0.24.0 (before 1.15): logits of every position, or with grpo of the completions",
}


FUSED = {
    "liger": "(stand-in): allocates what liger-kernel 0.8.5 allocates, ops/fused_linear_cross_entropy.py",
    "chunked": LOGPROBS["chunked"],
    "cut-cross-entropy": "(formula only): cut-cross-entropy 25.1.1, cce.py and cce_backward.py",
}


def _loss(question: Question) -> list[str]:
    """Returns what is assumed about the job and its loss."""
    spec, beside, responses = question.spec, question.beside, f"{question.responses} positions per sequence"
    kept = "kept until the next step as in a plain script" if spec.keeps_logits else "freed before the backward pass"
    if beside.job == "sft" and beside.loss != "plain" and spec.loss_path == "hf":
        return ["loss_path=hf: every position carries a loss"]
    if beside.job == "sft":
        return [
            f"loss_path=hf: logits of every position, {kept}; runs of this project compute only those of responses"
            if spec.loss_path == "hf"
            else f"loss_path=response_only: logits of {responses}"
        ]
    job = JOBS[beside.job]
    lines = [
        f"job={beside.job}: batch_size counts {job.items}; {counted(question.rows, 'row')} in the pass of the loss"
    ]
    lines += [] if job.drops else ["dropout=0: TRL's disable_dropout"]
    if beside.logprobs:
        lines.append(f"logprobs={beside.logprobs}, {LOGPROBS[beside.logprobs]}; answers have {responses}")
    if beside.reference:
        lines.append(f"reference={beside.reference}; its passes in a step: {passes_of(beside).count('reference')}")
    if beside.job == "grpo":
        lines.append("the completions are given: their generation, by vLLM or by the model itself, is left out")
    return lines


def assumptions_of(question: Question) -> list[str]:
    """Returns the assumptions behind the answer, given or by default, one sentence each."""
    model, spec, gpu, gpus = question.model, question.spec, question.gpu, question.gpus
    cublas = question.cublas_bytes / MIB
    packed = "a block-diagonal mask"
    if spec.attention == "flash_attention_2":
        packed = "rows end to end, without a mask; SDPA without a mask stands in for the kernel, which keeps as much"
    padding = "padded batches" if question.padded else "no padding in the longest batch"
    if spec.loss_path == "hf" and spec.attention == "sdpa":
        padding += ", with a mask for SDPA" if question.padded else ", and so no mask"
    fields = spec.method.model_dump(mode="json", exclude={"name"}, exclude_none=True)
    lines = [
        f"method {spec.method.name}: " + ", ".join(f"{name}={value}" for name, value in fields.items()),
        f"batch_size={spec.batch_size}, seq_len={spec.seq_len} for every sequence (the longest batch decides), "
        f"gradient_accumulation={spec.gradient_accumulation}",
        f"precision={spec.precision}{', autocast' if spec.autocast else ''}, {_optimizer(question)}",
        *_loss(question),
        f"packing=True: {packed}" if spec.packing else f"packing=False: {padding}" if question.padded else padding,
        f"attention={spec.attention}, checkpointing={spec.checkpointing}",
        _evaluation(question),
        "reserved: two steps of that batch in a model of torch's caching allocator, without expandable segments",
        f"cuBLAS workspace of {cublas:.1f} MiB{', one for each pass' if spec.method.trains else ''}",
        "allocated: the sizes of tensors in multiples of 512 bytes; torch may count up to 1 MiB more per block",
    ]
    if model.variant_of:
        lines.insert(0, f"model={model.variant_of}: {model.name} is a variant of it by its name, with the same shape")
    if gpu is not None:
        lines[:0] = _warnings(gpu, spec)
    lines += [f"the code of {versions}"] if (versions := library_versions()) else []
    if gpu is None or gpu.context_bytes is None:
        lines.append(f"CUDA context of {CONTEXT_BYTES / MIB:.0f} MiB, measured on an A100; other cards differ")
    else:
        lines.append(f"CUDA context of {gpu.context_bytes / MIB:.0f} MiB, measured on this type of card")
    if question.beside.loss != "plain":
        lines.append(f"loss={question.beside.loss} {FUSED[question.beside.loss]}")
    if question.saved:
        copies, width = " and ".join(question.saved), question.beside.modules_to_save_dtype
        lines.append(f"modules_to_save: a copy of {copies} is trained in full ({width}), and the frozen one stays")
    if model.unpacked:
        lines.insert(0, model.unpacked)
    if model.stored:
        lines.insert(0, f"base stored as {model.stored.name} (formula only): {model.stored.source}")
    elif spec.method.quantization():
        lines.append("4-bit products dequantise one layer at a time in both passes, as on CUDA with large batches")
    if spec.optimizer.startswith("paged"):
        lines.append("all paged optimizer states are on the card: device includes them, allocated does not")
    if spec.method.closed_form is None:
        lines.append(f"{spec.method.name} has no closed form: its peaks are simulated")
    elif model.shape is None:
        lines.append(f"{model.name} has no closed form, because {model.why_no_shape}: its peaks are simulated")
    if left_out := [name for name in ("vision", "audio") if f"{name}_config" in model.config]:
        lines.append(f"the {' and '.join(left_out)} tower is left out: its weights and activations come on top")
    if model.vision:
        lines.append(
            f"vision tower of {model.vision.parameters:,} weights: frozen and without adapters, though PEFT adapts its "
            "layers of the targets' names; image tokens are part of seq_len; its one forward pass is not counted"
        )
    lines += spec.method.memory_assumptions
    if gpus > 1:
        lines.append(f"sharded over {gpus} cards, batch_size rows on each: {WAYS[question.beside.sharding]}")
    elif idle := question.beside.model_dump(
        include={"sharding", "quant_storage", "reduce_bucket"}, exclude_defaults=True
    ):
        said = " and ".join(f"{option}={value}" for option, value in idle.items())
        lines.append(f"{said}: without effect on one card; gpus says over how many a model is sharded")
    return [*lines, *_formula_only_lines(question), *question.by_trainer]


def _optimizer(question: Question) -> str:
    beside, spec = question.beside, question.spec
    text = f"optimizer={spec.optimizer}"
    if beside.optimizer_states != "own":
        text = f"optimizer={beside.optimizer_states} (formula only: {OTHER_OPTIMIZERS[beside.optimizer_states]})"
    elif spec.optimizer in ("adamw", "sgd"):
        text += f" ({spec.optimizer_implementation})"
    return f"{text}, in the backward pass" if beside.optimizer_in_bwd else text


def _warnings(gpu: Gpu, spec: RunSpec) -> list[str]:
    """Returns what a person should know about a card before its answer."""
    lines = [f"{gpu.name}: {gpu.note}"] if gpu.note else []
    if gpu.before_ampere and spec.precision != "fp32":
        lines.append(f"{gpu.name}: no bf16 products before Ampere; torch emulates them, attention keeps fp32 scores")
    if gpu.before_ampere and spec.attention == "flash_attention_2":
        lines.append(f"{gpu.name}: flash attention 2 needs Ampere or newer; use sdpa")
    return lines


def _formula_only_lines(question: Question) -> list[str]:
    """Returns what is assumed about master weights, 4-bit shards and offloads."""
    beside, lines = question.beside, []
    if beside.master_weights == "fp32":
        lines.append(
            "master_weights=fp32 (formula only): trained weights, gradients and states in 32 bits, layers compute in 16"
        )
    quantised = question.gpus > 1 and question.spec.method.quantization()
    if quantised and beside.sharding in ("zero3", "fsdp1"):
        lines.append(
            "FSDP and ZeRO-3 share floating-point numbers only: 4-bit weights are taken to be packed into bf16, as "
            "bnb_4bit_quant_storage does (bitsandbytes 0.50.2, docs/source/fsdp_qlora.md)"
        )
    elif quantised and beside.sharding == "fsdp2":
        packed = "accelerate 1.15 leaves weights in integers whole" if beside.quant_storage == "uint8" else ""
        packed = packed or "packed weights are sharded as bf16 numbers, their constants are whole"
        lines.append(f"quant_storage={beside.quant_storage}: {packed} on every card")
    if beside.offload_activations:
        lines.append("offload_activations (formula only): inputs of layers on the host; one comes back at a time")
    if beside.offload == "optimizer":
        moved = "gradients too, as ZeRO-Offload has it" if question.gpus > 1 and beside.sharding == "zero2" else ""
        moved = moved or "gradients stay on the card, as with torchao's CPUOffloadOptimizer"
        lines.append(f"offload=optimizer (formula only): states and the step itself on the host; {moved}")
    if beside.offload == "parameters":
        lines.append(
            "offload=parameters (formula only): weights, gradients and states on the host, two layers at a time on the "
            "card, as in ZeRO-3 and FSDP's CPUOffloadPolicy"
        )
    return lines
