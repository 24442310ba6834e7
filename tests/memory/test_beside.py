"""Options of the calculator alone: trained modules, gathered logits, shares, the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_regimes import asked, off
from transformers.trainer_pt_utils import EvalLoopContainer

from peftscope.errors import InputError
from peftscope.memory.answer import Answer, answer_by_formula
from peftscope.memory.assumptions import assumptions_of
from peftscope.memory.base import describe_model
from peftscope.memory.question import Question, ask
from peftscope.memory.shares import GATHERED_OUTSIDE, GATHERED_WEIGHTS, MASTER, WHOLE_GRADIENTS, WIDE_GRADIENTS
from peftscope.memory.simulate import answer_by_simulation
from peftscope.memory.tracker import MemoryTracker
from peftscope.models.presets import PRESETS

BOTH = ["lm_head", "embed_tokens"]


def question(gpus: int = 1, **options: Any) -> Question:
    return ask(describe_model("llama-3.2-1b"), options, gpus=gpus)


def bytes_of(answer: Answer, name: str) -> int:
    return sum(term.bytes for term in answer.terms if term.name == name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-3.2-1b", {"modules_to_save": ["lm_head"], "gradient_accumulation": 2}),  # its embedding is tied
        ("llama-2-7b", {"method": "qlora", "modules_to_save": BOTH, "as_trainer": "llama-factory", "seq_len": 256}),
    ],
)
def test_trained_modules_take_what_peft_makes_them_take(name: str, options: dict[str, Any]) -> None:
    assert off(asked(name, 1, **options)) < 0.001


def test_a_trained_module_is_a_copy_beside_the_frozen_one() -> None:
    shape = PRESETS["llama-3.2-1b"].shape
    values = shape.vocab_size * shape.hidden_size
    plain = answer_by_formula(question())
    for modules in (["lm_head"], BOTH):  # tied or not: PEFT copies each module that is named
        saved = answer_by_formula(question(modules_to_save=modules))
        assert saved.phases["load"] - plain.phases["load"] == 2 * values * len(modules)
        assert (saved.trainable_parameters or 0) - (plain.trainable_parameters or 0) == values * len(modules)
        # The copy, its gradient and two states in 16 bits, and temporaries of the step.
        assert saved.phases["optimizer"] - plain.phases["optimizer"] >= 4 * 2 * values * len(modules)


def test_the_trainer_holds_logits_twice() -> None:
    tracker, container, logits = MemoryTracker([]), EvalLoopContainer(), None
    with tracker:
        for _ in range(3):
            logits = torch.empty(2, 8, 640)
            container.add(logits)
    rows = 6 * 8 * 640 * 4  # three batches, with the old sum, the last batch and the new sum alive
    assert tracker.peak_bytes == 2 * rows
    run = {"eval_batch_size": 2, "seq_len": 8, "autocast": True}
    vocabulary = PRESETS["llama-3.2-1b"].shape.vocab_size
    held = answer_by_formula(question(**run, eval_gathers_logits=6000))
    states = held.components["optimizer states"] + held.components["weights"] + held.components["adapters"]
    assert held.binding_phase == "evaluate"
    assert held.peak_allocated_bytes - states == pytest.approx(2 * 6000 * 8 * vocabulary * 4, rel=1e-3)
    moved = answer_by_formula(question(**run, eval_gathers_logits=6000, eval_accumulation_steps=1500))
    assert moved.peak_allocated_bytes - states == pytest.approx(2 * 3000 * 8 * vocabulary * 4, rel=1e-3)
    narrow = answer_by_formula(question(**run | {"autocast": False}, eval_gathers_logits=6000))
    assert narrow.peak_allocated_bytes - states == pytest.approx(2 * 6000 * 8 * vocabulary * 2, rel=1e-3)


def test_fully_shard_leaves_weights_in_integers_whole() -> None:
    one = answer_by_formula(question(method="qlora")).components["quantised weights"]
    parts = {
        storage: answer_by_formula(question(4, method="qlora", sharding="fsdp2", quant_storage=storage))
        for storage in ("uint8", "bf16")
    }
    assert parts["uint8"].components["quantised weights"] == one
    assert one / 4 < parts["bf16"].components["quantised weights"] < 0.35 * one  # constants are whole
    shared = "4-bit weights are taken to be packed into bf16"
    assert [any(shared in line for line in assumptions_of(question(n, method="qlora"))) for n in (1, 4)] == [
        False,
        True,
    ]
    full = answer_by_formula(question(4, method="full", sharding="fsdp2"))
    plain = answer_by_formula(question(4, method="full"))
    shape = PRESETS["llama-3.2-1b"].shape
    assert bytes_of(full, GATHERED_OUTSIDE) >= 2 * shape.vocab_size * shape.hidden_size
    assert full.phases["load"] == plain.phases["load"]
    assert bytes_of(full, GATHERED_WEIGHTS) + bytes_of(full, WHOLE_GRADIENTS) > 0


def test_zero_2_keeps_weights_whole_and_shares_the_rest() -> None:
    shape = PRESETS["llama-3.2-1b"].shape
    one, two, four = (answer_by_formula(question(n, method="full", sharding="zero2", seq_len=64)) for n in (1, 2, 4))
    assert one.components["weights"] == two.components["weights"] == four.components["weights"]
    # In 32 bits on a share each: the trained weights, two moments and, as the optimizer steps, the gradients.
    for cards, found in ((2, two), (4, four)):
        part = 4 * shape.parameters / cards
        assert bytes_of(found, MASTER) == bytes_of(found, WIDE_GRADIENTS) == pytest.approx(part, rel=1e-5)
        assert bytes_of(found, "first and second moments") == pytest.approx(2 * part, rel=1e-4)
    frozen = answer_by_formula(question(4, method="full", embeddings="frozen", sharding="zero2", seq_len=64))
    assert four.components["weights"] == frozen.components["weights"]
    assert bytes_of(frozen, MASTER) == pytest.approx(shape.parameters - shape.embedding_parameters, rel=1e-5)
    wide, narrow = [
        answer_by_formula(question(2, sharding="zero2", reduce_bucket=size)).phases["backward"]
        for size in (500_000_000, 0)
    ]
    assert wide - narrow == 4 * (500_000_000 - shape.hidden_size**2)  # adapters in 32 bits, and so are the buffers
    host = answer_by_formula(question(2, method="full", sharding="zero2", offload="optimizer", seq_len=64))
    assert not {"optimizer states", "gradients"} & {kind for kind, size in host.components.items() if size}
    with pytest.raises(InputError, match="ZeRO-2 keeps all weights"):
        question(2, sharding="zero2", offload="parameters")


def test_flat_parameters_gather_two_layers_beside_the_root() -> None:
    shape = PRESETS["llama-3.2-1b"].shape
    layer = 2 * (shape.linear_parameters // shape.num_layers + 2 * shape.hidden_size)
    full = answer_by_formula(question(2, method="full", sharding="fsdp1", seq_len=2048))
    outside = 2 * (shape.vocab_size + 1) * shape.hidden_size
    assert full.binding_phase == "backward"
    assert (bytes_of(full, GATHERED_WEIGHTS), bytes_of(full, GATHERED_OUTSIDE)) == (2 * layer, outside)
    assert bytes_of(full, WHOLE_GRADIENTS) == 2 * shape.vocab_size * shape.hidden_size
    constants = "constants of block constants"
    whole, shared = (answer_by_formula(question(2, method="qlora", sharding=way)) for way in ("fsdp1", "zero3"))
    assert bytes_of(whole, constants) == 2 * bytes_of(shared, constants) > 0  # they are no parameters


def test_what_only_several_cards_share_is_said_to_be_idle_on_one() -> None:
    idle = "sharding=fsdp2 and quant_storage=bf16: without effect on one card"
    options = {"method": "qlora", "sharding": "fsdp2", "quant_storage": "bf16"}
    said = {n: [line for line in assumptions_of(question(n, **options)) if line.startswith(idle)] for n in (1, 4)}
    assert (len(said[1]), len(said[4])) == (1, 0)
    assert answer_by_formula(question(**options)).phases == answer_by_formula(question(method="qlora")).phases


def test_master_weights_are_of_trained_16_bit_weights() -> None:
    def kept(**options: Any) -> dict[str, int]:
        components = answer_by_formula(question(4, autocast=True, **options)).components
        return {kind: components.get(kind, 0) for kind in ("weights", "adapters", "optimizer states")}

    wide, copied = {"master_weights": "fp32"}, {"modules_to_save": ["embed_tokens"]}
    assert kept() == kept(**wide)  # adapters are in 32 bits already, and the base is frozen
    narrow = kept(adapter_dtype="base")
    both = kept(adapter_dtype="base", **wide)
    assert both["optimizer states"] == pytest.approx(2 * narrow["optimizer states"], rel=0.01)
    shape = PRESETS["llama-3.2-1b"].shape
    more = {kind: kept(**copied, **wide)[kind] - size for kind, size in kept(**copied).items()}
    part = 2 * shape.vocab_size * shape.hidden_size / 4
    assert more == {"weights": 0, "adapters": part, "optimizer states": 2 * part}
    zero3, fsdp = (answer_by_formula(question(4, method="full", sharding=way, **wide)) for way in ("zero3", "fsdp1"))
    # As ZeRO-3 steps, shares of weights and gradients in 16 bits are alive, too.
    assert zero3.phases["optimizer"] - fsdp.phases["optimizer"] == pytest.approx(shape.parameters, rel=1e-3)


def test_what_lies_on_the_host_is_not_on_the_card() -> None:
    one, states, all_of_it = (
        answer_by_formula(question(method="full", offload=where)) for where in ("none", "optimizer", "parameters")
    )
    assert "optimizer states" in one.components
    assert "optimizer states" not in states.components
    assert states.components["weights"] == one.components["weights"]
    assert not {"weights", "gradients", "optimizer states"} & set(all_of_it.components)
    assert one.peak_allocated_bytes > states.peak_allocated_bytes > all_of_it.peak_allocated_bytes


@pytest.mark.parametrize("options", [{"offload": "optimizer"}, {"eval_gathers_logits": 4}], ids=str)
def test_what_only_a_formula_knows_is_not_simulated(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="closed form only"):
        answer_by_simulation(question(**options))
    assert "formula only" in " ".join(answer_by_formula(question(**options)).assumptions)
