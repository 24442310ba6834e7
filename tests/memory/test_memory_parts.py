"""The memory calculator's parts: presets, the allocator's books, cards and traces."""

from __future__ import annotations

import json
import re
from itertools import chain, count
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import answer, model_of

from peftscope.errors import InputError
from peftscope.hardware.cards import GPUS, find_gpu
from peftscope.memory.allocator import replay, reserved_bytes
from peftscope.memory.answer import answer_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.formula.step import TrainingTraces, trace_training
from peftscope.memory.question import ask
from peftscope.memory.trace import Block, Peak, Trace, by_kind, rounded
from peftscope.methods import METHODS
from peftscope.models.presets import PRESETS, SIMULATED
from peftscope.models.shapes import ModelShape
from peftscope.sizing.needs import options_of_method
from peftscope.words import GIB, MIB

# Presets.

PUBLISHED: dict[str, int] = yaml.safe_load("""
{llama-7b: 6738415616, llama-2-7b: 6738415616,
  llama-2-13b: 13015864320, llama-2-70b: 68976648192, llama-65b: 65285660672,
  llama-33b: 32528943616, codellama-34b: 33743970304, llama-3-8b: 8030261248, llama-3.1-8b: 8030261248,
  llama-3.1-70b: 70553706496, llama-3.2-1b: 1235814400, llama-3.2-3b: 3212749824, mistral-7b: 7241732096,
  qwen2.5-0.5b: 494032768, qwen2.5-1.5b: 1543714304, qwen2.5-7b: 7615616512, phi-3-mini: 3821079552,
  gemma-2-2b: 2614341888, smollm2-135m: 134515008, smollm2-360m: 361821120, smollm2-1.7b: 1711376384,
  smollm3-3b: 3075098624, llama-3.3-70b: 70553706496, mistral-7b-v0.3: 7248023552, mistral-nemo-12b: 12247782400,
  mistral-small-24b: 23572403200, mistral-small-3.2-24b: 24011361280, mixtral-8x7b: 46702792704,
  mixtral-8x22b: 140630071296, qwen3-30b-a3b: 30532122624, qwen3-235b-a22b: 235093634560, qwen2.5-3b: 3085938688,
  qwen2.5-14b: 14770033664, qwen2.5-32b: 32763876352, qwen3-0.6b: 596049920, qwen3-1.7b: 1720574976,
  qwen3-4b: 4022468096, qwen3-8b: 8190735360, qwen3-14b: 14768307200, qwen3-32b: 32762123264, phi-4: 14659507200,
  gemma-2-9b: 9241705984, gemma-2-27b: 27227128320, gemma-3-1b: 999885952, olmo-2-1b: 1484916736,
  olmo-2-7b: 7298617344, olmo-2-13b: 13716198400, olmo-2-32b: 32234279936, granite-3.1-2b: 2533531648,
  granite-3.1-8b: 8170848256, gemma-3-4b: 4300079472, gemma-3-12b: 12187325040, gemma-3-27b: 27432406640,
  qwen2.5-72b: 72706203648, qwen2.5-vl-3b: 3754622976, qwen2.5-vl-7b: 8292166656, qwen2.5-vl-32b: 33452718336,
  qwen2.5-vl-72b: 73410777344, qwen3-vl-2b: 2127532032, qwen3-vl-4b: 4437815808, qwen3-vl-8b: 8767123696,
  qwen3-vl-32b: 33357390064, qwen3-vl-30b-a3b: 31070754032, qwen3-vl-235b-a22b: 235670022896, smollm-360m: 361821120,
  tinyllama-1.1b: 1100048384, tinyllama-v1.1: 1100048384, open-llama-3b: 3426473600, codellama-7b: 6738546688,
  codellama-13b: 13016028160, llama-3-70b: 70553706496, llama-3.1-405b: 405853388800, yi-34b: 34388917248,
  mistral-7b-v0.2: 7241732096, zephyr-7b: 7241732096, ministral-8b: 8019808256, mistral-small-3.1-24b: 24011361280,
  magistral-small: 23572403200, magistral-small-2509: 24011361280, devstral-small: 23572403200,
  qwen2-0.5b: 494032768, qwen2-1.5b: 1543714304, qwen2-7b: 7615616512, phi-3.5-mini: 3821079552,
  gemma-2b: 2506172416, gemma-7b: 8537680896}
""")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_parameters_survives_its_config_and_is_found_by_its_hub_id(name: str) -> None:
    hub_id, shape, _, vision = preset = PRESETS[name]
    assert preset.parameters == answer(name).parameters == PUBLISHED[name]
    assert describe_model(hub_id).vision == vision
    assert ModelShape.from_config(json.loads(json.dumps(shape.to_config()))) == shape
    assert [describe_model(each).shape for each in (hub_id, hub_id.lower(), name.upper())] == [shape] * 3


