"""The memory calculator: presets, the allocator's books, and a closed form that adds up, grows and explains itself."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftscope.cli import main
from peftscope.errors import InputError
from peftscope.memory.allocator import CachingAllocator, reserved_bytes
from peftscope.memory.answer import Answer, Term, answer_by_formula, peaks_by_formula
from peftscope.memory.fit import ADVICE, Fit, fit_methods
from peftscope.memory.formula import DIMENSIONS
from peftscope.memory.hardware import CONTEXT_BYTES, GIB, GPUS, MIB, Gpu, find_gpu
from peftscope.memory.presets import PRESETS
from peftscope.memory.question import Model, ask, find_model
from peftscope.memory.shapes import FAMILIES, ModelShape
from peftscope.memory.trace import KINDS, Block, Peak, Trace, by_kind, rounded
from peftscope.methods import METHODS

LARGE_STATE = 4096
PAGED_FROM_VALUES = 100_000
"""bitsandbytes: tensors of so many values have 8-bit states, or paged ones."""

TRAINED = [name for name, method in METHODS.items() if method.trains]


def model_of(shape: ModelShape, name: str = "a model") -> Model:
    return Model(name, shape.to_config(), shape)


def small_shape(**sizes: Any) -> ModelShape:
    values = {"family": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_layers": 2}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "tied_embeddings": True}
    return ModelShape(**{**values, **heads, **sizes})


def answer(model: Model | str, gpus: int = 1, **options: Any) -> Answer:
    known = find_model(model) if isinstance(model, str) else model
    return answer_by_formula(ask(known, options, gpus=gpus))


# Presets.

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-65b": 65_285_660_672,
    "llama-33b": 32_528_943_616,
    "codellama-34b": 33_743_970_304,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "phi-3-mini": 3_821_079_552,
    "gemma-2-2b": 2_614_341_888,
    "smollm2-135m": 134_515_008,
}


def test_every_preset_has_a_published_count() -> None:
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items(), ids=PUBLISHED)
def test_a_preset_has_the_published_parameters(name: str, parameters: int) -> None:
    assert PRESETS[name][1].parameters == parameters
    assert answer(name).parameters == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_own_config(name: str) -> None:
    shape = PRESETS[name][1]
    assert ModelShape.from_config(json.loads(json.dumps(shape.to_config()))) == shape


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_its_hub_id_in_any_case(name: str) -> None:
    hub_id, shape = PRESETS[name]
    assert find_model(hub_id).shape == find_model(hub_id.lower()).shape == find_model(name.upper()).shape == shape


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_transformers_builds_a_preset_with_as_many_parameters(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = PRESETS[name][1]
    config = AutoConfig.for_model(**shape.to_config())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


# The allocator.


def test_up_to_one_mib_comes_from_segments_of_two() -> None:
    allocator = CachingAllocator()
    assert [allocator.allocate(512), allocator.allocate(MIB)] == [0, 512]
    assert allocator.reserved_bytes == 2 * MIB
    assert allocator.allocate(MIB) == 2 * MIB  # 512 bytes short of room in the first
    assert allocator.reserved_bytes == 4 * MIB


def test_the_rest_of_a_small_block_stays_free_down_to_512_bytes() -> None:
    allocator = CachingAllocator()
    allocator.allocate(MIB)
    allocator.allocate(MIB - 512)
    assert allocator.allocate(512) == 2 * MIB - 512
    assert allocator.reserved_bytes == 2 * MIB


def test_more_than_one_mib_comes_from_segments_of_twenty() -> None:
    allocator = CachingAllocator()
    assert [allocator.allocate(MIB + 512), allocator.allocate(10 * MIB - 512)] == [0, MIB + 512]
    assert allocator.reserved_bytes == 20 * MIB


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (11 * MIB, 12 * MIB),
        (12 * MIB, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_ten_mib_and_more_get_segments_of_their_own_in_steps_of_two(size: int, segment: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved_bytes == segment


def test_the_rest_of_a_large_block_stays_free_above_one_mib() -> None:
    allocator = CachingAllocator()
    allocator.allocate(10 * MIB + 512)
    assert allocator.allocate(MIB + 512) == 10 * MIB + 512
    assert allocator.reserved_bytes == 12 * MIB


def test_one_mib_that_is_left_goes_with_the_block() -> None:
    allocator = CachingAllocator()
    addresses = [allocator.allocate(size * MIB) for size in (5, 5, 10)]
    allocator.free(addresses[0])
    assert allocator.allocate(4 * MIB) == 0  # and keeps all five
    allocator.free(addresses[1])
    assert allocator.allocate(6 * MIB) == 20 * MIB
    assert allocator.reserved_bytes == 40 * MIB


def test_small_and_large_requests_share_no_segment() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(2 * MIB))
    allocator.free(allocator.allocate(512))
    assert allocator.reserved_bytes == 22 * MIB
    assert [allocator.allocate(MIB), allocator.allocate(MIB + 512)] == [20 * MIB, 0]


def test_a_request_takes_the_smallest_block_that_is_large_enough() -> None:
    allocator = CachingAllocator()
    addresses = [allocator.allocate(size * MIB) for size in (4, 2, 3, 2)]  # 9 MiB are left
    assert addresses == [0, 4 * MIB, 6 * MIB, 9 * MIB]
    allocator.free(addresses[0])
    allocator.free(addresses[2])
    assert allocator.allocate(3 * MIB) == 6 * MIB
    assert allocator.allocate(2 * MIB) == 0
    assert allocator.allocate(2 * MIB) == 2 * MIB
    assert allocator.allocate(9 * MIB) == 11 * MIB
    assert allocator.reserved_bytes == 20 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbours_become_one_block(order: tuple[int, ...]) -> None:
    allocator = CachingAllocator()
    addresses = [allocator.allocate(5 * MIB) for _ in range(4)]
    for index in order:
        allocator.free(addresses[index])
    assert allocator.allocate(15 * MIB) == 0
    assert allocator.reserved_bytes == 20 * MIB


def test_neighbouring_segments_stay_apart() -> None:
    allocator = CachingAllocator()
    for address in [allocator.allocate(10 * MIB), allocator.allocate(10 * MIB)]:
        allocator.free(address)
    assert allocator.allocate(20 * MIB) == 20 * MIB
    assert allocator.reserved_bytes == 40 * MIB


def test_best_fit_may_break_up_what_a_later_request_needs() -> None:
    allocator = CachingAllocator()

    def addresses_of_three() -> list[int]:
        return [allocator.allocate(size * MIB) for size in (3, 18, 17)]

    for address in addresses_of_three():
        allocator.free(address)
    assert allocator.reserved_bytes == 38 * MIB
    assert addresses_of_three() == [20 * MIB, 0, 38 * MIB]  # the first one took from the segment of 18
    assert allocator.reserved_bytes == 56 * MIB


def test_segments_stay_and_serve_what_comes_next() -> None:
    trace = Trace()
    for size in (30 * MIB, 20 * MIB, 512):
        trace.pass_by(Block(size))
    assert reserved_bytes(trace) == 32 * MIB


def test_what_comes_after_the_last_phase_reserves_nothing() -> None:
    trace = Trace()
    trace.pass_by(Block(30 * MIB))
    trace.begin("")
    trace.pass_by(Block(50 * MIB))
    assert reserved_bytes(trace) == 30 * MIB


def test_paged_and_empty_blocks_are_not_the_allocators() -> None:
    trace = Trace()
    for block in (Block(100 * MIB, paged=True), Block(0)):
        trace.pass_by(block)
    assert reserved_bytes(trace) == 0
    trace.born(Block(512))
    assert reserved_bytes(trace) == 2 * MIB


SMALL = st.integers(1, MIB)
MIDDLE = st.integers(MIB + 1, 10 * MIB - 512)
LARGE = st.integers(10 * MIB - 511, 50 * MIB)


def scripts(*sizes: st.SearchStrategy[int]) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Requests, and blocks to free: the nth of those that live."""
    request = st.tuples(st.just("allocate"), st.one_of(*sizes))
    return st.lists(st.one_of(request, request, st.tuples(st.just("free"), st.integers(0, 20))), max_size=50)


