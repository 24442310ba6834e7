"""The parameter count and the PEFT configuration that LoRA and its variants share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftscope.methods.fields import adapted_modules, target_modules

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape


def low_rank_parameters(shape: ModelShape, targets: str | tuple[str, ...], rank: int) -> int:
    """Returns the size of all A (rank x in) and B (out x rank) matrices.

    Source: Hu et al. 2021, section 4.2: rank * (in + out) per adapted matrix.
    """
    return sum(rank * (layer.inputs + layer.outputs) for layer in shape.linear_layers(target_modules(targets)))


def decompositions(shape: ModelShape, targets: str | tuple[str, ...]) -> float:
    """Returns the number of 4096 x 4096 matrices that take as long to decompose as all targets together.

    The time of a decomposition grows with the third power of the smaller width.
    """
    narrow = [min(layer.inputs, layer.outputs) for layer in shape.linear_layers(target_modules(targets))]
    return float(sum((width / 4096) ** 3 for width in narrow))


def wrap_with_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    targets: str | tuple[str, ...],
    dropout: float,
    adapter_dtype: str,
    **options: Any,
) -> Any:
    """Returns ``model`` with a LoRA layer on every target. ``options`` are passed to PEFT's ``LoraConfig``."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=adapted_modules(model, targets),
        bias="none",
        **options,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=adapter_dtype == "fp32")
