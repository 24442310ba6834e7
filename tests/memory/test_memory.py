"""The closed form: it adds up, grows with what is asked, explains itself, and needs no torch."""

from __future__ import annotations

import resource
from fractions import Fraction
from math import ceil, prod
from typing import Any

import pytest
from conftest import python
from hypothesis import given, settings
from hypothesis import strategies as st

from peftscope.hardware.cards import CONTEXT_BYTES, GPUS, Gpu
from peftscope.memory.answer import Answer, Term, answer_by_formula
from peftscope.memory.base import Model, describe_model
from peftscope.memory.formula.terms import DIMENSIONS
from peftscope.memory.question import ask
from peftscope.memory.trace import KINDS, rounded
from peftscope.methods import METHODS
from peftscope.models.shapes import EXPERTS, FAMILIES, Experts, ModelShape

LARGE_STATE = 4096
PAGED_FROM_VALUES = 100_000
"""bitsandbytes: tensors of so many values have 8-bit states, or paged ones."""

TRAINED = [name for name, method in METHODS.items() if method.trains and method.closed_form]


def model_of(shape: ModelShape, name: str = "a model") -> Model:
    return Model(name, shape.to_config(), shape)


def small_shape(**sizes: Any) -> ModelShape:
    values = {"family": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_layers": 2}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "tied_embeddings": True}
    return ModelShape(**{**values, **heads, **sizes})


def answer(model: Model | str, gpus: int = 1, **options: Any) -> Answer:
    known = describe_model(model) if isinstance(model, str) else model
    return answer_by_formula(ask(known, options, gpus=gpus))


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads, sixteens = draw(st.integers(1, 2)), st.integers(2, 12).map(lambda n: 16 * n)
    family = draw(st.sampled_from(FAMILIES))
    experts = Experts(number=draw(st.integers(2, 8)), per_token=draw(st.integers(1, 2)), size=draw(sixteens))
    return ModelShape(
        family=family,
        experts=experts if family in EXPERTS else None,
        vocab_size=draw(st.integers(10, 3000)),
        hidden_size=draw(sixteens),
        intermediate_size=draw(sixteens),
        num_layers=draw(st.integers(1, 3)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 32])),
        tied_embeddings=draw(st.booleans()),
    )


@st.composite
def runs(draw: st.DrawFn, method: str, family: str) -> dict[str, Any]:
    """Options that fit a method and a family; every rank is at most half of the narrowest width of ``shapes``."""
    description = METHODS[method]
    fields = description.model_fields
    four_bit = description().quantization() is not None
    options: dict[str, Any] = {
        "method": method,
        "batch_size": draw(st.integers(1, 4)),
        "seq_len": draw(st.integers(2, 100)),
        "precision": "bf16" if four_bit else draw(st.sampled_from(["bf16", "fp32", "amp"])),
        "optimizer": draw(st.sampled_from(["adamw", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])),
        "loss_path": draw(st.sampled_from(["hf", "response_only"])),
        "gradient_accumulation": draw(st.integers(1, 2)),
        "packing": description.supports_packing and draw(st.booleans()),
        "checkpointing": description.supports_checkpointing and draw(st.booleans()),
    }
    if options["optimizer"] in ("adamw", "sgd"):
        options["optimizer_implementation"] = draw(st.sampled_from(["foreach", "fused", "single"]))
    kernels = ["eager"] if family == "gemma2" else ["sdpa", "eager"]
    if options["precision"] != "fp32":
        kernels.append("flash_attention_2")
    options["attention"] = draw(st.sampled_from(kernels))
    choices = {
        "rank": st.integers(1, 8),
        "virtual_tokens": st.integers(1, 20),
        "targets": st.sampled_from(["minimal", "attention", "mlp", "all-linear"]),
        "dropout": st.sampled_from([0.0, 0.1]),
        "adapter_dtype": st.sampled_from(["fp32", "base"]),
        "norm_gradient": st.booleans(),
        "double_quant": st.booleans(),
        "kbit_preparation": st.booleans(),
    }
    options |= {name: draw(choice) for name, choice in choices.items() if name in fields}
    if family in EXPERTS and options.get("targets") == "mlp":  # which names no layers there
        options["targets"] = "attention"
    if "init_r" in fields:
        options["init_r"] = draw(st.integers(2, 8))
        options["target_r"] = 1
    return options


