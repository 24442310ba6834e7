"""A question about memory: the model, the run and the card. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from peftscope.errors import InputError, Problem, close_match
from peftscope.files.problems import problems_of
from peftscope.hardware.cards import CUBLAS_BYTES, Gpu
from peftscope.memory.base import Model
from peftscope.memory.beside import BESIDE_OPTIONS, JOBS, Beside, check_beside, with_job
from peftscope.memory.formula.states import OTHER_OPTIMIZERS
from peftscope.memory.regimes import REGIMES, settings_of
from peftscope.methods import METHODS
from peftscope.methods.fields import TARGET_PRESETS
from peftscope.models.stored import INT8
from peftscope.spec import RunSpec

METHOD_OPTIONS = (
    "tuner",
    "options",
    "rank",
    "alpha",
    "init_r",
    "target_r",
    "targets",
    "feedforward",
    "embeddings",
    "virtual_tokens",
    "dropout",
    "adapter_dtype",
    "norm_gradient",
    "double_quant",
    "kbit_preparation",
)
"""The options that are fields of a method."""

SPEC_OPTIONS = (
    "batch_size",
    "seq_len",
    "gradient_accumulation",
    "precision",
    "autocast",
    "optimizer",
    "optimizer_implementation",
    "loss_path",
    "keep_logits",
    "attention",
    "checkpointing",
    "packing",
    "eval_batch_size",
)
"""The options that are fields of the spec."""

OPTIONS = (*METHOD_OPTIONS, *SPEC_OPTIONS, *BESIDE_OPTIONS)
"""All options of a question but the method itself."""


def options_of(spec: RunSpec) -> dict[str, Any]:
    """Returns a run as options of ``ask``."""
    options = {name: getattr(spec, name) for name in SPEC_OPTIONS}
    options |= {name: getattr(spec.method, name) for name in METHOD_OPTIONS if hasattr(spec.method, name)}
    return {"method": spec.method.name, **options}


DEFAULTS: dict[str, Any] = {"batch_size": 1, "seq_len": 512, "precision": "bf16", "loss_path": "hf"}
"""The settings of a plain PyTorch and PEFT script. All other options have the default of their field."""


@dataclass(frozen=True)
class Question:
    """A question about the memory of a run.

    Attributes:
        model: The base.
        spec: The run. Every sequence of the longest batch has the length ``seq_len``.
        responses: The number of positions of a sequence that carry a loss.
        gpu: The card, or None if none was named.
        gpus: The number of cards over which weights, gradients and states are sharded.
        beside: What the question says beside the fields of the run.
        by_trainer: What the defaults of a trainer decide, one sentence each.
    """

    model: Model
    spec: RunSpec
    responses: int
    gpu: Gpu | None
    gpus: int
    beside: Beside = field(default_factory=Beside)
    by_trainer: tuple[str, ...] = ()

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation counts."""
        return self.beside.evaluation or not self.spec.method.trains

    @property
    def padded(self) -> bool:
        """Whether the longest batch has padding."""
        return self.beside.padding == "some"

    @property
    def cublas_bytes(self) -> int:
        """The size of cuBLAS's workspace on the card."""
        return self.gpu.cublas_bytes if self.gpu else CUBLAS_BYTES

    @property
    def before_ampere(self) -> bool:
        """Whether the card is known to have no attention kernel for bf16 but the math one."""
        return self.gpu is not None and self.gpu.before_ampere

    @property
    def saved(self) -> dict[str, str]:
        """The modules of which a copy is trained in full, and the precision of the copy: base or fp32."""
        return dict.fromkeys(self.beside.modules_to_save, self.beside.modules_to_save_dtype)

    @property
    def shared(self) -> bool:
        """Whether a card's blocks have other sizes than on one card alone."""
        return self.gpus > 1 or self.beside.offload != "none" or self.beside.master_weights == "fp32"

    @property
    def rows(self) -> int:
        """The rows of a batch in the pass of the loss."""
        return self.spec.batch_size * JOBS[self.beside.job].rows

    @property
    def scores_responses(self) -> bool:
        """Whether the training step computes logits only of the positions that carry a loss."""
        beside = self.beside
        return self.spec.loss_path == "response_only" or beside.logprobs == "chunked" or beside.job == "grpo"

    @property
    def formula_only(self) -> list[str]:
        """The options whose values the closed form alone knows."""
        beside = self.beside
        asked = {
            "loss": beside.loss == "cut-cross-entropy",
            "eval_gathers_logits": beside.eval_gathers_logits is not None,
            "sharding": self.gpus > 1 and beside.sharding != "zero3",
            "master_weights": beside.master_weights == "fp32",
            "offload": beside.offload != "none",
            "optimizer_states": beside.optimizer_states != "own",
            "optimizer_in_bwd": beside.optimizer_in_bwd,
            "logprobs": beside.logprobs == "whole",
            "offload_activations": beside.offload_activations,
        }
        return [option for option, is_asked in asked.items() if is_asked]

    @property
    def gathered_rows(self) -> int:
        """The rows of the evaluation whose logits are on the card at once; 0 if it gathers none."""
        items, batches = self.beside.eval_gathers_logits or 0, self.beside.eval_accumulation_steps
        return items if batches is None else min(items, batches * self.spec.eval_batch_size * self.gpus)

    @property
    def has_closed_form(self) -> bool:
        """Whether the closed form knows both the method and the model's kind; the rest is simulated."""
        return self.spec.method.closed_form is not None and self.model.shape is not None


