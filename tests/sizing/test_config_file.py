"""Questions about memory from trainers' files: what is understood, ignored, assumed and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command

from peftscope.errors import InputError
from peftscope.memory.answer import answer_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.beside import BESIDE_OPTIONS
from peftscope.memory.question import METHOD_OPTIONS, SPEC_OPTIONS, Question, ask
from peftscope.methods import METHODS
from peftscope.models.presets import PRESETS
from peftscope.sizing.config_file import Reading, question_of, read_config
from peftscope.sizing.reading import Row
from peftscope.sizing.trainers import TRAINERS

FILES: dict[str, dict[str, Any]] = yaml.safe_load(r"""
axolotl:
  {base_model: NousResearch/Meta-Llama-3-8B, load_in_8bit: false, load_in_4bit: true, adapter: qlora,
    lora_model_dir: null, sequence_len: 4096, sample_packing: true, micro_batch_size: 2, gradient_accumulation_steps: 4,
    lora_r: 32, lora_alpha: 16, lora_target_linear: true, optimizer: paged_adamw_32bit, learning_rate: 2e-5,
    bf16: auto, gradient_checkpointing: true, attn_implementation: flash_attention_2, special_tokens: {
    pad_token: <|end_of_text|>}}
LLaMA-Factory:
  {model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct, stage: sft, finetuning_type: lora, lora_rank: '8',
    template: qwen, per_device_train_batch_size: 1, gradient_accumulation_steps: 8, bf16: true}
TRL:
  {model_name_or_path: Qwen/Qwen2.5-0.5B, dataset_name: stanfordnlp/imdb, learning_rate: 0.0001}
alignment-handbook:
  {model_name_or_path: mistralai/Mistral-7B-v0.1, torch_dtype: bfloat16, attn_implementation: flash_attention_2,
    load_in_4bit: true, use_peft: true, lora_r: 16, lora_target_modules: [q_proj, v_proj], dataset_mixture: {
    test_split_size: 1000}, max_seq_length: 2048, per_device_train_batch_size: 4, per_device_eval_batch_size: 2,
    eval_strategy: epoch}
torchtune:
  {model: {_component_: torchtune.models.llama3_1.qlora_llama3_1_8b, lora_attn_modules: [q_proj,
    output_proj], apply_lora_to_mlp: true}, tokenizer: {path: tokenizer.model, max_seq_len: 1024},
    dataset: {packed: false}, batch_size: 2, run_val_every_n_steps: 10, batch_size_val: '${batch_size}',
    optimizer: {_component_: torch.optim.AdamW, fused: true, lr: 3e-4},
    loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss},
    dtype: bf16, enable_activation_checkpointing: true}
PEFT:
  {peft_type: LORA, base_model_name_or_path: meta-llama/Llama-3.2-3B, r: 32, target_modules: null}
""")

ASKED: dict[str, tuple[str, dict[str, Any]]] = yaml.safe_load("""
axolotl:
  [llama-3-8b, {method: qlora, rank: 32, alpha: 16, batch_size: 2, seq_len: 4096, gradient_accumulation: 4,
    optimizer: paged_adamw, checkpointing: true, attention: flash_attention_2, autocast: true,
    keep_logits: false}]
LLaMA-Factory:
  [qwen2.5-1.5b, {method: lora, rank: 8, alpha: 16, seq_len: 2048, gradient_accumulation: 8,
    checkpointing: true, optimizer_implementation: fused, autocast: true, keep_logits: false}]
TRL:
  [qwen2.5-0.5b, {method: full, precision: amp, batch_size: 8, seq_len: 1024, checkpointing: true,
    optimizer_implementation: fused, keep_logits: false}]
alignment-handbook:
  [mistral-7b, {method: qlora, rank: 16, alpha: 32, dropout: 0.05, targets: [q_proj, v_proj],
    double_quant: false, batch_size: 4, eval_batch_size: 2, seq_len: 2048, checkpointing: true,
    attention: flash_attention_2, optimizer_implementation: fused, autocast: true, adapter_dtype: base,
    keep_logits: false}]
torchtune:
  [llama-3.1-8b, {method: qlora, adapter_dtype: base, batch_size: 2, eval_batch_size: 2, seq_len: 1024,
    targets: [q_proj, o_proj, gate_proj, up_proj, down_proj], checkpointing: true, optimizer_implementation: fused,
    keep_logits: false}]
