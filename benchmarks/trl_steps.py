"""Steps of TRL's own trainers beside our simulation of them, to the byte: ``python -m benchmarks.trl_steps``.

Both run under the byte tracker, on a processor. In TRL's fused head, a card folds each tile of logits by one kernel.
Here operations of torch do it that the tracker does not see: the head allocates what it does on a card. TRL comes with
the extra ``trl``.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils._python_dispatch import _disable_current_modes
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from peftscope.memory.base import Model
from peftscope.memory.empty import empty_batch
from peftscope.memory.question import Question, ask
from peftscope.memory.simulate import _Owners, _tracker_of, simulate
from peftscope.memory.trace import Trace
from peftscope.models.shapes import ModelShape
from peftscope.training.load import DTYPES, bitsandbytes_config, disable_weight_repacking
from peftscope.training.step import CausalLoss, TrainedModel

LENGTH, ANSWER, ROWS, STEPS = 128, 50, 2, 2
"""Tokens of the longest row and of an answer on average, rows or pairs of a batch, and steps."""
MODEL = ModelShape(
    family="llama",
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tied_embeddings=False,
)


class Trainer(NamedTuple):
    """A trainer of TRL: its module and name, and the rows of its data, whose texts have so many tokens."""

    module: str
    name: str
    rows: list[dict[str, Any]]


# TRL appends a token to each answer.
_PAIRS = [{"prompt": 68, "chosen": 59, "rejected": 39}]
TRAINERS = {
    "sft": Trainer("trl", "SFT", [{"text": 127}, {"text": 126}]),
    "dpo": Trainer("trl", "DPO", _PAIRS),
    "kto": Trainer("trl", "KTO", [{"prompt": 78, "completion": 49}, {"prompt": 70, "completion": 49}]),
    "orpo": Trainer("trl.experimental.orpo", "ORPO", _PAIRS),
    "reward": Trainer("trl", "Reward", _PAIRS),
}
CASES: dict[str, dict[str, Any]] = {
    "supervised": {"job": "sft"},
    "DPO": {"job": "dpo", "checkpointing": False},
    "DPO, recomputed": {"job": "dpo"},
    "DPO, recomputed, on 4 bits": {"job": "dpo", "method": "qlora"},
    "DPO, the reference precomputed": {"job": "dpo", "reference": "precomputed", "checkpointing": False},
    "DPO of all weights, with a copy": {"job": "dpo", "method": "full", "precision": "amp", "autocast": False},
    "KTO": {"job": "kto", "checkpointing": False},
    "ORPO": {"job": "orpo", "checkpointing": False},
    "reward model": {"job": "reward"},
}
"""The options of each step beside TRL's defaults."""
HEADS = ("", "model", "loss", "lm_head", "score")
"""Modules that own what belongs to no layer: batch, masks, head and loss."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of one word."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "word": 2}, unk_token="word"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def data_of(trainer: Trainer) -> Any:
    """Returns the data of all steps: every batch has the same lengths, and padding."""
    from datasets import Dataset

    rows = [{key: " ".join(["word"] * size) for key, size in row.items()} for row in trainer.rows]
    rows = [{key: f"{text} " if key == "prompt" else text for key, text in row.items()} for row in rows]
    rows = (rows * ROWS * STEPS)[: ROWS * STEPS]
    return Dataset.from_list(
        [row | ({"label": index % 2 > 0} if "completion" in row else {}) for index, row in enumerate(rows)]
    )


@contextmanager
def kernels_out_of_sight() -> Iterator[None]:
    """Lets TRL's fused head take the path of a card, with torch's operations as its kernels and out of sight."""
    from trl.kernels import chunked_logprob as kernels
    from trl.trainer import utils

    def unseen(fold: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            with _disable_current_modes():
                fold(*arguments, **options)

        return run

    stand_ins = {
        "triton": SimpleNamespace(cdiv=lambda size, part: -(-size // part)),
        "_forward_kernel": defaultdict(lambda: unseen(kernels._forward_tile)),
        "_backward_kernel": defaultdict(lambda: unseen(kernels._backward_tile)),
        "_addmm_fp32": unseen(kernels._addmm_fp32),
    }
    with ExitStack() as patches:
        for module in (kernels, utils):
            patches.enter_context(patch.object(module, "_use_triton", lambda device: True))
        for name, stand_in in stand_ins.items():
            patches.enter_context(patch.object(kernels, name, stand_in, create=True))
        yield


def trainer_of(question: Question, folder: str) -> Any:
    """Returns TRL's trainer for a question, with a model of random weights."""
    spec, beside, method = question.spec, question.beside, question.spec.method
    module, name, _ = trainer = TRAINERS[beside.job]
    found = import_module(module)
    config, rewards = AutoConfig.for_model(**question.model.config, num_labels=1), beside.job == "reward"
    kind = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM
    options = {"dtype": DTYPES[spec.precision], "attn_implementation": "sdpa"}
    model, more = kind.from_config(config, **options), dict[str, Any]()
    if quantization := method.quantization():
        model.save_pretrained(folder)
        packed = bitsandbytes_config(quantization)
        model = kind.from_pretrained(folder, quantization_config=packed, device_map={"": "cpu"}, **options)
        disable_weight_repacking(model)
    if beside.reference == "copy":
        more["ref_model"] = kind.from_config(config, **options).requires_grad_(False)
    if not method.trains_base:
        task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if rewards else {"task_type": "CAUSAL_LM"}
        more["peft_config"] = LoraConfig(r=method.rank, lora_alpha=16, target_modules="all-linear", **task)
    known = {"precompute_ref_log_probs": True} if beside.reference == "precomputed" else {}
    arguments = getattr(found, f"{name}Config")(
        **{"output_dir": folder, "per_device_train_batch_size": ROWS, "max_steps": STEPS, "bf16": True},
        **{"gradient_checkpointing": spec.checkpointing, "use_cpu": True, "dataloader_pin_memory": False},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        **{"train_sampling_strategy": "sequential", **known},
    )
    data = {"args": arguments, "train_dataset": data_of(trainer), "processing_class": tokenizer()}
    made = getattr(found, f"{name}Trainer")(model=model, **data, **more)
    if "ref_model" in more:
        made.model.reference = more["ref_model"]  # so that it is counted
    return made