@pytest.mark.parametrize("method", TRAINED)
def test_more_never_takes_less(method: str) -> None:
    fields = METHODS[method].model_fields
    of_method = [name for name in ("rank", "init_r", "virtual_tokens") if name in fields]

    @given(shapes(), st.sampled_from(["batch_size", "seq_len", "num_layers", *of_method]), st.integers(1, 8), st.data())
    @settings(max_examples=20, deadline=None, database=None)
    def check(shape: ModelShape, what: str, more: int, data: st.DataObject) -> None:
        options = data.draw(runs(method, shape.family))
        if what in of_method or (what == "num_layers" and method == "prefix-tuning"):
            # A trained tensor grows. Where it reaches the size for 8 bits, or for paging, its states take less:
            # test_states_shrink_where_they_become_8_bit and test_paged_states_count_on_the_device_alone.
            options["optimizer"] = "sgd" if options["optimizer"] == "sgd" else "adamw"
        before = answer_by_formula(ask(model_of(shape), options))
        if what == "num_layers":
            shape = shape.model_copy(update={"num_layers": shape.num_layers + more})
        else:
            options[what] += more
        after = answer_by_formula(ask(model_of(shape), options))
        assert after.peak_allocated_bytes >= before.peak_allocated_bytes
        assert list(after.phases) == list(before.phases)
        for phase, size in before.phases.items():
            assert after.phases[phase] >= size, phase

    check()


def test_states_shrink_where_they_become_8_bit() -> None:
    model = model_of(small_shape(hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64))
    rank = LARGE_STATE // 512
    below, at = (
        answer(model, rank=r, targets=["q_proj"], optimizer="adamw_8bit").components["optimizer states"]
        for r in (rank - 1, rank)
    )
    tensors = 2 * 2  # A and B in two layers
    assert below == tensors * 2 * rounded(4 * 512 * (rank - 1))
    assert at == tensors * (2 * LARGE_STATE + 2 * rounded(4 * LARGE_STATE // 256))


def test_paged_states_count_on_the_device_alone() -> None:
    model = model_of(small_shape(hidden_size=1000, num_heads=10, num_kv_heads=10, head_dim=100))
    rank, run = PAGED_FROM_VALUES // 1000, {"targets": ["q_proj"], "optimizer": "paged_adamw"}
    below, at = (answer(model, rank=r, **run) for r in (rank - 1, rank))
    assert below.components["optimizer states"] == 2 * 2 * 2 * rounded(4 * 1000 * (rank - 1))
    assert below.peak_device_bytes == below.peak_reserved_bytes + CONTEXT_BYTES
    assert "optimizer states" not in at.components
    assert at.phases["optimizer"] < below.phases["optimizer"]
    states = 2 * 2 * 2 * rounded(4 * 1000 * rank)
    assert at.peak_device_bytes == at.peak_reserved_bytes + CONTEXT_BYTES + states


def children_fit(node: dict[str, Any]) -> bool:
    """Whether no level of a tree of modules is smaller than what lies in it."""
    inside = node["modules"].values()
    return node["bytes"] >= sum(child["bytes"] for child in inside) and all(map(children_fit, inside))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.closed_form])
