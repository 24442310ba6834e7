"""The contract of a method, and the types of the fields that methods share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from peftscope.files.content import NUMBER, Count, Strict
from peftscope.models.shapes import LinearLayer, ModelShape

if TYPE_CHECKING:
    from peftscope.spec import RunSpec as RunSpec
else:
    RunSpec = Any  # its fields are made of all methods

TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "minimal": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
FUSED_MODULES = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""The fused modules that replace these in some families (Phi-3). A preset means the ones that a model has."""


def _preset_or_modules(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(value, str) and value not in TARGET_PRESETS:
        raise ValueError(f"not a preset ({', '.join(TARGET_PRESETS)}); write module names as a list")
    if not isinstance(value, str):
        if not value:
            raise ValueError("the list of target modules is empty")
        return tuple(sorted(set(value)))
    return value


def target_modules(targets: str | tuple[str, ...]) -> list[str]:
    """Returns the module names behind a preset or a list.

    >>> target_modules("minimal")
    ['q_proj', 'v_proj', 'qkv_proj']
    """
    return with_fused(TARGET_PRESETS[targets]) if isinstance(targets, str) else list(targets)


def adapted_modules(model: Any, targets: str | tuple[str, ...]) -> list[str]:
    """Returns the names of the modules of a model that a preset or a list means.

    ``all-linear`` means what it means in PEFT: every linear layer but the output, whatever its family calls it.
    """
    if targets != "all-linear":
        return target_modules(targets)
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear | Conv1D)}
    # The router of Llama 4 returns two tensors, and PEFT's layer around it fails.
    left_out = {name for name, module in linear.items() if module is output or "Router" in type(module).__name__}
    names = {name.rpartition(".")[2] for name in linear.keys() - left_out}
    return sorted(names - {"out_proj"} if model.config.model_type in PEFT_NO_OUT_PROJ else names)


def with_adapter(model: Any, config: str, adapter_dtype: str = "fp32", **options: Any) -> Any:
    """Returns a model with an adapter of PEFT, by the name of PEFT's configuration and with these options of it."""
    import peft

    chosen = getattr(peft, config)(task_type=peft.TaskType.CAUSAL_LM, **options)
    return peft.get_peft_model(model, chosen, autocast_adapter_dtype=adapter_dtype == "fp32")


