"""The training loop: it feeds data, runs steps, measures them, and stops when the loss diverges."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from peftscope.data.batching import Batch
from peftscope.hardware.meter import make_meter, paged_bytes
from peftscope.spec import RunSpec
from peftscope.training.ceilings import count_work
from peftscope.training.checkpoint import Checkpoints, TrainingState
from peftscope.training.log import TrainingLog
from peftscope.training.shard import anywhere, own_rows, summed
from peftscope.training.signals import Interrupted, stops_between_steps
from peftscope.training.step import TrainedModel, make_optimizer, make_schedule, rehearse, train_step

EXPLODED = 1.5
"""A loss above this many times ln(vocabulary), the loss of a uniform guess, counts as diverged."""


class Diverged(Exception):
    """The loss is not finite, or is far above that of a uniform guess."""


def train(
    trained: TrainedModel,
    batches: Iterator[Batch],
    spec: RunSpec,
    log: TrainingLog,
    checkpoints: Checkpoints,
    rehearsal: Batch | None = None,
    after_step: Callable[[int], None] = lambda steps: None,
) -> None:
    """Trains for ``spec.steps`` steps and logs each of them, so that a failed run keeps its loss curve.

    Training resumes from the last checkpoint if there is one. ``rehearsal`` is the widest batch. It is tried right
    after the first step, when the optimizer has its states, so that a run that will be out of memory fails early.
    ``after_step`` is called after every step, outside of its time, with the number of steps done.

    Raises:
        Diverged: The loss is not finite, or above ``EXPLODED`` times the loss of a uniform guess.
        Interrupted: A signal arrived. A checkpoint was saved.
    """
    model = trained.model
    model.train()
    optimizer = make_optimizer(model, spec)
    schedule = make_schedule(optimizer, spec)
    state = TrainingState(model, optimizer, schedule, log)
    done = checkpoints.restore(state)
    meter, (for_token, for_response) = make_meter(spec.device), count_work(model)
    for _ in itertools.islice(batches, done * spec.gradient_accumulation):
        pass  # the checkpoint has trained on these
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # Refreshed between steps: a thread that refreshes it would run during timed steps.
    display = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
    with display as progress, stops_between_steps() as stopped:
        bar = progress.add_task("", total=spec.steps, completed=done)
        for step in range(done, spec.steps):
            began = time.perf_counter()
            whole = list(itertools.islice(batches, spec.gradient_accumulation))
            accumulated = [own_rows(batch, spec).to(spec.device) for batch in whole]
            stop_clock = meter.clock()
            ready = time.perf_counter()
            output = train_step(trained, accumulated, optimizer, spec, step)
            schedule.step()
            log.step_seconds.append(stop_clock())
            log.data_seconds += ready - began
            log.tokens.append(sum(batch.tokens for batch in whole))
            responses = sum(int(batch.response_tokens) for batch in whole)
            log.useful_flops.append(for_token * log.tokens[-1] + for_response * responses)
            log.padded_tokens.append(sum(batch.input_ids.numel() for batch in whole))
            nll, loss = summed(torch.stack([output.nll, output.loss]), spec).tolist()
            log.nll.append(nll if math.isfinite(nll) else None)
            log.loss.append(loss if math.isfinite(loss) else None)
            progress.update(bar, advance=1, description=f"nll {nll:.3f}", refresh=True)
            check_loss(nll if math.isfinite(loss) else loss, trained.vocab_size, spec, f"at step {step + 1}")
            if step == done:
                log.paged_state_bytes = paged_bytes(optimizer) if spec.device == "cuda" else None
                if rehearsal is not None:
                    rehearse(trained, own_rows(rehearsal, spec).to(spec.device), spec)
            after_step(step + 1)
            if anywhere(bool(stopped()) or checkpoints.due, spec):
                checkpoints.save(state)
                if anywhere(bool(stopped()), spec):  # a signal came before or during the save
                    raise Interrupted(stopped() or "another process of the run was told to stop")


def check_loss(nll: float, vocab_size: int, spec: RunSpec, where: str) -> None:
    """Raises Diverged if a loss in nats per token is not finite, or far above that of a uniform guess."""
    guess = math.log(vocab_size)
    if not nll <= EXPLODED * guess:
        raise Diverged(
            f"the loss is {nll:.3g} {where}, a uniform guess costs {guess:.1f}; "
            f"lower learning_rate={spec.learning_rate:g}"
        )