def follow(script: list[tuple[str, int]], allocator: CachingAllocator) -> None:
    """Plays a script, looks at the books after every line, and frees what is left."""
    live: dict[int, int] = {}
    most = 0
    for what, number in script:
        if what == "free":
            if live:
                address = list(live)[number % len(live)]
                allocator.free(address)
                del live[address]
            continue
        size = rounded(number)
        address = allocator.allocate(size)
        assert all(address + size <= other or other + taken <= address for other, taken in live.items())
        assert 0 <= address <= allocator.reserved_bytes - size
        live[address] = size
        most = max(most, sum(live.values()))
        assert allocator.reserved_bytes >= most
    for address in live:
        allocator.free(address)


@given(scripts(SMALL, MIDDLE, LARGE))
@settings(max_examples=50, deadline=None, database=None)
def test_blocks_never_overlap_and_segments_hold_them_all(script: list[tuple[str, int]]) -> None:
    allocator = CachingAllocator()
    follow(script, allocator)
    reserved = allocator.reserved_bytes
    for what, number in script:  # whatever fitted once fits into what came back
        if what == "allocate":
            allocator.free(allocator.allocate(rounded(number)))
    assert allocator.reserved_bytes == reserved


@given(scripts(SMALL, MIDDLE))
@settings(max_examples=50, deadline=None, database=None)
def test_the_same_requests_again_need_no_new_segment(script: list[tuple[str, int]]) -> None:
    # With segments of their own that is not so: test_best_fit_may_break_up_what_a_later_request_needs.
    allocator = CachingAllocator()
    follow(script, allocator)
    reserved = allocator.reserved_bytes
    follow(script, allocator)
    assert allocator.reserved_bytes == reserved


