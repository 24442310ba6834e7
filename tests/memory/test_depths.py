"""The peaks of a deep model that follow from shallow ones are those of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import fast_if
from transformers import LlamaConfig

from peftscope.memory import depths
from peftscope.memory.base import Model
from peftscope.memory.beside import Beside
from peftscope.memory.empty import empty_batch, empty_model
from peftscope.memory.question import ask
from peftscope.memory.simulate import answer_by_simulation, simulate
from peftscope.memory.trace import Trace
from peftscope.words import MIB

TINY = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    **{"vocab_size": 128, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
}
LINEAR, FULL = "linear_attention", "full_attention"
LAYERS = {
    "lfm2": ["conv", "conv", FULL, "conv", "conv", FULL, "conv", FULL, "conv", FULL, "conv", "conv"],
    "qwen3_5_text": [LINEAR, LINEAR, LINEAR, FULL] * 3,
    "granitemoehybrid": [*[LINEAR] * 5, FULL, *[LINEAR] * 6],
    "nemotron_h": [LINEAR, "mlp", LINEAR, FULL, LINEAR, "mlp"] * 4,  # without a period at its end
}
OPTIONS: list[dict[str, Any]] = [{"checkpointing": True, "evaluation": True}]
OPTIONS += [{"method": method} for method in ("full", "ia3", "prompt-tuning")]


@pytest.mark.parametrize(
    ("kind", "options"),
    [fast_if((kind, options) == ("lfm2", {"method": "full"}), kind, options) for kind in LAYERS for options in OPTIONS],
    ids=str,
)
def test_one_more_layer_adds_the_same_at_any_depth(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TINY | {"model_type": kind, "layer_types": LAYERS[kind], "num_hidden_layers": len(LAYERS[kind])}
    question = ask(Model(kind, config, None, "unknown"), {"seq_len": 16, **options})
    found = answer_by_simulation(question)
    note = f"{len(LAYERS[kind])} layers from simulations of"
    alike = options.get("method") != "ia3" or kind == "qwen3_5_text"  # elsewhere IA³ has no adapter in the first layer
    assert (note in found.assumptions[-1]) == alike
    monkeypatch.setattr(depths, "shallow_layers", lambda config: {})
    whole = answer_by_simulation(question)
    assert found.phases == pytest.approx(whole.phases, rel=1e-4, abs=1024)  # two numbers of a step wait for the next
    assert sum(found.components.values()) == found.peak_allocated_bytes
    assert found.peak_reserved_bytes == pytest.approx(whole.peak_reserved_bytes, abs=2 * MIB)


@pytest.mark.parametrize("method", ["none", "full", "qlora", "adalora", "prompt-tuning", "prefix-tuning"])
def test_a_runs_peaks_follow_from_shallow_models(method: str, make_spec: Any) -> None:
    spec, config = make_spec(method=method), LlamaConfig(**TINY, num_hidden_layers=7, attn_implementation="sdpa")
    batch = empty_batch(rows=2, width=16, responses=4, padded=True, packed=False)

    def simulate_at(config: Any) -> tuple[Trace, Trace | None]:
        return simulate(spec, config, [batch] * 2 if spec.method.trains else [], batch)

    found = depths.phases_by_depth(config, simulate_at)
    assert found is not None
    whole = {phase: peak.size for trace in simulate_at(config) if trace for phase, peak in trace.peaks().items()}
    assert found.items() >= whole.items()


def test_layers_with_other_parameters_are_not_alike(make_spec: Any) -> None:
    config = LlamaConfig(**TINY, num_hidden_layers=3)
    model = empty_model(make_spec(method="lora"), config, Beside()).model
    assert depths.layers_are_alike(model, config)
    next(p for name, p in model.named_parameters() if "layers.1." in name and p.requires_grad).requires_grad_(False)
    assert not depths.layers_are_alike(model, config)
