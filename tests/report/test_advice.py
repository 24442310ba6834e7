"""Advice: ten situations, and rules that follow the claims."""

from __future__ import annotations

import ast
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import REPOSITORY, Command
from pydantic import ValidationError

from peftscope.errors import InputError
from peftscope.hardware.cards import find_gpu
from peftscope.layout import CLAIMS_FILE
from peftscope.memory.base import describe_model
from peftscope.methods import METHODS
from peftscope.report.advice.advise import Advice, advise
from peftscope.report.advice.rules import HABIT, Rule, Rules, Standing, known_findings, read_rules
from peftscope.report.advice.settings import Situation
from peftscope.sizing.changes import NOTHING
from peftscope.sizing.fit import fit_methods
from peftscope.sizing.trainer_file import Pasted
from peftscope.spec import RunSpec

SITUATIONS = sorted((REPOSITORY / "tests" / "advice").glob("*.yaml"))


@cache
def findings() -> dict[str, dict[str, Any]]:
    return known_findings()[0]


@cache
def rules() -> Rules:
    return read_rules()


def with_verdicts(**verdicts: str) -> dict[str, dict[str, Any]]:
    changed = {claim: {"verdict": verdict, "in_worlds": {}} for claim, verdict in verdicts.items()}
    return findings() | {claim: findings()[claim] | own for claim, own in changed.items()}


def advice_for(asked: dict[str, Any], **verdicts: str) -> Advice:
    asked = dict(asked)
    model, gpu = describe_model(asked.pop("model")), find_gpu(asked.pop("gpu"))
    return advise(Situation(model, gpu, **asked), rules(), with_verdicts(**verdicts))


def line(advice: Advice, setting: str) -> Any:
    return next(each for each in advice.lines if each.setting == setting)


def told(advice: Advice) -> str:
    """Returns all that is said of an advice's lines, and of what its options cost."""
    lines = [f"{each.text} {each.says} {each.evidence}" for each in advice.lines]
    return " ".join([*lines, *map(advice.costs, advice.options)])


def spec_of(advice: Advice) -> RunSpec:
    return advice.options[0].question.spec


EXPECTED: dict[str, Callable[[Advice, Any], bool]] = {
    "method": lambda advice, name: advice.options[0].method == name,
    "first_or_equal": lambda advice, name: name in (line(advice, "method").value, *line(advice, "method").choice),
    "no_option": lambda advice, names: not {option.method for option in advice.options}.intersection(names),
    "option": lambda advice, names: {option.method for option in advice.options}.issuperset(names),
    "fields": lambda advice, fields: {name: getattr(spec_of(advice), name) for name in fields} == fields,
    "seq_len_at_least": lambda advice, tokens: spec_of(advice).seq_len >= tokens,
    "steps_at_most": lambda advice, steps: advice.options[0].steps <= steps,
    "rank_at_most": lambda advice, rank: max(line(advice, "rank").value, *line(advice, "rank").choice) <= rank,
    "no_change": lambda advice, names: not set(advice.options[0].changes).intersection(names),
    "option_changes": lambda advice, names: {n for o in advice.options[1:] for n in o.changes}.issuperset(names),
    "cites": lambda advice, claims: all(claim in told(advice) for claim in claims),
    "says": lambda advice, texts: all(words in told(advice) for words in texts),
}
"""What a situation may expect of its advice."""