# Cards.


@pytest.mark.parametrize("name", GPUS)
def test_a_card_is_found_under_its_own_name(name: str) -> None:
    assert find_gpu(name) == find_gpu(name.upper()) == find_gpu(f"NVIDIA {name}") == GPUS[name]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("rtx_3090", "rtx3090"),
        ("Tesla T4", "t4"),
        ("A100 80GB", "a100-80gb"),
        ("v100 32gb", "v100-32gb"),
        *((card.name, name) for name, card in GPUS.items() if not card.name.endswith((" 40 GB", " 16 GB", "A6000"))),
    ],
)
def test_a_card_is_found_as_people_write_it(text: str, name: str) -> None:
    if name == "h100":
        text = text.removesuffix(" 80 GB")
    assert find_gpu(text) == GPUS[name]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "rtx4090"),
        ("RTX A6000", "a6000"),
        ("A100 40 GB", "a100"),
        ("V100 16 GB", "v100"),
        ("H100 80 GB", "h100"),
    ],
)
def test_a_card_is_found_by_its_number_or_full_name(text: str, name: str) -> None:
    assert find_gpu(text) == GPUS[name]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("24", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("24564MiB", 24564 * MIB),
        ("500 MB", 500 * 10**6),
        ("1.5GiB", 3 * GIB // 2),
    ],
)
def test_a_card_is_known_by_its_memory(text: str, size: int) -> None:
    card = find_gpu(text)
    assert (card.memory_bytes, card.context_bytes) == (size, None)
    assert text in card.name


@pytest.mark.parametrize("text", ["rtx4091", "nothing", "0", "0GiB", "-5GiB", "24GiBs", "24kb", ""])
def test_an_unknown_card_has_a_remedy(text: str) -> None:
    with pytest.raises(InputError, match=r"give its memory, as in 24GiB") as caught:
        find_gpu(text)
    (problem,) = caught.value.problems
    assert problem.where == "gpu"
    assert repr(text) in problem.message


# Traces.


def test_a_peak_is_the_most_that_lives_at_once_in_a_phase() -> None:
    trace = Trace()
    weights = trace.born(Block(1024, "weights"))
    trace.begin("forward")
    saved = trace.born(Block(512, "saved activations"))
    trace.pass_by(Block(256, "temporaries"))
    trace.begin("backward")
    gradient = trace.born(Block(2048, "gradients"))
    trace.events.append(~saved)
    trace.pass_by(Block(512, "temporaries"))
    trace.begin("optimizer")
    trace.events.append(~gradient)
    trace.begin("")
    trace.born(Block(10**6))
    assert trace.peaks() == {
        "forward": Peak(1024 + 512 + 256, 3),
        "backward": Peak(1024 + 512 + 2048, 5),
        "optimizer": Peak(1024 + 2048, 8),
    }
    assert trace.alive(5) == [trace.blocks[weights], trace.blocks[saved], trace.blocks[gradient]]
    assert by_kind(trace.alive(5)) == {"weights": 1024, "gradients": 2048, "saved activations": 512}
    assert [block.size for block in trace.alive(len(trace.events))] == [1024, 10**6]
    assert trace.alive(0) == []


def test_a_phase_that_comes_twice_has_its_larger_peak() -> None:
    trace = Trace()
    for size in (512, 2048, 1024):
        trace.begin("forward")
        trace.pass_by(Block(size))
    assert trace.peaks() == {"forward": Peak(2048, 3)}


def test_paged_blocks_count_only_where_they_are_wanted() -> None:
    trace = Trace()
    trace.begin("optimizer")
    trace.born(Block(4096, "optimizer states", paged=True))
    trace.born(Block(512, "optimizer states"))
    assert trace.peaks() == {"optimizer": Peak(4608, 2)}
    assert trace.peaks(paged=False) == {"optimizer": Peak(512, 2)}


def test_a_step_that_is_repeated_finds_what_lasted() -> None:
    trace = Trace()
    trace.born(Block(1024, "weights"))
    start = len(trace.events)
    trace.begin("forward")
    saved = trace.born(Block(512, "saved activations"))
    trace.begin("optimizer")
    state = trace.born(Block(2048, "optimizer states"))
    trace.events.append(~saved)
    trace.begin("")
    trace.repeat(start, {state})
    assert [phase for phase, *_ in trace.segments()] == ["", "forward", "optimizer", "", "forward", "optimizer", ""]
    assert trace.events == [0, 1, 2, ~1, 3, ~3]
    assert trace.peaks() == {"forward": Peak(1024 + 2048 + 512, 5), "optimizer": Peak(1024 + 2048 + 512, 3)}
    assert [block.kind for block in trace.alive(len(trace.events))] == ["weights", "optimizer states"]
    trace.repeat(4, set())
    assert trace.events[6:] == [5, ~5]