PEFT_NO_OUT_PROJ = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""Kinds of models whose ``out_proj`` PEFT refuses to adapt. Source: peft 0.21, tuners/tuners_utils.py:152."""


def with_fused(modules: Sequence[str]) -> list[str]:
    """Returns module names, followed by the fused modules that replace them in some families."""
    return [*modules, *dict.fromkeys(FUSED_MODULES[name] for name in modules if name in FUSED_MODULES)]


Rank = Annotated[Count, Field(description="inner dimension of the update B·A")]
Alpha = Annotated[
    float, Field(gt=0, description="numerator of the scale alpha/rank (alpha/sqrt(rank) for rsLoRA)"), NUMBER
]
Targets = Annotated[
    str | tuple[str, ...],
    AfterValidator(_preset_or_modules),
    Field(description="minimal (q,v), attention (q,k,v,o), mlp, all-linear, or a list of modules' names"),
]
Dropout = Annotated[float, Field(ge=0, lt=1, description="dropout on the input of A"), NUMBER]
AdapterDtype = Annotated[
    Literal["fp32", "base"],
    Field(description="fp32 is PEFT's default (autocast_adapter_dtype); base keeps the base model's dtype"),
]
QuantType = Annotated[
    Literal["nf4", "fp4", "nf3", "nf2"],
    Field(
        description="code book of the 4-bit weights; nf3 and nf2 are simulated: weights lie on a grid of 3 or 2 bits, "
        "in blocks of 64 with exact constants, and keep their dtype"
    ),
]
SIMULATED = ("nf3", "nf2")
"""Codes that no kernel stores; the base is rounded to them when it is loaded."""
DoubleQuant = Annotated[bool, Field(description="quantise the fp32 block constants to 8 bit as well")]
ComputeDtype = Annotated[Literal["bf16", "fp32"], Field(description="dtype of the dequantised product")]
VirtualTokens = Annotated[Count, Field(description="trainable positions before the prompt")]


class Quantization(Strict):
    """How the linear layers of a frozen base are stored. Every option of bitsandbytes is set; no default applies."""

    quant_type: QuantType = "nf4"
    double_quant: DoubleQuant = True
    compute_dtype: ComputeDtype = "bf16"


@dataclass(frozen=True)
class ClosedForm:
    """The properties of a method that the closed form of memory (``memory/formula``) needs.

    Attributes:
        layer: The formula of an adapted layer: that of LoRA, of AdaLoRA's P E Q, of DoRA or of IA3.
        orthogonality_term: Whether the loss has a term for each A and each B.
        scores: The number of values that the method keeps per trained value from the first optimizer step on.
        own_group: The adapter matrices that form a parameter group of their own.
    """

    layer: Literal["low-rank", "triplets", "decomposed", "rescaled"] = "low-rank"
    orthogonality_term: bool = False
    scores: int = 0
    own_group: str = ""


class Method(BaseModel):
    """The contract of a method: its settings are fields, and its methods are what a run calls.

    A subclass overrides only what differs. Methods do not inherit from each other; what several share is a base
    class without a name. The modules of this package import torch and peft inside functions, so that specs can be read
    without them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    trains: ClassVar[bool] = True
    """Whether anything is trained. False for the untouched base."""
    label: ClassVar[str]
    """The name in tables and plots."""
    mask_free_attention: ClassVar[bool] = True
    """Whether a causal kernel without a mask is exact. It is not with a prefix in the key-value cache."""
    has_own_base: ClassVar[bool] = False
    """Whether its adapter fits only a base that ``build`` changed, which must be rebuilt to load the adapter."""
    draws_start: ClassVar[bool] = True
    """Whether the seed decides the initial adapter. False if the base alone decides it."""
    generates_from_cache: ClassVar[bool] = True
    """Whether ``generate`` with a key-value cache agrees with the model's forward pass."""
    supports_checkpointing: ClassVar[bool] = True
    """Whether activations can be recomputed in the backward pass."""
    compiles_recomputation: ClassVar[bool] = True
    """Whether torch.compile can compile a decoder layer whose activations are recomputed."""
    supports_packing: ClassVar[bool] = True
    """Whether several examples can share a sequence."""
    supports_shards: ClassVar[bool] = True
    """Whether its tensors can be sharded over processes, if the base is not quantised."""
    min_steps: ClassVar[int] = 1
    """The fewest steps that its schedule works with."""
    mergeable: ClassVar[bool] = True
    """Whether the result can be merged into a plain model with the base's shape."""
    plain_update: ClassVar[bool] = False
    """Whether what it trains is a matrix that is added to the base's own weight, with or without DoRA's norms."""
    continues: ClassVar[bool] = False
    """Whether a run can start from the adapter of another one: its saved adapter is all that it trains, on any base."""
    trains_base: ClassVar[bool] = False
    """Whether the base's own weights are trained."""
    rank_field: ClassVar[str] = "rank"
    """The field that holds the initial rank, in methods that have a rank."""
    run_defaults: ClassVar[Mapping[str, Any]] = {}
    """The settings of a method that ``defaults.yaml`` does not name: at least its learning rate."""
    closed_form: ClassVar[ClosedForm | None] = None
    """The properties that the closed form of memory needs. None means that the method is simulated instead."""
    memory_assumptions: ClassVar[tuple[str, ...]] = ()
    """Assumptions behind answers about its memory, beyond those for all methods, one sentence each."""

    def __hash__(self) -> int:
        """Returns a hash of the canonical fields, because a field that is a dictionary or a list has none."""
        return hash(json.dumps(self.canonical(), sort_keys=True))

    def canonical(self) -> dict[str, Any]:
        """Returns the name, and the fields that differ from their defaults. A run's id hashes only these."""
        return {"name": self.__dict__["name"], **self.model_dump(mode="json", exclude_defaults=True)}

    def quantization(self) -> Quantization | None:
        """Returns how the base is quantised while it is loaded, or None if it is not.

        ``base_weights``, a field of some methods, may say NF4, which has double quantisation then.
        """
        return Quantization() if getattr(self, "base_weights", None) == "nf4" else None

    def targets_of(self) -> list[str]:
        """Returns the names of the adapted modules. An empty list means none, or all."""
        targets = getattr(self, "targets", None)
        return target_modules(targets) if targets is not None else []

    def modules_named(self) -> list[str]:
        """Returns the module names that the spec lists itself. A preset takes whatever the model has."""
        targets = getattr(self, "targets", None)
        return list(targets) if isinstance(targets, tuple) else []

    def full_label(self) -> str:
        """Returns the label, with an addition if two rows of a table would otherwise have the same label."""
        return self.label

    def columns(self) -> dict[str, Any]:
        """Returns the fields as columns of a table, in which a list is one text."""
        fields = self.model_dump(mode="json", exclude={"name"})
        return {name: "+".join(value) if isinstance(value, list) else value for name, value in fields.items()}

    def id_parts(self) -> list[str]:
        """Returns the parts of a run id that describe the method, after its name."""
        fields = self.model_dump(mode="json")
        named = (("rank", "r"), ("init_r", "r"), ("virtual_tokens", "v"), ("alpha", "a"))
        parts = [f"{prefix}{fields[field]:g}" for field, prefix in named if field in fields]
        if fields.get("targets"):
            parts.append(fields["targets"] if isinstance(fields["targets"], str) else "-".join(fields["targets"]))
        return parts

    def rescales_input(self, module: str) -> bool:
        """Returns whether the method rescales the input of a module (as IA3 may) instead of its output."""
        return False

    @classmethod
    def with_rank(cls, rank: int) -> dict[str, int]:
        """Returns the fields that give the method this rank; none if it has no rank."""
        return {cls.rank_field: rank} if cls.rank_field in cls.model_fields else {}

    def why_not_simulated(self) -> str:
        """Returns why its memory cannot be simulated; empty if it can."""
        return ""

    def rounding(self) -> str | None:
        """Returns the code that the base's linear weights are rounded to while it is loaded, without being packed."""
        code: str | None = getattr(self, "quant_type", getattr(self, "base_weights", None))
        return code if code in SIMULATED else None

    def loading_temporary(self, largest: LinearLayer) -> tuple[int, str] | None:
        """Returns the temporary bytes of loading and initialising the largest layer, and their description."""
        if self.quantization():
            return 2 * largest.weights, "largest layer before it is quantised"
        return None

    def initialisation_seconds(self, shape: ModelShape) -> float:
        """Returns the seconds of computation that ``build`` takes on a card."""
        return 0.0

    def trainable_parameters(self, shape: ModelShape) -> int | None:
        """Returns the number of values that require gradients at the start of a run; None: known once it is built."""
        return None

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the model to train. ``model`` is the loaded base, which this may change in place."""
        raise NotImplementedError

    def build_empty(self, model: Any, spec: RunSpec) -> Any:
        """Returns a model with the same tensors as ``build`` makes, but from a base whose tensors have no values."""
        return self.build(model, spec)

    def optimizer_groups(self, model: Any, spec: RunSpec) -> list[dict[str, Any]]:
        """Returns the optimizer's parameter groups."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": spec.learning_rate}]

    def logit_offset(self) -> int:
        """Returns the number of positions that the wrapper adds before the logits of the tokens."""
        return 0

    def after_optimizer_step(self, model: Any, step: int) -> None:
        """Runs after ``optimizer.step`` and before ``zero_grad``. ``step`` counts from 0."""

    def training_state(self, model: Any) -> dict[str, Any]:
        """Returns the state beside parameters that training changes: tensors and plain values for a checkpoint."""
        return {}

    def load_training_state(self, model: Any, state: dict[str, Any]) -> None:
        """Restores what ``training_state`` returned."""

    def final_trainable_parameters(self, model: Any) -> int:
        """Returns the number of trained values that the finished model uses."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def metrics(self, model: Any) -> dict[str, float]:
        """Returns figures for the record that only this method has."""
        return {}

    def save(self, model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Writes the trained weights: an adapter in PEFT's format or, for full fine-tuning, the model.

        ``state`` has the tensors of a sharded model by name. None means the tensors of the model itself.
        """
        modules = [f".{name}" for name, _ in model.named_modules()]
        for config in getattr(model, "peft_config", {}).values():
            # PEFT stores names in sets, and would write them in an order that changes from process to process.
            for name, value in vars(config).items():
                if isinstance(value, set):
                    # A preset also names the fused modules of other families.
                    lacking = {target for target in value if not any(m.endswith(f".{target}") for m in modules)}
                    setattr(config, name, sorted(value - lacking if name == "target_modules" else value))
        model.save_pretrained(folder, state_dict=state)


class Prepended(Method):
    """The common base of methods that train virtual tokens before the prompt."""

    closed_form: ClassVar[ClosedForm | None] = ClosedForm()
    generates_from_cache: ClassVar[bool] = False
    supports_packing: ClassVar[bool] = False
    supports_shards: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    name: str
    virtual_tokens: VirtualTokens = 8
