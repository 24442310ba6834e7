"""One contract for every method, on the toy model; and which modules a preset means in other families."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fast_if
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3_5TextConfig

from benchmarks.tuners import listed_fields
from peftscope.data.batching import Batch, Example, tokenise, training_batches
from peftscope.data.tasks import read_split
from peftscope.errors import InputError
from peftscope.execution.merge import base_of_adapter
from peftscope.methods import METHODS
from peftscope.methods.fields import TARGET_PRESETS, adapted_modules
from peftscope.methods.loftq import float_weight
from peftscope.models.catalog import find_model
from peftscope.models.rounding import linear_layers, normal_float_levels, rounded
from peftscope.planning.checks import check_runs
from peftscope.spec import RunSpec
from peftscope.training.build import build_model
from peftscope.training.load import attention, load_base, load_tokenizer
from peftscope.training.step import TrainedModel, forward_loss, make_optimizer, train_step

TUNERS = ["vera", "oft", "ln_tuning"]
OWN = [name for name, cls in METHODS.items() if cls.trains and name != "peft"]
TRAINED = [*OWN, *(fast_if(tuner == "vera", f"peft {tuner}") for tuner in TUNERS)]
ADAPTERS = [name for name in TRAINED if name not in OWN or not METHODS[name].trains_base]
QUANTISED = [name for name in OWN if METHODS[name]().quantization()]


@pytest.fixture
def spec_of(toy: Path, make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    """Specs in fp32 where the method allows it, so that equality is equality."""

    def spec(name: str, **values: Any) -> RunSpec:
        method, _, tuner = name.partition(" ")
        if tuner:
            values = {"tuner": tuner, **listed_fields(tuner), **values}
        return make_spec(**{"precision": "bf16" if name in QUANTISED else "fp32", "method": method} | values)

    return spec


EXAMPLES: dict[tuple[str, str, int], tuple[list[Example], int]] = {}


def examples_of(spec: RunSpec) -> tuple[list[Example], int]:
    """The task's examples and the padding token, tokenised once for all tests."""
    key = spec.model, spec.task, spec.seq_len
    if key not in EXAMPLES:
        tokenizer = load_tokenizer(spec)
        examples = tokenise(read_split(spec.task, "train"), tokenizer, spec.seq_len)
        # Prompts of different lengths, so that there is padding.
        uneven = [Example(e.tokens[index % 3 :], e.prompt_length - index % 3) for index, e in enumerate(examples)]
        EXAMPLES[key] = uneven, tokenizer.pad_token_id
    return EXAMPLES[key]


def batches_of(spec: RunSpec, count: int, seed: int = 0) -> list[Batch]:
    examples, pad = examples_of(spec)
    pack_to = 48 if spec.packing else None
    stream = training_batches(examples, seed=seed, batch_size=4, pad_token_id=pad, pack_to=pack_to)
    return list(itertools.islice(stream, count))


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), attention(model, "sdpa"):
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()


def train(built: TrainedModel, spec: RunSpec, steps: int) -> list[float]:
    """Trains on one batch, and returns its losses."""
    built.model.train()
    optimizer = make_optimizer(built.model, spec)
    (batch,) = batches_of(spec, 1)
    return [train_step(built, [batch], optimizer, spec, step).nll.item() for step in range(steps)]


def trained(spec: RunSpec, steps: int) -> tuple[Any, list[float]]:
    built = build_model(load_base(spec), spec)
    return built.model, train(built, spec, steps)