@pytest.mark.slow
@pytest.mark.parametrize("path", SITUATIONS, ids=lambda path: path.stem)
def test_ten_situations(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    advice, expect = advice_for(case["asked"]), case["expect"]
    assert case["reasons"] and case["sources"]
    assert bool(advice.options) is expect.pop("fits", True)
    if nearest := expect.pop("nearest", []):
        assert all(any(words in told for told in advice.nearest) for words in map(str.lower, nearest)), advice.nearest
        return
    for what, wanted in expect.items():
        assert EXPECTED[what](advice, wanted), (what, wanted, told(advice))
    assert all(option.peak_device_bytes <= advice.situation.gpu.usable_bytes for option in advice.options)


def test_every_claim_and_method_of_the_rules_exists_and_none_is_refuted() -> None:
    rules = read_rules()
    assert len(SITUATIONS) == 10
    ledger = Path(CLAIMS_FILE).read_text()  # as text, because reading it as a ledger loads every check
    claims = re.findall(r"^    ([SP]\d+):$", ledger, re.MULTILINE)
    for grounds in [*rules.rules, *rules.changes]:
        assert {*grounds.claims, *grounds.against} <= set(claims)
        assert grounds.standing(findings()) is not Standing.REFUTED, grounds.says
    assert {name for rule in rules.rules for name in rule.when.get("method", [])} <= set(METHODS)
    # What the files of trainers say.
    assert {rule.value for rule in rules.rules if rule.setting == "targets"} == {"all-linear"}
    # Something is said of each setting whatever the verdicts are.
    last = {rule.setting: rule for rule in rules.rules}
    assert all(not last[name].when and not last[name].claims for name in last.keys() - {"merging"})


def test_a_rule_file_with_an_unknown_key_says_which(tmp_path: Path) -> None:
    path = tmp_path / "advice.yaml"
    path.write_text("rules: [{setting: rank, says: '', claim: [S1]}]\nchanges: []\n")
    with pytest.raises(InputError, match="did you mean `claims`"):
        read_rules(path)


def test_a_rank_is_a_range_while_its_claims_are_open_and_a_point_once_they_hold() -> None:
    asked = {"model": "llama-3.2-1b", "gpu": "a100-80gb", "examples": 2000}
    waiting = line(advice_for(asked, P16="not run"), "rank")
    assert waiting.text == "8 to 64, start at 16" and waiting.standing == "open" and "not run yet" in waiting.evidence
    decided = line(advice_for(asked, P16="holds", S36="holds"), "rank")
    assert decided.text == "16" and decided.choice == ()
    refuted = line(advice_for(asked, P16="wrong"), "rank")
    assert refuted.standing == "custom" and refuted.rests_on == (HABIT,) and HABIT in refuted.evidence


def test_a_range_of_one_value_is_no_range() -> None:
    roomy = line(advice_for({"model": "llama-3.1-8b", "gpu": "h200", "examples": 1_000_000}), "rank")
    assert roomy.text == "64" and roomy.choice == ()


def test_examples_are_cut_only_where_liger_recomputation_and_four_bits_do_not_do() -> None:
    asked = {"model": "llama-3.1-8b", "examples": 500, "seq_len": 8192}
    whole = advice_for(asked | {"gpu": "rtx4090"})
    assert [option.liger for option in whole.options] == [True, True] and spec_of(whole).seq_len == 8192
    assert "to be as long." in line(whole, "length").says
    cut = advice_for(asked | {"gpu": "rtx4060"})
    assert cut.options[0].changes == ("qlora", "shorter") and cut.options[0].liger
    assert "have 8,192 tokens, and is cut to fit" in line(cut, "length").says


@pytest.mark.parametrize("trainer", [None, "axolotl", "trl"])
def test_advice_and_fit_give_one_answer(trainer: Pasted | None) -> None:
    asked = {"model": "qwen3-30b-a3b", "gpu": "rtx4090", "examples": 5000, "seq_len": 300}
    advice = advice_for(asked | {"trainer": trainer})
    regime = {"as_trainer": trainer} if trainer else {"loss_path": "response_only"}
    options = {"batch_size": 16, "seq_len": 300, "rank": 16, **regime}
    card = find_gpu("rtx4090")
    (fit,) = fit_methods([describe_model("qwen3-30b-a3b")], ["qlora"], options, card)
    if trainer == "trl":  # its file cannot ask for packed experts
        assert not advice.options and fit.advice == NOTHING and NOTHING in advice.nearest[1]
    else:
        assert advice.options[0].question.beside.quantize_moe_experts and "--quantize-moe-experts" in fit.advice
        assert advice.options[0].peak_device_bytes == pytest.approx(fit.advised_device_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("gpus", "says"),
    [
        (32, "(in a step: 8 to 32, start at 16)"),
        (64, "(in a step: 64, one on each card, where at most 32 are advised)"),
    ],
)
def test_cards_that_make_more_than_the_advised_step_are_told(gpus: int, says: str) -> None:
    advice = advice_for({"model": "llama-3.2-1b", "gpu": "a100-80gb", "examples": 5000, "gpus": gpus})
    assert line(advice, "batch").text.endswith(says)


def test_where_four_bits_cost_quality_they_come_last() -> None:
    asked = {"model": "llama-3.2-1b", "gpu": "rtx4060", "examples": 5000, "priority": "memory"}
    before, after = advice_for(asked), advice_for(asked, P18="wrong")
    assert [option.method for option in before.options][:2] == ["qlora", "lora"]
    assert after.options[0].method == "lora" and after.options[-1].method == "qlora"
    assert "P18 wrong" in after.costs(after.options[-1])


def test_what_is_forgotten_is_told_with_the_method_only_while_its_verdict_stands() -> None:
    asked = {"model": "llama-3.2-1b", "gpu": "a100-80gb", "examples": 20000, "priority": "retention"}
    told = line(advice_for(asked, P7="wrong"), "method")
    assert "P7 wrong" in told.evidence and told.choice == ()
    assert line(advice_for(asked, P7="not run"), "method").standing == "open"
    assert "P7" not in line(advice_for(asked, P7="holds"), "method").claims


def test_a_condition_holds_if_all_of_it_does() -> None:
    facts = {"examples": 100, "billions": 7.0, "data_rank": 4, "priority": "quality", "method": "lora"}

    def is_for(**when: object) -> bool:
        return Rule.model_validate({"setting": "rank", "says": "", "when": when}).is_for(facts)

    held = {"examples": [0, 100], "billions": [6.9, math.inf], "data_rank": [4, 4], "method": ["full", "lora"]}
    assert is_for() and is_for(**held)
    for wrong in ({"examples": [0, 99]}, {"billions": [7.1, 9]}, {"data_rank": [5, 6]}, {"method": ["full"]}):
        assert not is_for(**held | wrong)
    with pytest.raises(ValidationError):
        is_for(tokens=[1, 2])


def test_time_is_that_of_the_model_and_with_records_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftscope.planning.forecast import Forecaster

    asked = {"model": "llama-3.2-1b", "gpu": "a100-80gb", "examples": 2000}
    predicted = advice_for(asked)
    assert "measured speeds" in line(predicted, "time").evidence
    monkeypatch.setattr(Forecaster, "measured_ratios", lambda self, spec: [1.0, 2.0])
    measured = advice_for(asked)
    low, high = measured.options[0].seconds
    assert high == pytest.approx(2 * low) and "records" in line(measured, "time").evidence
    shortest, longest = predicted.options[0].seconds
    assert shortest < low < longest


def test_the_command_speaks_to_people_and_programs_within_five_seconds(peftscope, slowness: float) -> None:
    options = ["--model", "llama-3-8b", "--gpu", "rtx4060", "--examples", "64", "--seq-len", "8000"]
    began = time.process_time()
    code, out, _ = peftscope("advise", *options, "--json")
    assert time.process_time() - began < 5 * slowness
    answer = json.loads(out)
    best = answer["options"][0]
    assert code == 0 and answer["examples"] == 64 and best["method"]["name"] == "qlora" and best["seq_len"] < 8000
    assert {"method", "rank", "learning_rate", "batch", "peak", "time"} <= {each["setting"] for each in answer["lines"]}
    code, out, _ = peftscope("advise", "--model", "llama-3.2-1b", "--gpu", "1GiB", "--examples", "10")
    assert code == 1 and "Nothing fits" in out and "larger card" in out
    small = ["--model", "llama-3.2-1b", "--gpu", "4GiB", "--examples", "10"]
    code, out, _ = peftscope("advise", *small, "--as", "axolotl")
    rows = [row for row in out.splitlines()[2:] if row.strip() and not row.startswith("  ")]
    decided = [re.split("  +", row.strip())[0] for row in rows[:4]]
    assert code == 0 and decided == ["method", "rank and alpha", "targets", "learning rate"]
    assert "SmolLM2-135M on two-digit sums: 8 seeds" in out and out.endswith("liger_fused_linear_cross_entropy: true\n")
    code, out, _ = peftscope("advise", *small, "--why")
    assert code == 0 and "learning rate" in out and "lora_r" not in out
    named = re.search(r"peftscope claims --id (\w+)", out)
    assert named and f"{named[1]} " in out.partition("Ways that fit")[0]


def as_trl_file(script: str) -> str:
    """Returns what a script gives to TRL as TRL's own file, whose keys its command line documents."""
    tree = ast.parse(script)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    given = {call.func.id: {word.arg: word.value for word in call.keywords} for call in calls}  # type: ignore[union-attr]
    start = given["SFTConfig"].pop("model_init_kwargs")
    assert isinstance(start, ast.Dict) and isinstance(start.keys[0], ast.Constant) and start.keys[0].value == "dtype"
    keys = {**given["SFTConfig"], "model_name_or_path": given["SFTTrainer"]["model"], "dtype": start.values[0]}
    names = {"r": "lora_r", "target_modules": "lora_target_modules"}
    keys |= {names.get(str(name), name): value for name, value in given.get("LoraConfig", {}).items()}
    bits = {"bnb_4bit_use_double_quant": "use_bnb_nested_quant", "load_in_4bit": "load_in_4bit"}
    keys |= {bits[str(name)]: value for name, value in given.get("BitsAndBytesConfig", {}).items() if name in bits}
    read = {name: ast.literal_eval(value) for name, value in keys.items()}
    return yaml.safe_dump({**read, "use_peft": "LoraConfig" in given})


@pytest.mark.parametrize("trainer", get_args(Pasted))
@pytest.mark.parametrize(
    ("model", "gpu", "examples", "tokens", "method"),
    [
        ("llama-3-8b", "rtx4090", 5000, 8192, "lora"),
        ("llama-3-8b", "rtx4060", 500, 512, "qlora"),
        ("llama-3.2-1b", "a100-80gb", 10**8, 512, "full"),
    ],
)
def test_the_pasted_file_is_read_back_with_the_same_peak(
    trainer: Pasted, model: str, gpu: str, examples: int, tokens: int, method: str, peftscope: Command, tmp_path: Path
) -> None:
    advice = advice_for({"model": model, "gpu": gpu, "examples": examples, "seq_len": tokens, "trainer": trainer})
    assert tokens == 512 or trainer == "trl" or advice.options[0].liger
    # axolotl trains all weights in 16 bits, of which nothing says that it costs no quality.
    assert advice.options[0].method == ("lora" if (trainer, method) == ("axolotl", "full") else method)
    for best in advice.options:
        text = replace(advice, options=(best,)).file
        assert text is not None
        path = tmp_path / "run.yaml"
        path.write_text(as_trl_file(text) if trainer == "trl" else text)
        code, out, err = peftscope("memory", "--config", str(path), "--gpu", gpu, "--json")
        answer = json.loads(out)
        assert code == 0 and answer["peak_device_bytes"] == best.peak_device_bytes, err
        doubts = [*answer["config"]["not_modelled"], *answer["config"]["may_change_memory"]]
        assert [doubt.partition(":")[0] for doubt in doubts] in ([], ["enable_liger_kernel"])  # Liger's other kernels
        keys = yaml.safe_load(path.read_text())
        assert keys["learning_rate"] == best.settings.value("learning_rate")
        assert keys["num_epochs" if trainer == "axolotl" else "num_train_epochs"] == best.settings.value("epochs")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "rtx4090", "--examples", "0"], "must be from 1 to 2,147,483,647 (got 0)"),
        (["--gpu", "", "--examples", "5"], "unknown card (got '')"),
        (["--gpu", "rtx4090", "--examples", "5", "--priority", "cheap"], "unknown (got 'cheap')"),
        (["--gpu", "rtx4090", "--examples", "5", "--as", "axolotel"], "did you mean `axolotl`?"),
        (["--gpu", "rtx4090", "--examples", "5", "--claims", "nowhere.json"], "nowhere.json"),
        (["--gpu", "rtx4090", "--examples", "5", "--seq-len", "1000000"], "seq_len: 1000000 is over the model's limit"),
    ],
)
def test_bad_input_is_a_sentence(options: list[str], says: str, peftscope: Command) -> None:
    code, _, err = peftscope("advise", "--model", "llama-3.2-1b", *options)
    assert code == 2 and says in err


@pytest.mark.parametrize("gpus", [1, 3, 5, 8])
def test_steps_on_several_cards_see_the_data_as_often_as_is_said(gpus: int) -> None:
    advice = advice_for({"model": "qwen2.5-0.5b", "gpu": "a100-80gb", "examples": 50_000, "gpus": gpus})
    for option in advice.options:
        seen = option.steps * option.question.spec.batch_size * option.question.spec.gradient_accumulation * gpus
        assert seen == pytest.approx(50_000 * option.settings.value("epochs"), rel=0.01)
    assert not advice.options[0].question.spec.checkpointing  # there is room for all activations
