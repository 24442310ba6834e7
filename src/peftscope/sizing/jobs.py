"""Which job a trainer's file asks for, and what it says about it. No torch.

Supervised fine-tuning is modelled, continued pretraining included: both take the same step. So are the jobs in
``ANSWERED``. A file that asks for another job is refused by the name of that job, before anything else is read from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peftscope.memory.beside import JOBS
from peftscope.sizing.reading import OFF, Reading

SUPERVISED = "supervised"
ANSWERED = {**{job: job for job in JOBS}, SUPERVISED: "sft", "ipo": "dpo", "reward-model": "reward"}
"""The jobs that are modelled, by the names that files and their trainers give them."""


class Sign(NamedTuple):
    """A key that says which job a file asks for.

    Attributes:
        job: The job; empty if the value of the key names it.
        key: A pattern of the whole key; nested keys are joined by dots.
        value: A pattern somewhere in the value; empty if any value counts that switches the key on.
        without: A pattern of keys of which the file has none.
    """

    job: str
    key: str
    value: str = ""
    without: str = ""


SIGNS: dict[str, tuple[Sign, ...]] = {
    "axolotl": (
        Sign("", "rl"),
        Sign("process-reward-model", "process_reward_model"),
        Sign("reward-model", "reward_model"),
        Sign("classification", "model_type", "SequenceClassification|TokenClassification"),
        Sign("distillation", "kd_trainer"),
        Sign("distillation", "plugins", r"\bkd\b|KDPlugin"),
        Sign("diffusion", r"diffusion\b.*"),
        Sign("quantisation-aware training", r"qat\b.*"),
        Sign("sparse fine-tuning", "plugins", "LLMCompressor"),
        Sign("reinforcement learning", "plugins", "NemoGym|Hatchery"),
        Sign("training of layers in turn (LISA)", "lisa_n_layers"),
    ),
    "LLaMA-Factory": (
        Sign("training by Megatron", "tensor_model_parallel_size|pipeline_model_parallel_size"),
        Sign("experts on the host (KTransformers)", "use_kt"),
        Sign("fine-tuning with a second model (ASFT)", "use_asft_loss"),
        Sign(SUPERVISED, "stage", "^(sft|pt)$", without="export_dir|do_predict|infer_backend|tokenized_path"),
        Sign("quantisation", "export_quantization_bit"),
        Sign("merging", "export_dir"),
        Sign("reward-model with a value head", "stage", "^rm$"),
        Sign("", "pref_loss", "^(orpo|simpo)$"),
        Sign("", "stage", "^(?!sft|pt)"),
        Sign("preprocessing", "tokenized_path", without="output_dir"),
        Sign("generation", "do_predict", without="do_train"),
        Sign("generation", "infer_backend", without="do_train"),
        Sign("evaluation", "task", without="do_train"),
    ),
    "TRL": (
        Sign("grpo", "num_generations|reward_funcs|reward_functions"),
        Sign("reward optimisation", "reward_model_path|reward_model_name_or_path"),
        Sign("dpo", "beta|ref_model.*|precompute_ref_log_probs|max_prompt_length|rpo_alpha"),
        Sign("dpo", ".*dataset.*", "chosen"),
    ),
    "torchtune": (
        Sign("distillation", r"teacher_model\..*"),
        Sign("distillation", r"(kd_)?loss\._component_", "KL"),
        Sign("torchtune's grpo", r"(.*\.)?loss\._component_", "GRPO"),
        Sign("ppo", r"loss\._component_", "PPO"),
        Sign("dpo", r"loss\._component_", r"rlhf\.loss"),
        Sign("quantisation-aware training", r"quantizer\._component_", "QAT"),
        Sign("quantisation", r"quantizer\._component_", without=r"optimizer\._component_|tasks|prompt.*"),
        Sign("evaluation", "tasks"),
        Sign("generation", "max_new_tokens", without=r"optimizer\._component_"),
        Sign("training with early exits", r"(early_exit_loss|layer_dropout)\..*"),
    ),
}
"""The signs of each trainer; the first that a file shows decides. Without any, the job is supervised."""

NAMED = re.compile(r"(?<![a-z])(dpo|kto|orpo|simpo|grpo|ppo|rloo|reward)(?![a-z])", re.IGNORECASE)
"""Jobs in the name of a file or its folder. TRL's keys need not say the job: the script that reads them does."""