@pytest.mark.parametrize("name", TRAINED)
class TestContract:
    def test_trainable_parameters_equal_the_formula(self, name: str, spec_of) -> None:
        spec = spec_of(name)
        model = build_model(load_base(spec), spec).model
        found = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert found > 0
        shape = find_model("toy").shape
        assert spec.method.trainable_parameters(shape) == (None if spec.method.name == "peft" else found)

    def test_both_loss_paths_give_the_same_loss_and_gradients(self, name: str, spec_of) -> None:
        results = []
        for path in ("hf", "response_only"):
            spec = spec_of(name, loss_path=path)
            built = build_model(load_base(spec), spec)
            model = built.model
            model.train()
            loss = forward_loss(model, batches_of(spec, 1)[0], spec).loss
            loss.backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append((loss.item(), built.loss_function.nll.item(), gradients))
        (hf_loss, hf_nll, hf_gradients), (loss, nll, gradients) = results
        tolerance = 2e-2 if name in QUANTISED else 1e-5
        assert loss == pytest.approx(hf_loss, rel=tolerance)
        assert nll == pytest.approx(hf_nll, rel=tolerance)
        assert gradients.keys() == hf_gradients.keys()
        largest = max(g.abs().max() for g in hf_gradients.values())
        assert largest > 0
        for key, gradient in gradients.items():
            rtol, atol = 10 * tolerance, float(tolerance * largest)
            torch.testing.assert_close(gradient, hf_gradients[key], rtol=rtol, atol=atol)

    def test_training_lowers_the_loss_moves_adapters_alone_and_loads_as_it_was_saved(
        self, name: str, spec_of, tmp_path: Path
    ) -> None:
        spec = spec_of(name, steps=12)
        built = build_model(load_base(spec), spec)
        before = {n: (p.detach().clone(), p.requires_grad) for n, p in built.model.named_parameters()}
        nll = train(built, spec, spec.steps)
        assert min(nll[-3:]) < nll[0]
        after = dict(built.model.named_parameters())
        moved = {n for n, (value, _) in before.items() if not torch.equal(after[n], value)}
        assert moved and moved <= {n for n, (_, is_trained) in before.items() if is_trained}

        (batch,) = batches_of(spec, 1, seed=9)
        wanted = logits_of(built.model, batch)
        spec.method.save(built.model, tmp_path)
        if spec.method.trains_base:
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        else:
            loaded = PeftModel.from_pretrained(base_of_adapter(spec), tmp_path)
        found = logits_of(loaded, batch)
        if name == "adalora":  # its export drops pruned ranks, and sums what is left in another order
            assert (found - wanted).norm() / wanted.norm() <= 1e-4
        else:
            assert torch.equal(found, wanted)

    def test_step_0_computes_what_its_base_computes(self, name: str, spec_of) -> None:
        spec = spec_of(name)
        (batch,) = batches_of(spec, 1)
        wanted = logits_of(load_base(spec), batch)
        found = logits_of(build_model(load_base(spec), spec).model, batch)[:, spec.method.logit_offset() :]
        if name not in ("loftq", "prompt-tuning", "prefix-tuning"):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        else:  # LoftQ by design (its error is tested apart), virtual tokens by nature
            assert not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)

    def test_one_seed_is_one_start_and_another_is_not(self, name: str, spec_of) -> None:
        def start(seed: int) -> list[torch.Tensor]:
            spec = spec_of(name, seed=seed)
            model = build_model(load_base(spec), spec).model
            return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]

        first = start(0)
        assert all(torch.equal(a, b) for a, b in zip(first, start(0), strict=True))
        others = [torch.equal(a, b) for a, b in zip(first, start(1), strict=True)]
        assert all(others) != spec_of(name).method.draws_start


@pytest.mark.parametrize(("start", "zero"), [("b-zero", {"lora_B"}), ("a-zero", {"lora_A"}), ("both-random", set())])
def test_loras_start_is_the_specs(start: str, zero: set[str], spec_of, tmp_path: Path) -> None:
    """The factor that is not zero is as wide as torch draws it, in the first step only the zero one gets a gradient."""
    spec = spec_of("lora", start=start)
    (batch,) = batches_of(spec, 1)
    wanted = logits_of(load_base(spec), batch)
    model = build_model(load_base(spec), spec).model
    assert torch.allclose(logits_of(model, batch), wanted, rtol=1e-4, atol=1e-4) == bool(zero)
    found = set()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            letter = name.split(".")[-3]
            spread = float(parameter.detach().std()) * (3 * parameter.shape[1]) ** 0.5
            found |= {letter} if spread == 0 else set()
            assert spread == 0 or spread == pytest.approx(1, abs=0.2)
    assert found == zero
    model.train()
    forward_loss(model, batch, spec).loss.backward()
    moving = {n.split(".")[-3] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moving == (zero or {"lora_A", "lora_B"})
    model, _ = trained(spec, 2)
    wanted = logits_of(model, batch)
    spec.method.save(model, tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(load_base(spec), tmp_path), batch), wanted)


