"""RunSpec: everything that decides what a run does, and the id that follows from it. No torch.

A spec does not say how a run is executed (threads, folders); workflow profiles do. It does say over how many processes
a run is sharded, because that decides what each of them holds and in which order sums are rounded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peftscope.files.content import BENCHMARK_PATTERN, LONGEST_NAME, NUMBER, REVISION_PATTERN, Count, CountOrZero
from peftscope.hardware.device import Device
from peftscope.methods import AnyMethod

SPEC_VERSION = 1
"""This number is part of every run id. Raise it when the meaning of an existing spec changes."""

RUN_ID_PATTERN = r"[a-z0-9.-]+"
MOST_SHARDS = 1024


class RunSpec(BaseModel):
    """One run: a base model, a method, data, and how it is trained and evaluated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, description="a name in models.yaml, or a hub id org/name")]
    revision: Annotated[
        str | None, Field(pattern=REVISION_PATTERN, description="hub revision (branch, tag or commit); null: main")
    ] = None
    task: Annotated[str, Field(min_length=1, description="a name in tasks.yaml")]
    method: AnyMethod
    seed: Annotated[CountOrZero, Field(description="seeds adapter initialisation, dropout and data order")] = 0
    init_seed: Annotated[
        CountOrZero | None, Field(description="seeds adapter initialisation and dropout alone; null: same as seed")
    ] = None
    train_items: Annotated[
        Count | None, Field(description="training items, of which the seed draws as many; null: all there are")
    ] = None
    start_from: Annotated[
        str | None,
        Field(
            pattern=f"^{RUN_ID_PATTERN}$",
            description="the run from whose adapter or weights the training starts; in experiment files also fields in "
            "which that run differs from this one; null: the base alone",
        ),
    ] = None
    start_as: Annotated[
        Literal["adapter", "merged"],
        Field(description="train that adapter on, or put what was trained into the base first and begin afresh"),
    ] = "adapter"
    shuffled_targets: Annotated[
        bool, Field(description="a control: every training prompt gets the response of another one")
    ] = False

    steps: Annotated[Count, Field(description="optimizer steps")] = 16
    batch_size: Annotated[Count, Field(description="sequences a forward pass")] = 16
    gradient_accumulation: Annotated[Count, Field(description="forward passes a step")] = 1
    packing: Annotated[
        bool,
        Field(
            description="several examples per sequence; each attends to itself only (a block-diagonal mask; with "
            "flash_attention_2 their positions, and all rows end to end)"
        ),
    ] = False
    seq_len: Annotated[Count, Field(description="longest sequence in tokens; longer prompts lose their start")] = 256
    learning_rate: Annotated[float, Field(ge=0, description="for the first parameter group; 0 is a control"), NUMBER]
    schedule: Annotated[Literal["constant", "linear", "cosine"], Field(description="after the warm-up")] = "constant"
    warmup_steps: Annotated[CountOrZero, Field(description="linear warm-up")] = 0
    weight_decay: Annotated[float, Field(ge=0), NUMBER] = 0.0
    max_grad_norm: Annotated[float | None, Field(gt=0, description="null: no clipping"), NUMBER] = 1.0
    optimizer: Annotated[
        Literal["adamw", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"],
        Field(description="torch.optim, or bitsandbytes: 8-bit states, states that CUDA may page out to the host"),
    ] = "adamw"
    optimizer_implementation: Annotated[
        Literal["foreach", "fused", "single"],
        Field(description="an option of torch.optim; foreach is its choice on CUDA"),
    ] = "foreach"
    adam_beta1: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0), NUMBER] = 1e-8

    precision: Annotated[
        Literal["fp32", "bf16", "amp"], Field(description="amp: fp32 master weights under bf16 autocast")
    ] = "bf16"
    autocast: Annotated[
        bool, Field(description="matrix products in bf16, whatever the precision of their inputs; amp has it on")
    ] = False
    loss_path: Annotated[
        Literal["response_only", "hf"],
        Field(description="logits at response positions only, or the full logits that HF computes; the same loss"),
    ] = "response_only"
    keep_logits: Annotated[
        bool | None,
        Field(
            description="the output lives until the next step, as in a plain script, or only until the backward pass; "
            "null: kept with loss_path hf"
        ),
    ] = None
    checkpointing: Annotated[bool, Field(description="recompute activations in the backward pass")] = False
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"], Field(description="attention kernel")] = "sdpa"
    compile: Annotated[bool, Field(description="torch.compile for every decoder layer, in training only")] = False
    shards: Annotated[
        int,
        Field(
            ge=1,
            le=MOST_SHARDS,
            description="processes, one per card, that share the rows of a batch and every tensor of the training",
        ),
        NUMBER,
    ] = 1

    eval_batch_size: Annotated[
        Count, Field(description="sequences an evaluation batch; fixed, because bf16 answers depend on it")
    ] = 32
    validation_items: Annotated[
        CountOrZero, Field(description="validation items for the loss that learning rates are chosen by; 0: none")
    ] = 0
    validation_every: Annotated[
        CountOrZero, Field(description="steps between losses on the validation items while it trains; 0: none")
    ] = 0
    heldout_items: Annotated[
        Count, Field(description="test items for the held-out loss; trained items where the task says so")
    ] = 256
    generation_items: Annotated[CountOrZero, Field(description="test items that lm-eval answers; 0: none")] = 64
    retention_tokens: Annotated[
        CountOrZero, Field(description="tokens of English prose, before and after; 0: none")
    ] = 1024
    retention_every: Annotated[
        CountOrZero, Field(description="steps between scores on English prose while it trains; 0: none")
    ] = 0
    benchmarks: Annotated[
        tuple[Annotated[str, Field(pattern=f"^{BENCHMARK_PATTERN}$", max_length=LONGEST_NAME)], ...],
        Field(description="lm-eval's own tasks, scored after training; the run of the base gives the score before"),
    ] = ()
    benchmark_items: Annotated[Count | None, Field(description="items of each benchmark; null: all")] = None
    untimed_steps: Annotated[CountOrZero, Field(description="first steps left out of the step times")] = 3
    probe_steps: Annotated[
        CountOrZero, Field(description="extra steps whose peaks are measured phase by phase; 0: none")
    ] = 2
    latency_tokens: Annotated[
        CountOrZero,
        Field(
            description="tokens of prompts, batch_size at once, whose latency is timed on the base, with the adapter "
            "apart, and merged; 0: none"
        ),
    ] = 0
    memory_limit_gib: Annotated[
        float | None,
        Field(gt=0, description="memory of the smaller card that the run is limited to (CUDA), context included"),
        NUMBER,
    ] = None

    device: Annotated[Device, Field(description="set by the machine, not by experiment files")] = "cpu"

    @model_validator(mode="after")
    def _fields_fit(self) -> RunSpec:
        if misfit := next(self._misfits(), ""):
            raise ValueError(misfit)
        return self

    def _misfits(self) -> Iterator[str]:
        """Yields what does not fit together, and what to use instead."""
        method = self.method
        if method.quantization() and self.precision != "bf16":
            remedy = "bf16 with autocast" if self.precision == "amp" else "bf16"
            yield f"precision={self.precision} does not fit a 4-bit base, which computes in bf16; use {remedy}"
        if self.autocast and self.precision != "bf16":
            yield "autocast is for bf16 weights: precision=amp is fp32 weights under autocast; use amp"
        if getattr(method, "kbit_preparation", "none") == "trl" and not self.autocast:
            yield (
                "kbit_preparation=trl puts norms in fp32 before a head in bf16, and only autocast multiplies the two; "
                "use autocast=true, or kbit_preparation=peft"
            )
        if self.steps < method.min_steps:
            yield f"steps={self.steps}: {method.name} needs at least {method.min_steps}"
        if self.warmup_steps > self.steps:
            yield f"warmup_steps={self.warmup_steps} must not exceed steps={self.steps}"
        if self.generation_items > self.heldout_items:
            yield f"generation_items={self.generation_items} must not exceed heldout_items={self.heldout_items}"
        if self.retention_tokens == 1:
            yield "retention_tokens=1 scores nothing, because a first token is given; use 0, or more"
        for name, scored in (("validation_every", "validation_items"), ("retention_every", "retention_tokens")):
            if getattr(self, name) and not getattr(self, scored):
                yield f"{name}={getattr(self, name)} needs {scored} above 0"
            if getattr(self, name) and self.compile:
                yield f"{name} does not work with compile, which compiles training only; use 0"
        if self.attention == "flash_attention_2" and (self.device == "cpu" or self.precision == "fp32"):
            yield "attention=flash_attention_2 needs a CUDA card and 16-bit precision; use sdpa"
        if self.packing and not method.supports_packing:
            yield f"packing does not work with {method.name}, whose virtual tokens precede a single prompt"
        if self.optimizer not in ("adamw", "sgd") and self.optimizer_implementation != "foreach":
            yield f"optimizer_implementation is an option of torch.optim; leave it out with {self.optimizer}"
        if self.checkpointing and not method.supports_checkpointing:
            yield f"checkpointing does not work with {method.name}, which fills the key-value cache"
        if self.compile and self.checkpointing and not method.compiles_recomputation:
            yield (
                f"compile does nothing with checkpointing and {method.name}, whose layers torch.compile leaves as "
                "they are, without a word; leave out one of the two"
            )
        if self.latency_tokens and (not method.mergeable or self.shards > 1):
            yield (
                f"latency_tokens={self.latency_tokens} compares an adapter that is apart with a merged one, which "
                f"{method.name} with shards={self.shards} does not have; use 0"
            )
        if self.start_from is None and self.start_as == "merged":
            yield "start_as=merged needs start_from, the run whose adapter is merged"
        continues = method.continues or (self.start_as == "merged" and method.trains_base)
        if self.start_from is not None and (self.shards > 1 or not continues):
            yield (
                f"start_from does not work with {method.name}, start_as={self.start_as} and shards={self.shards}; "
                "use lora, rslora, lora-plus or dora, or full with start_as: merged, and shards: 1"
            )
        if self.shards > 1 and (method.quantization() or not method.supports_shards):
            yield f"shards={self.shards} does not work with {method.name}; use shards: 1"
        if self.shards > 1 and self.optimizer not in ("adamw", "sgd"):
            yield f"shards={self.shards} needs an optimizer of torch (got {self.optimizer}); use adamw"
        if self.batch_size % self.shards:
            yield f"shards={self.shards} must divide batch_size={self.batch_size}, so that all get equal rows"

    @property
    def autocasts(self) -> bool:
        """Whether matrix products are in bf16 whatever the precision of their inputs."""
        return self.autocast or self.precision == "amp"

    @property
    def keeps_logits(self) -> bool:
        """Whether the output lives until the next step."""
        return self.loss_path == "hf" if self.keep_logits is None else self.keep_logits

    def canonical(self) -> dict[str, Any]:
        """Returns the fields that differ from their defaults. The id hashes only these: a new field renames no run."""
        return {
            **self.model_dump(mode="json", exclude_defaults=True, exclude={"method"}),
            "method": self.method.canonical(),
        }


