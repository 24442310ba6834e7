"""PEFT's LoRA layers: names, shapes, defaults, initial values, scale and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from scipy import stats
from torch.overrides import TorchFunctionMode

from peftscope.analysis.stats import CONFIDENCE
from peftscope.claims.lora_subjects import factor_of, lora_layer, lora_layers, lora_model, randomise_b, update_of
from peftscope.claims.measurement import Measurement, mean_of
from peftscope.claims.subjects import (
    BLOCK_LINEAR,
    TINY,
    fetched_model,
    random_model,
    text_windows,
    tiny_llama,
    token_ids,
    window_losses,
)

SPREADS = (0.01, 0.1, 0.577, 1.0)
"""Standard deviations of a random B × √rank; torch draws a linear layer, and PEFT an A, with 0.577."""


def factor_shape(factor: str) -> Measurement:
    """Returns the shape of PEFT's factor A or B as text, in torch's layout: outputs × inputs of a linear layer."""
    layer = lora_layer(inputs=48, outputs=80, rank=8)
    words = {48: "n", 80: "m", 8: "r"}
    weights = {letter: factor_of(layer, letter) for letter in "AB"} | {"W": layer.get_base_layer().weight}
    shapes = {name: " × ".join(words[size] for size in weight.shape) for name, weight in weights.items()}
    return Measurement(shapes[factor], evidence=shapes, model="torch.nn.Linear from n to m values, r = 8")


def formula_error(rank: int, alpha: float, with_scale: bool) -> Measurement:
    """Returns how far PEFT's output is from W₀x + BAx, or from W₀x + (alpha/rank)·BAx, relative to the largest output.

    A and B are random.
    """
    layer = lora_layer(inputs=256, outputs=192, rank=rank, alpha=alpha)
    randomise_b(layer)
    x = torch.randn(32, 256)
    weight, factor = layer.get_base_layer().weight, alpha / rank if with_scale else 1.0
    expected = x @ weight.T + factor * (x @ factor_of(layer, "A").T) @ factor_of(layer, "B").T
    output = layer(x)
    error = (output - expected).abs().max() / output.abs().max()
    return Measurement(error.item(), evidence={"alpha/rank": alpha / rank}, model="a linear layer, 256 × 192, fp32")


def scale(rank: int, alpha: float, rank_stabilised: bool = False) -> Measurement:
    """Returns the factor before BAx in PEFT's output, by least squares on outputs of a layer with random A and B."""
    layer = lora_layer(inputs=256, outputs=192, rank=rank, alpha=alpha, use_rslora=rank_stabilised)
    randomise_b(layer)
    x = torch.randn(32, 256)
    product = (x @ factor_of(layer, "A").T) @ factor_of(layer, "B").T
    factor = ((layer(x) - layer.get_base_layer()(x)) * product).sum() / product.square().sum()
    return Measurement(factor.item(), model="a linear layer, 256 × 192, fp32")


def lora_option(name: str) -> Measurement:
    """Returns whether PEFT's ``LoraConfig`` has an option of this name."""
    config = LoraConfig()
    return Measurement(hasattr(config, name), evidence={"default": getattr(config, name, "none")})


def lora_default(name: str) -> Measurement:
    """Returns the default of an option of PEFT's ``LoraConfig``."""
    return Measurement(getattr(LoraConfig(), name))


def targets_found(family: str, names: Sequence[str]) -> Measurement:
    """Returns how many of these module names one block of a model family has, on ``meta``."""
    with torch.device("meta"):
        model = random_model({"model_type": family, "num_hidden_layers": 1})
    present = {name.rsplit(".", 1)[-1]: type(module).__name__ for name, module in model.named_modules()}
    linear = {name for name, kind in present.items() if kind in ("Linear", "Conv1D", "FalconLinear")}
    evidence = {"its linear layers": ", ".join(sorted(linear))}
    return Measurement(len(linear & set(names)), n=len(names), evidence=evidence, model=family)


def start_shift(variant: str) -> Measurement:
    """Returns how far a wrapped model's logits are from its base's before training, relative to the largest logit.

    Args:
        variant: lora, dora, adalora, swapped (A = 0, B random), or random (PEFT's start with A and B random).
    """
    base = tiny_llama()
    ids = token_ids(base)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = _variant(base, variant)
        after = model(input_ids=ids).logits
        update = max(update_of(layer).abs().max().item() for layer in lora_layers(model).values())
    shift = (after - before).abs().max() / before.abs().max()
    return Measurement(shift.item(), evidence={"largest |ΔW|": update}, model=TINY)