def test_blocks_are_named_by_what_becomes_of_them() -> None:
    trace = Trace()
    trace.begin("forward")
    saved = trace.born(Block(512))
    trace.pass_by(Block(1024))
    named = trace.born(Block(512, "logits and loss"))
    trace.begin("backward")
    late = trace.born(Block(512))
    for index in (saved, named, late):
        trace.events.append(~index)
    trace.begin("optimizer")
    trace.born(Block(2048))
    trace.begin("backward")
    trace.begin("evaluate")
    trace.born(Block(4096))
    trace.begin("")
    trace.name_open_blocks()
    assert [(block.size, block.kind) for block in trace.blocks] == [
        (512, "saved activations"),
        (1024, "temporaries"),
        (512, "logits and loss"),
        (512, "temporaries"),
        (2048, "temporaries"),
        (4096, "temporaries"),
    ]


# The closed form.


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads, sixteens = draw(st.integers(1, 2)), st.integers(2, 12).map(lambda n: 16 * n)
    return ModelShape(
        family=draw(st.sampled_from(FAMILIES)),
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
    if options["precision"] != "fp32" and not options["packing"]:
        kernels.append("flash_attention_2")
    options["attention"] = draw(st.sampled_from(kernels))
    choices = {
        "rank": st.integers(1, 8),
        "virtual_tokens": st.integers(1, 20),
        "targets": st.sampled_from(["minimal", "attention", "mlp", "all-linear"]),
        "dropout": st.sampled_from([0.0, 0.1]),
        "adapter_dtype": st.sampled_from(["fp32", "base"]),
        "double_quant": st.booleans(),
        "kbit_preparation": st.booleans(),
    }
    options |= {name: draw(choice) for name, choice in choices.items() if name in fields}
    if "init_r" in fields:
        options["init_r"] = draw(st.integers(2, 8))
        options["target_r"] = 1
    return options


@pytest.mark.parametrize("method", TRAINED)
def test_more_never_takes_less(method: str) -> None:
    fields = METHODS[method].model_fields
    of_method = [name for name in ("rank", "init_r", "virtual_tokens") if name in fields]

    @given(shapes(), st.sampled_from(["batch_size", "seq_len", "num_layers", *of_method]), st.integers(1, 8), st.data())
    @settings(max_examples=50, deadline=None, database=None)
    def check(shape: ModelShape, what: str, more: int, data: st.DataObject) -> None:
        options = data.draw(runs(method, shape.family))
        if what in of_method or (what == "num_layers" and method == "prefix-tuning"):
            # A trained tensor grows. Where it reaches the size for 8 bits, or for paging, its states take less:
            # test_states_shrink_where_they_become_8_bit and test_states_leave_the_allocator_where_they_are_paged.
            options["optimizer"] = "adamw" if options["optimizer"].endswith(("8bit", "paged_adamw")) else "sgd"
            options.pop("optimizer_implementation", None)
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


PAGED_MODEL = model_of(small_shape(hidden_size=1000, num_heads=10, num_kv_heads=10, head_dim=100))
PAGED_RANK = PAGED_FROM_VALUES // 1000
PAGED_RUN = {"targets": ["q_proj"], "optimizer": "paged_adamw"}


def test_states_leave_the_allocator_where_they_are_paged() -> None:
    below, at = (answer(PAGED_MODEL, rank=rank, **PAGED_RUN) for rank in (PAGED_RANK - 1, PAGED_RANK))
    assert below.components["optimizer states"] == 2 * 2 * 2 * rounded(4 * 1000 * (PAGED_RANK - 1))
    assert "optimizer states" not in at.components
    assert below.peak_device_bytes == below.peak_reserved_bytes + CONTEXT_BYTES


def test_paged_states_count_on_the_device() -> None:
    found = answer(PAGED_MODEL, rank=PAGED_RANK, **PAGED_RUN)
    states = 2 * 2 * 2 * rounded(4 * 1000 * PAGED_RANK)
    assert found.peak_device_bytes == found.peak_reserved_bytes + CONTEXT_BYTES + states


def children_fit(node: dict[str, Any]) -> bool:
    """Whether no level of a tree of modules is smaller than what lies in it."""
    inside = node["modules"].values()
    return node["bytes"] >= sum(child["bytes"] for child in inside) and all(map(children_fit, inside))


@pytest.mark.parametrize("method", METHODS)
def test_everything_adds_up(method: str) -> None:
    @given(shapes(), st.integers(1, 4), st.sampled_from([None, *GPUS.values()]), st.integers(1, 8), st.data())
    @settings(max_examples=30, deadline=None, database=None)
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


def test_logits_are_of_every_position_or_of_the_responses() -> None:
    for loss_path, positions in (("hf", 3 * 32), ("response_only", 3 * 5)):
        options = {"batch_size": 3, "seq_len": 32, "loss_path": loss_path, "method": "ia3"}
        found = answer_by_formula(ask(model_of(small_shape(vocab_size=4096)), options, responses=5))
        (logs,) = [term.bytes for term in found.terms if term.name == "log-softmax of the logits"]
        assert logs == 4 * positions * 4096
        assert found.dimensions["N"] == positions


def test_sharding_takes_less_on_each_card() -> None:
    whole, half, quarter = (answer("llama-3.2-1b", method="full", gpus=gpus) for gpus in (1, 2, 4))
    for kind in ("weights", "gradients", "optimizer states"):
        if kind in whole.components:
            assert half.components[kind] == pytest.approx(whole.components[kind] / 2, abs=len(whole.terms) * 512)
    for more, fewer in ((whole, half), (half, quarter)):
        assert fewer.peak_allocated_bytes < more.peak_allocated_bytes
        assert fewer.peak_reserved_bytes < more.peak_reserved_bytes
        assert fewer.peak_device_bytes < more.peak_device_bytes
        assert all(fewer.phases[phase] < size for phase, size in more.phases.items() if phase != "evaluate")


# Commands.

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def peftscope(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: (exit code, stdout, stderr). A traceback is an error of the test."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peftscope", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[[Any], str]:
    """Writes a config.json, from text or from what JSON can hold, and returns its path."""

    def write(content: Any) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


ERRORS = {
    "unknown model": (["lama-2-7b"], "model: unknown model (got 'lama-2-7b')", "did you mean `llama-2-7b`?"),
    "unlike any model": (["nonsense"], "got 'nonsense'", "llama-2-7b, llama-3-8b"),
    "model that is not here": (["nobody/nothing"], "could not get config.json of 'nobody/nothing'", "use a preset"),
    "unknown card": (["llama-2-7b", "--gpu", "rtx4091"], "gpu: unknown card (got 'rtx4091')", "as in 24GiB"),
    "unknown method": (["llama-2-7b", "--method", "qlra"], "method: unknown method (got 'qlra')", "`qlora`?"),
    "option of another method": (
        ["llama-2-7b", "--method", "full", "--rank", "8"],
        "rank: does not fit the method full",
        "full has no such options",
    ),
    "option of a method with others": (
        ["llama-2-7b", "--virtual-tokens", "8"],
        "virtual_tokens: does not fit the method lora",
        "lora has rank, alpha, targets",
    ),
    "too long": (["llama-2-7b", "--seq-len", "4097"], "seq_len: 4097", "limit of 4096 tokens"),
    "rank over the width": (["qwen2.5-0.5b", "--rank", "129"], "rank: 129 is more than", "width, 128"),
    "no such module": (["llama-2-7b", "--targets", "q_proj,k_prj"], "has no `k_prj`", "did you mean `k_proj`?"),
    "no such preset": (["llama-2-7b", "--targets", "everything"], "targets: not a preset (minimal,", "'everything'"),
    "4-bit in fp32": (["llama-2-7b", "--method", "qlora", "--precision", "fp32"], "precision=fp32", "use bf16"),
    "checkpointed prefix": (
        ["llama-2-7b", "--method", "prefix-tuning", "--checkpointing"],
        "checkpointing does not work with prefix-tuning",
        "cache",
    ),
    "soft cap": (["gemma-2-2b", "--attention", "sdpa"], "attention: sdpa does not know", "use eager"),
    "no responses": (["llama-2-7b", "--response-len", "0"], "response_len: must lie between 1 and", "seq_len=512"),
    "no card": (["llama-2-7b", "--gpus", "0"], "gpus: must be at least 1", "got 0"),
    "no such precision": (["llama-2-7b", "--precision", "fp8"], "precision: Input should be", "got 'fp8'"),
    "no such file": (["nothing.json"], "model: nothing.json", "No such file"),
}


@pytest.mark.parametrize(("arguments", "what", "remedy"), ERRORS.values(), ids=ERRORS)
def test_a_wrong_question_gets_one_line(arguments: list[str], what: str, remedy: str, peftscope: Command) -> None:
    code, output, message = peftscope("memory", *arguments)
    assert (code, output) == (2, "")
    assert message.endswith("\n")
    assert len(message.splitlines()) == 1
    assert what in message
    assert remedy in message


LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {
    "not JSON": ("{", "is not valid JSON"),
    "a list": ([], "has no `model_type` -> give the config.json of a causal model"),
    "no model_type": ({"hidden_size": 64}, "has no `model_type` -> give the config.json of a causal model"),
    "no layers": ({k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}, "`num_hidden_layers` is missing"),
    "text for a number": ({**LLAMA, "vocab_size": "many"}, "vocab_size: Input should be a valid integer"),
    "another family": ({**LLAMA, "model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, mistral, qwen2"),
}


@pytest.mark.parametrize(("config", "what"), CONFIGS.values(), ids=CONFIGS)
def test_a_broken_config_gets_one_line(config: Any, what: str, peftscope: Command, config_of) -> None:
    path = config_of(config)
    code, output, message = peftscope("memory", path)
    assert (code, output) == (2, "")
    assert len(message.splitlines()) == 1
    assert what in message
    assert path in message or "use --simulate" in message


@pytest.mark.parametrize(
    "wrong", [{"num_attention_heads": 0}, {"num_attention_heads": "4"}, {"hidden_size": None}], ids=str
)
def test_a_config_that_cannot_be_divided_gets_one_line(wrong: dict[str, Any], peftscope: Command, config_of) -> None:
    code, _, message = peftscope("memory", config_of({**LLAMA, **wrong}))
    assert code == 2
    assert len(message.splitlines()) == 1


def test_a_limit_that_is_no_number_gets_one_line(peftscope: Command, config_of) -> None:
    code, _, message = peftscope("memory", config_of({"model_type": "gpt2", "max_position_embeddings": "many"}))
    assert code == 2
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "what", "remedy"),
    [
        (["--gpu", "24GiB"], "model: none given", "peftscope fit --gpu 24GiB llama-2-7b"),
        (["--gpu", "24GiB", "--models", " , "], "model: none given", "peftscope fit --gpu 24GiB llama-2-7b"),
        (["--gpu", "24GiB", "--models", "llama-2-7b,lama-3-8b"], "got 'lama-3-8b'", "did you mean `llama-3-8b`?"),
        (["llama-2-7b", "--gpu", "nothing"], "got 'nothing'", "as in 24GiB"),
        (
            ["llama-2-7b", "--gpu", "24GiB", "--methods", "lora,qlra"],
            "methods: unknown method (got 'qlra')",
            "`qlora`?",
        ),
    ],
    ids=["no model", "no models", "unknown model", "unknown card", "unknown method"],
)
def test_a_wrong_fit_gets_one_line(arguments: list[str], what: str, remedy: str, peftscope: Command) -> None:
    code, output, message = peftscope("fit", *arguments)
    assert (code, output) == (2, "")
    assert len(message.splitlines()) == 1
    assert what in message
    assert remedy in message


def test_rank_1_fits_every_method(peftscope: Command) -> None:
    code, *_ = peftscope("fit", "smollm2-135m", "--gpu", "24GiB", "--methods", "lora,adalora", "--rank", "1", "--json")
    assert code == 0


def test_json_has_the_stable_keys(peftscope: Command) -> None:
    code, output, message = peftscope("memory", "smollm2-135m", "--json")
    found = json.loads(output)
    assert (code, message) == (0, "")
    assert found == answer("smollm2-135m").to_json() | {"terms": found["terms"]}
    assert list(found)[:5] == ["model", "method", "how", "parameters", "trainable_parameters"]
    for key, kind in {
        "peak_allocated_bytes": int,
        "peak_reserved_bytes": int,
        "peak_device_bytes": int,
        "binding_phase": str,
        "phases": dict,
        "components": dict,
        "modules": dict,
        "assumptions": list,
        "terms": list,
        "dimensions": dict,
    }.items():
        assert isinstance(found[key], kind), key
        assert found[key], key
    assert list(found["phases"]) == ["load", "forward", "backward", "optimizer", "evaluate"]


OPTIONS = {
    "lora": {
        "rank": 5,
        "alpha": 3.0,
        "targets": "mlp",
        "dropout": 0.1,
        "adapter_dtype": "base",
        "batch_size": 3,
        "precision": "amp",
        "optimizer": "adamw_8bit",
        "loss_path": "response_only",
        "attention": "eager",
    },
    "adalora": {"init_r": 7, "target_r": 5},
    "prompt-tuning": {"virtual_tokens": 13},
    "qlora": {"rank": 6, "optimizer": "paged_adamw"},
}


@pytest.mark.parametrize(("method", "options"), OPTIONS.items(), ids=OPTIONS)
def test_an_answer_says_what_it_was_asked(method: str, options: dict[str, Any], peftscope: Command) -> None:
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    code, output, _ = peftscope("memory", "smollm2-135m", "--method", method, *words, "--json")
    assert code == 0
    found = json.loads(output)
    assert found["method"] == method
    said = "\n".join(found["assumptions"])
    for name, value in options.items():
        assert f"{name}={value}" in said
    plain = answer("smollm2-135m", method=method)
    assert found["peak_allocated_bytes"] != plain.peak_allocated_bytes


def test_an_answer_says_the_lengths_and_switches(peftscope: Command) -> None:
    words = "--seq-len 77 --response-len 9 --loss-path response_only --checkpointing --packed --eval-batch-size 6"
    _, output, _ = peftscope("memory", "smollm2-135m", *words.split(), "--gpus", "3", "--gpu", "l4", "--json")
    said = "\n".join(json.loads(output)["assumptions"])
    for words in (
        "seq_len=77",
        "9 positions",
        "checkpointing=True",
        "packing=True",
        "batch_size=6",
        "3 cards",
        "226 MiB",
    ):
        assert words in said


QWEN = """{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
  "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
  "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
  "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
  "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936
}"""
"""As the hub has it, with what says nothing about sizes."""


def test_a_local_config_gives_the_presets_answer(peftscope: Command, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(QWEN)
    assert find_model(str(path)).shape == PRESETS["qwen2.5-0.5b"][1]
    by_name, by_file, by_folder, by_hub_id = (
        json.loads(peftscope("memory", name, "--method", "qlora", "--json")[1])
        for name in ("qwen2.5-0.5b", str(path), str(tmp_path), "Qwen/Qwen2.5-0.5B")
    )
    assert by_file.pop("model") == str(path)
    assert by_name.pop("model") != by_folder.pop("model") != by_hub_id.pop("model")
    assert by_name == by_file == by_folder == by_hub_id


def test_text_names_peaks_phases_and_every_letter(peftscope: Command) -> None:
    code, output, message = peftscope("memory", "llama-2-7b", "--method", "qlora", "--explain", "--depth", "2")
    assert (code, message) == (0, "")
    found = answer("llama-2-7b", method="qlora")
    assert f"{found.parameters:,} parameters, {found.trainable_parameters:,} trained" in output
    (binding,) = [line for line in output.splitlines() if "<- binds" in line]
    assert binding.split()[0] == found.binding_phase
    flat = " ".join(output.split())
    for letter in {letter for term in found.terms for letter in letters_of(term)} & set(DIMENSIONS):
        assert f"{letter} = {found.dimensions[letter]:,} ({DIMENSIONS[letter]})" in flat
    for line in ("self_attn", "mlp", *found.assumptions):
        assert line in flat or line in output


def test_fit_speaks_json_about_several_models(peftscope: Command, config_of) -> None:
    paths = [config_of(small_shape(num_layers=layers).to_config()) for layers in (1, 2)]
    code, output, _ = peftscope("fit", "--models", ",".join(paths), "--gpu", "1GiB", "--methods", "full,ia3", "--json")
    assert code == 0
    found = json.loads(output)
    assert [(one["model"], one["method"]) for one in found] == [(p, m) for p in paths for m in ("full", "ia3")]
    for one in found:
        assert list(one) == list(Fit.__dataclass_fields__)
        assert one["capacity_bytes"] == GIB
        assert one["headroom_bytes"] == GIB - one["peak_device_bytes"]
        assert one["fits"] is True
        assert one["largest_batch_size"] >= 1
        assert one["advice"] == ""
        said = json.loads(peftscope("memory", one["model"], "--method", one["method"], "--json")[1])
        assert said["peak_device_bytes"] == one["peak_device_bytes"]


def test_fit_takes_every_method_that_trains_and_shows_a_table(peftscope: Command, config_of) -> None:
    path = config_of(small_shape(num_layers=1, max_seq_len=64).to_config())
    code, output, _ = peftscope("fit", path, "--gpu", "0.55GiB", "--rank", "4", "--seq-len", "32")
    assert code == 0
    rows = [line.split() for line in output.splitlines() if "MiB" in line and "yes" in line.split()]
    assert [row[row.index("yes") - 3] for row in rows] == TRAINED


def test_fit_over_two_cards(peftscope: Command) -> None:
    question = ["fit", "smollm2-135m", "--gpu", "24GiB", "--methods", "full", "--json"]
    (one,), (two,) = (json.loads(peftscope(*question, "--gpus", gpus)[1]) for gpus in ("1", "2"))
    assert two["peak_device_bytes"] < one["peak_device_bytes"]
    assert two["largest_batch_size"] >= one["largest_batch_size"]


SMALL_MODEL = model_of(PRESETS["smollm2-135m"][1].model_copy(update={"num_layers": 2}))


def device_bytes(options: dict[str, Any], **changes: Any) -> int:
    return peaks_by_formula(ask(SMALL_MODEL, options | changes), evaluation=False).device_bytes


def fit_of(method: str, capacity: int, **options: Any) -> Fit:
    (fit,) = fit_methods([SMALL_MODEL], [method], options, Gpu("a card", capacity), 1)
    return fit


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "adalora", "prefix-tuning"])
@pytest.mark.parametrize(("field", "value", "limit"), [("batch_size", 23, 4096), ("seq_len", 901, 8192)])
def test_the_largest_fits_and_one_more_does_not(method: str, field: str, value: int, limit: int) -> None:
    options = {"method": method}
    capacity = device_bytes(options, **{field: value})
    largest = getattr(fit_of(method, capacity), f"largest_{field}")
    assert 1 < largest < limit
    assert device_bytes(options, **{field: largest}) <= capacity < device_bytes(options, **{field: largest + 1})