def test_a_preset_names_code_file_and_commit() -> None:
    without = {name for name, preset in PRESETS.items() if not re.search(r"^\S+/\S+ \S+ @ [0-9a-f]{40}", preset.source)}
    assert without == {"llama-65b", "granite-3.1-2b", "yi-34b", "ministral-8b"}


def parameters_built(config: dict[str, Any]) -> int:
    """Returns how many parameters transformers gives to a model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("name", {preset.shape.family: name for name, preset in PRESETS.items()}.values())
def test_transformers_builds_a_preset_with_as_many_parameters(name: str) -> None:
    shape = PRESETS[name][1]
    assert parameters_built(shape.to_config()) == shape.parameters


SIMULATED_COUNTS: dict[str, tuple[float, float]] = {
    "gpt-oss-20b": (20_914_757_184, 0),
    "gpt-oss-120b": (116_829_156_672, 0),
    # The hub's total without its layer of several tokens, less 256 biases of routers in 58 layers, which are buffers.
    "deepseek-v3": (671_026_419_200 - 58 * 256, 0),
    # As the model cards round it. That of Llama 4 counts its tower, those of Gemma 4's small models towers for two.
    "llama-4-scout": (109e9, 0.02),
    "qwen3.5-9b": (9e9, 0.01),
    "qwen3.5-35b-a3b": (35e9, 0.01),
    "gemma-4-31b": (30.7e9, 0.002),
    "gemma-4-26b-a4b": (25.2e9, 0.002),
    "gemma-4-e4b": (8e9, 0.07),
    "gemma-4-e2b": (5.1e9, 0.1),
    **{"glm-4.7-flash": (30e9, 0.01), "glm-4.5-air": (106e9, 0.03), "qwen3-next-80b-a3b": (80e9, 0.01)},
    **{"qwen1.5-moe-a2.7b": (14.3e9, 0.01), "phi-1.5": (1.4e9, 0.02), "starcoder2-3b": (3.03e9, 0.01)},
}
"""The published parameters of the models that are simulated, and how far those of the text model may be from them."""


def test_a_model_that_is_simulated_is_found_by_name_and_hub_id() -> None:
    assert set(SIMULATED_COUNTS) == set(SIMULATED)
    for name, known in SIMULATED.items():
        found = describe_model(name)
        assert found.config == describe_model(known.hub_id.lower()).config == known.config
        assert found.shape is None
        assert found.max_seq_len
        assert re.search(r"^huggingface/transformers \S+ @ (5\.24\.0|[0-9a-f]{40})", known.source)


@pytest.mark.slow
@pytest.mark.parametrize("name", {known.config["model_type"]: name for name, known in SIMULATED.items()}.values())
def test_transformers_builds_a_simulated_model_with_as_many_parameters(name: str) -> None:
    published, off = SIMULATED_COUNTS[name]
    assert parameters_built(SIMULATED[name].config) == pytest.approx(published, rel=off)


# The allocator.


SMALLEST = 512 / MIB
ALLOCATIONS: dict[str, tuple[list[tuple[float, float] | int], float]] = {
    "up to 1 MiB comes from segments of 2, whose rest is too small": ([(SMALLEST, 0), (1, SMALLEST), (1, 2)], 4),
    "the rest of a small block stays free down to 512 bytes": (
        [(1, 0), (1 - SMALLEST, 1), (SMALLEST, 2 - SMALLEST)],
        2,
    ),
    "more than 1 MiB comes from segments of 20": ([(1 + SMALLEST, 0), (10 - SMALLEST, 1 + SMALLEST)], 20),
    "10 MiB get a segment of their own": ([(10, 0)], 10),
    "in steps of 2 MiB": ([(10 + SMALLEST, 0)], 12),
    "the rest of a large block stays free above 1 MiB": ([(10 + SMALLEST, 0), (1 + SMALLEST, 10 + SMALLEST)], 12),
    "1 MiB that is left goes with the block": ([(5, 0), (5, 5), (10, 10), 0, (4, 0), 1, (6, 20)], 40),
    "small and large requests share no segment": ([(2, 0), 0, (SMALLEST, 20), 1, (1, 20), (1 + SMALLEST, 0)], 22),
    "a request takes the smallest block that is large enough": (
        [(4, 0), (2, 4), (3, 6), (2, 9), 0, 2, (3, 6), (2, 0), (2, 2), (9, 11)],
        20,
    ),
    **{
        f"free neighbours become one block, {order}": ([*((5, 5 * n) for n in range(4)), *order, (15, 0)], 20)
        for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2))
    },
    "neighbouring segments stay apart": ([(10, 0), (10, 10), 0, 1, (20, 20)], 40),
    "best fit may break up what a later request needs": (
        [(3, 0), (18, 20), (17, 3), 0, 1, 2, (3, 20), (18, 0), (17, 38)],
        56,
    ),
}
"""Requests as (size, address) in MiB, numbers of earlier requests that are freed, and the MiB reserved then."""


@pytest.mark.parametrize(("script", "reserved"), ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_requests_land_where_the_allocator_of_torch_puts_them(
    script: list[tuple[float, float] | int], reserved: float
) -> None:
    requests, numbers = [step for step in script if not isinstance(step, int)], count()
    events = [~step if isinstance(step, int) else next(numbers) for step in script]
    held, pieces = replay(events, [round(size * MIB) for size, _ in requests])
    assert [piece[1] for piece in pieces] == [round(address * MIB) for _, address in requests]
    assert held == reserved * MIB


def test_segments_stay_and_only_blocks_of_the_allocator_in_a_phase_take_any() -> None:
    trace = Trace()
    for block in (Block(100 * MIB, paged=True), Block(0)):
        trace.pass_by(block)
    assert reserved_bytes(trace) == 0
    for size in (30 * MIB, 20 * MIB, 512):
        trace.pass_by(Block(size))
    assert reserved_bytes(trace) == 32 * MIB
    trace.begin("")  # after the last phase
    trace.pass_by(Block(50 * MIB))
    assert reserved_bytes(trace) == 32 * MIB


def test_free_segments_are_given_back_where_a_new_one_exceeds_the_card() -> None:
    trace = Trace()
    for size in (30, 40):
        trace.pass_by(Block(size * MIB))
    held = [reserved_bytes(trace, capacity=capacity * MIB) for capacity in (70, 69, 40, 39)]
    assert held == [70 * MIB, 40 * MIB, 40 * MIB, 40 * MIB]


SMALL = st.integers(1, MIB)
MIDDLE = st.integers(MIB + 1, 10 * MIB - 512)
LARGE = st.integers(10 * MIB - 511, 50 * MIB)


def scripts(*sizes: st.SearchStrategy[int]) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Requests, and blocks to free: the nth of those that live."""
    request = st.tuples(st.just("allocate"), st.one_of(*sizes))
    return st.lists(st.one_of(request, request, st.tuples(st.just("free"), st.integers(0, 20))), max_size=50)


