"""The steps of DPO and its kin, of reward models and of GRPO: formula and simulation agree, and terms add up."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_memory import model_of, small_shape
from transformers import AutoConfig, AutoModelForSequenceClassification

from benchmarks import trl_steps
from peftscope.errors import InputError
from peftscope.hardware.cards import find_gpu
from peftscope.memory.answer import answer_by_formula, peaks_by_formula
from peftscope.memory.base import Model, describe_model
from peftscope.memory.question import Question, ask
from peftscope.memory.simulate import peaks_by_simulation
from peftscope.sizing.changes import Asked, remedies_of
from peftscope.sizing.duration import Schedule, duration
from peftscope.sizing.fit import fit_methods
from peftscope.sizing.needs import Needs

LENGTH, ANSWER, VOCABULARY, HIDDEN = 128, 50, 40_000, 64


def qwen(*, tied: bool = False) -> Model:
    return model_of(small_shape(family="qwen2", vocab_size=VOCABULARY, hidden_size=HIDDEN, tied_embeddings=tied))


def asked(job: str, *, tied: bool = False, **options: Any) -> Question:
    options = {"batch_size": 2, "seq_len": LENGTH, **options}
    return ask(qwen(tied=tied), {"job": job, **options}, responses=ANSWER)


FULL = {"logprobs": "full"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"autocast": True}),
    "dpo of all weights in mixed precision": ("dpo", {"method": "full", "precision": "amp", "checkpointing": True}),
    "dpo from logits": ("dpo", {**FULL, "autocast": True, "checkpointing": True}),
    "dpo from logits in 16 bits": ("dpo", {**FULL, "method": "full", "batch_size": 4}),
    "dpo of a 4-bit base with a copy": ("dpo", {"method": "qlora", "reference": "copy", "autocast": True}),
    "dpo with a trained head": ("dpo", {"reference": "precomputed", "modules_to_save": ["lm_head"]}),
    "kto": ("kto", {"method": "ia3", "gradient_accumulation": 2}),
    "kto from logits": ("kto", {**FULL, "reference": "copy", "autocast": True, "checkpointing": True}),
    "kto from the logits of one row": ("kto", {**FULL, "autocast": True, "batch_size": 1}),
    "orpo": ("orpo", {"autocast": True}),
    "orpo in 16 bits": ("orpo", {"method": "dora", "dropout": 0.1}),
    "reward": ("reward", {"checkpointing": True}),
    "reward of all weights": ("reward", {"method": "full", "tied": True}),
    "grpo": ("grpo", {"dropout": 0.1}),
    "grpo from logits with a reference": ("grpo", {**FULL, "reference": "disabled", "batch_size": 1}),
    "grpo from logits in mixed precision": ("grpo", {**FULL, "method": "full", "precision": "amp"}),
}


@pytest.mark.parametrize("case", CASES)
def test_formula_and_simulation_agree(case: str) -> None:
    """Rows of logits are blocks of their own, and one block here: that moves what is reserved alone."""
    job, options = CASES[case]
    question = asked(job, **options)
    simulated, computed = peaks_by_simulation(question), peaks_by_formula(question)
    assert computed.phases == pytest.approx(simulated.phases, rel=0.02)
    assert computed.allocated_bytes == pytest.approx(simulated.allocated_bytes, rel=0.005)
    assert computed.reserved_bytes == pytest.approx(simulated.reserved_bytes, rel=0.25)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: the extra trl, as docs/install.md says")
@pytest.mark.parametrize("case", trl_steps.CASES)
def test_a_step_of_trls_own_takes_what_is_simulated(case: str) -> None:
    """Outside the head to the byte, but for the norm of the gradients, which transformers' Trainer keeps.

    Under a tracker alone, torch sums the gradients of ORPO's logits out of place; its profiler is 0.5 % below ours.
    """
    outside, whole = trl_steps.differences(case)
    assert outside == {"forward": 512, "backward": 512, "optimizer": 0}
    assert case == "ORPO" or max(map(abs, whole.values())) < 0.015


@pytest.mark.parametrize(
    ("job", "items", "rows", "copies"),
    [("dpo", 2, 4, 12), ("kto", 2, 2, 12), ("kto", 1, 1, 16), ("orpo", 2, 4, 14)],
)
def test_full_log_probabilities_take_so_many_bytes_a_logit(job: str, items: int, rows: int, copies: int) -> None:
    """In 32 bits: the logits, a gradient for each row, all of them stacked; with ORPO half of a log-softmax.

    So torch's profiler has it without a tracker, on a CPU: 12.0 for 2 rows or more, 16.0 for one, 13.8 with ORPO.
    """
    answer = answer_by_formula(asked(job, batch_size=items, autocast=True, **({} if job == "orpo" else FULL)))
    logits = rows * LENGTH * VOCABULARY
    assert answer.binding_phase == "backward"
    assert answer.components["logits and loss"] == pytest.approx(copies * logits, rel=0.01)


def test_chunked_log_probabilities_do_not_grow_with_the_answers() -> None:
    sizes = [answer_by_formula(asked("grpo", batch_size=n)).components["logits and loss"] for n in (100, 200)]
    full = answer_by_formula(asked("grpo", batch_size=200, **FULL)).components["logits and loss"]
    assert sizes[1] - sizes[0] < 0.1 * sizes[0] < 0.1 * full


def test_a_reference_takes_its_weights_or_nothing() -> None:
    phases = {r: peaks_by_formula(asked("dpo", reference=r)).phases for r in ("copy", "disabled", "precomputed")}
    weights = 2 * answer_by_formula(asked("dpo")).parameters
    assert phases["copy"]["load"] - phases["disabled"]["load"] == pytest.approx(weights, rel=0.01)
    assert phases["disabled"]["load"] == phases["precomputed"]["load"]
    assert phases["disabled"]["forward"] > phases["precomputed"]["forward"]
    assert peaks_by_formula(asked("dpo", reference="none")).phases == phases["precomputed"]
    assert [asked("dpo", method=m).beside.reference for m in ("lora", "full")] == ["disabled", "copy"]
    assert [asked(j).beside.reference for j in ("grpo", "orpo", "reward")] == ["none", None, None]


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_has_a_score_in_place_of_the_head(tied: bool) -> None:
    config = AutoConfig.for_model(**qwen(tied=tied).config, num_labels=1)
    with torch.device("meta"):
        parameters = AutoModelForSequenceClassification.from_config(config).num_parameters()
    full, lora = (answer_by_formula(asked("reward", tied=tied, method=method)) for method in ("full", "lora"))
    assert full.parameters == full.trainable_parameters == lora.parameters == parameters
    without = answer_by_formula(asked("orpo", tied=tied)).trainable_parameters
    assert lora.trainable_parameters == without + HIDDEN


def test_llama_factory_takes_all_rows_at_once_and_holds_the_logits() -> None:
    logits = 4 * 4 * LENGTH * VOCABULARY  # of two pairs, in 32 bits
    given = {"method": "full", "precision": "amp", "batch_size": 2, "seq_len": LENGTH}
    kinds = {way: answer_by_formula(asked("dpo", **given, logprobs=way)).components for way in ("full", "whole")}
    assert kinds["whole"]["logits and loss"] == pytest.approx(4 * logits, rel=0.02)  # both passes have two such tensors
    assert kinds["full"]["weights"] - kinds["whole"]["weights"] == pytest.approx(2 * qwen().shape.parameters, rel=0.01)


def test_an_answer_says_which_trl_and_what_is_left_out() -> None:
    lines = {job: "\n".join(answer_by_formula(asked(job)).assumptions) for job in ("dpo", "grpo", "sft")}
    assert "logprobs=chunked, as in TRL 1.16.0" in lines["dpo"] and "4 rows" in lines["dpo"]
    assert "generation" in lines["grpo"] and "job=" not in lines["sft"]
    assert [asked("dpo", as_trainer=name).beside.logprobs for name in ("trl", "axolotl")] == ["chunked", "full"]
    assert asked("dpo", dropout=0.1).spec.method.dropout == 0 < asked("grpo", dropout=0.1).spec.method.dropout


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "reference": ("sft", {"reference": "copy"}),
    "logprobs": ("reward", FULL),
    "loss_path": ("dpo", {"loss_path": "response_only"}),
    "packing": ("kto", {"packing": True}),
    "loss": ("orpo", {"loss": "liger"}),
    "evaluation": ("grpo", {"eval_batch_size": 1}),
    "modules_to_save": ("reward", {"modules_to_save": ["lm_head"]}),
    "method": ("dpo", {"method": "adalora"}),
    "no adapter to disable": ("dpo", {"method": "full", "reference": "disabled"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_options_that_do_not_go_with_a_job_are_named(what: str) -> None:
    job, options = WRONG[what]
    with pytest.raises(InputError, match=what):
        asked(job, **options)


def test_time_is_not_told_and_sizes_are_searched() -> None:
    question = ask(describe_model("qwen2.5-0.5b"), {"job": "dpo"}, gpu=find_gpu("a100"))
    assert duration(question, Schedule()) is None
    with pytest.raises(InputError, match="job: the time of dpo is not modelled"):
        duration(question, Schedule(examples=10))
    (pairs,), (items,) = (
        [fit.largest_batch_size for fit in fit_methods([qwen()], ["lora"], {"job": job}, find_gpu("4GiB"))]
        for job in ("dpo", "kto")
    )
    assert pairs == pytest.approx(items / 2, rel=0.05)


def test_remedies_leave_out_the_second_model_and_the_logits() -> None:
    given = {"job": "dpo", "method": "full", "logprobs": "full", "batch_size": 8, "seq_len": 512}
    question, needs = ask(describe_model("qwen2.5-0.5b"), given, gpu=find_gpu("24GiB")), Needs(find_gpu("24GiB"))
    remedies = remedies_of(Asked(question, given), needs.peaks(question), needs)
    changes = [change for remedy in remedies for change in remedy.changes.items()]
    assert ("--logprobs", "chunked") in changes
    assert not {"--loss", "--loss-path"} & {name for name, _ in changes}
