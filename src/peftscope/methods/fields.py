"""The types that method parameters share: ranges, units and descriptions are stated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from peftscope.files.content import Count

if TYPE_CHECKING:
    from peftscope.models.shapes import LinearLayer, ModelShape
    from peftscope.spec import RunSpec

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
"""Where some families (Phi-3) keep these modules: a preset means whichever of the two a model has."""


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


def with_fused(modules: Sequence[str]) -> list[str]:
    """Returns module names, and the fused modules that stand for them in some families."""
    return [*modules, *dict.fromkeys(FUSED_MODULES[name] for name in modules if name in FUSED_MODULES)]


Rank = Annotated[Count, Field(description="inner dimension of the update B·A")]
Alpha = Annotated[float, Field(gt=0, description="numerator of the scale alpha/rank (alpha/sqrt(rank) for rsLoRA)")]
Targets = Annotated[
    str | tuple[str, ...],
    AfterValidator(_preset_or_modules),
    Field(description="minimal (q,v), attention (q,k,v,o), mlp, all-linear, or a list of module names"),
]
Dropout = Annotated[float, Field(ge=0, lt=1, description="dropout on the input of A")]
AdapterDtype = Annotated[
    Literal["fp32", "base"],
    Field(description="fp32 is PEFT's default (autocast_adapter_dtype); base keeps the base model's dtype"),
]
QuantType = Annotated[Literal["nf4", "fp4"], Field(description="code book of the 4-bit weights")]
DoubleQuant = Annotated[bool, Field(description="quantise the fp32 block constants to 8 bit as well")]
ComputeDtype = Annotated[Literal["bf16", "fp32"], Field(description="dtype of the dequantised product")]
VirtualTokens = Annotated[Count, Field(description="trainable positions before the prompt")]


class Quantization(BaseModel):
    """How the linear layers of a frozen base are stored: every bitsandbytes option, none left to its default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_type: QuantType = "nf4"
    double_quant: DoubleQuant = True
    compute_dtype: ComputeDtype = "bf16"


@dataclass(frozen=True)
class ClosedForm:
    """What the closed form of memory (``memory/formula``) has to know of a method that it was written for.

    Attributes:
        layer: The formula of an adapted layer: LoRA's, AdaLoRA's P E Q, DoRA's, or IA3's.
        orthogonality_term: Whether the loss has a term of each A and each B.
        scores: How many values the method keeps of each trained value from the first optimizer step on.
        own_group: The adapter matrices that are a parameter group of their own.
    """

    layer: Literal["low-rank", "triplets", "decomposed", "rescaled"] = "low-rank"
    orthogonality_term: bool = False
    scores: int = 0
    own_group: str = ""


