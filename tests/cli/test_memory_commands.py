"""``peftscope memory`` and ``peftscope fit``: what they answer, and what they say where they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from test_memory import TRAINED, answer, letters_of, model_of, small_shape

from peftscope.hardware.cards import CONTEXT_BYTES, GPUS, Gpu, find_gpu
from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.formula.terms import DIMENSIONS
from peftscope.memory.question import ask
from peftscope.models.presets import PRESETS
from peftscope.sizing.changes import mildest_change, values_of
from peftscope.sizing.fit import Fit, fit_methods
from peftscope.words import GIB, MIB

Refusal = Callable[..., str]


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[[Any], str]:
    """Writes a config.json, from text or from what JSON can hold, and returns its path."""

    def write(content: Any) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


SAVED = ("--modules-to-save", "lm_head,embed_tokens")
ERRORS = {
    "unknown model": (["lama-2-7b"], "model: unknown model (got 'lama-2-7b')", "did you mean `llama-2-7b`?"),
    "no such folder": (["./nowhere/model"], "model: no such file or folder: ./nowhere/model", "path of a config.json"),
    "unlike any model": (["nonsense"], "got 'nonsense'", "peftscope models"),
    "model that is not here": (["nobody/nothing"], "the config.json of 'nobody/nothing'", "give a preset"),
    "unknown card": (["llama-2-7b", "--gpu", "rtx4091"], "gpu: unknown card (got 'rtx4091')", "as in 24GiB"),
    "unknown method": (["llama-2-7b", "--method", "qlra"], "method: unknown method (got 'qlra')", "`qlora`?"),
    "option of another method": (
        ["llama-2-7b", "--method", "full", "--rank", "8"],
        "rank: is not an option of the method full",
        "full has embeddings",
    ),
    "option of a method with others": (
        ["llama-2-7b", "--virtual-tokens", "8"],
        "virtual_tokens: is not an option of the method lora",
        "lora has rank, alpha, targets",
    ),
    "too long": (["llama-2-7b", "--seq-len", "4097"], "seq_len: 4097", "limit of 4096 tokens"),
    "rank over the width": (["qwen2.5-0.5b", "--rank", "129"], "rank: 129 is more than", "width, 128"),
    "no such module": (["llama-2-7b", "--targets", "q_proj,k_prj"], "has no `k_prj`", "did you mean `k_proj`?"),
    "soft cap": (["gemma-2-2b", "--attention", "sdpa"], "attention: sdpa does not apply", "use eager"),
    "no responses": (["llama-2-7b", "--response-len", "0"], "response_len: must lie between 1 and", "seq_len=512"),
    "no card": (["llama-2-7b", "--gpus", "0"], "gpus: must be at least 1", "got 0"),
    "no such precision": (["llama-2-7b", "--precision", "fp8"], "precision: Input should be", "got 'fp8'"),
    "no such file": (["nothing.json"], "model: nothing.json", "no such file"),
    "unknown padding": (["qwen2.5-0.5b", "--padding", "all"], "padding: ", "'none' or 'some'"),
    "norms in fp32": (
        ["qwen2.5-0.5b", "--method", "qlora", "--kbit-preparation", "trl"],
        "kbit_preparation=trl",
        "use autocast=true",
    ),
    "two spellings of autocast": (
        ["qwen2.5-0.5b", "--precision", "fp32", "--autocast"],
        "autocast",
        "precision=amp is fp32 weights under autocast",
    ),
    "amp over 4 bits": (["qwen2.5-0.5b", "--method", "qlora", "--precision", "amp"], "amp", "use bf16 with autocast"),
    "modules beside no adapter": (["llama-3.2-1b", "--method", "full", *SAVED], "modules_to_save: ", ""),
    "modules beside prompts": (["llama-3.2-1b", "--method", "prompt-tuning", *SAVED], "modules_to_save: ", ""),
    "their precision": (["llama-3.2-1b", *SAVED, "--modules-to-save-dtype", "fp32"], "modules_to_save_dtype: ", ""),
    "steps of nothing": (["llama-3.2-1b", "--eval-accumulation-steps", "4"], "eval_accumulation_steps: ", ""),
    "no hub id": (["models/foo/bar"], "model: there is no 'models/foo/bar' here", "config.json"),
    "no such method": (["--config", "qlora.yml", "--method", "bogus"], "method: unknown method (got 'bogus')", ""),
    "too much": (["llama-2-7b", "--eval-gathers-logits", "9" * 400], "eval_gathers_logits", ""),
}
FIT_ERRORS = {
    "no model": (["--gpu", "24GiB"], "model: none given", "peftscope fit --gpu 24GiB llama-2-7b"),
    "no models": (["--gpu", "24GiB", "--models", " , "], "model: none given", "peftscope fit --gpu 24GiB llama-2-7b"),
    "unknown model": (["--gpu", "24GiB", "--models", "lama-3-8b"], "got 'lama-3-8b'", "did you mean `llama-3-8b`?"),
    "unknown method": (["llama-2-7b", "--gpu", "24GiB", "--methods", "lora,qlra"], "got 'qlra'", "`qlora`?"),
    "rank": (["llama-2-7b", "--gpu", "24GiB", "--methods", "adalora", "--rank", "0"], "rank: must be at least 1", "0"),
}


@pytest.mark.parametrize(
    ("arguments", "what", "remedy"),
    [(["memory", *words], *said) for words, *said in ERRORS.values()]
    + [(["fit", *words], *said) for words, *said in FIT_ERRORS.values()],
    ids=[*ERRORS, *(f"fit, {name}" for name in FIT_ERRORS)],
)
def test_a_wrong_question_gets_one_line(arguments: list[str], what: str, remedy: str, refusal: Refusal) -> None:
    for name, content in {
        "qlora.yml": "a: 1\n",
    }.items():
        Path(name).write_text(content)
    message = refusal(*arguments)
    assert what in message and remedy in message


LLAMA = small_shape().to_config()
CONFIGS = {
    "not JSON": ("{", "not valid JSON"),
    "a list": ([], "has no `model_type` -> give the config.json of a causal model"),
    "no model_type": ({"hidden_size": 64}, "has no `model_type` -> give the config.json of a causal model"),
    "no layers": ({k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}, "`num_hidden_layers` is missing"),
    "text for a number": ({**LLAMA, "vocab_size": "many"}, "vocab_size: Input should be a valid integer"),
    "heads in text": ({**LLAMA, "num_attention_heads": "4"}, ""),
    "no width": ({**LLAMA, "hidden_size": None}, ""),
    "heads that do not divide": ({**LLAMA, "num_key_value_heads": 3}, ""),
    "a limit that is no number": ({"model_type": "gpt2", "max_position_embeddings": "many"}, ""),
}


@pytest.mark.parametrize(("config", "what"), CONFIGS.values(), ids=CONFIGS)
def test_a_broken_config_gets_one_line(config: Any, what: str, refusal: Refusal, config_of) -> None:
    path = config_of(config)
    message = refusal("memory", path)
    assert what in message and path in message
    assert not any(empty in message for empty in (": :", "Value error"))


def test_layers_of_gpt_2_are_packed_in_four_bits_too(peftscope: Command, config_of) -> None:
    path = config_of({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 256})
    assert "quantised weights" in peftscope("memory", path, "--method", "qlora", "--seq-len", "32")[1]


def test_a_model_of_an_unknown_kind_is_simulated_and_the_answer_says_so(peftscope: Command, config_of) -> None:
    path = config_of({**LLAMA, "model_type": "stablelm", "num_key_value_heads": 4, "max_position_embeddings": 64})
    code, output, _ = peftscope("memory", path, "--seq-len", "32")
    assert code == 0
    said = " ".join(output.split())
    assert f"simulated on tensors without data, because {path} has no closed form" in said
    assert "because model_type 'stablelm' is not one of llama, mistral, qwen2" in said
    (row,) = json.loads(peftscope("fit", path, "--gpu", "1GiB", "--methods", "lora", "--seq-len", "32", "--json")[1])
    assert (row["how"], row["fits"], row["largest_batch_size"]) == ("simulation", "yes", None)


def test_models_are_listed_with_the_code_that_lists_their_shape(peftscope: Command) -> None:
    code, output, _ = peftscope("models")
    assert code == 0
    rows = json.loads(peftscope("models", "--json")[1])
    assert [row["name"] for row in rows] == list(PRESETS)
    for row in rows:
        assert row["name"] in output and row["source"].split()[0] in output
        assert PRESETS[row["name"]].shape.model_dump() == row["shape"]


def test_json_has_the_stable_keys(peftscope: Command) -> None:
    code, output, message = peftscope("memory", "smollm2-135m", "--json")
    found = json.loads(output)
    assert (code, message) == (0, "")
    assert found == answer("smollm2-135m").to_json() | {"terms": found["terms"]}
    assert list(found)[:5] == ["model", "method", "how", "parameters", "trainable_parameters"]
    kinds = {int: "peak_allocated_bytes peak_reserved_bytes peak_device_bytes", str: "binding_phase"}
    kinds |= {dict: "phases components modules dimensions", list: "assumptions terms"}
    for kind, keys in kinds.items():
        assert all(isinstance(found[key], kind) and found[key] for key in keys.split()), keys
    assert list(found["phases"]) == ["load", "forward", "backward", "optimizer"]


OPTIONS = {
    "lora": {"rank": 5, "alpha": 3.0, "targets": "mlp", "dropout": 0.1, "adapter_dtype": "base", "batch_size": 3}
    | {"precision": "amp", "optimizer": "adamw_8bit", "loss_path": "response_only", "attention": "eager"},
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


SAID_TOO = "phases", "peak_device_bytes", "headroom_bytes", "missing_bytes", "fits"
"""Keys that ``memory`` and ``fit`` both have."""


def test_fit_speaks_json_about_several_models(peftscope: Command, config_of) -> None:
    paths = [config_of(small_shape(num_layers=layers).to_config()) for layers in (1, 2)]
    options = ["--gpu", "1GiB", "--evaluation", "--json"]
    code, output, _ = peftscope("fit", "--models", ",".join(paths), "--methods", "full,ia3", *options)
    assert code == 0
    found = json.loads(output)
    assert [(one["model"], one["method"]) for one in found] == [(p, m) for p in paths for m in ("full", "ia3")]
    for one in found:
        assert list(one) == [*Fit.__dataclass_fields__, "tokens_per_second"]
        assert one["capacity_bytes"] == GIB
        assert one["headroom_bytes"] == GIB - one["peak_device_bytes"]
        assert one["fits"] == "yes"
        assert one["largest_batch_size"] >= 1
        assert one["advice"] == ""
        said = json.loads(peftscope("memory", one["model"], "--method", one["method"], *options)[1])
        assert [said[key] for key in SAID_TOO] == [one[key] for key in SAID_TOO]


def test_fit_takes_every_method_that_trains_and_shows_a_table(peftscope: Command, config_of) -> None:
    path = config_of(small_shape(num_layers=1, max_seq_len=64).to_config())
    code, output, _ = peftscope("fit", path, "--gpu", "0.55GiB", "--rank", "4", "--seq-len", "32")
    assert code == 0
    lines = [line.split() for line in output.splitlines() if "MiB" in line]
    rows = [(line, mark) for line in lines for mark in ("yes", "tight") if mark in line]
    assert [line[line.index(mark) - 3] for line, mark in rows] == TRAINED


@pytest.mark.parametrize(
    ("options", "cannot"),
    [
        (["--seq-len", "64"], {"prompt-tuning", "prefix-tuning"}),
        (["--precision", "amp"], {"qlora", "loftq"}),
        (["--packed"], {"prompt-tuning", "prefix-tuning"}),
    ],
    ids=["short sequences", "amp", "packed"],
)
def test_a_method_that_cannot_run_as_asked_says_why_and_the_others_are_answered(
    options: list[str], cannot: set[str], peftscope: Command, config_of
) -> None:
    asked = ["fit", config_of(small_shape(num_layers=1, max_seq_len=64).to_config()), "--gpu", "0.5GiB", *options]
    asked += [] if "--seq-len" in options else ["--seq-len", "32"]
    asked += ["--rank", "4", "--methods", "lora,qlora,loftq,prompt-tuning,prefix-tuning"]
    code, output, _ = peftscope(*asked, "--json")
    rows = {row["method"]: row for row in json.loads(output)}
    assert code == 0 and len(rows) == 5
    assert {name for name, row in rows.items() if row["advice"].startswith("cannot run as asked: ")} == cannot
    for name in cannot:
        assert (rows[name]["fits"], rows[name]["peak_device_bytes"], rows[name]["phases"]) == ("no", None, {})
    code, _, message = peftscope(*asked[:-1], ",".join(cannot))
    assert code == 2 and message


def test_fit_takes_the_options_of_methods(peftscope: Command) -> None:
    ask = ["fit", "qwen2.5-0.5b", "--gpu", "24GiB", "--json", "--method", "lora,adalora", "--targets", "mlp"]
    few, many = (
        json.loads(peftscope(*ask, "--rank", "256", "--alpha", "16", "--dropout", dropout)[1])
        for dropout in ("0", "0.1")
    )
    for less, more in zip(few, many, strict=True):
        assert less["peak_allocated_bytes"] < more["peak_allocated_bytes"]
        assert less["largest_rank"] == 896
        assert sum(less["components"].values()) == less["phases"][less["binding_phase"]] == less["peak_allocated_bytes"]


SMALL_MODEL = model_of(PRESETS["smollm2-135m"][1].model_copy(update={"num_layers": 2}))


def device_bytes(options: dict[str, Any], **changes: Any) -> int:
    return peaks_by_formula(ask(SMALL_MODEL, options | changes), evaluation=False).device_bytes


def fit_of(method: str, capacity: int, **options: Any) -> Fit:
    (fit,) = fit_methods([SMALL_MODEL], [method], options, Gpu("a card", capacity), 1)
    return fit


def test_the_largest_sizes_of_a_method_are_the_same_whichever_others_are_asked() -> None:
    def longest(*methods: str) -> int | None:
        asked = fit_methods([describe_model("qwen2.5-0.5b")], list(methods), {}, find_gpu("rtx4090"))
        return list(asked)[-1].largest_seq_len

    assert longest("lora", "qlora") == longest("qlora")


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "adalora", "prefix-tuning"])
@pytest.mark.parametrize(
    ("what", "value", "limit"), [("batch_size", 23, 4096), ("seq_len", 901, 8192), ("rank", 57, 192)]
)
def test_the_largest_fits_and_one_more_does_not(method: str, what: str, value: int, limit: int) -> None:
    if what == "rank" and method in ("full", "prefix-tuning"):
        assert fit_of(method, 10 * GIB).largest_rank is None
        return
    options, field = {"method": method}, "init_r" if (what, method) == ("rank", "adalora") else what
    capacity = device_bytes(options, **{field: value})
    largest = getattr(fit_of(method, capacity), f"largest_{what}")
    assert 1 < largest < limit
    assert device_bytes(options, **{field: largest}) <= capacity < device_bytes(options, **{field: largest + 1})


def test_with_room_for_everything_the_limits_are_the_largest() -> None:
    fit = fit_of("lora", 10**15)
    assert (fit.largest_batch_size, fit.largest_seq_len, fit.largest_rank) == (4096, 8192, 192)
    assert fit.fits == "yes"


def test_with_room_for_nothing_there_is_no_largest() -> None:
    fit = fit_of("lora", 100 * MIB)
    assert (fit.largest_batch_size, fit.largest_seq_len, fit.largest_rank) == (None, None, None)
    assert fit.fits == "no"
    assert fit.headroom_bytes < 0 < fit.missing_bytes
    assert fit.advice == "a smaller model, a larger card, or --gpus"


def test_it_is_tight_where_the_allocator_has_to_give_back_what_it_caches(peftscope: Command) -> None:
    roomy = fit_of("full", 10**12)
    least = roomy.peak_allocated_bytes + CONTEXT_BYTES
    cards = (least - 1, least, roomy.peak_device_bytes - 1, roomy.peak_device_bytes)
    found = [fit_of("full", card) for card in cards]
    assert [fit.fits for fit in found] == ["no", "no", "tight", "yes"]  # the second one's fragments leave no room
    assert found[0].missing_bytes == 1 < found[1].missing_bytes and found[2].missing_bytes == 0
    assert found[2].largest_batch_size is None and found[2].largest_tight_batch_size == 1
    said = [peftscope("memory", "smollm2-135m", "--method", "full", "--gpu", f"{card}GiB")[1] for card in (1.97, 1.977)]
    assert [("are missing" in text, "expandable_segments" in text) for text in said] == [(True, False), (True, True)]


def test_the_drivers_reserve_is_not_for_runs(peftscope: Command) -> None:
    (row,) = json.loads(peftscope("fit", "smollm2-135m", "--gpu", "t4", "--methods", "lora", "--json")[1])
    assert row["capacity_bytes"] == int(14.56 * GIB) < GPUS["t4"].memory_bytes
    assert row["headroom_bytes"] == row["capacity_bytes"] - row["peak_device_bytes"]
    for name, gpu in GPUS.items():
        assert 0.96 < gpu.usable_bytes / gpu.memory_bytes < 1, name
        assert gpu.reserve_source


def test_a_table_says_what_was_assumed_and_the_peak_after_the_advice(peftscope: Command) -> None:
    ask_for = ["fit", "qwen2.5-0.5b", "--gpu", "9GiB", "--methods", "lora,adalora", "--batch-size", "4"]
    said = peftscope(*ask_for)[1]
    assert "assuming batch_size=4, seq_len=512, precision=bf16, loss_path=hf, rank=8, adalora 12; " in said
    for column in ("largest batch", "largest length", "largest rank", "what to do", "peak then"):
        assert column in said
    for row in json.loads(peftscope(*ask_for, "--json")[1]):
        assert row["advice"].startswith("--loss liger")
        options = advised(row["advice"]) | {"method": row["method"]}
        after = ask(describe_model("qwen2.5-0.5b"), {"batch_size": 4} | options, gpu=Gpu("a card", 9 * GIB))
        assert row["advised_device_bytes"] == peaks_by_formula(after, evaluation=False).device_bytes < 9 * GIB


def test_a_smaller_batch_comes_with_accumulation_and_what_is_so_already_is_not_advised() -> None:
    spec = ask(SMALL_MODEL, {"batch_size": 4, "gradient_accumulation": 2, "seq_len": 128, "method": "lora"}).spec
    tried: list[dict[str, Any]] = []
    assert mildest_change(lambda changes: tried.append(dict(changes)) or False, values_of(spec, {}, {}, {})) is None
    assert tried[0] == {"checkpointing": True}
    assert tried[1:3] == [{"batch_size": size, "gradient_accumulation": 8 // size} for size in (2, 1)]
    assert all(not changes.keys() & {"loss", "seq_len"} for changes in tried)
    assert len({str(changes) for changes in tried}) == len(tried)


def advised(words: str) -> dict[str, Any]:
    """The options that advice stands for, as someone who follows it would write them."""
    found: dict[str, Any] = {}
    parts = iter(words.split())
    for part in parts:
        name = part.removeprefix("--").replace("-", "_")
        value = True if name == "checkpointing" else next(parts)
        found[name] = int(value) if isinstance(value, str) and value.isdigit() else value
    return found


@pytest.mark.parametrize("method", ["full", "lora"])
def test_advice_fits_whoever_follows_it(method: str) -> None:
    """The rank that was asked for stays where another method is advised."""
    options = {"batch_size": 4, "seq_len": 500, "rank": 128}
    whole, said = fit_of(method, 1, **options).peak_device_bytes, set()
    for share in range(1, 16, 2):
        capacity = CONTEXT_BYTES + (whole - CONTEXT_BYTES) * share // 16
        advice = fit_of(method, capacity, **options).advice
        said.add(advice)
        if advice.startswith("--"):
            changed = {**options, "method": method, **advised(advice)}
            assert fit_of(changed.pop("method"), capacity, **changed).fits != "no", advice
    assert len(said) > 2
