"""The memory calculator's parts: presets, the allocator's books, cards and traces."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import answer, model_of

from peftscope.errors import InputError
from peftscope.hardware.cards import GPUS, find_gpu
from peftscope.memory import allocator as books
from peftscope.memory import answer as answers
from peftscope.memory.allocator import reserved_bytes
from peftscope.memory.base import describe_model
from peftscope.memory.formula.step import TrainingTraces, trace_training
from peftscope.memory.question import ask
from peftscope.memory.trace import Block, Peak, Trace, by_kind, rounded
from peftscope.methods import METHODS
from peftscope.models.presets import PRESETS
from peftscope.models.shapes import ModelShape
from peftscope.sizing.fit import fit_methods, known_methods, options_of_method
from peftscope.words import GIB, MIB

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
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "phi-4": 14_659_507_200,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    # The hub's totals less SigLIP's 416,866,032 and a projector of 1152·(hidden size + 1).
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - 1152 * 2561,
    "gemma-3-12b": 12_187_325_040 - 416_866_032 - 1152 * 3841,
    "gemma-3-27b": 27_432_406_640 - 416_866_032 - 1152 * 5377,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "granite-3.1-2b": 2_533_531_648,
    "granite-3.1-8b": 8_170_848_256,
}


def test_every_preset_has_a_published_count() -> None:
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items(), ids=PUBLISHED)
def test_a_preset_has_the_published_parameters(name: str, parameters: int) -> None:
    assert PRESETS[name][1].parameters == parameters
    assert answer(name).parameters == parameters


def test_a_preset_names_code_file_and_commit() -> None:
    without = {name for name, preset in PRESETS.items() if not re.search(r"^\S+/\S+ \S+ @ [0-9a-f]{40}", preset.source)}
    assert without == {"llama-65b", "granite-3.1-2b"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_own_config(name: str) -> None:
    shape = PRESETS[name][1]
    assert ModelShape.from_config(json.loads(json.dumps(shape.to_config()))) == shape


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_its_hub_id_in_any_case(name: str) -> None:
    hub_id, shape, _ = PRESETS[name]
    assert (
        describe_model(hub_id).shape
        == describe_model(hub_id.lower()).shape
        == describe_model(name.upper()).shape
        == shape
    )


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


class CachingAllocator(books.CachingAllocator):
    """Names blocks by their addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: dict[int, books.Piece] = {}

    def allocate(self, size: int) -> int:
        piece = super().allocate(size)
        self.pieces[piece.offset] = piece
        return piece.offset

    def free(self, address: int) -> None:
        super().free(self.pieces.pop(address))


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
        ("4090", "rtx4090"),
        ("RTX A6000", "a6000"),
        ("A100 40 GB", "a100"),
        ("V100 16 GB", "v100"),
        ("H100 80 GB", "h100"),
        *((card.name, name) for name, card in GPUS.items() if not card.name.endswith((" 40 GB", " 16 GB", "A6000"))),
    ],
)
def test_a_card_is_found_as_people_write_it(text: str, name: str) -> None:
    if name == "h100":
        text = text.removesuffix(" 80 GB")
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


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trains and method.closed_form])
def test_a_trace_that_is_kept_and_resized_is_the_trace_of_those_sizes(method: str, optimizer: str) -> None:
    """The sizes lie on both sides of the ranks from which bitsandbytes keeps 8-bit states and pages them."""
    model, traces = model_of(PRESETS["llama-3.2-1b"][1].model_copy(update={"num_layers": 2})), TrainingTraces()
    for batch_size, seq_len, rank in [(1, 512, 8), (3, 100, 1), (2, 999, 64), (1, 512, 8)]:
        options = {"batch_size": batch_size, "seq_len": seq_len, "rank": rank, "optimizer": optimizer}
        question = ask(model, options_of_method(method, options))
        assert traces.trace(question) == trace_training(question)
        assert traces.measure(reserved_bytes, traces.trace(question)) == reserved_bytes(trace_training(question))


def test_the_search_for_the_largest_sizes_asks_the_allocator_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve methods and three sizes of each: a replay takes most of a question's time."""
    replays = []
    monkeypatch.setattr(
        answers, "reserved_bytes", lambda trace, *limits: replays.append(1) or reserved_bytes(trace, *limits)
    )
    shape = PRESETS["llama-3.2-1b"][1].model_copy(update={"num_layers": 2})
    fits = list(fit_methods([model_of(shape)], known_methods(None), {}, find_gpu("3GiB")))
    assert len(fits) == 12
    assert len(replays) < 3 * 36
