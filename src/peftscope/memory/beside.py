"""Options that only the calculator has, beside the fields of a run and its method. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from peftscope.errors import InputError, Problem, raise_any
from peftscope.files.content import LARGEST_COUNT
from peftscope.memory.regimes import Trainer
from peftscope.spec import RunSpec


class Job(NamedTuple):
    """The properties of a job's step, by TRL's trainers.

    Attributes:
        rows: The rows of the loss pass for each item of the batch.
        items: What a batch consists of.
        scored: Whether the loss is of log-probabilities of the answers, and may need those of a reference.
        references: The passes of the reference; 0 if there is none by default.
        drops: Whether the adapter's dropout stays on.
    """

    rows: int
    items: str
    scored: bool = False
    references: int = 0
    drops: bool = False


_PAIRS = "pairs of a chosen and a rejected answer, two rows each"
JOBS = {
    "sft": Job(1, "sequences", drops=True),
    "dpo": Job(2, _PAIRS, scored=True, references=1),
    "kto": Job(1, "answers, and as many rows without gradients for its KL term", scored=True, references=2),
    "orpo": Job(2, _PAIRS),
    "reward": Job(2, _PAIRS),
    "grpo": Job(1, "completions", scored=True, drops=True),
}


class Beside(BaseModel):
    """Options that only the calculator has, beside the fields of a run and its method."""

    model_config = ConfigDict(frozen=True)

    as_trainer: Annotated[
        Trainer | None,
        Field(description="the precision, preparation and output that a trainer has by default, where not given"),
    ] = None
    job: Annotated[
        Literal["sft", "dpo", "kto", "orpo", "reward", "grpo"],
        Field(description="what is trained, as TRL's trainers do it; batch_size counts pairs for dpo, orpo and reward"),
    ] = "sft"
    reference: Annotated[
        Literal["disabled", "copy", "precomputed", "none"] | None,
        Field(description="of dpo, kto, grpo; TRL's default: an adapter that is disabled, else a copy; none with grpo"),
    ] = None
    logprobs: Annotated[
        Literal["chunked", "full", "whole"] | None,
        Field(
            description="of dpo, kto, grpo: in tiles, TRL's way since 1.15 and the default; of all logits, row by row; "
            "or of all rows at once, as in LLaMA-Factory, for orpo too"
        ),
    ] = None
    padding: Annotated[
        Literal["none", "some"],
        Field(description="padding in the longest batch; without any, transformers drops the mask"),
    ] = "some"
    loss: Annotated[
        Literal["plain", "liger", "chunked", "cut-cross-entropy"],
        Field(description="the loss: transformers', or one that never holds all logits; chunked: TRL's since 1.15"),
    ] = "plain"
    modules_to_save: Annotated[
        tuple[Literal["embed_tokens", "lm_head"], ...],
        BeforeValidator(lambda names: tuple(sorted(set(names))) if isinstance(names, list | tuple) else names),
        Field(description="modules of which PEFT trains a copy in full beside the adapter: embed_tokens, lm_head"),
    ] = ()
    modules_to_save_dtype: Annotated[
        Literal["base", "fp32"], Field(description="of those copies: PEFT's is that of the module")
    ] = "base"
    quantize_moe_experts: Annotated[
        bool, Field(description="of a mixture on a 4-bit base: pack the experts, too, as axolotl does where asked")
    ] = False
    load_in_8bit: Annotated[
        bool, Field(description="linear layers of the base in 8 bits, as bitsandbytes' LLM.int8() stores them")
    ] = False
    optimizer_states: Annotated[
        Literal["own", "adamw_torch_4bit", "adafactor", "lion", "lion_8bit", "muon", "galore", "apollo"],
        Field(description="of an optimizer that runs here do not have, by formula; --optimizer takes these names, too"),
    ] = "own"
    optimizer_rank: Annotated[int, Field(gt=0, description="rank of the states of galore and apollo")] = 128
    optimizer_in_bwd: Annotated[
        bool, Field(description="each weight is updated in the backward pass, and its gradient goes at once")
    ] = False
    evaluation: Annotated[
        bool, Field(description="whether an evaluation counts; one does where its batch or what it gathers is given")
    ] = False
    eval_gathers_logits: Annotated[
        int | None,
        Field(
            gt=0,
            le=LARGEST_COUNT,
            description="items whose logits the evaluation of transformers' Trainer holds on the card, as it does for "
            "compute_metrics without preprocess_logits_for_metrics",
        ),
    ] = None
    eval_accumulation_steps: Annotated[
        int | None, Field(gt=0, description="batches of that evaluation after which their logits move to the host")
    ] = None
    sharding: Annotated[
        Literal["zero3", "zero2", "fsdp1", "fsdp2"],
        Field(
            description="how several cards share a model: as DeepSpeed's ZeRO-3, as its ZeRO-2 (each card has all "
            "weights), as FSDP's flat parameters, or as torch's fully_shard"
        ),
    ] = "zero3"
    reduce_bucket: Annotated[
        int,
        Field(
            ge=0, description="values of ZeRO-2's buffers of gradients; 0: hidden size squared, as for auto in its file"
        ),
    ] = 500_000_000
    master_weights: Annotated[
        Literal["base", "fp32"],
        Field(
            description="of trained 16-bit weights, on each card's share: as they were loaded, or in fp32, with their "
            "gradients and states, as FSDP and ZeRO-3 keep them in mixed precision"
        ),
    ] = "base"
    quant_storage: Annotated[
        Literal["uint8", "bf16"],
        Field(description="type that 4-bit weights are packed into; fully_shard leaves those in integers whole"),
    ] = "uint8"
    offload: Annotated[
        Literal["none", "optimizer", "parameters"],
        Field(description="on the host: optimizer states, or also weights and gradients, but for layers that compute"),
    ] = "none"
    offload_activations: Annotated[
        bool, Field(description="what recomputation keeps, the inputs of layers, waits on the host: Unsloth's way")
    ] = False


BESIDE_OPTIONS = tuple(Beside.model_fields)
"""The options that are neither fields of the spec nor of a method."""


def passes_of(beside: Beside) -> list[str]:
    """Returns the passes of a job's step: ``loss``, and those without gradients of the ``reference`` or its ``own``."""
    references = max(1, JOBS[beside.job].references) if beside.reference in ("copy", "disabled") else 0
    if beside.job == "grpo":  # completions are scored before they are trained on
        return [*["reference"] * references, "loss"]
    return [*["own"] * (beside.job == "kto"), "loss", *["reference"] * references]


