"""AdaLoRA: every matrix starts at ``init_r``; unimportant singular triplets are masked until ``target_r`` is the mean.

Source: Zhang et al. 2023, arXiv 2303.10512. The schedule is given as shares of the run, so that a short run prunes too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftscope.files.content import Count
from peftscope.methods.fields import AdapterDtype, Alpha, ClosedForm, Dropout, Method, Rank, Targets, target_modules

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec

IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What PEFT's rank allocator keeps of every trained value."""

Share = Annotated[float, Field(ge=0, lt=1)]


class AdaLoRA(Method):
    """Adaptive budget allocation over P E Q triplets."""

    label: ClassVar[str] = "AdaLoRA"
    closed_form: ClassVar[ClosedForm] = ClosedForm(layer="triplets", orthogonality_term=True, scores=len(IMPORTANCE))
    min_steps: ClassVar[int] = 3
    supports_shards: ClassVar[bool] = False
    rank_field: ClassVar[str] = "init_r"
    memory_assumptions: ClassVar[tuple[str, ...]] = ("before AdaLoRA prunes; masking frees nothing",)

    name: Literal["adalora"] = "adalora"
    init_r: Rank = 12
    target_r: Rank = 8
    alpha: Alpha = 24
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0
    adapter_dtype: AdapterDtype = "fp32"
    warmup_share: Share = 0.1
    final_share: Share = 0.3
    allocate_every: Annotated[Count, Field(description="steps between two allocations")] = 1
    orthogonal_weight: Annotated[float, Field(ge=0, description="gamma of the orthogonality term")] = 0.1

    @model_validator(mode="after")
    def _budget_shrinks(self) -> AdaLoRA:
        if self.target_r >= self.init_r:
            raise ValueError(f"target_r={self.target_r} must be smaller than init_r={self.init_r}: AdaLoRA only prunes")
        if self.warmup_share + self.final_share >= 1:
            raise ValueError("warmup_share + final_share must stay below 1, or no step is left to prune in")
        return self

    @classmethod
    def with_rank(cls, rank: int) -> dict[str, int]:
        """Returns initial and target rank; the initial one is at least 2, for there must be something to prune."""
        return {"init_r": max(2, rank), "target_r": max(1, rank // 2)}

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns init_r * (in + out + 1), summed over the targets: what is trained before the first pruning."""
        return sum(
            self.init_r * (layer.inputs + layer.outputs + 1)
            for layer in shape.linear_layers(target_modules(self.targets))
        )

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's AdaLoRA, the schedule scaled to ``spec.steps``."""
        from peft import AdaLoraConfig, TaskType, get_peft_model

        tfinal = max(1, round(spec.steps * self.final_share))
        config = AdaLoraConfig(
            task_type=TaskType.CAUSAL_LM,
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=target_modules(self.targets),
            tinit=min(round(spec.steps * self.warmup_share), spec.steps - tfinal - 1),
            tfinal=tfinal,
            deltaT=self.allocate_every,
            # PEFT adds the term to the loss of every forward pass, also of each in a gradient accumulation.
            orth_reg_weight=self.orthogonal_weight / spec.gradient_accumulation,
            total_step=spec.steps,
        )
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=self.adapter_dtype == "fp32")
        for name, parameter in wrapped.named_parameters():
            if ".ranknum." in name:
                # PEFT 0.21 makes it trainable when it casts the adapter of a bf16 base to fp32.
                parameter.requires_grad_(False)
        return wrapped

    def after_optimizer_step(self, model: Any, step: int) -> None:
        """Lets PEFT update the importance scores and mask triplets; the HF Trainer does not call this."""
        model.base_model.update_and_allocate(step)

    def training_state(self, model: Any) -> dict[str, Any]:
        """Returns PEFT's importance scores and the ranks that it kept last."""
        allocator = model.base_model.rankallocator
        scores = {name: getattr(allocator, name) for name in IMPORTANCE}
        return {**scores, "rank_pattern": model.peft_config["default"].rank_pattern}

    def load_training_state(self, model: Any, state: dict[str, Any]) -> None:
        """Puts the scores and the ranks back."""
        device = next(model.parameters()).device
        for name in IMPORTANCE:
            setattr(model.base_model.rankallocator, name, {key: score.to(device) for key, score in state[name].items()})
        model.peft_config["default"].rank_pattern = state["rank_pattern"]

    def _final_ranks(self, model: Any) -> dict[str, int]:
        pattern = model.peft_config["default"].rank_pattern or {}
        return {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}

    def final_trainable_parameters(self, model: Any) -> int:
        """Returns the size of the triplets that the last allocation kept."""
        ranks = self._final_ranks(model)
        if not ranks:
            return super().final_trainable_parameters(model)
        modules = dict(model.base_model.model.named_modules())
        return sum(rank * (modules[name].in_features + modules[name].out_features + 1) for name, rank in ranks.items())

    def metrics(self, model: Any) -> dict[str, float]:
        """Returns the sum of the ranks that were kept and the budget that was asked for."""
        ranks = self._final_ranks(model)
        return {"final_rank_sum": sum(ranks.values()), "rank_budget": self.target_r * len(ranks)} if ranks else {}