@pytest.mark.parametrize(("method", "field"), [("lora", "rank"), ("qlora", "rank"), ("adalora", "init_r")])
def test_the_largest_rank_fits_and_one_more_does_not(method: str, field: str) -> None:
    options = {"method": method}
    capacity = device_bytes(options, **{field: 57})
    largest = fit_of(method, capacity).largest_rank
    assert 1 < largest < 192
    assert device_bytes(options, **{field: largest}) <= capacity < device_bytes(options, **{field: largest + 1})


@pytest.mark.parametrize("method", ["full", "ia3", "prefix-tuning"])
def test_without_a_rank_there_is_no_largest(method: str) -> None:
    assert fit_of(method, 10 * GIB).largest_rank is None


def test_with_room_for_everything_the_limits_are_the_largest() -> None:
    fit = fit_of("lora", 10**15)
    assert (fit.largest_batch_size, fit.largest_seq_len, fit.largest_rank) == (4096, 8192, 192)
    assert fit.fits


def test_with_room_for_nothing_there_is_no_largest() -> None:
    fit = fit_of("lora", 100 * MIB)
    assert (fit.largest_batch_size, fit.largest_seq_len, fit.largest_rank) == (None, None, None)
    assert not fit.fits
    assert fit.headroom_bytes < 0
    assert fit.advice == "a smaller model, a larger card, or --gpus"