@pytest.mark.parametrize("dimension", [1, 10, 1000])
def test_a_random_subspace_is_linear_keeps_lengths_and_reaches_every_weight(dimension: int, spec_of) -> None:
    spec = spec_of("random-subspace", dimension=dimension)
    model = build_model(load_base(spec), spec).model
    (coordinates,) = (p for p in model.parameters() if p.requires_grad)
    layers = lora_layers(model)

    def change(values: torch.Tensor) -> torch.Tensor:
        coordinates.data = values
        return torch.cat([layer.get_delta_weight("default").detach().flatten() for layer in layers])

    first, second = torch.randn(2, dimension, generator=torch.Generator().manual_seed(3))
    assert not change(torch.zeros(dimension)).any()
    torch.testing.assert_close(change(first) + 2 * change(second), change(first + 2 * second), rtol=1e-4, atol=1e-6)
    assert change(first).norm() == pytest.approx(float(first.norm()), rel=0.1)
    assert change(torch.eye(dimension)[0]).count_nonzero() / change(first).numel() > min(0.99, 4 / dimension)
    assert (change(torch.ones(dimension)) != 0).all()


def test_a_subspace_has_no_more_dimensions_than_values_to_deal_out(spec_of) -> None:
    spec = spec_of("random-subspace", dimension=100_000)
    with pytest.raises(InputError, match="raise the rank"):
        build_model(load_base(spec), spec)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_weight_gets_a_gradient_with_checkpointing(name: str, spec_of) -> None:
    if not spec_of(name).method.supports_checkpointing:
        with pytest.raises(InputError, match="checkpointing does not work"):
            spec_of(name, checkpointing=True)
        return
    spec = spec_of(name, checkpointing=True)
    model = build_model(load_base(spec), spec).model
    model.train()
    forward_loss(model, batches_of(spec, 1)[0], spec).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", QUANTISED)
def test_an_evaluation_between_two_steps_leaves_the_gradients_as_they_were(name: str, spec_of) -> None:
    spec = spec_of(name)
    (batch,) = batches_of(spec, 1)

    def gradients(evaluate: bool) -> list[torch.Tensor]:
        model = build_model(load_base(spec), spec).model
        if evaluate:
            logits_of(model, batch)
        model.train()
        forward_loss(model, batch, spec).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for before, after in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(before, after)


def test_every_bitsandbytes_option_is_the_specs(spec_of) -> None:
    from bitsandbytes.nn import Linear4bit

    for options in ({}, {"quant_type": "fp4", "double_quant": False, "compute_dtype": "fp32"}):
        spec = spec_of("qlora", **options)
        layers = [m for m in load_base(spec).modules() if isinstance(m, Linear4bit)]
        assert len(layers) == 14
        for layer in layers:
            assert layer.weight.quant_type == spec.method.quant_type
            assert layer.weight.quant_state.nested == spec.method.double_quant
            assert layer.compute_dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.method.compute_dtype]
            assert layer.weight.dtype == torch.uint8
            assert layer.support_avx512bf16_for_cpu is False


def test_normal_float_codes_of_four_bits_are_bitsandbytes_own_and_rounding_twice_changes_nothing() -> None:
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

    levels = torch.tensor(normal_float_levels(4))
    torch.testing.assert_close(levels, get_4bit_type("nf4", device="cpu"), rtol=0, atol=1e-4)
    weight = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight.flatten(), quant_type="nf4", blocksize=64, compress_statistics=False)
    torch.testing.assert_close(rounded(weight, "nf4"), dequantize_4bit(packed, state).view(96, 40), rtol=0, atol=1e-3)
    for code, levels in (("nf2", 4), ("nf3", 8)):
        once = rounded(weight, code)
        assert torch.equal(rounded(once, code), once)
        assert max(len(block.unique()) for block in once.flatten().split(64)) <= levels
    assert len(rounded(torch.randn(70), "nf2")) == 70