PEFT:
  [llama-3.2-3b, {method: lora, rank: 32, alpha: 8, targets: minimal, batch_size: 4, seq_len: 768}]
""")
"""The question that each file asks, as one would ask it by hand."""

NEEDED: dict[str, dict[str, Any]] = {"PEFT": {"batch_size": 4, "seq_len": 768}}
"""The options that a trainer's file never has."""


def read(folder: Path, content: Any, given: dict[str, Any] | None = None, name: str = "run.yaml") -> Reading:
    path = folder / name
    path.write_text(json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content, sort_keys=False))
    return read_config(path, given or {})


def question(folder: Path, content: Any, gpus: int | None = None, **given: Any) -> Question:
    return question_of(read(folder, content, given), gpus=gpus)


def complaint(folder: Path, content: Any, **given: Any) -> str:
    with pytest.raises(InputError) as error:
        question(folder, content, **given)
    return str(error.value)


@pytest.mark.parametrize("trainer", FILES)
def test_a_file_asks_what_one_would_ask_by_hand_and_every_key_is_named(trainer: str, tmp_path: Path) -> None:
    reading = read(tmp_path, FILES[trainer], NEEDED.get(trainer))
    assert reading.trainer == trainer
    understood = {line.split(":")[0] for line in reading.understood}
    assert not understood & set(reading.ignored)
    assert set(reading.values) <= understood | set(reading.ignored)
    spec = question_of(reading, gpus=None).spec
    model, options = ASKED[trainer]
    by_hand = ask(describe_model(model), options).spec
    assert spec.model_dump(exclude={"model"}) == by_hand.model_dump(exclude={"model"})


def test_flash_attention_packs_without_a_mask_and_sdpa_with_one(tmp_path: Path) -> None:
    assert not question(tmp_path, FILES["axolotl"]).spec.packing
    assert question(tmp_path, FILES["axolotl"] | {"attn_implementation": "sdpa"}).spec.packing


def test_a_saving_that_is_not_modelled_is_said(tmp_path: Path) -> None:
    assert "loss._component_" in read(tmp_path, FILES["torchtune"]).not_modelled[0]
    off, on = (read(tmp_path, FILES["TRL"] | {"use_liger_kernel": on}).not_modelled for on in (False, True))
    assert not off and "use_liger_kernel: Liger's norms" in on[0]
    assert any(line.startswith("loss=chunked: TRL 1.16.0") for line in read(tmp_path, FILES["TRL"]).assumed)


FUSED = {"LLaMA-Factory": ("enable_liger_kernel", "liger"), "axolotl": ("cut_cross_entropy", "cut-cross-entropy")}


@pytest.mark.parametrize("trainer", FUSED)
def test_a_fused_loss_is_asked_about(trainer: str, tmp_path: Path) -> None:
    key, loss = FUSED[trainer]
    assert question(tmp_path, FILES[trainer] | {key: True}).beside.loss == loss
    assert question(tmp_path, FILES[trainer] | {key: True}, loss="plain").beside.loss == "plain"
    assert question(tmp_path, FILES[trainer] | {key: False}).beside.loss == "plain"


def test_a_fused_loss_that_a_family_cannot_have_is_said(tmp_path: Path) -> None:
    gemma = {"use_liger_kernel": True, "model_name_or_path": "google/gemma-2-2b"}
    readings = {trainer: read(tmp_path, FILES[trainer] | gemma) for trainer in ("LLaMA-Factory", "TRL")}
    losses = [question_of(reading, gpus=None).beside.loss for reading in readings.values()]
    assert losses == ["plain", "chunked"]  # TRL's own, whatever Liger's key says
    assert "not modelled for gemma2" in readings["LLaMA-Factory"].not_modelled[-1]


SAVED = dict.fromkeys(("axolotl", "alignment-handbook"), "lora_modules_to_save")
SAVED |= {"LLaMA-Factory": "additional_target", "PEFT": "modules_to_save"}


@pytest.mark.parametrize("trainer", SAVED)
def test_modules_beside_the_adapter(trainer: str, tmp_path: Path) -> None:
    asked = question(
        tmp_path, FILES[trainer] | {SAVED[trainer]: ["lm_head", "embed_tokens"]}, **NEEDED.get(trainer, {})
    )
    width = "fp32" if trainer == "LLaMA-Factory" else "base"
    assert asked.saved == {"embed_tokens": width, "lm_head": width}
    assert not question(tmp_path, FILES[trainer] | {SAVED[trainer]: []}, **NEEDED.get(trainer, {})).saved


