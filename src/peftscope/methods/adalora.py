"""AdaLoRA: every matrix starts at rank ``init_r``, and triplets are masked until the mean rank is ``target_r``.

Source: Zhang et al. 2023, arXiv 2303.10512. The schedule is given in shares of the run, so that short runs prune too.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftscope.files.content import NUMBER, Count
from peftscope.methods.fields import (
    AdapterDtype,
    Alpha,
    ClosedForm,
    Dropout,
    Method,
    Rank,
    RunSpec,
    Targets,
    adapted_modules,
    with_adapter,
)
from peftscope.models.shapes import ModelShape

IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""The scores that PEFT's rank allocator keeps for every trained value."""

Share = Annotated[float, Field(ge=0, lt=1), NUMBER]


class AdaLoRA(Method):
    """Adaptive allocation of a rank budget over P E Q triplets, the most important ones first."""

    label: ClassVar[str] = "AdaLoRA"
    plain_update: ClassVar[bool] = True
    closed_form: ClassVar[ClosedForm] = ClosedForm(layer="triplets", orthogonality_term=True, scores=len(IMPORTANCE))
    min_steps: ClassVar[int] = 3
    supports_shards: ClassVar[bool] = False
    rank_field: ClassVar[str] = "init_r"
    memory_assumptions: ClassVar[tuple[str, ...]] = ("AdaLoRA before it prunes; masking frees nothing",)

    name: Literal["adalora"] = "adalora"
    init_r: Annotated[Rank, Field(description="AdaLoRA's rank of every matrix before pruning")] = 12
    target_r: Annotated[Rank, Field(description="AdaLoRA's mean rank after pruning")] = 8
    alpha: Alpha = 24
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0
    adapter_dtype: AdapterDtype = "fp32"
    warmup_share: Share = 0.1
    final_share: Share = 0.3
    allocate_every: Annotated[Count, Field(description="steps between two allocations")] = 1
    orthogonal_weight: Annotated[float, Field(ge=0, description="gamma of the orthogonality term"), NUMBER] = 0.1
    score: Annotated[
        Literal["sensitivity", "magnitude"],
        Field(description="what ranks the triplets: the paper's sensitivity of their values, or |lambda| alone"),
    ] = "sensitivity"

    @model_validator(mode="after")
    def _budget_shrinks(self) -> AdaLoRA:
        if self.target_r >= self.init_r:
            raise ValueError(f"target_r={self.target_r} must be smaller than init_r={self.init_r}: AdaLoRA only prunes")
        if self.warmup_share + self.final_share >= 1:
            raise ValueError("warmup_share + final_share must stay below 1, or no step is left to prune in")
        return self

    @classmethod
    def with_rank(cls, rank: int) -> dict[str, int]:
        """Returns the initial and the target rank. The initial rank is at least 2, to leave something to prune."""
        return {"init_r": max(2, rank), "target_r": max(1, rank // 2)}

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns init_r * (in + out + 1), summed over the targets: the trained values before the first pruning."""
        layers = shape.linear_layers(self.targets_of())
        return sum(self.init_r * (layer.inputs + layer.outputs + 1) for layer in layers)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's AdaLoRA, with the schedule scaled to ``spec.steps``."""
        tfinal = max(1, round(spec.steps * self.final_share))
        wrapped = with_adapter(
            model,
            "AdaLoraConfig",
            self.adapter_dtype,
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=adapted_modules(model, self.targets),
            tinit=min(round(spec.steps * self.warmup_share), spec.steps - tfinal - 1),
            tfinal=tfinal,
            deltaT=self.allocate_every,
            # PEFT adds the term to the loss of every forward pass, so each pass of an accumulation gets its share.
            orth_reg_weight=self.orthogonal_weight / spec.gradient_accumulation,
            total_step=spec.steps,
        )
        for name, parameter in wrapped.named_parameters():
            if ".ranknum." in name:
                # PEFT 0.21 makes this trainable when it casts the adapter of a bf16 base to fp32.
                parameter.requires_grad_(False)
        if self.score == "magnitude":
            _score_by_magnitude(wrapped)
        return wrapped

    def after_optimizer_step(self, model: Any, step: int) -> None:
        """Lets PEFT update the importance scores and mask triplets. The HF Trainer never calls this."""
        model.base_model.update_and_allocate(step)

    def training_state(self, model: Any) -> dict[str, Any]:
        """Returns PEFT's importance scores and the ranks that it kept at the last allocation."""
        allocator = model.base_model.rankallocator
        scores = {name: getattr(allocator, name) for name in IMPORTANCE}
        return {**scores, "rank_pattern": model.peft_config["default"].rank_pattern}

    def load_training_state(self, model: Any, state: dict[str, Any]) -> None:
        """Restores the scores and the ranks."""
        device = next(model.parameters()).device
        for name in IMPORTANCE:
            setattr(model.base_model.rankallocator, name, {key: score.to(device) for key, score in state[name].items()})
        model.peft_config["default"].rank_pattern = state["rank_pattern"]

    def kept_ranks(self, model: Any) -> dict[str, int]:
        """Returns the number of triplets with a value other than zero, for each adapted matrix."""
        values = {name: p for name, p in model.named_parameters() if ".lora_E." in name}
        return {
            name.removeprefix("base_model.model.").partition(".lora_E")[0]: int((p != 0).sum())
            for name, p in values.items()
        }

    def _final_ranks(self, model: Any) -> dict[str, int]:
        pattern = model.peft_config["default"].rank_pattern or {}
        return {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}

    def final_trainable_parameters(self, model: Any) -> int:
        """Returns the number of values in the triplets that the last allocation kept."""
        ranks = self._final_ranks(model)
        if not ranks:
            return super().final_trainable_parameters(model)
        modules = dict(model.base_model.model.named_modules())
        return sum(rank * (modules[name].in_features + modules[name].out_features + 1) for name, rank in ranks.items())

    def metrics(self, model: Any) -> dict[str, float]:
        """Returns the sum of the ranks that were kept, and the budget for it."""
        ranks = self._final_ranks(model)
        return {"final_rank_sum": sum(ranks.values()), "rank_budget": self.target_r * len(ranks)} if ranks else {}


def _score_by_magnitude(model: Any) -> None:
    """Makes PEFT's allocator score a triplet by the size of its singular value, the rival of the paper's score.

    PEFT adds up the scores of the value and of its two vectors, so the vectors score nothing.
    """
    import torch

    values = dict(model.base_model.model.named_parameters())
    model.base_model.rankallocator._element_score = lambda name: (
        values[name].detach().abs() if ".lora_E." in name else torch.zeros_like(values[name])
    )
