"""Our training step against the HF Trainer, on the same job in one process: ``make benchmark``.

LoRA r=8 on all linear layers of SmolLM2-135M, two-digit sums. Pairs alternate which side goes first, so that drift of
the machine cancels; the ratio is of tokens per second, per pair.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from transformers import Trainer, TrainerCallback, TrainingArguments

from peftscope.data.batching import Example, collate, tokenise, training_batches, training_order
from peftscope.data.tasks import make_task, read_split
from peftscope.execution.libraries import without_hub_kernels
from peftscope.models.fetch import fetch_model
from peftscope.planning.experiment import Experiment
from peftscope.planning.resolve import Resolver
from peftscope.spec import RunSpec
from peftscope.training.build import build_model
from peftscope.training.load import load_base, load_tokenizer
from peftscope.training.step import make_optimizer, train_step


class _StepClock(TrainerCallback):
    """Notes when each step begins and ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Notes the end of a step."""
        self.ends.append(time.perf_counter())


def run_trainer(spec: RunSpec, examples: list[Example], pad: int) -> tuple[float, float]:
    """Returns (seconds a step, training loss of the last step) of a plain HF Trainer: HF loss, sdpa, its own loop."""
    model = build_model(load_base(spec), spec).model
    clock = _StepClock()

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate([Example(row["tokens"], row["prompt_length"]) for row in rows], pad)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            max_grad_norm=spec.max_grad_norm or 0.0,
            use_cpu=spec.device == "cpu",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=spec.steps,
            report_to=[],
            disable_tqdm=True,
            seed=spec.seed,
        )
        trainer = Trainer(model, arguments, collator, [vars(example) for example in examples], callbacks=[clock])
        trainer.pop_callback(next(c for c in map(type, trainer.callback_handler.callbacks) if "Printer" in c.__name__))
        trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return _per_step(clock.ends), loss


def run_ours(spec: RunSpec, examples: list[Example], pad: int) -> tuple[float, float]:
    """Returns (seconds a step, mean training loss) of the project's own step and batches."""
    trained = build_model(load_base(spec), spec)
    trained.model.train()
    optimizer = make_optimizer(trained.model, spec)
    batches = training_batches(examples, seed=spec.seed, batch_size=spec.batch_size, pad_token_id=pad)
    ends, losses = [], []
    for step, batch in enumerate(itertools.islice(batches, spec.steps)):
        losses.append(train_step(trained, [batch], optimizer, spec, step).loss.item())
        ends.append(time.perf_counter())
    return _per_step(ends), statistics.fmean(losses)


def _per_step(ends: list[float], warmup: int = 2) -> float:
    """Returns seconds a step from one end to the next, data and everything else between included."""
    return (ends[-1] - ends[warmup - 1]) / (len(ends) - warmup)


@without_hub_kernels()
def main() -> None:
    """Runs the pairs and prints both ratios with their spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    fetch_model(arguments.model)
    make_task("two-digit-sums")
    resolver = Resolver(Experiment(), Path("benchmark"))
    common = {"method": "lora", "model": arguments.model, "task": "two-digit-sums", "steps": arguments.steps, "seed": 0}
    plain = resolver.spec({**common, "loss_path": "hf"}, "benchmark")
    rivals = {
        "equal adapter dtype (fp32)": resolver.spec(common, "benchmark"),
        "another precision: bf16 adapters": resolver.spec({**common, "adapter_dtype": "base"}, "benchmark"),
    }
    tokenizer = load_tokenizer(plain)
    pad = tokenizer.pad_token_id
    examples = tokenise(read_split(plain.task, "train"), tokenizer, plain.seq_len)
    order = training_order(len(examples), plain.seed)
    # The Trainer reads its data in order: give it the order in which ours draws.
    ordered = [examples[next(order)] for _ in range(plain.steps * plain.batch_size)]
    console = Console()
    run_trainer(plain, ordered, pad)
    for label, spec in rivals.items():
        run_ours(spec, examples, pad)
        ratios, losses = [], []
        for pair in track(range(arguments.pairs), description=label, console=Console(stderr=True)):
            if pair % 2:
                (ours, our_loss), (theirs, their_loss) = run_ours(spec, examples, pad), run_trainer(plain, ordered, pad)
            else:
                (theirs, their_loss), (ours, our_loss) = run_trainer(plain, ordered, pad), run_ours(spec, examples, pad)
            ratios.append(theirs / ours)
            losses.append((our_loss, their_loss))
        console.print(
            f"{label}: {statistics.median(ratios):.2f} times the HF Trainer's tokens/s "
            f"(median of {len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f}); "
            f"mean training loss {losses[-1][0]:.4f} against {losses[-1][1]:.4f}",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
