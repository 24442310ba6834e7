"""DoRA with a constant norm, as PEFT has it, and with a gradient through the norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import batches_of, logits_of

from peftscope.spec import memory_key, run_id
from peftscope.training.build import build_model
from peftscope.training.load import load_base
from peftscope.training.step import forward_loss


def gradients_of(spec: Any, moved: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of a batch, and the gradients of its loss, at the start or after B and the magnitudes have moved."""
    model = build_model(load_base(spec), spec).model
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if moved and (".lora_B." in name or "magnitude" in name):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=random) * parameter.data.std().clamp(min=0.1)
    (batch,) = batches_of(spec, 1)
    logits = logits_of(model, batch)
    model.train()
    forward_loss(model, batch, spec).loss.backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{"precision": "fp32"}, {"precision": "amp", "checkpointing": True}], ids=str)
@pytest.mark.parametrize("moved", [False, True], ids=["at the start", "later"])
def test_the_norms_gradient_changes_gradients_and_no_output(
    moved: bool, settings: dict[str, Any], toy: Path, make_spec
) -> None:
    specs = [make_spec(method="dora", norm_gradient=follows, **settings) for follows in (False, True)]
    (wanted, constant), (found, followed) = (gradients_of(spec, moved) for spec in specs)
    assert torch.equal(found, wanted)
    assert constant.keys() == followed.keys()
    for name, gradient in followed.items():
        if ".lora_A." in name and not moved:
            assert not gradient.any(), "while B is zero"
        elif "magnitude" in name:
            torch.testing.assert_close(gradient, constant[name], rtol=1e-3, atol=1e-6)
        else:
            assert (gradient - constant[name]).norm() > 1e-3 * constant[name].norm(), name


@pytest.mark.parametrize(("bias", "dropout"), [(False, 0.0), (True, 0.3)])
@pytest.mark.parametrize("follows", [False, True])
def test_gradients_are_those_of_the_formula(follows: bool, bias: bool, dropout: float, toy: Path, make_spec) -> None:
    """Equation 5 by hand, in fp64: m (W + sBA) x / ‖W + sBA‖, whose norm is a constant or not."""
    spec = make_spec(method="dora", precision="fp32", norm_gradient=follows, dropout=dropout)
    base = load_base(spec)
    torch.manual_seed(3)
    if bias:
        for module in base.model.layers[0].mlp.children():
            if isinstance(module, torch.nn.Linear):
                module.bias = torch.nn.Parameter(torch.randn(module.out_features))
    model = build_model(base, spec).model.double().train()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    magnitude = layer.lora_magnitude_vector["default"].weight
    for parameter in (*factors, magnitude):
        parameter.data += torch.randn_like(parameter)
    inputs = torch.randn(5, layer.in_features, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, layer.out_features, dtype=torch.float64)
    trained = (*factors, magnitude, inputs)

    torch.manual_seed(4)
    output = layer(inputs)
    found = torch.autograd.grad(output, trained, upstream)

    torch.manual_seed(4)
    dropped = torch.nn.functional.dropout(inputs, dropout)
    weight, offset = layer.base_layer.weight, layer.base_layer.bias if bias else 0.0
    updated = weight + 16 / 8 * factors[1] @ factors[0]
    norm = (updated**2).sum(1).sqrt()
    decomposed = (magnitude / (norm if follows else norm.detach()))[:, None] * updated
    # With dropout the adapter sees other inputs than the base.
    expected = inputs @ weight.T + offset + dropped @ (decomposed - weight).T
    torch.testing.assert_close(output, expected)
    for one, other in zip(found, torch.autograd.grad(expected, trained, upstream), strict=True):
        torch.testing.assert_close(one, other)


def test_the_option_renames_no_other_run_and_takes_memory_of_its_own(make_spec) -> None:
    plain, other = make_spec(method="dora"), make_spec(method="dora", norm_gradient=True)
    assert "norm_gradient" not in plain.canonical()["method"]
    assert run_id(plain) == run_id(make_spec(method="dora", norm_gradient=False))
    assert memory_key(plain) != memory_key(other), "the updated weights are kept"