def test_everything_adds_up(method: str) -> None:
    @given(shapes(), st.integers(1, 4), st.sampled_from([None, *GPUS.values()]), st.integers(1, 8), st.data())
    @settings(max_examples=12, deadline=None, database=None)
    def check(shape: ModelShape, gpus: int, gpu: Gpu | None, eval_batch: int, data: st.DataObject) -> None:
        options = data.draw(runs(method, shape.family)) | {"eval_batch_size": eval_batch}
        found = answer_by_formula(ask(model_of(shape), options, gpu=gpu, gpus=gpus))
        peak = found.peak_allocated_bytes
        assert peak == found.phases[found.binding_phase] == max(found.phases.values()) > 0
        assert sum(found.components.values()) == peak
        assert list(found.components) == [kind for kind in KINDS if kind in found.components]
        assert sum(node["bytes"] for node in found.modules.values()) == peak
        assert all(map(children_fit, found.modules.values()))
        for kind, size in found.components.items():
            assert sum(term.bytes for term in found.terms if term.kind == kind) == size, kind
        assert sum(term.bytes for term in found.terms) == peak
        assert found.peak_reserved_bytes >= peak
        context = gpu.context_bytes if gpu and gpu.context_bytes else CONTEXT_BYTES
        paged = found.peak_device_bytes - found.peak_reserved_bytes - context
        assert paged >= 0
        assert paged == 0 or options["optimizer"].startswith("paged")
        trains = METHODS[method].trains
        training = {"forward", "backward", "optimizer"} if trains else set()
        assert set(found.phases) == {"load", "evaluate"} | training
        assert (found.trainable_parameters > 0) == trains

    check()


def test_a_decomposition_on_loading_counts_as_reserved() -> None:
    shape = small_shape(hidden_size=1024, intermediate_size=4096, num_heads=16, num_kv_heads=16, head_dim=64)
    found = answer(model_of(shape), method="pissa", seq_len=1)
    assert found.binding_phase == "load"
    assert found.peak_reserved_bytes >= found.peak_allocated_bytes
    largest, narrow, wide = 1024 * 4096, 1024, 4096
    assert found.components["temporaries"] == 4 * (3 * largest + narrow * (narrow + wide))


# Without torch, and at once.


@pytest.mark.slow
@pytest.mark.alone
def test_an_answer_takes_a_fraction_of_a_second(slowness: float) -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python("-m", "peftscope", "memory", "llama-2-7b", check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.4 * slowness  # alone on its machine 0.22


# Explanations.

WITHOUT_FORMULA = {
    "cuBLAS workspace",
    "largest layer before it is quantised",
    "singular value decomposition of the largest target",
    "LoftQ's initialisation of the largest target",
    "weights gathered from other cards",
}


def letters_of(term: Term) -> list[str]:
    return term.formula.split("·")[1:]


def check_terms(found: Answer) -> None:
    for term in found.terms:
        assert term.source, term
        assert term.count >= 1
        if not term.formula:
            assert term.name in WITHOUT_FORMULA
            continue
        assert all(letter in DIMENSIONS or letter.isdigit() for letter in letters_of(term)), term
        width = Fraction(term.formula.split("·")[0])
        one = width * prod(found.dimensions[letter] for letter in letters_of(term))
        assert term.bytes == term.count * rounded(ceil(one)), term


@pytest.mark.parametrize("method", TRAINED)
def test_every_term_has_a_formula_that_gives_its_bytes(method: str) -> None:
    @given(shapes(), st.data())
    @settings(max_examples=12, deadline=None, database=None)
    def check(shape: ModelShape, data: st.DataObject) -> None:
        found = answer_by_formula(ask(model_of(shape), data.draw(runs(method, shape.family))))
        if found.binding_phase != "evaluate":
            check_terms(found)

    check()


@pytest.mark.parametrize(
    ("method", "options"),
    [("none", {}), ("lora", {"eval_batch_size": 64})],
    ids=["logits of responses", "another batch"],
)
def test_formulas_hold_where_the_evaluation_binds(method: str, options: dict[str, Any]) -> None:
    found = answer("smollm2-135m", method=method, **options)
    assert found.binding_phase == "evaluate"
    check_terms(found)