def test_full_fine_tuning_of_llama_factory_has_fp32_weights_unless_pure(tmp_path: Path) -> None:
    full = FILES["LLaMA-Factory"] | {"finetuning_type": "full"}
    assert question(tmp_path, full).spec.precision == "amp"
    assert question(tmp_path, full | {"pure_bf16": True}).spec.precision == "bf16"


def test_adapters_of_peft(tmp_path: Path) -> None:
    def method(**keys: Any) -> Any:
        return question(tmp_path, FILES["PEFT"] | keys, **NEEDED["PEFT"]).spec.method

    assert method(use_dora=True).name == "dora"
    assert method(init_lora_weights="pissa_niter_4").name == "pissa"
    assert method(peft_type="PROMPT_TUNING", num_virtual_tokens=20).virtual_tokens == 20
    qwen = method(peft_type="IA3", base_model_name_or_path="Qwen/Qwen2.5-7B")
    assert qwen.targets == ("down_proj", "q_proj", "v_proj")
    assert "bias" in complaint(tmp_path, FILES["PEFT"] | {"bias": "all"}, **NEEDED["PEFT"])
    phi = FILES["PEFT"] | {"base_model_name_or_path": "microsoft/Phi-3-mini-4k-instruct"}
    assert "--targets" in complaint(tmp_path, phi, **NEEDED["PEFT"])