class Method(BaseModel):
    """The contract of a method: its parameters as fields, and what a run asks of it.

    A subclass overrides what differs. Methods do not inherit from each other. Modules of this package import
    torch and peft inside functions only, so that specs can be read without them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    trains: ClassVar[bool] = True
    """False for the untouched base."""
    label: ClassVar[str]
    """The name in tables and plots."""
    mask_free_attention: ClassVar[bool] = True
    """False where a mask-free causal kernel would be wrong, as with a prefix in the key-value cache."""
    has_own_base: ClassVar[bool] = False
    """Whether its adapter fits only a base that ``build`` changed, which must be made again to load it."""
    starts_at_base: ClassVar[bool] = True
    """Whether the model computes what its (quantised) base computes before the first step."""
    draws_start: ClassVar[bool] = True
    """Whether the seed decides where training starts; False where that follows from the base alone."""
    generates_from_cache: ClassVar[bool] = True
    """Whether ``generate`` with a key-value cache gives what the model's forward pass gives."""
    supports_checkpointing: ClassVar[bool] = True
    """Whether activations can be recomputed in the backward pass."""
    compiles_recomputation: ClassVar[bool] = True
    """Whether torch.compile makes a graph of a decoder layer whose activations are recomputed."""
    supports_packing: ClassVar[bool] = True
    """Whether several examples can share a sequence."""
    supports_shards: ClassVar[bool] = True
    """Whether its tensors can be spread over processes (an unquantised base taken for granted)."""
    min_steps: ClassVar[int] = 1
    """The shortest run that its schedule fits."""
    mergeable: ClassVar[bool] = True
    """Whether the result can become a plain model of the base's shape."""
    trains_base: ClassVar[bool] = False
    """Whether the base's own weights are trained."""
    rank_field: ClassVar[str] = "rank"
    """The field that holds the rank at the start, in methods that have one."""
    run_defaults: ClassVar[Mapping[str, Any]] = {}
    """What experiments start from where ``defaults.yaml`` does not name the method: at least its learning rate."""
    closed_form: ClassVar[ClosedForm | None] = None
    """What the closed form of memory has to know; None: it does not cover the method, whose memory is simulated."""
    memory_assumptions: ClassVar[tuple[str, ...]] = ()
    """What an answer about its memory rests on beside what holds for all, one sentence each."""

    def quantization(self) -> Quantization | None:
        """Returns how the base is quantised when it is loaded, or None."""
        return None

    def targets_of(self) -> list[str]:
        """Returns the names of the modules that the method adapts (empty: none, or all)."""
        targets = getattr(self, "targets", None)
        return target_modules(targets) if targets is not None else []

    def modules_named(self) -> list[str]:
        """Returns the module names that the spec lists itself; a model must have them, a preset takes what is there."""
        targets = getattr(self, "targets", "")
        return [] if isinstance(targets, str) else list(targets)

    def full_label(self) -> str:
        """Returns the label, with what tells two rows of this method apart that are no settings of one another."""
        return self.label

    def id_parts(self) -> list[str]:
        """Returns what the readable part of a run id says of the method after its name."""
        fields = self.model_dump(mode="json")
        named = (("rank", "r"), ("init_r", "r"), ("virtual_tokens", "v"), ("alpha", "a"))
        parts = [f"{prefix}{fields[field]:g}" for field, prefix in named if field in fields]
        if fields.get("targets"):
            parts.append(fields["targets"] if isinstance(fields["targets"], str) else "-".join(fields["targets"]))
        return parts

    def rescales_input(self, module: str) -> bool:
        """Returns whether the method rescales a module's input, as IA3 may, rather than its output."""
        return False

    @classmethod
    def with_rank(cls, rank: int) -> dict[str, int]:
        """Returns the fields of a method of this rank; none where it has no rank."""
        return {cls.rank_field: rank} if cls.rank_field in cls.model_fields else {}

    def loading_temporary(self, largest: LinearLayer) -> tuple[int, str] | None:
        """Returns the bytes that loading and initialising the largest layer take for a while, and what they hold."""
        if self.quantization():
            return 2 * largest.weights, "largest layer before it is quantised"
        return None

    def initialisation_seconds(self, shape: ModelShape) -> float:
        """Returns the seconds that ``build`` computes on a card before the first step."""
        return 0.0

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the number of values that require gradients when the run starts."""
        raise NotImplementedError

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the model that is trained; ``model`` is the loaded base and may be changed in place."""
        raise NotImplementedError

    def build_empty(self, model: Any, spec: RunSpec) -> Any:
        """Returns a model of the same tensors as ``build`` on a base without values, where nothing can be computed."""
        return self.build(model, spec)

    def optimizer_groups(self, model: Any, spec: RunSpec) -> list[dict[str, Any]]:
        """Returns the optimizer's parameter groups."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": spec.learning_rate}]

    def logit_offset(self) -> int:
        """Returns how many positions the wrapper puts before the tokens whose logits it returns."""
        return 0

    def after_optimizer_step(self, model: Any, step: int) -> None:
        """Runs after ``optimizer.step`` and before ``zero_grad``; ``step`` counts from 0."""

    def training_state(self, model: Any) -> dict[str, Any]:
        """Returns what training changes beside trained parameters: tensors and plain values, for a checkpoint."""
        return {}

    def load_training_state(self, model: Any, state: dict[str, Any]) -> None:
        """Puts back what ``training_state`` returned."""

    def final_trainable_parameters(self, model: Any) -> int:
        """Returns the number of trained values that the finished model uses."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def metrics(self, model: Any) -> dict[str, float]:
        """Returns further figures that this method alone can give, for the record."""
        return {}

    def save(self, model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Writes what was trained: an adapter in PEFT's format (or, for full fine-tuning, the model).

        Args:
            model: The trained one.
            folder: Where to.
            state: Its tensors by name; None: those in the model, which holds all of them unless it is sharded.
        """
        modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        for config in getattr(model, "peft_config", {}).values():
            # PEFT keeps names as sets and would write them in an order that changes from process to process.
            for name, value in vars(config).items():
                if isinstance(value, set):
                    # A preset names the fused modules of other families as well.
                    setattr(config, name, sorted(value & modules if name == "target_modules" else value))
        model.save_pretrained(folder, state_dict=state)