def ask(
    model: Model, options: Mapping[str, Any], *, responses: int | None = None, gpu: Gpu | None = None, gpus: int = 1
) -> Question:
    """Returns a question. Options that are not given have the values of a plain PyTorch and PEFT script.

    ``options`` are fields of the spec, of the method and of ``Beside``, and ``responses`` is the number of positions of
    a sequence that carry a loss. None means that an option is not given.

    Raises:
        InputError: An option is wrong, or contradicts another option or the model.
    """
    given = {name: value for name, value in options.items() if value is not None}
    name = given.pop("method", "lora")
    if given.get("optimizer") in OTHER_OPTIMIZERS:
        given |= {"optimizer_states": given.pop("optimizer"), "optimizer_implementation": "fused"}
    if name not in METHODS:
        raise InputError(Problem("method", f"unknown method (got {name!r})", close_match(name, METHODS)))
    try:
        beside = Beside.model_validate({name: given.pop(name) for name in BESIDE_OPTIONS if name in given})
    except ValidationError as error:
        raise InputError(_problems(error)) from None
    if "evaluation" not in beside.model_fields_set and ("eval_batch_size" in given or beside.eval_gathers_logits):
        beside = beside.model_copy(update={"evaluation": True})
    known = given | {option: getattr(beside, option) for option in beside.model_fields_set}
    regime = settings_of(beside.as_trainer, name, known) if beside.as_trainer else {}
    set_by_trainer = {option: value for option, (value, _) in regime.items()}
    beside = beside.model_copy(
        update={option: set_by_trainer.pop(option) for option in BESIDE_OPTIONS if option in set_by_trainer}
    )
    given = set_by_trainer | given
    method: dict[str, Any] = {"name": name}
    for option in METHOD_OPTIONS:
        if option in given:
            method[option] = given.pop(option)
            if option not in METHODS[name].model_fields:
                fields = [field for field in METHODS[name].model_fields if field in METHOD_OPTIONS]
                remedy = f"{name} has {', '.join(fields)}" if fields else f"{name} has no options of its own"
                raise InputError(Problem(option, f"is not an option of the method {name}", remedy))
    if not JOBS[beside.job].drops and "dropout" in METHODS[name].model_fields:
        method["dropout"] = 0.0  # TRL's disable_dropout
    family = model.config["model_type"]
    if why := NOT_SDPA.get(family):
        if given.get("attention") == "sdpa":
            raise InputError(Problem("attention", f"sdpa does not {why}", "use eager or flash_attention_2"))
        given.setdefault("attention", "eager")
    values = {**DEFAULTS, **given, "eval_batch_size": given.get("eval_batch_size", given.get("batch_size", 1))}
    try:
        spec = RunSpec(model=model.name, task="memory", device="cuda", learning_rate=1e-4, method=method, **values)
    except ValidationError as error:
        # Without a value of its own, the evaluation's batch size follows that of training.
        follows = {"eval_batch_size"} - given.keys()
        raise InputError(p for p in _problems(error) if p.where not in follows) from None
    if beside.load_in_8bit:
        model = replace(model, stored=INT8)
    _check_model(model, spec)
    kept = responses if responses is not None else usual_responses(spec.seq_len)
    if not 1 <= kept <= spec.seq_len:
        raise InputError(Problem("response_len", f"must lie between 1 and seq_len={spec.seq_len} (got {kept})"))
    if gpus < 1:
        raise InputError(Problem("gpus", f"must be at least 1 (got {gpus})"))
    if beside.loss not in ("plain", "chunked") and family in SCALED_LOGITS:
        message = f"{beside.loss} is not modelled for {family}, which changes its logits"
        raise InputError(Problem("loss", message, "use plain"))
    check_beside(spec, beside)
    beside = with_job(spec, beside)
    said = [f"as {beside.as_trainer}: {option}={value} ({source})" for option, (value, source) in regime.items()]
    if beside.as_trainer:
        version, more = REGIMES[beside.as_trainer].version, REGIMES[beside.as_trainer].beside
        said.insert(0, f"as {beside.as_trainer}, read from {version}{f'; {more}' if more else ''}")
    return Question(model, spec, kept, gpu, gpus, beside, tuple(said))