def with_job(spec: RunSpec, beside: Beside) -> Beside:
    """Returns what is said beside, with the reference and the log-probabilities that the job has by default.

    Raises:
        InputError: An option or the method does not go with the job.
    """
    job, method, tuned = JOBS[beside.job], spec.method, beside.job == "sft"
    terms = method.closed_form and method.closed_form.orthogonality_term
    foreign = {
        "reference": not job.scored and beside.reference not in (None, "none"),
        "logprobs": not job.scored and beside.logprobs not in (None, *["whole"] * (beside.job == "orpo")),
        "loss_path": not tuned and spec.loss_path != "hf",
        "packing": not tuned and spec.packing,
        "loss": not tuned and beside.loss != "plain",
        "evaluation": not tuned and beside.evaluation,
        "modules_to_save": beside.job == "reward" and "lm_head" in beside.modules_to_save,
        "method": not tuned and not (method.trains_base or (method.targets_of() and not terms)),
    }
    message, remedy = f"does not go with job={beside.job}", "leave it out, or change --job"
    raise_any(Problem(option, message, remedy) for option, asked in foreign.items() if asked)
    if beside.reference == "disabled" and method.trains_base:
        raise InputError(Problem("reference", f"{method.name} has no adapter to disable", "use copy or precomputed"))
    own = "none" if not job.references else "copy" if method.trains_base else "disabled"
    # The releases of trainers on top of TRL that were read have TRL before 1.15.
    way = {None: "chunked", "trl": "chunked", "llama-factory": "whole"}.get(beside.as_trainer, "full")
    scored = {"reference": beside.reference or own} if job.scored else {}
    scores = job.scored or (beside.job == "orpo" and way == "whole")
    return beside.model_copy(update=scored | ({"logprobs": beside.logprobs or way} if scores else {}))


def check_beside(spec: RunSpec, beside: Beside) -> None:
    """Checks that the options go with the run and with each other.

    Raises:
        InputError: The method has no adapter that modules could be trained beside, the precision of these modules does
            not work, or an option is without effect.
    """
    method = spec.method
    if beside.modules_to_save and (method.trains_base or not method.targets_of() or method.closed_form is None):
        message = f"{method.name} trains no modules beside an adapter"
        raise InputError(Problem("modules_to_save", message, "use lora or one of its variants"))
    if beside.modules_to_save_dtype == "fp32" and spec.precision == "bf16" and not spec.autocasts:
        message = "a copy in fp32 does not multiply with bf16 outside autocast"
        raise InputError(Problem("modules_to_save_dtype", message, "use base, or --autocast"))
    if beside.optimizer_states in ("galore", "apollo") and not method.trains_base:
        message = (
            f"{beside.optimizer_states} projects the gradients of whole matrices, which {method.name} does not train"
        )
        raise InputError(Problem("optimizer", message, "use full, or another optimizer"))
    if beside.optimizer_in_bwd and spec.gradient_accumulation > 1:
        message = "an optimizer in the backward pass keeps no gradients that could be accumulated"
        raise InputError(Problem("optimizer_in_bwd", message, "use gradient_accumulation 1"))
    if beside.offload_activations and not spec.checkpointing:
        message = "moves what recomputation keeps, and nothing is recomputed"
        raise InputError(Problem("offload_activations", message, "give --checkpointing"))
    if beside.quantize_moe_experts and not method.quantization():
        message = f"packs experts as the 4-bit base of {method.name} is packed, which has none"
        raise InputError(Problem("quantize_moe_experts", message, "use qlora, or leave it out"))
    if beside.sharding == "zero2" and beside.offload == "parameters":
        raise InputError(Problem("offload", "ZeRO-2 keeps all weights on each card", "use optimizer, or zero3"))
    if beside.eval_accumulation_steps and not beside.eval_gathers_logits:
        message = "says when gathered logits move to the host, and none are gathered"
        raise InputError(Problem("eval_accumulation_steps", message, "give --eval-gathers-logits ITEMS"))