def run_id(spec: RunSpec) -> str:
    """Returns the run's id: a readable stem and a hash of every field that differs from its default."""
    parts = [spec.method.name, *spec.method.id_parts(), f"s{spec.seed}"]
    parts += [spec.device] if spec.device != "cpu" else []
    stem = re.sub(r"[^a-z0-9.-]+", "-", "-".join(parts).lower())[:80]
    text = json.dumps([SPEC_VERSION, spec.canonical()], sort_keys=True, separators=(",", ":"))
    return f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def start_without_seed(start: str, seed: int) -> str:
    """Returns the id of the run that a run of this seed starts from, without what its own seed decides.

    Starts with the seed of the run that follows are one start, made once for each seed.

    >>> start_without_seed("lora-r8-s3-0a1b2c3d", 3), start_without_seed("full-s0-0a1b2c3d", 3)
    ('lora-r8', 'full-s0-0a1b2c3d')
    """
    return re.sub(rf"-s{seed}(-[a-z]+)?-[0-9a-f]{{8}}$", "", start)


MEASURING = (
    *("validation_items", "validation_every", "heldout_items", "generation_items", "retention_tokens"),
    *("retention_every", "benchmarks", "benchmark_items", "untimed_steps", "probe_steps", "latency_tokens"),
)
"""Fields that say what is measured and change no trained weight."""

_NO_MEMORY = {
    *("seed", "init_seed", "learning_rate", "train_items", "shuffled_targets", "start_from", "start_as"),
    *("steps", "schedule", "warmup_steps", "task", *MEASURING),
}
"""Fields that change no shape, and so no memory; a method's scale alpha and its start are others."""


def memory_key(spec: RunSpec) -> str:
    """Returns what runs that take the same memory have in common."""
    fields = {name: value for name, value in spec.canonical().items() if name not in _NO_MEMORY}
    method = {name: value for name, value in fields["method"].items() if name != "start"}
    return json.dumps({**fields, "method": {**method, "alpha": None}}, sort_keys=True)