def job_of(trainer: str, path: Path, values: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the job that a file asks for, and the key that says so; empty if none does.

    For TRL's files the name of the file counts, too, and that of its folder.
    """
    built_on_trl = trainer in ("TRL", "alignment-handbook")
    named = NAMED.search("/".join(path.absolute().parts[-2:])) if built_on_trl else None
    for sign in SIGNS["TRL"] if built_on_trl else SIGNS.get(trainer, ()):
        for key, value in values.items():
            if value in OFF or not re.fullmatch(sign.key, key) or not re.search(sign.value, str(value)):
                continue
            if sign.without and any(re.fullmatch(sign.without, name) for name in values):
                continue
            job = named[1].lower() if named and sign.job == "dpo" else sign.job  # KTO and ORPO have keys of DPO
            return job or str(value).lower(), key
    return (named[1].lower(), "the name of the file") if named else (SUPERVISED, "")


LOGPROBS = {
    "axolotl": ("full", "axolotl at 067b021 pins trl 1.8.0, pyproject.toml"),
    "LLaMA-Factory": ("whole", "LLaMA-Factory, train/trainer_utils.py: get_batch_logps of all logits in 32 bits"),
    "torchtune": ("full", "torchtune, rlhf/sequence_processing.py: get_batch_log_probs of all logits"),
    **dict.fromkeys(("TRL", "alignment-handbook", "PEFT"), ("chunked", "TRL 1.16.0; --logprobs full before 1.15")),
}
"""How each trainer computes log-probabilities, and where that was read."""
ALONE = ("eval_batch_size", "packing", "loss")
"""Options of supervised fine-tuning alone."""


def read_job(reading: Reading) -> None:
    """Reads what a file says about its job: the reference, the log-probabilities, and the lengths of GRPO.

    It comes after all rows, because an option of supervised fine-tuning that they read is left out.
    """
    options = reading.options
    job = options["job"]
    if job == "sft":
        return
    for option in (option for option in ALONE if options.pop(option, None)):
        key = reading.keys.pop(option, option)
        reading.not_modelled.append(f"{key}: {option} is not modelled for {job}, and left out")
    if JOBS[job].scored or (job == "orpo" and reading.trainer == "LLaMA-Factory"):
        reading.assume("logprobs", *LOGPROBS[reading.trainer])
    if not JOBS[job].scored:
        return
    second = reading.is_on("ref_model", "ref_model_name_or_path", "rl_adapter_ref_model")
    if reading.is_on("precompute_ref_log_probs"):
        options["reference"] = "precomputed"
    elif second or (job == "grpo" and reading.is_on("beta", "trl.beta", "rl_beta")):
        options["reference"] = "copy" if second or options["method"] == "full" else "disabled"
    if job == "grpo":
        # Without a key, a completion has the default of TRL 1.16.0, trainer/grpo_config.py.
        completion, prompt = reading.get("max_completion_length", "trl.max_completion_length"), "max_prompt_length"
        reading.responses = completion if isinstance(completion, int) else 512
        if isinstance(cut := reading.get(prompt), int):
            reading.set("seq_len", cut + reading.responses, prompt)
            reading.assumed = [line for line in reading.assumed if not line.startswith("seq_len=")]
        elif "sequence_len" not in reading.values:
            options.pop("seq_len", None)
            reading.need("seq_len", "GRPO cuts no prompts: the longest prompt and its completion decide the length")