def advised(words: str) -> dict[str, Any]:
    """The options that advice stands for, as someone who follows it would write them."""
    found: dict[str, Any] = {}
    parts = iter(words.split())
    for part in parts:
        name = part.removeprefix("--").replace("-", "_")
        value = True if name == "checkpointing" else next(parts)
        found[name] = int(value) if isinstance(value, str) and value.isdigit() else value
    return found


def follow_advice(method: str, **options: Any) -> set[str]:
    """Asks for ever more room, follows what is said, and returns all that was."""
    whole = fit_of(method, 1, **options).peak_device_bytes
    said = set()
    for share in range(1, 16):
        capacity = CONTEXT_BYTES + (whole - CONTEXT_BYTES) * share // 16
        advice = fit_of(method, capacity, **options).advice
        said.add(advice)
        if advice.startswith("--"):
            changed = {**options, "method": method, **advised(advice)}
            assert fit_of(changed.pop("method"), capacity, **changed).fits, advice
    return said


def test_advice_fits_whoever_follows_it() -> None:
    said = set.union(*(follow_advice(m, batch_size=4, seq_len=500, optimizer="adamw") for m in ("full", "lora")))
    assert len(said) > 4
    assert said <= {*(words for words, _ in ADVICE), "a smaller model, a larger card, or --gpus"}