def trl_step(question: Question) -> Trace:
    """Returns the trace of steps of TRL's own trainer."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(question, folder)
        owners = _Owners(TrainedModel(trainer.model, CausalLoss()))
        tracker = _tracker_of(trainer.model, owners, 0, ())

        class Marks(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                tracker.trace.begin("forward")

            def on_step_end(self, *_: Any, **__: Any) -> None:
                tracker.trace.begin("")

        def backward(*arguments: Any, **options: Any) -> None:
            tracker.trace.begin("backward")
            own_backward(*arguments, **options)

        def training_step(*arguments: Any, **options: Any) -> Any:
            loss = own_step(*arguments, **options)
            tracker.trace.begin("optimizer")
            return loss

        own_backward, trainer.accelerator.backward = trainer.accelerator.backward, backward
        own_step, trainer.training_step = trainer.training_step, training_step
        trainer.add_callback(Marks())
        with owners, tracker, kernels_out_of_sight():
            trainer.train()
    return tracker.trace


def our_step(question: Question) -> Trace:
    """Returns the trace of our simulation, as a processor runs it."""
    config, sizes = AutoConfig.for_model(**question.model.config), {"width": LENGTH, "responses": question.responses}
    batch = empty_batch(rows=question.rows, padded=True, **sizes)
    return simulate(question.spec, config, [batch] * STEPS, beside=question.beside)[0]


def peaks_outside_the_head(trace: Trace) -> dict[str, int]:
    """Returns the peak of each phase without the blocks of batch, masks, head and loss, which have no size then."""
    for phase, first, last in trace.segments():
        for event in trace.events[first:last]:
            block = trace.blocks[event]
            name = block.module.removeprefix("reference").lstrip(".")
            if event >= 0 and phase != "optimizer" and name.split(".")[0] in HEADS:
                block.size = 0
    return {phase: peak.size for phase, peak in trace.peaks().items()}


def differences(case: str) -> tuple[dict[str, int], dict[str, float]]:
    """Returns how many bytes TRL's step has more than ours outside the head, and which share ours has more in all."""
    options = {"as_trainer": "trl", "batch_size": ROWS, "seq_len": LENGTH, **CASES[case]}
    responses = LENGTH if options["job"] == "sft" else ANSWER
    question = ask(Model("tiny", MODEL.to_config(), MODEL), options, responses=responses)
    theirs, ours = trl_step(question), our_step(question)
    peaks = theirs.peaks(), ours.peaks()
    whole = {phase: peak.size / peaks[0][phase].size - 1 for phase, peak in peaks[1].items()}
    outside = peaks_outside_the_head(theirs), peaks_outside_the_head(ours)
    return {phase: outside[0][phase] - size for phase, size in outside[1].items()}, whole


def main() -> None:
    """Prints the differences of every step."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    for case in CASES:
        outside, whole = differences(case)
        shares = ", ".join(f"{phase} {100 * share:+.2f} %" for phase, share in whole.items())
        print(f"{case}: {outside} bytes outside the head; in all, ours differs by {shares}")


if __name__ == "__main__":
    main()
