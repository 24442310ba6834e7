"""The way of a run through its phases: load, prepare, train, evaluate, save, probe."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from peftscope.data.batching import Batch, digested, evaluation_batches, tokenise, training_batches, widest_batch
from peftscope.data.sources import Item, RandomStringsSource
from peftscope.data.tasks import draw_items, find_task, read_split, shuffle_responses
from peftscope.evaluation.heldout import ItemLoss, base_answers, heldout_nll, mean_nll, nll_and_shift
from peftscope.evaluation.latency import time_passes
from peftscope.evaluation.retention import bits_per_byte
from peftscope.evaluation.updates import update_spectra, weights_before
from peftscope.execution.phases import Phases
from peftscope.execution.provenance import card_reading
from peftscope.execution.start import continue_adapter, merged_start
from peftscope.files.manifest import file_sha256
from peftscope.memory.predict import predict_or_nothing
from peftscope.memory.probe import probe_evaluation, probe_training
from peftscope.memory.tracker import MemoryTracker, tensors_of
from peftscope.record import KeepWeights, Quality, RunRecord, Size, Timing, kept_path, steps_at
from peftscope.spec import RunSpec
from peftscope.training.build import build_model, compiled_layers, count_parameters, seed_everything
from peftscope.training.ceilings import measure_ceilings
from peftscope.training.checkpoint import Checkpoints
from peftscope.training.kept import write_kept
from peftscope.training.load import attention, load_base, load_tokenizer
from peftscope.training.log import TrainingLog
from peftscope.training.loop import Diverged, check_loss, train
from peftscope.training.shard import from_all, held_bytes, is_first, own_seed, shard, trained_state


class Way:
    """One run on its way. What is measured goes into the record as soon as it is known.

    So the record of a run that fails says what was measured until then.
    """

    def __init__(self, record: RunRecord, folder: Path, phases: Phases, log: TrainingLog) -> None:
        self.record, self.folder, self.phases, self.log = record, folder, phases, log
        self.spec = record.spec

    def go(self, checkpoints: Checkpoints, keep_weights: KeepWeights, keep_at: Sequence[float]) -> None:
        """Runs all phases."""
        record, spec, phase, alone = self.record, self.spec, self.phases.phase, self.record.provenance["alone"]
        trains = spec.method.trains
        with phase("load"):
            self.tokenizer = load_tokenizer(spec)
            self.pad: int = self.tokenizer.pad_token_id
            judged = self._read_items()
            with self._tracked_load() as loaded:
                base = load_base(spec)
                loaded.append(base)
        timings: dict[str, Timing] = {}
        if spec.latency_tokens:
            record.latency = timings
        timings |= self._time_latency(base, "base")
        self.answers: list[torch.Tensor] = []
        if trains and spec.validation_every and spec.shards == 1:
            with phase("evaluate"), attention(base, spec.attention):
                self.answers = base_answers(base.eval(), self.validation, spec, self.pad)
        weights = self._prepare(base)
        self.model = model = self.trained.model
        trainable, total = count_parameters(model)
        record.size = Size(initial_trainable_parameters=trainable, total_parameters=total)
        if spec.shards > 1:
            with phase("initialise"):
                shard(model, spec)
        quality = record.quality
        before = quality.retention_bits_per_byte_before = self._score_retention()
        with phase("predict"):
            self._find_widest()
            self.phases.memory.predicted = predict_or_nothing(spec, self.widest, self.widest_heldout)
        if trains:

            def after_step(step: int) -> None:
                self._follow(step)
                if step in steps_at(keep_at, spec.steps):
                    with self.phases.aside("train", "evaluate"):
                        write_kept(kept_path(self.folder, step), model)

            digest = self._train(checkpoints, after_step)
            if record.provenance["card"]:
                record.provenance["card"]["after_training"] = card_reading()
            record.train_batches_sha256 = digest
            record.method_metrics = spec.method.metrics(model)
        with phase("evaluate"):
            model.eval()
            if self.validation:
                quality.validation_nll, quality.shift = self._validate()
            if weights:
                record.updates = update_spectra(model, weights)
            with attention(model, spec.attention):
                per_item = self._score_heldout()
                generated, seconds = _score_answers(model, self.tokenizer, spec, judged)
                if generated:
                    record.speed.generation_seconds = seconds if alone else None
                    quality.exact_match = sum(row["correct"] for row in generated) / len(generated)
                    quality.exact_match_items = len(generated)
                record.benchmarks = _score_benchmarks(model, self.tokenizer, spec)
            write_items(self.folder / "items.jsonl", judged, per_item, generated)
            quality.heldout_nll, quality.heldout_tokens = mean_nll(per_item), sum(item.tokens for item in per_item)
            quality.greedy_match = sum("0" not in item.argmax for item in per_item) / len(per_item)
            quality.token_accuracy = sum(item.argmax.count("1") for item in per_item) / quality.heldout_tokens
            if trains:
                record.size.adapter_bytes = self._save()
                record.size.trained_parameters = spec.method.final_trainable_parameters(model)
                record.weights = self._keep_or_drop(keep_weights)
            record.files = self._checksums()
        quality.retention_bits_per_byte = self._score_retention() if trains else before
        self._probe()
        for state in ("apart", "merged"):
            timings |= self._time_latency(model, state)
        if trains and alone:
            # A model may leave no room on the card for this measurement. The run is valid without it.
            with phase("ceilings"), suppress(torch.OutOfMemoryError):
                record.ceilings = measure_ceilings(spec)

    def _read_items(self) -> list[Item]:
        """Tokenises the items of the run, says in the record what it is judged on, and returns those items."""
        spec, task = self.spec, find_task(self.spec.task)
        drawn = draw_items(read_split(spec.task, "train"), spec.train_items, spec.seed)
        if spec.shuffled_targets:
            drawn = shuffle_responses(drawn, spec.seed)
        judged = (drawn if task.judged_on == "train" else read_split(spec.task, "test"))[: spec.heldout_items]
        self.record.quality = Quality(judged_on=task.judged_on, judged_items=len(judged))
        if isinstance(task.source, RandomStringsSource):
            self.record.quality.judged_entropy_bits = len(judged) * task.source.entropy_bits
        self.training = tokenise(drawn, self.tokenizer, spec.seq_len) if spec.method.trains else []
        validation = read_split(spec.task, "validation")[: spec.validation_items]
        self.validation = tokenise(validation, self.tokenizer, spec.seq_len)
        self.heldout = tokenise(judged, self.tokenizer, spec.seq_len)
        return judged

    def _prepare(self, base: Any) -> dict[str, torch.Tensor]:
        """Makes the model to train, and returns the weights that its updates will be told from if it is followed."""
        with self.phases.phase("initialise"), self._tracked_load(base) as loaded:
            start = merged_start(base, self.spec)
            weights = weights_before(start, self.spec) if self.answers else {}
            self.trained = build_model(start, self.spec)
            continue_adapter(self.trained.model, self.spec)
            loaded.append(self.trained.model)
        return weights

    def _score_retention(self) -> float | None:
        self.model.eval()
        with self.phases.phase("evaluate"), attention(self.model, self.spec.attention):
            return bits_per_byte(self.model, self.tokenizer, self.spec) if self.spec.retention_tokens else None

    def _find_widest(self) -> None:
        """Finds the batches that take the most memory. That of the training is None if nothing is trained."""
        spec = self.spec
        seen = islice(self._batches(), spec.steps * spec.gradient_accumulation)
        self.widest: Batch | None = widest_batch(seen) if spec.method.trains else None
        self.widest_heldout = widest_batch(
            evaluation_batches(self.heldout, batch_size=spec.eval_batch_size, pad_token_id=self.pad)
        )

    def _train(self, checkpoints: Checkpoints, after_step: Callable[[int], None]) -> str:
        """Trains the model, and returns the SHA-256 of the batches."""
        spec, digest = self.spec, hashlib.sha256()
        with self.phases.phase("train"), compiled_layers(self.model, spec):
            seed_everything(own_seed(spec.seed if spec.init_seed is None else spec.init_seed, spec))
            rehearsal = self.widest if spec.device == "cuda" else None
            train(self.trained, digested(self._batches(), digest), spec, self.log, checkpoints, rehearsal, after_step)
        return digest.hexdigest()

    def _follow(self, step: int) -> None:
        """Measures what the spec asks for along the training after a step, and writes it into the log.

        Raises:
            Diverged: The loss on the validation items is not finite, or far above that of a uniform guess, or the score
                on prose is not finite.
        """
        spec = self.spec

        def is_due(every: int) -> bool:
            return bool(every) and step % every == 0 and step < spec.steps

        if is_due(spec.validation_every):
            with self._evaluating():
                nll, self.log.shift[step] = self._validate()
            check_loss(nll, self.trained.vocab_size, spec, f"on validation items after step {step}")
            self.log.validation_nll[step] = nll
        if is_due(spec.retention_every):
            with self._evaluating(), attention(self.model, spec.attention):
                bits = bits_per_byte(self.model, self.tokenizer, spec)
            if not math.isfinite(bits):
                raise Diverged(f"the score on prose after step {step} is not a number")
            self.log.retention[step] = bits

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluates inside this context, in the middle of the training, and counts it to the phase ``evaluate``."""
        self.model.eval()
        with self.phases.aside("train", "evaluate"):
            yield
        self.model.train()

    def _validate(self) -> tuple[float, dict[str, float]]:
        """Returns the mean nll of the validation items, in nats per response token, and how far their answers moved."""
        with attention(self.model, self.spec.attention):
            per_item, shift = nll_and_shift(self.model, self.validation, self.spec, self.pad, self.answers)
        return mean_nll(per_item), shift

    def _score_heldout(self) -> list[ItemLoss]:
        """Returns the loss of each judged item.

        Raises:
            Diverged: Their mean is not finite, or far above that of a uniform guess, after a training.
        """
        per_item = heldout_nll(self.model, self.heldout, self.spec, self.pad)
        if self.spec.method.trains:
            check_loss(mean_nll(per_item), self.trained.vocab_size, self.spec, "on held-out items")
        return per_item

    def _save(self) -> int:
        """Writes the trained weights, and returns their bytes."""
        adapter = self.folder / "adapter"
        state = trained_state(self.model) if self.spec.shards > 1 else None
        if is_first():
            self.spec.method.save(self.model, adapter, state)
        return sum(path.stat().st_size for path in adapter.glob("*.safetensors"))

    def _keep_or_drop(self, keep_weights: KeepWeights) -> Literal["kept", "dropped"]:
        """Removes the trained weights if they are not to be kept, and returns whether they were."""
        if keep_weights == "all" or (keep_weights == "adapters" and not self.spec.method.trains_base):
            return "kept"
        shutil.rmtree(self.folder / "adapter", ignore_errors=True)
        return "dropped"

    def _checksums(self) -> dict[str, str]:
        """Returns the SHA-256 of what the run wrote, by the path in its folder."""
        written = [self.folder / "items.jsonl", *sorted((self.folder / "adapter").glob("*.*"))]
        return {path.relative_to(self.folder).as_posix(): file_sha256(path) for path in written}

    def _probe(self) -> None:
        """Adds to the measured memory what only a probe measures: the peaks of a step's parts, or a process's share."""
        memory, spec = self.phases.memory, self.spec
        if spec.shards > 1:
            self.phases.gather_ranks(held_bytes(self.model), lambda mine: from_all(mine, spec))
            return
        if not spec.probe_steps:
            return
        on_cpu = spec.device == "cpu"
        # A full card may have no room for another optimizer; the run is good all the same.
        with self.phases.phase("probe"), nullcontext() if on_cpu else suppress(torch.OutOfMemoryError):
            if on_cpu:
                with attention(self.model, spec.attention):
                    memory.evaluate.peak_tensor_bytes = probe_evaluation(self.model, self.widest_heldout, spec)
            if self.widest is not None and not spec.compile:
                peaks, memory.resident_tensor_bytes = probe_training(self.trained, self.widest, spec)
                if on_cpu:
                    memory.train.peak_tensor_bytes = max(peaks.values())
                memory.forward_peak_tensor_bytes = peaks["forward"]
                memory.backward_peak_tensor_bytes = peaks["backward"]
                memory.optimizer_peak_tensor_bytes = peaks["optimizer"]

    def _time_latency(self, model: Any, state: str) -> dict[str, Timing]:
        """Returns the latency of a model in a state, if the spec asks for it. The state ``merged`` ends the model."""
        if not self.spec.latency_tokens:
            return {}
        with self.phases.phase("latency"):
            if state == "merged":
                with warnings.catch_warnings(action="ignore"):  # of 4-bit sums: here, only their time counts
                    model = model.merge_and_unload()
            return {f"{state}_{name}": timing for name, timing in time_passes(model, self.spec).items()}

    def _batches(self) -> Iterator[Batch]:
        spec = self.spec
        pack_to = spec.seq_len if spec.packing else None
        return training_batches(
            self.training, seed=spec.seed, batch_size=spec.batch_size, pad_token_id=self.pad, pack_to=pack_to
        )

    @contextmanager
    def _tracked_load(self, *alive: Any) -> Iterator[list[Any]]:
        """Tracks live bytes while the block makes a model. The block appends the model to the list to be counted."""
        loaded: list[Any] = []
        if self.spec.device != "cpu":
            yield loaded
            return
        tracker = MemoryTracker(tensors_of(*alive))
        with tracker:
            yield loaded
        for tensor in tensors_of(*loaded):
            tracker.add(tensor)
        load = self.phases.memory.load
        load.peak_tensor_bytes = max(load.peak_tensor_bytes or 0, tracker.peak_bytes)