def test_companions_of_an_adapter_lie_beside_and_above(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "lora"
    folder.mkdir(parents=True)
    defaults = {"model_id": "meta-llama/Llama-3.2-3B", "max_seq_length": 768, "batch_size": 4, "dtype": "float32"}
    (tmp_path / "default_training_params.json").write_text(json.dumps(defaults))
    (folder / "training_params.json").write_text(json.dumps({"batch_size": 2, "optimizer_kwargs": {"lr": "1e-3"}}))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": None, "r": 4, "target_modules": None}
    spec = question_of(read(folder, adapter, name="adapter_config.json"), gpus=None).spec
    assert (spec.batch_size, spec.seq_len, spec.precision, spec.method.name) == (2, 768, "fp32", "lora")
    (folder / "adapter_config.json").unlink()
    assert question_of(read_config(folder / "training_params.json", {}), gpus=None).spec.method.name == "full"


def test_cards_come_from_a_companion_or_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    zero = {"zero_optimization": {"stage": 3}}
    (tmp_path / "ds" / "zero3.json").write_text(json.dumps(zero))
    sharded = FILES["LLaMA-Factory"] | {"deepspeed": "ds/zero3.json"}
    assert "deepspeed: shards over cards" in complaint(tmp_path, sharded)
    assert "--gpus" in complaint(tmp_path, FILES["LLaMA-Factory"] | {"deepspeed": zero})
    (tmp_path / "recipes").mkdir()
    assert question(tmp_path, sharded, gpus=4).gpus == question(tmp_path / "recipes", sharded, gpus=4).gpus == 4
    assert "no such file" in complaint(tmp_path, FILES["LLaMA-Factory"] | {"deepspeed": "zero3.json"})
    accelerate = {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_offload_params": True}}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(accelerate))
    reading = read(tmp_path, FILES["TRL"] | {"accelerate_config": "fsdp.yaml"})
    assert question_of(reading, gpus=None).gpus == 8
    assert question_of(reading, gpus=None).beside.offload == "parameters"
    zero["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}}
    assert question(tmp_path, FILES["LLaMA-Factory"] | {"deepspeed": zero}, gpus=2).beside.offload == "optimizer"
    fsdp = FILES["axolotl"] | {"fsdp": ["full_shard", "auto_wrap"]}
    assert question(tmp_path, fsdp | {"fsdp_version": 2}, gpus=2).beside.sharding == "fsdp2"
    assert question(tmp_path, fsdp, gpus=2).beside.sharding == "fsdp1"
    assert question(tmp_path, FILES["TRL"] | {"fsdp": "full_shard"}, gpus=2).beside.sharding == "fsdp2"
    assert "fsdp: shards over cards" in complaint(tmp_path, fsdp)
    own = {"fsdp_config": {"activation_checkpointing": True}, "gradient_checkpointing": False, "dp_shard_size": 4}
    assert (question(tmp_path, fsdp | own).spec.checkpointing, question(tmp_path, fsdp | own).gpus) == (True, 4)
    tune = FILES["torchtune"] | {"custom_sharded_layers": ["output"]}
    assert "--gpus" in complaint(tmp_path, tune)


@pytest.mark.parametrize(
    ("inner", "gpus", "sharding"),
    [
        ({"fsdp_sharding_strategy": "FULL_SHARD"}, 4, "fsdp1"),
        ({"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, 1, "zero3"),
        ({"fsdp_sharding_strategy": "NO_SHARD"}, 1, "zero3"),
        ({"fsdp_sharding_strategy": 2}, 1, "zero3"),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": True}, 4, "fsdp2"),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": False}, 1, "zero3"),
    ],
    ids=str,
)
def test_weights_are_shared_by_the_strategies_that_share_them(
    tmp_path: Path, inner: dict[str, Any], gpus: int, sharding: str
) -> None:
    accelerate = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": inner}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(accelerate))
    trl = question(tmp_path, FILES["TRL"] | {"accelerate_config": "fsdp.yaml"})
    own = {key.removeprefix("fsdp_").replace("version", "fsdp_version"): value for key, value in inner.items()}
    axolotl = question(tmp_path, FILES["axolotl"] | {"fsdp_config": own}, gpus=4)
    for found in (trl, axolotl):
        assert (found.gpus, found.beside.sharding) == (gpus, sharding)


@pytest.mark.parametrize(
    ("zero", "bucket"),
    [
        ({}, 500_000_000),
        ({"reduce_bucket_size": 2e8, "overlap_comm": True}, 400_000_000),
        ({"reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}}, 0),
    ],
    ids=str,
)
def test_stage_two_of_deepspeed_has_buffers_of_its_own(tmp_path: Path, zero: dict[str, Any], bucket: int) -> None:
    file = FILES["LLaMA-Factory"] | {"deepspeed": {"zero_optimization": {"stage": 2, **zero}}}
    found = question(tmp_path, file, gpus=4)
    assert (found.gpus, found.beside.sharding, found.beside.reduce_bucket) == (4, "zero2", bucket)
    assert found.spec.method.adapter_dtype == "base"  # DeepSpeed casts the whole module
    assert found.beside.offload == ("optimizer" if "offload_optimizer" in zero else "none")
    assert question(tmp_path, FILES["TRL"] | {"accelerate_config": "zero2"}, gpus=2).beside.sharding == "zero2"
    file["deepspeed"]["zero_optimization"]["reduce_bucket_size"] = "many" if bucket else True
    assert "reduce_bucket_size must be a number" in complaint(tmp_path, file)
    file["deepspeed"]["zero_optimization"] = {"stage": 2, "contiguous_gradients": False}
    assert "contiguous_gradients: false may change memory" in read(tmp_path, file).not_modelled[0]


@pytest.mark.parametrize(
    "more", [{"deepspeed": {"zero_optimization": {"stage": 1}}}, {"accelerate_config": "multi_gpu"}], ids=str
)
def test_cards_with_all_weights_are_answered_for_one(tmp_path: Path, more: dict[str, Any]) -> None:
    reading = read(tmp_path, FILES["TRL"] | more)
    assert question_of(reading, gpus=4).gpus == 1
    assert any("each of the 4 cards has all weights" in line for line in reading.assumed)


@pytest.mark.parametrize(
    ("more", "each"),
    [
        ({"bf16": "auto"}, 16),
        ({"bf16": "auto", "fsdp_version": 2}, 16),
        ({"bf16": "full"}, 8),
        ({"bf16": False, "fp16": False}, 16),  # all in 32 bits
    ],
    ids=str,
)
def test_shards_of_trained_weights_are_in_32_bits_in_mixed_precision(tmp_path, more: dict[str, Any], each: int) -> None:
    asked = {"base_model": "meta-llama/Llama-3.2-1B", "optimizer": "adamw_torch", "sequence_len": 64}
    axolotl = asked | {"micro_batch_size": 1, "fsdp": ["full_shard"], "sample_packing": False} | more
    for cards in (1, 4):
        answer = answer_by_formula(question(tmp_path, axolotl, gpus=cards))
        kept = sum(answer.components[kind] for kind in ("weights", "gradients", "optimizer states"))
        assert kept == pytest.approx(each * answer.parameters / cards, rel=1e-3)


def test_a_companion_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    for kind, inner in (("FSDP", {"fsdp_config": ["a"]}), ("DEEPSPEED", {"deepspeed_config": "hello"})):
        (tmp_path / "acc.yaml").write_text(yaml.safe_dump({"distributed_type": kind, "num_processes": 2} | inner))
        assert "must be a mapping" in complaint(tmp_path, FILES["TRL"] | {"accelerate_config": "acc.yaml"})
    (tmp_path / "training_params.json").write_text("[1]")
    assert "training_params.json: must be a mapping" in complaint(tmp_path, FILES["PEFT"])


def test_a_local_model_lies_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    shape = describe_model("qwen2.5-0.5b").config
    (tmp_path / "base" / "config.json").write_text(json.dumps(shape))
    assert question(tmp_path, FILES["TRL"] | {"model_name_or_path": "./base"}).model.shape is not None
    (tmp_path / "base" / "config.json").write_text(json.dumps(describe_model("mixtral-8x7b").config))
    assert question(tmp_path, FILES["TRL"] | {"model_name_or_path": "./base"}).model.shape.experts


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "8-bit base without an adapter": (
        {"base_model": "qwen2.5-0.5b", "sequence_len": 512, "load_in_8bit": True},
        "full on a base stored as int8 is not modelled",
    ),
    "3 bits of LLaMA-Factory": (FILES["LLaMA-Factory"] | {"quantization_bit": 3}, "quantization_bit"),
    "Adam-mini": (FILES["LLaMA-Factory"] | {"use_adam_mini": True}, "use_adam_mini: Adam-mini"),
    "GaLore with an adapter": (FILES["LLaMA-Factory"] | {"use_galore": "true"}, "galore projects the gradients"),
    "another optimizer": (FILES["axolotl"] | {"optimizer": "grokadamw"}, "optimizer: an optimizer"),
    "experts": (
        {**FILES["axolotl"], "base_model": "mixtral-8x7b", "lora_target_linear": None, "lora_target_modules": ["w1"]},
        "experts are fused parameters",
    ),
    "other modules beside": (FILES["axolotl"] | {"lora_modules_to_save": ["norm"]}, "lora_modules_to_save"),
    "QDoRA": (FILES["alignment-handbook"] | {"use_dora": True}, "use_dora: DoRA on a 4-bit base"),
    "no length": (FILES["torchtune"] | {"tokenizer": {"max_seq_len": None}}, "give --seq-len"),
    "a pattern of nothing": (FILES["alignment-handbook"] | {"lora_target_modules": r".*\.w_pack"}, "no known module"),
    "a broken pattern": (FILES["alignment-handbook"] | {"lora_target_modules": "(q_proj"}, "no known module"),
    "a pattern in a list": (FILES["alignment-handbook"] | {"lora_target_modules": [r".*\.q_proj"]}, "has no"),
    "no rank": ({**FILES["axolotl"], "lora_r": None}, "give --rank"),
    "a length that is no number": (FILES["axolotl"] | {"sequence_len": "long"}, "sequence_len (seq_len)"),
    "a rank that is a switch": (FILES["axolotl"] | {"lora_r": True}, "lora_r: must be a value"),
    "no such module": (FILES["alignment-handbook"] | {"lora_target_modules": ["q_prj"]}, "`q_proj`?"),
    "unknown model of torchtune": (
        FILES["torchtune"] | {"model": {"_component_": "torchtune.models.own_5b"}},
        "peftscope memory MODEL --config",
    ),
    "a model's config.json": ({"model_type": "llama", "hidden_size": 64}, "give it as MODEL"),
    "accelerate's file": ({"distributed_type": "FSDP", "num_processes": 2}, "the trainer's file"),
    "another framework": ({"trainer": {"devices": 8}, "exp_manager": {}}, "not the file of a known trainer"),
}


JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "process-reward-model": ("axolotl", {"process_reward_model": True}),
    "simpo": ("axolotl", {"rl": "simpo"}),
    "classification": ("axolotl", {"model_type": "AutoModelForSequenceClassification"}),
    "quantisation-aware training": ("axolotl", {"qat": {"weight_dtype": "int4"}}),
    "reward-model with a value head": ("LLaMA-Factory", {"stage": "rm"}),
    "merging": ("LLaMA-Factory", {"export_dir": "merged"}),
    "generation": ("LLaMA-Factory", {"do_predict": True}),
    "training by Megatron": ("LLaMA-Factory", {"pipeline_model_parallel_size": 1}),
    "experts on the host (KTransformers)": ("LLaMA-Factory", {"use_kt": True}),
    "distillation": ("torchtune", {"teacher_model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}}),
    "evaluation": ("torchtune", {"tasks": ["truthfulqa_mc2"]}),
}


@pytest.mark.parametrize("what", JOBS)
def test_a_job_that_is_not_modelled_is_refused_by_its_name(what: str, tmp_path: Path) -> None:
    trainer, more = JOBS[what]
    said = complaint(tmp_path, FILES[trainer] | more)
    assert f"asks for {what}, which is not modelled" in said
    assert len(said.splitlines()) == 1


DPO = {"job": "dpo", "reference": "disabled", "logprobs": "full"}
WHOLE = {"logprobs": "whole"}
GRPO = {"job": "grpo", "reference": "none", "logprobs": "chunked"}
LENGTHS = {"max_prompt_length": 200, "max_completion_length": 100}
ANSWERED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dpo of axolotl": ("axolotl", {"rl": "ipo"}, DPO),
    "a copy of axolotl": ("axolotl", {"rl": "dpo", "rl_adapter_ref_model": True}, DPO | {"reference": "copy"}),
    "reward of axolotl": ("axolotl", {"reward_model": True}, {"job": "reward", "reference": None, "logprobs": None}),
    "dpo of LLaMA-Factory": ("LLaMA-Factory", {"stage": "dpo"}, DPO | WHOLE),
    "orpo of LLaMA-Factory": ("LLaMA-Factory", {"stage": "dpo", "pref_loss": "orpo"}, {"job": "orpo", **WHOLE}),
    "kto of LLaMA-Factory": ("LLaMA-Factory", {"stage": "kto", "ref_model": "x"}, {"job": "kto", "reference": "copy"}),
    "dpo of TRL": ("TRL", {"beta": 0.1}, {"job": "dpo", "reference": "copy", "logprobs": "chunked"}),
    "precomputed": ("TRL", {"precompute_ref_log_probs": True}, {"job": "dpo", "reference": "precomputed"}),
    "grpo of TRL": ("TRL", {"num_generations": 8, **LENGTHS}, GRPO),
    "a term of KL": ("TRL", {"num_generations": 8, "beta": 0.04, **LENGTHS}, GRPO | {"reference": "copy"}),
    "dpo of a mixture": (
        "alignment-handbook",
        {"dataset_mixture": {"datasets": [{"columns": ["chosen", "rejected"]}]}},
        DPO | {"logprobs": "chunked"},
    ),
    "dpo of torchtune": ("torchtune", {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}, DPO),
}


@pytest.mark.parametrize("what", ANSWERED)
def test_the_jobs_of_trl_are_read(what: str, tmp_path: Path) -> None:
    trainer, more, expected = ANSWERED[what]
    one = question(tmp_path, FILES[trainer] | more)
    assert expected.items() <= one.beside.model_dump().items()
    assert not one.evaluates and not one.spec.packing
    if one.beside.job == "grpo":
        assert (one.spec.seq_len, one.responses) == (300, 100)


def test_what_a_job_leaves_out_is_said(tmp_path: Path) -> None:
    more = {"enable_liger_kernel": True, "eval_strategy": "epoch", "per_device_eval_batch_size": 2}
    said = "\n".join(read(tmp_path, FILES["LLaMA-Factory"] | more, {"job": "dpo"}).not_modelled)
    assert "per_device_eval_batch_size" in said and "enable_liger_kernel: loss is not modelled for dpo" in said
    assert "the longest prompt and its completion" in complaint(tmp_path, FILES["TRL"] | {"num_generations": 8})
    odd = {"num_generations": 8, "max_completion_length": "long", "max_prompt_length": [1], "beta": "x"}
    assert question(tmp_path, FILES["TRL"] | odd, seq_len=900).responses == 512


def test_what_is_switched_off_asks_for_no_other_job(tmp_path: Path) -> None:
    assert read(tmp_path, FILES["axolotl"] | {"rl": None, "reward_model": False, "plugins": []}).job == "supervised"
    assert read(tmp_path, FILES["LLaMA-Factory"] | {"stage": "pt", "do_train": True}).job == "supervised"
    assert read(tmp_path, FILES["TRL"] | {"beta": 0.1}, name="config_orpo.yaml").job == "orpo"
    with pytest.raises(InputError, match="the name of the file: asks for rloo"):
        read(tmp_path, FILES["TRL"], name="config_rloo.yaml")


LAYERWISE = {"finetuning_type": "full", "use_galore": True, "galore_layerwise": True}
PATTERNS: dict[str, tuple[str, ...]] = {
    r".*\.(q|v)_proj": ("q_proj", "v_proj"),
    r"^(?!.*visual).*(?:mlp|self_attn)\.(?:up|down|o)_proj$": ("down_proj", "o_proj", "up_proj"),
    r"model\.layers\.[01]\.self_attn\.q_proj": ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"),
}
"""Patterns of target modules, and the modules of Mistral-7B whose whole name they match."""


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_of_target_modules_is_read_as_peft_reads_it(pattern: str, tmp_path: Path) -> None:
    asked = question(tmp_path, FILES["alignment-handbook"] | {"lora_target_modules": pattern})
    assert asked.spec.method.targets == PATTERNS[pattern]


def test_a_model_is_as_its_trainer_builds_it(tmp_path: Path) -> None:
    seen = {"lora_target_modules": r"model.language_model.layers.\d+.mlp.up_proj", "lora_target_linear": False}
    assert question(tmp_path, FILES["axolotl"] | seen | {"base_model": "qwen2.5-vl-3b"}).spec.method.targets == (
        "up_proj",
    )
    long = {"base_model": "tinyllama-1.1b"}  # of 2048 positions, which the file doubles
    assert question(tmp_path, FILES["axolotl"] | long).spec.seq_len == 4096
    phi = {
        "_component_": "torchtune.models.phi3.lora_phi3_mini",
        "lora_attn_modules": ["q_proj"],
        "apply_lora_to_mlp": True,
    }
    assert question(tmp_path, FILES["torchtune"] | {"model": phi}).model.shape.family == "llama"


@pytest.mark.parametrize(
    ("trainer", "more", "option", "value"),
    [
        ("axolotl", {"optimizer": "lion_8bit"}, "optimizer_states", "lion_8bit"),
        ("axolotl", {"optimizer": "adamw_torch_4bit"}, "optimizer_states", "adamw_torch_4bit"),
        ("LLaMA-Factory", LAYERWISE, "optimizer_in_bwd", True),
        ("TRL", {"optim": "adafactor"}, "optimizer_states", "adafactor"),
        ("LLaMA-Factory", {"finetuning_type": "full", "use_galore": True}, "optimizer_states", "galore"),
        ("LLaMA-Factory", {"finetuning_type": "full", "use_galore": True}, "optimizer_rank", 16),
        ("LLaMA-Factory", {"finetuning_type": "full", "use_apollo": True, "apollo_rank": 4}, "optimizer_rank", 4),
        ("LLaMA-Factory", {"finetuning_type": "full", "use_muon": True}, "optimizer_states", "muon"),
        ("torchtune", {"optimizer_in_bwd": True}, "optimizer_in_bwd", True),
        ("torchtune", {"optimizer_in_bwd": False}, "optimizer_in_bwd", False),
    ],
)
def test_other_optimizers_are_read(trainer: str, more: dict[str, Any], option: str, value: Any, tmp_path: Path) -> None:
    content = FILES[trainer] | more
    content = {key: number for key, number in content.items() if key != "gradient_accumulation_steps"}
    assert getattr(question(tmp_path, content).beside, option) == value


def test_keys_that_may_change_memory_stand_apart_from_harmless_ones(tmp_path: Path) -> None:
    more = {"fp8": True, "context_parallel_size": 2, "tiled_mlp": False, "wandb_project": "mine"}
    reading = read(tmp_path, FILES["axolotl"] | more)
    assert reading.may_change_memory == ["fp8", "context_parallel_size"]
    assert {"tiled_mlp", "wandb_project"} <= set(reading.ignored)
    assert reading.to_json()["may_change_memory"] == reading.may_change_memory


def test_axolotls_plugin_of_cut_cross_entropy_switches_it_on(tmp_path: Path) -> None:
    plugins = ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin", "axolotl.integrations.liger.LigerPlugin"]
    assert question(tmp_path, FILES["axolotl"] | {"plugins": plugins}).beside.loss == "cut-cross-entropy"
    assert (
        question(tmp_path, FILES["axolotl"] | {"plugins": plugins, "cut_cross_entropy": False}).beside.loss == "plain"
    )
    assert question(tmp_path, FILES["axolotl"] | {"plugins": plugins[1:]}).beside.loss == "plain"
    assert "MinePlugin" in read(tmp_path, FILES["axolotl"] | {"plugins": ["mine.MinePlugin"]}).not_modelled[0]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "another head than a causal model"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is an encoder"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantised ('aqlm')"),
        ({"quantization_config": {"quant_method": "gptq", "bits": -4}}, "quantised ('gptq')"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "quantised ('fp8')"),
        ({"quantization_config": {"bits": 4}}, "quantised ('unknown')"),
        ({"model_type": "opt", "quantization_config": {"quant_method": "gptq"}}, "gptq is not simulated"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_its_name(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    shape = PRESETS["qwen2.5-0.5b"].shape
    (tmp_path / "config.json").write_text(json.dumps(shape.to_config() | config))
    with pytest.raises(InputError) as error:
        describe_model(str(tmp_path))
    assert said in str(error.value)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_answered_is_refused_by_key(what: str, tmp_path: Path) -> None:
    content, message = REFUSED[what]
    said = complaint(tmp_path, content)
    assert message in said
    assert "->" in said


@pytest.mark.parametrize(("trainer", "rows"), [(trainer, rows) for trainer, rows, _ in TRAINERS])
def test_rows_set_options_that_exist_and_name_the_sources_of_their_defaults(
    trainer: str, rows: tuple[Row, ...]
) -> None:
    known = {"model", "method", *METHODS, *METHOD_OPTIONS, *SPEC_OPTIONS, *BESIDE_OPTIONS}
    for row in rows:
        assert set(row.option.split()) <= known, row
        assert row.default is None or row.source or row.option in ("method", "precision"), row


def test_an_option_of_the_command_line_stands_in_for_a_value_that_is_not_modelled(tmp_path: Path) -> None:
    odd = FILES["axolotl"] | {"attn_implementation": "sage"}
    assert "give --attention" in complaint(tmp_path, odd)
    spec = question(tmp_path, odd, attention="sdpa", method="full").spec
    assert (spec.attention, spec.method.name) == ("sdpa", "full")


ODD = ([1], [[]], {"a": [1]}, True, "x" * 300, -1, 1e12)


@pytest.mark.parametrize("trainer", FILES)
def test_odd_values_are_answered_or_refused_in_words(trainer: str, tmp_path: Path) -> None:
    more = {"fsdp", "fsdp_config", "deepspeed", "accelerate_config", "optim", "optimizer_type", "flash_attn", "dtype"}
    refused = 0
    for key in sorted({*FILES[trainer], *more, "peft_type", "bias", "feedforward_modules", "val_size", "packing"}):
        for value in ODD:
            try:
                odd = read(tmp_path, FILES[trainer] | {key: value}, NEEDED.get(trainer, {}), "run.json")
                question_of(odd, gpus=None)
            except InputError as error:
                refused += 1
                assert all(problem.where and problem.message for problem in error.problems)
    assert refused > len(ODD)


def test_all_that_is_needed_is_asked_for_at_once(tmp_path: Path) -> None:
    said = complaint(tmp_path, {"peft_type": "LORA", "r": 8})
    assert all(part in said for part in ("--seq-len", "--batch-size", "names no base model"))


def test_the_command_is_a_check_before_a_run(peftscope: Command, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(FILES["alignment-handbook"] | {"max_seq_length": 256}))
    code, text, _ = peftscope("memory", "--config", str(path), "--gpu", "80GiB")
    assert code == 0
    assert all(part in text for part in ("understood:", "ignored:", "assumed", "fits on", "allocated"))
    code, text, _ = peftscope("memory", "--config", str(path), "--gpu", "4GiB", "--json")
    content = json.loads(text)
    assert (code, content["config"]["trainer"]) == (1, "alignment-handbook")
    assert content["headroom_bytes"] == 4 * 2**30 - content["peak_device_bytes"] < 0
    assert peftscope("memory", "--config", str(path))[0] == 0
    code, text, _ = peftscope("memory", "mistral-7b", "--gpu", "4GiB")
    assert code == 0 and "does not fit on" in text  # the check belongs to files


@pytest.mark.parametrize(("text", "message"), [("base_model: [", "line 2: not valid YAML"), ("", "must be a mapping")])
def test_a_broken_file_is_a_sentence(peftscope: Command, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    code, _, said = peftscope("memory", "--config", str(tmp_path / "run.yaml"))
    assert (code, message in said) == (2, True)
    assert peftscope("memory", "--config", str(tmp_path / "none.yaml"))[0] == 2
    assert peftscope("memory")[0] == 2