def distance_from_normal(init: bool | str, rank: int, inputs: int) -> Measurement:
    """Returns the Kolmogorov–Smirnov distance of a fresh A (rank × inputs) to the normal one of the same spread.

    The bounds are those of a sample's distance to its distribution (Dvoretzky, Kiefer and Wolfowitz; Massart 1990).
    """
    layers = {r: lora_layer(inputs, 16, rank=r, init_lora_weights=init) for r in (1, rank, 64)}
    values = {r: factor_of(layer, "A").detach().flatten() for r, layer in layers.items()}
    sample, spread = values[rank].numpy(), values[rank].std().item()
    bound = math.sqrt(3) * spread
    distance = float(stats.kstest(sample, "norm", args=(0, spread)).statistic)
    uniform = stats.kstest(sample, "uniform", args=(-bound, 2 * bound))
    reach = math.sqrt(math.log(2 / (1 - CONFIDENCE)) / (2 * sample.size))
    return Measurement(
        distance,
        low=max(0.0, distance - reach),
        high=distance + reach,
        n=sample.size,
        evidence={
            "distance to the uniform distribution of this spread": float(uniform.statistic),
            "spread × √inputs": spread * math.sqrt(inputs),
            "spread × rank": spread * rank,
            "spread at rank 1 over spread at rank 64": (values[1].std() / values[64].std()).item(),
        },
        model=f"A of {rank} × {inputs}",
    )


def loss_jump(model: str, spread: float) -> Measurement:
    """Returns the rise of the loss in nats per token before training if B is random instead of zero, paired by window.

    Args:
        model: A fetched base model.
        spread: The standard deviation of B in units of 1/√rank; one of ``SPREADS``.
    """
    start, rises = _loss_jumps(model)
    return mean_of(
        rises[spread],
        samples=rises[spread],
        evidence={"loss with B = 0": start},
        curves={"rise": {width: sum(each) / len(each) for width, each in rises.items()}},
        axes=("spread of B × √rank", "rise of the loss, nats per token"),
        model=model,
    )


@cache
def _loss_jumps(model: str) -> tuple[float, dict[float, tuple[float, ...]]]:
    """Returns the loss with B = 0, and by the spread of B the rise of every window's loss, at rank 8."""
    wrapped = lora_model(fetched_model(model, "AutoModelForCausalLM"), rank=8)
    windows = text_windows(model, 8)
    start, rises = window_losses(wrapped, windows), {}
    for spread in SPREADS:
        for index, layer in enumerate(lora_layers(wrapped).values()):
            randomise_b(layer, spread=spread / 8**0.5, seed=index)
        rises[spread] = tuple((window_losses(wrapped, windows) - start).tolist())
    return float(start.mean()), rises


def zeros_in_factors(probability: float) -> Measurement:
    """Returns the share of zeros in A and B as they enter their products, with LoRA dropout in training mode.

    This watches every call of ``torch.nn.functional.linear`` inside the layer and counts zeros in both operands.
    """
    layer = lora_layer(inputs=256, outputs=192, rank=16, lora_dropout=probability).train()
    randomise_b(layer)
    with _LinearWatcher() as watcher:
        layer(torch.randn(64, 256))
    names = {(192, 256): "W₀", (16, 256): "A", (192, 16): "B"}
    zeros = {names[shape]: shares for shape, shares in watcher.zeros.items()}
    return Measurement(
        (zeros["A"]["weight"] + zeros["B"]["weight"]) / 2,
        evidence={f"in the input of {name}": shares["input"] for name, shares in zeros.items()},
        model="a linear layer, 256 × 192, rank 16",
    )


def _variant(base: Any, name: str) -> Any:
    if name == "adalora":
        config = AdaLoraConfig(task_type="CAUSAL_LM", init_r=8, target_modules=list(BLOCK_LINEAR), total_step=10)
        return get_peft_model(base, config).eval()
    options: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "random": {"init_lora_weights": False}}
    model = lora_model(base, **options.get(name, {}))
    if name == "swapped":
        for layer in lora_layers(model).values():
            randomise_b(layer)
            with torch.no_grad():
                factor_of(layer, "A").zero_()
    return model.eval()


class _LinearWatcher(TorchFunctionMode):
    """A context that counts zeros in both operands of every linear product, by the weight's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: dict[tuple[int, ...], dict[str, float]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            shares = [(operand == 0).float().mean().item() for operand in args[:2]]
            self.zeros[tuple(args[1].shape)] = {"input": shares[0], "weight": shares[1]}
        return function(*args, **(kwargs or {}))