def _score_answers(model: Any, tokenizer: Any, spec: RunSpec, items: list[Item]) -> tuple[list[dict[str, Any]], float]:
    """Returns the answers to items, each with its item and whether it is right, and the seconds that they took."""
    if not spec.generation_items:
        return [], 0.0
    # This import is slow, and only these runs need it.
    from peftscope.evaluation import answers as generated

    began = time.perf_counter()
    answers = generated.score_answers(model, tokenizer, spec, items)
    return answers, time.perf_counter() - began


def _score_benchmarks(model: Any, tokenizer: Any, spec: RunSpec) -> dict[str, dict[str, float]]:
    """Returns the scores of lm-eval's benchmarks that the spec asks for."""
    if not spec.benchmarks:
        return {}
    from peftscope.evaluation import benchmarks

    return benchmarks.score_benchmarks(model, tokenizer, spec)


def write_items(path: Path, items: list[Item], per_item: Sequence[ItemLoss], answers: list[dict[str, Any]]) -> None:
    """Writes one line for each held-out item: its loss and, where it was asked, its answer."""
    by_item = {row["item"]: row for row in answers}
    rows = []
    for index, (item, loss) in enumerate(zip(items, per_item, strict=True)):
        row = {"item": index, "prompt": item.prompt, "target": item.response, **loss._asdict()}
        answer = by_item.get(index)
        rows.append(row | ({"answer": answer["answer"], "correct": answer["correct"]} if answer else {}))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