@pytest.mark.parametrize("name", ["qlora", "loftq", "none"])
def test_a_base_of_two_bits_is_on_its_grid_and_fits_its_saved_adapter(name: str, spec_of, tmp_path: Path) -> None:
    spec = spec_of(name, **{"base_weights" if name == "none" else "quant_type": "nf2"})
    assert spec.method.quantization() is None
    built = build_model(load_base(spec), spec).model
    inner = built.base_model.model if name != "none" else built
    layers = linear_layers(inner) if name == "none" else [m.get_base_layer() for m in lora_layers(inner)]
    assert len(layers) == 14
    assert all(torch.equal(rounded(layer.weight, "nf2"), layer.weight) for layer in layers)
    assert not torch.equal(rounded(inner.get_output_embeddings().weight, "nf2"), inner.get_output_embeddings().weight)
    if name == "none":
        return
    model, _ = trained(spec, 2)
    (batch,) = batches_of(spec, 1)
    spec.method.save(model, tmp_path)
    loaded = PeftModel.from_pretrained(base_of_adapter(spec), tmp_path)
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def test_directly_trained_weights_stay_on_their_grid_and_nothing_else_moves(spec_of) -> None:
    """Small steps of Adam are rounded away, but for the largest weight of each block; large ones are not."""
    for rate, moves in ((1e-5, False), (1e-1, True)):
        spec = spec_of("rounded", quant_type="nf2", learning_rate=rate)
        before = load_base(spec)
        model, _ = trained(spec, 2)
        pairs = list(zip(linear_layers(before), linear_layers(model), strict=True))
        assert all(torch.equal(rounded(new.weight, "nf2"), new.weight) for _, new in pairs)
        changed = [bool(((old.weight - new.weight).abs() > 1e-3).any()) for old, new in pairs]
        assert any(changed) == moves
        assert torch.equal(before.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 4, "iterations": 3}, {"iterations": 1}, {"alpha": 64, "iterations": 3}, {"quant_type": "nf2"}],
    ids=str,
)
def test_loftq_reduces_every_layers_error_at_any_scale_and_number_of_bits(options: dict[str, Any], spec_of) -> None:
    from bitsandbytes.functional import dequantize_4bit

    def values(weight: Any) -> torch.Tensor:
        state = getattr(weight, "quant_state", None)
        return weight.float() if state is None else dequantize_4bit(weight.data, state).float()

    spec = spec_of("loftq", **options)
    plain = dict(load_base(spec).named_modules())
    model = build_model(load_base(spec), spec).model
    folder = Path(model.base_model.model.config._name_or_path)
    layers = [(n, m) for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")]
    assert len(layers) == 14
    for name, layer in layers:
        weight, quantised = float_weight(folder, f"{name}.weight"), values(plain[name].weight)
        reached = values(layer.get_base_layer().weight) + layer.get_delta_weight("default").float()
        assert (weight - reached).norm() < 0.95 * (weight - quantised).norm()


def test_adalora_prunes_to_its_budget_and_keeps_its_term_apart(spec_of) -> None:
    spec = spec_of("adalora", steps=10, precision="bf16")
    built = build_model(load_base(spec), spec)
    model = built.model
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".ranknum." in n)
    model.train()
    optimizer = make_optimizer(model, spec)
    initial = spec.method.final_trainable_parameters(model)
    for step, batch in enumerate(batches_of(spec, spec.steps)):
        output = train_step(built, [batch], optimizer, spec, step)
        assert output.loss > output.nll > 0
    metrics = spec.method.metrics(model)
    assert metrics["final_rank_sum"] == metrics["rank_budget"] == 8 * 14
    assert spec.method.final_trainable_parameters(model) < initial
    masked = sum(int((p == 0).sum()) for n, p in model.named_parameters() if ".lora_E." in n)
    assert masked == (12 - 8) * 14


def test_adalora_by_magnitude_keeps_the_largest_singular_values(spec_of) -> None:
    spec = spec_of("adalora", score="magnitude")
    model = build_model(load_base(spec), spec).model.base_model
    values = {n: p for n, p in model.model.named_parameters() if ".lora_E." in n}
    with torch.no_grad():
        for seed, value in enumerate(values.values()):
            value.normal_(generator=torch.Generator().manual_seed(seed))
    sizes = torch.cat([v.detach().abs().flatten() for v in values.values()])
    smallest_kept = sizes.sort(descending=True).values[8 * 14 - 1]
    expected = {n: (v.detach().abs() >= smallest_kept).flatten().tolist() for n, v in values.items()}
    assert model.rankallocator.mask_to_budget(model.model, 8 * 14) == expected


def test_lora_plus_gives_b_the_larger_rate(spec_of) -> None:
    spec = spec_of("lora-plus")
    model = build_model(load_base(spec), spec).model
    slow, fast = make_optimizer(model, spec).param_groups
    assert fast["lr"] == pytest.approx(16 * slow["lr"])
    trained_values = sum(p.numel() for p in slow["params"] + fast["params"])
    assert trained_values == spec.method.trainable_parameters(find_model("toy").shape)


@pytest.mark.parametrize("name", [name for name in OWN if "adapter_dtype" in METHODS[name].model_fields])
def test_adapter_dtype_is_the_specs(name: str, toy: Path, make_spec) -> None:
    for dtype, wanted in (("fp32", torch.float32), ("base", torch.bfloat16)):
        spec = make_spec(method=name, adapter_dtype=dtype)
        model = build_model(load_base(spec), spec).model
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}