def played(script: list[tuple[str, int]]) -> tuple[list[int], list[int]]:
    """Returns the events of a script, after which all is free, and the sizes of its requests."""
    live: list[int] = []
    events, sizes = [], []
    for what, number in script:
        if what == "allocate":
            live.append(len(sizes))
            events.append(live[-1])
            sizes.append(rounded(number))
        elif live:
            events.append(~live.pop(number % len(live)))
    return [*events, *(~number for number in live)], sizes


@given(scripts(SMALL, MIDDLE, LARGE))
@settings(max_examples=20, deadline=None, database=None)
def test_blocks_never_overlap_and_segments_hold_them_all(script: list[tuple[str, int]]) -> None:
    events, sizes = played(script)
    reserved, pieces = replay(events, sizes)
    live: dict[int, int] = {}
    for place, event in enumerate(events, 1):
        if event < 0:
            del live[~event]
            continue
        end = pieces[event][1] + sizes[event]
        assert all(end <= pieces[other][1] or last <= pieces[event][1] for other, last in live.items())
        live[event] = end
        assert replay(events[:place], sizes)[0] >= max(end, sum(sizes[number] for number in live))
    again = [(number, ~number) for number in range(len(sizes), 2 * len(sizes))]
    assert replay([*events, *chain(*again)], 2 * sizes)[0] == reserved  # what fitted once fits into what came back


@given(scripts(SMALL, MIDDLE))
@settings(max_examples=20, deadline=None, database=None)
def test_the_same_requests_again_need_no_new_segment(script: list[tuple[str, int]]) -> None:
    # With segments of their own that is not so: test_best_fit_may_break_up_what_a_later_request_needs.
    events, sizes = played(script)
    again = [event + len(sizes) if event >= 0 else event - len(sizes) for event in events]
    assert replay([*events, *again], 2 * sizes)[0] == replay(events, sizes)[0]


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
        ("4090", "rtx4090"),
        ("RTX A6000", "a6000"),
        ("A100 40 GB", "a100"),
        ("H100 80 GB", "h100"),
        *((card.name, name) for name, card in GPUS.items() if not card.name.endswith((" 40 GB", " 16 GB", "A6000"))),
    ],
)
def test_a_card_is_found_as_people_write_it(text: str, name: str) -> None:
    if name == "h100":
        text = text.removesuffix(" 80 GB")
    assert find_gpu(text) == GPUS[name]


@pytest.mark.parametrize("name", ["gtx1080ti", "rtx2080ti", "t4", "v100", "v100-32gb"])
def test_a_card_before_ampere_is_warned_about(name: str) -> None:
    options = {"attention": "flash_attention_2"}
    first, second, *_ = answer_by_formula(ask(describe_model("llama-3.2-1b"), options, gpu=GPUS[name])).assumptions
    assert "no bf16 products" in first
    assert "use sdpa" in second
    wide = answer_by_formula(ask(describe_model("llama-3.2-1b"), {"precision": "fp32"}, gpu=GPUS[name]))
    assert not any("Ampere" in line for line in wide.assumptions)


@pytest.mark.parametrize(
    ("text", "size"),
    [
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