def preset_or_modules(text: str | None) -> str | list[str] | None:
    """Returns the name of a preset of target modules, or the modules that are listed, separated by commas."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    return text if not text else names[0] if len(names) == 1 and names[0] in TARGET_PRESETS else names


NOT_SDPA = {
    "gemma2": "apply the soft cap of Gemma-2's attention scores",
    "gpt_oss": "know the sinks of gpt-oss's attention",
}
"""Families whose attention is eager by default, and what SDPA does not do."""


def _problems(error: ValidationError) -> list[Problem]:
    def place(location: tuple[int | str, ...]) -> str:
        names = (str(part).replace("as_trainer", "as") for part in location if part not in ("method", *METHODS))
        return ".".join(names) or "options"

    return problems_of(error, place, set())


def _check_model(model: Model, spec: RunSpec) -> None:
    limit, virtual = model.max_seq_len, getattr(spec.method, "virtual_tokens", 0)
    if limit is not None and spec.seq_len + virtual > limit:
        length = f"{spec.seq_len}" + (f" and {virtual} virtual tokens" if virtual else "")
        message = f"{length} is over the model's limit of {limit} tokens"
        raise InputError(Problem("seq_len", message, f"use at most {limit - virtual}"))
    form = spec.method.closed_form
    if model.stored and (not form or not spec.method.targets_of() or form.layer != "low-rank" or form.own_group):
        message = f"{spec.method.name} on a base stored as {model.stored.name} is not modelled"
        raise InputError(Problem("method", message, "use lora, rslora or qlora"))
    if model.stored and (
        spec.precision != "bf16" or model.shape is None or (model.shape.experts and model.stored != INT8)
    ):
        message = f"a base stored as {model.stored.name} is modelled for dense models with a closed form, in bf16"
        raise InputError(Problem("model", message, "use precision bf16 and such a model"))
    if model.shape is None:
        return
    modules = [layer.name for layer in model.shape.block]
    for target in spec.method.modules_named():
        if not model.shape.linear_layers([target]):
            remedy = close_match(target, [*modules, *TARGET_PRESETS])
            remedy = FUSED_EXPERTS if model.shape.experts else remedy
            raise InputError(Problem("targets", f"{model.name} has no `{target}`", remedy))
    if spec.method.targets_of() and not model.shape.linear_layers(spec.method.targets_of()):
        raise InputError(Problem("targets", f"{model.name} has no such layers", FUSED_EXPERTS))
    name = spec.method.rank_field
    rank, narrowest = getattr(spec.method, name, None), narrowest_target(model, spec)
    if spec.method.closed_form is None:  # a method of another package may mean something else by its rank
        return
    if rank is not None and narrowest is not None and rank > narrowest:
        message = f"{rank} is more than the smallest adapted width, {narrowest}"
        raise InputError(Problem(name, message, f"use at most {narrowest}"))


FUSED_EXPERTS = "experts are fused parameters, whose adapters are not modelled; use all-linear, or name attention's"

SCALED_LOGITS = ("gemma2", "granite")
"""Families whose logits are scaled or capped after the head, which Liger's loss and CCE here do not do."""


def usual_responses(seq_len: int) -> int:
    """Returns the number of positions that carry a loss if the question does not say."""
    return max(1, seq_len // 2)


def narrowest_target(model: Model, spec: RunSpec) -> int | None:
    """Returns the smallest width of the adapted layers; None if the shape is unknown or no layer is adapted.

    A rank above this width adds nothing that the product of the two matrices could express.
    """
    targets = spec.method.targets_of()
    layers = model.shape.linear_layers(targets) if model.shape else ()
    return min((min(layer.inputs, layer.outputs) for layer in layers), default=None)