@pytest.mark.parametrize("name", ["lora", "adalora", "prompt-tuning"])
def test_gradient_accumulation_is_one_large_batch(name: str, spec_of) -> None:
    updates = []
    for parts in (2, 1):
        spec = spec_of(name, max_grad_norm=None, optimizer="sgd", learning_rate=1.0, gradient_accumulation=parts)
        first, second = batches_of(spec, 2)
        accumulated = [first, second] if parts == 2 else [join(first, second)]
        built = build_model(load_base(spec), spec)
        model = built.model
        model.train()
        train_step(built, accumulated, make_optimizer(model, spec), spec, step=0)
        updates.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*updates, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def join(one: Batch, other: Batch) -> Batch:
    from peftscope.data.batching import collate

    examples = []
    for batch in (one, other):
        for row in range(batch.input_ids.shape[0]):
            length = int(batch.attention_mask[row].sum())
            answer = int((batch.labels[row] != -100).sum())
            examples.append(Example(tuple(batch.input_ids[row, :length].tolist()), length - answer))
    return collate(examples, 2)


@pytest.mark.parametrize("name", ["lora", "prompt-tuning", "prefix-tuning"])
def test_answers_are_the_models_own(name: str, spec_of) -> None:
    """What lm-eval is given, by batches with padding, is the greedy continuation that single forward passes give."""
    from peftscope.evaluation.answers import score_answers

    spec = spec_of(name, generation_items=8, learning_rate=1e-2)
    model, _ = trained(spec, spec.steps)
    model.eval()
    tokenizer = load_tokenizer(spec)
    with attention(model, "sdpa"), torch.no_grad():
        for row in score_answers(model, tokenizer, spec, read_split(spec.task, "test")):
            tokens = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
            length = tokens.shape[1]
            for _ in range(8):
                logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
                if tokens[0, -1] == tokenizer.eos_token_id:
                    break
            wanted = tokenizer.decode(tokens[0, length:], skip_special_tokens=True).split("\n")[0]
            assert row["answer"].strip() == wanted.strip()


IA3_FIELDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "the paper's": ({}, {"down_proj"}),
    "everywhere": ({"targets": "all-linear"}, {"down_proj"}),
    "other inputs": ({"targets": "all-linear", "feedforward": ["up_proj", "o_proj"]}, {"up_proj", "o_proj"}),
    "outputs alone": ({"targets": "mlp", "feedforward": []}, set()),
}


@pytest.mark.parametrize("fields", IA3_FIELDS)
def test_ia3_rescales_what_the_spec_says(fields: str, spec_of) -> None:
    chosen, inputs = IA3_FIELDS[fields]
    spec = spec_of("ia3", **chosen)
    model, losses = trained(spec, 4)
    layers = {n.rpartition(".")[2]: m for n, m in model.named_modules() if hasattr(m, "ia3_l") and "layers.0." in n}
    assert {name for name, layer in layers.items() if layer.is_feedforward} == inputs
    shape = find_model("toy").shape
    assert layers.keys() == {layer.name for layer in shape.block} & set(spec.method.targets_of())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == spec.method.trainable_parameters(shape)
    assert losses[-1] < losses[0]


def test_a_target_may_be_the_module_of_one_layer(spec_of, tmp_path: Path) -> None:
    spec = spec_of("lora", rank=2, targets=["1.mlp.down_proj", "k_proj"])
    model = build_model(load_base(spec), spec).model
    adapted = {name.partition("layers.")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"1.mlp.down_proj", "0.self_attn.k_proj", "1.self_attn.k_proj"}
    spec.method.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [*spec.method.targets]
    trained_values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = find_model("toy").shape
    assert trained_values == spec.method.trainable_parameters(shape) == 2 * (192 + 64) + 2 * 2 * (64 + 32)
    refused = check_runs({"run": spec_of("lora", targets=["7.mlp.down_proj"])}, "mine.yaml")
    assert "no module of that name (got '7.mlp.down_proj')" in str(refused[0])


def test_ia3_refuses_inputs_of_what_is_no_target(make_spec) -> None:
    with pytest.raises(InputError, match="up_proj"):
        make_spec(method="ia3", targets="attention", feedforward=["up_proj"])


# Which modules a preset means in models of different families.


def test_all_linear_is_every_linear_layer_but_the_output() -> None:
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1))
        hybrid = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(num_hidden_layers=4))
    assert adapted_modules(llama, "all-linear") == sorted(TARGET_PRESETS["all-linear"])
    extra = set(adapted_modules(hybrid, "all-linear")) - set(TARGET_PRESETS["all-linear"])
    assert extra == {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
    assert adapted_modules(hybrid, ("q_proj",)) == ["q_proj"]
