"""Optimizers that only the formula knows: their states are those of their code, and their steps take what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from peftscope.errors import InputError
from peftscope.memory.answer import Answer, answer_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.formula.states import OTHER_OPTIMIZERS, states_of
from peftscope.memory.question import ask
from peftscope.models.presets import PRESETS

SHAPE = PRESETS["llama-3.2-1b"].shape
EMBEDDING = SHAPE.vocab_size * SHAPE.hidden_size
NORMS = SHAPE.parameters - EMBEDDING - SHAPE.linear_parameters
RANK = 128


def answer(**options: Any) -> Answer:
    return answer_by_formula(ask(describe_model("llama-3.2-1b"), {"method": "full", "checkpointing": True, **options}))


def of_layers(per_layer: Any) -> int:
    return SHAPE.num_layers * sum(per_layer(layer.inputs, layer.outputs) for layer in SHAPE.block)


STATES: dict[str, float] = {
    "adafactor": 4
    * (of_layers(lambda a, b: a + b) + SHAPE.vocab_size + SHAPE.hidden_size + (2 * SHAPE.num_layers + 1) * 2048),
    "adamw_torch_4bit": 2 * (0.5 + 4 / 128) * (SHAPE.parameters - NORMS) + 4 * NORMS,
    "lion": 4 * SHAPE.parameters,
    "lion_8bit": (1 + 4 / 256) * (SHAPE.parameters - NORMS) + 4 * NORMS,
    "muon": 2 * SHAPE.linear_parameters + 4 * (EMBEDDING + NORMS),
    "galore": 2 * of_layers(lambda a, b: RANK * (2 * max(a, b) + min(a, b))) + 4 * (EMBEDDING + NORMS),
    "apollo": 2 * of_layers(lambda a, b: RANK * 2 * max(a, b)) + 4 * (EMBEDDING + NORMS),
}
"""Bytes of the states of Llama-3.2-1B in bf16."""


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_states_are_those_of_the_code(name: str) -> None:
    found = answer(optimizer=name)
    assert found.components["optimizer states"] == pytest.approx(STATES[name], rel=2e-3)
    assert any(f"optimizer={name} (formula only: " in line for line in found.assumptions)
    assert found.agreement.startswith("no peak of such a run was measured on a card")


@pytest.mark.parametrize(
    ("name", "make", "shape"),
    [*(("adafactor", Adafactor, shape) for shape in ((6, 10), (10,), (3, 6, 10))), ("muon", torch.optim.Muon, (6, 10))],
)
def test_an_optimizer_keeps_what_its_code_keeps(name: str, make: Any, shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = make([weight])
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.ndim]
    dims = tuple("eqh"[-len(shape) :])
    sizes = dict(zip(dims, shape, strict=True))
    states, _ = states_of(name, dims, 2, sizes, layer=True)
    assert [(value.numel(), value.element_size()) for value in kept] == [
        (int(torch.tensor([sizes[dim] for dim in names]).prod()), width) for names, width in states
    ]


def test_an_optimizer_in_the_backward_pass_keeps_no_gradients() -> None:
    apart, inside = answer(optimizer="adamw_8bit"), answer(optimizer="adamw_8bit", optimizer_in_bwd=True)
    gradients = 2 * SHAPE.parameters
    assert apart.phases["optimizer"] - inside.phases["optimizer"] == pytest.approx(gradients, rel=0.01)
    assert inside.components.get("gradients", 0) < 0.3 * gradients


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lora", "optimizer": "galore"}, "galore projects the gradients of whole matrices"),
        ({"optimizer_in_bwd": True, "gradient_accumulation": 2}, "keeps no gradients"),
        ({"optimizer": "sophia"}, "optimizer"),
    ],
)
def test_what_is_not_modelled_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        answer(**options)