def test_advice_keeps_the_rank_that_was_asked_for() -> None:
    assert len(follow_advice("full", batch_size=4, seq_len=100, rank=128)) > 2


# Without torch, and at once.


def test_the_closed_form_never_loads_torch() -> None:
    code = (
        "import sys; from peftscope.cli import main; sys.argv = ['peftscope', 'memory', 'llama-2-7b', '--explain']\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_an_answer_takes_a_fraction_of_a_second() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "peftscope", "memory", "llama-2-7b"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert median(seconds() for _ in range(5)) < 0.6  # measured: 0.24; other machines are slower


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


def check_term(term: Term, dimensions: dict[str, int]) -> None:
    assert term.source, term
    assert term.count >= 1
    if not term.formula:
        assert term.name in WITHOUT_FORMULA
        return
    assert all(letter in DIMENSIONS or letter.isdigit() for letter in letters_of(term)), term
    width = float(term.formula.split("·")[0])
    one = width * prod(dimensions[letter] for letter in letters_of(term))
    if width * 2 == int(width * 2):
        assert term.bytes == term.count * rounded(-int(-one // 1)), term
    else:  # three digits of a long fraction
        assert term.bytes == pytest.approx(term.count * one, rel=0.005, abs=term.count * 512), term


@pytest.mark.parametrize("method", TRAINED)
def test_every_term_has_a_formula_that_gives_its_bytes(method: str) -> None:
    @given(shapes(), st.data())
    @settings(max_examples=30, deadline=None, database=None)
    def check(shape: ModelShape, data: st.DataObject) -> None:
        found = answer_by_formula(ask(model_of(shape), data.draw(runs(method, shape.family))))
        for term in found.terms if found.binding_phase != "evaluate" else []:
            check_term(term, found.dimensions)

    check()


@pytest.mark.parametrize("name", PRESETS)
def test_every_term_of_a_preset_has_a_formula_that_gives_its_bytes(name: str) -> None:
    found = answer(name, method="qlora")
    assert len(found.terms) > 20
    for term in found.terms:
        check_term(term, found.dimensions)


@pytest.mark.parametrize(
    ("method", "options"),
    [("none", {}), ("lora", {"eval_batch_size": 64})],
    ids=["logits of responses", "another batch"],
)
def test_formulas_hold_where_the_evaluation_binds(method: str, options: dict[str, Any]) -> None:
    found = answer("smollm2-135m", method=method, **options)
    assert found.binding_phase == "evaluate"
    for term in found.terms:
        check_term(term, found.dimensions)
