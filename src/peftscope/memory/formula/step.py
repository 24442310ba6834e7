"""The project's own training step and evaluation, on a tape. No torch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from peftscope.memory.formula.decoder import run_decoder, run_head
from peftscope.memory.formula.fused import ALSO_IN_EVALUATION, fused_loss
from peftscope.memory.formula.jobs import job_loss
from peftscope.memory.formula.linear import TapedModel
from peftscope.memory.formula.states import LARGE_STATE, STATE_BLOCK, Tensors, states_of
from peftscope.memory.formula.terms import GATHERED, OPTIMIZER_COPY, evaluation_sizes, sizes_of
from peftscope.memory.question import Question
from peftscope.memory.tape import Dims, Shaped
from peftscope.memory.trace import Block, Trace, bytes_of, factors

RETURNS_CACHE = ("llama", "gemma2", "gemma3_text", "granite", "olmo2")
"""Families whose output has the cache even where ``use_cache`` is false."""
NO_OPERATIONS = {
    *("name", "alpha", "start", "lr_ratio", "iterations"),
    *("allocate_every", "warmup_share", "final_share", "orthogonal_weight", "score"),
}
"""Fields of methods that change values, and neither which operations a step does nor on which tensors."""
PAGED_FROM_VALUES = 100_000
"""bitsandbytes pages the states of tensors with at least so many values."""


def trace_training(question: Question) -> Trace:
    """Returns the trace of two training steps on batches of ``spec.batch_size`` sequences of ``spec.seq_len`` tokens.

    It has what kernels take inside on CUDA.
    """
    with without_collector():
        return _train(TapedModel(question, sizes_of(question)))


class TrainingTraces:
    """The traces of runs that are asked about again and again with other sizes.

    Runs that differ in batch size, length or rank alone do the same operations, so that one trace with other sizes
    serves them all. A trace is what was asked for until the next one is asked for.
    """

    def __init__(self) -> None:
        self._traces: dict[str, tuple[Trace, int, list[Block]]] = {}
        self._numbers: dict[Any, int] = {}
        self._formulas: list[set[str]] = []
        self._measured: dict[Any, Any] = {}
        self._last: tuple[Trace, Any] | None = None

    def trace(self, question: Question) -> Trace:
        """Returns what ``trace_training`` returns."""
        card = question.cublas_bytes, question.before_ampere
        key = f"{operations_of(question)} {question.model.shape!r} {question.model.vision} {card}"
        if key not in self._traces:
            trace = trace_training(question)
            # Methods that do the same operations on the same tensors, as LoRA and rsLoRA do, share what is reserved.
            same = tuple(trace.events), tuple((b.formula or b.size, b.paged) for b in trace.blocks)
            number = self._numbers.setdefault(same, len(self._numbers))
            if number == len(self._formulas):
                self._formulas.append({block.formula for block in trace.blocks if block.formula})
            once = {id(block): block for block in trace.blocks if block.formula}  # both steps share theirs
            self._traces[key] = trace, number, list(once.values())
        trace, number, blocks = self._traces[key]
        sizes = sizes_of(question)
        formulas = {formula: bytes_of(*factors(formula), sizes) for formula in self._formulas[number]}
        for block in blocks:
            block.size = formulas[block.formula]
        self._last = trace, (number, tuple(sorted(formulas.items())))
        return trace

    def measure(self, what: Callable[..., Any], trace: Trace, *enough: float) -> Any:
        """Returns ``what(trace, *enough)``; for the last trace of here, what it was for the same sizes."""
        if self._last is None or trace is not self._last[0]:
            return what(trace, *enough)
        whole, part = (*self._last[1], what), (*self._last[1], what, *enough)
        if whole in self._measured or part in self._measured:
            return self._measured.get(whole, self._measured.get(part))
        found = what(trace, *enough)
        # What did not reach its limit is what there is without one.
        self._measured[part if enough and found > enough[0] else whole] = found
        return found


def operations_of(question: Question) -> str:
    """Returns what decides which operations a run's training step does; methods that do the same have the same."""
    spec, method = question.spec, question.spec.method
    # A rank decides which states bitsandbytes keeps in 8 bits or pages.
    own = question.beside.optimizer_states == "own"
    ranks = {"rank", "init_r", "target_r"} if spec.optimizer in ("adamw", "sgd") and own else set()
    fields = method.model_dump(exclude={*ranks, *NO_OPERATIONS})
    of_method = sorted((name, value) for name, value in fields.items() if value != "none")
    of_class = method.closed_form, method.trains, method.trains_base, method.mask_free_attention, method.logit_offset()
    rescales = type(method).rescales_input, method.quantization()
    repeats = min(spec.gradient_accumulation, 2)
    batch = {"batch_size", "eval_batch_size", "seq_len", "gradient_accumulation", "method"}
    asked = question.beside
    optimizer = asked.optimizer_states, asked.optimizer_in_bwd, asked.quantize_moe_experts, question.model.stored
    job = asked.job, asked.reference, asked.logprobs, asked.offload_activations
    beside = question.padded, asked.loss, question.saved, optimizer, job
    return f"{spec.model_dump_json(exclude=batch)} {repeats} {of_method} {of_class} {rescales} {beside}"


def trace_evaluation(question: Question) -> Trace:
    """Returns the trace of the held-out loss on ``spec.eval_batch_size`` sequences of ``spec.seq_len`` tokens.

    With ``gathered_rows`` it is the evaluation of transformers' Trainer that gathers the logits of so many sequences.
    """
    with without_collector():
        model = TapedModel(question, evaluation_sizes(question))
        return _evaluate(model, gathers=question.gathered_rows > 0)


@contextmanager
def without_collector() -> Iterator[None]:
    """Blocks end when their last reference goes; looking for cycles among so many objects takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _loss(model: TapedModel, logits: Shaped) -> Shaped:
    """Stands for ``ForCausalLMLoss``: logits in 32 bits, then log-softmax and negative log likelihood."""
    tape = model.tape
    tape.module = "loss"
    wide = tape.cast(logits, 4, "logits in 32 bits")
    logs = tape.with_saved_output([wide], ("N", "V"), 4, "log-softmax of the logits")
    return tape.scale(tape.op([logs], (), 4, None, (logs,)))


def _regularised(model: TapedModel, loss: Shaped) -> Shaped:
    """Stands for the term that a method adds to the loss."""
    tape = model.tape
    if not model.form.orthogonality_term:
        return loss
    # Its gradients come first in the backward pass, and wait until those of the model come.
    tape.module = ""
    matrices = [w for name, w in model.weights.items() if name.endswith(("lora_A", "lora_B"))]
    return tape.op([loss, *(tape.op([w, w], ("r", "r"), 4, None, (w,)) for w in matrices)], (), 4)


def _masked(model: TapedModel, needed: bool) -> bool:
    """Returns whether attention gets a mask: eager always, flash never, SDPA if it is needed or there is a prefix."""
    kernel = model.spec.attention
    return kernel == "eager" or (kernel == "sdpa" and (needed or not model.method.mask_free_attention))


def _train(model: TapedModel) -> Trace:
    """Returns the trace of two steps: optimizer states appear in the first, the second is the steady one."""
    tape, spec = model.tape, model.spec
    batch = [tape.new(("T",), 8, "temporaries", "batch") for _ in range(3)]
    trained = [w for w in model.weights.values() if w.node is not None]
    masked = _masked(model, spec.packing or (spec.loss_path == "hf" and model.padded))
    start = len(tape.trace.events)
    held: Shaped | None = None
    for _ in range(min(spec.gradient_accumulation, 2)):  # any later one is like the second
        tape.trace.begin("forward")
        before, model.cache = model.cache, []  # the last outputs, with their cache, live until there are new ones
        job, kept = model.beside.job, spec.loss_path == "response_only"
        hidden = run_decoder(model, masked=masked) if job == "sft" else None
        if hidden is None:
            loss = job_loss(model, masked=masked)
        elif model.loss == "plain":
            logits = run_head(model, hidden, kept=kept)
            loss = _regularised(model, _loss(model, logits))
            held = logits if spec.keeps_logits else None
            del logits
        else:
            loss = _regularised(model, fused_loss(model, hidden, kept=kept))
        before.clear()
        tape.casts.clear()
        if held is None or model.shape.family not in RETURNS_CACHE:
            model.cache.clear()
        del hidden
        tape.trace.begin("backward")
        tape.backward(loss)
        del loss
    tape.trace.begin("optimizer")
    tape.module = ""
    states = _states_of(model, trained)
    for shapes in _temporaries(model, trained):
        copies = [tape.new(*shape, "temporaries", OPTIMIZER_COPY) for shape in shapes]
        copies.clear()
    for weight in trained:
        weight.node.grad = None
    del held
    model.cache.clear()
    tape.trace.begin("")
    tape.trace.name_open_blocks()
    tape.trace.repeat(start, {state.storage.index for state in states})
    del batch
    return tape.trace


def _states_of(model: TapedModel, trained: list[Shaped]) -> list[Shaped]:
    """Returns what the first optimizer step makes and keeps."""
    states: list[Shaped] = []
    if model.beside.optimizer_states != "own":
        for weight in trained:
            states += [_state(model, weight, width, STATES, dims) for dims, width in _other(model, weight)[0]]
    elif model.spec.optimizer != "sgd":
        for weight in trained:
            states += _moments(model, weight)
    scores = range(model.form.scores)
    matrices = [weight for weight in trained if "lora_" in weight.node.name]
    return states + [_state(model, w, w.width, "importance scores of AdaLoRA") for w in matrices for _ in scores]


def _temporaries(model: TapedModel, trained: list[Shaped]) -> Iterator[Tensors]:
    """Yields what ``optimizer.step`` takes at once; bitsandbytes and fused implementations take nothing."""
    spec, apart = model.spec, model.form.own_group
    if model.beside.optimizer_states != "own":
        yield from (_other(model, weight)[1] for weight in trained)
    elif spec.optimizer == "adamw" or (spec.optimizer == "sgd" and spec.weight_decay):
        for second in (False, True) if apart else (False,):
            shapes = [(w.dims, w.width) for w in trained if not apart or (apart in w.node.name) == second]
            if spec.optimizer_implementation == "foreach":
                yield shapes
            elif spec.optimizer_implementation == "single":
                yield from ([shape] * 2 for shape in shapes)


def _other(model: TapedModel, weight: Shaped) -> tuple[Tensors, Tensors]:
    in_layer = weight.node.name.startswith("layers.")
    return states_of(model.beside.optimizer_states, weight.dims, weight.width, model.sizes, layer=in_layer)


STATES = "first and second moments"


def _moments(model: TapedModel, weight: Shaped) -> list[Shaped]:
    values = prod(model.sizes[name] for name in weight.dims)
    optimizer = model.spec.optimizer
    paged = optimizer.startswith("paged") and values >= PAGED_FROM_VALUES
    if optimizer.endswith("8bit") and values >= LARGE_STATE:
        widths = [1.0, 1.0, 4 / STATE_BLOCK, 4 / STATE_BLOCK]
    else:
        widths = [float(weight.width)] * 2 if optimizer == "adamw" else [4.0] * 2
    states = [_state(model, weight, width, STATES) for width in widths]
    for state in states[:2]:
        state.storage.block.paged = paged
    return states


def _state(model: TapedModel, weight: Shaped, width: float, term: str, dims: Dims | None = None) -> Shaped:
    state = model.tape.new(weight.dims if dims is None else dims, width, "optimizer states", term)
    state.storage.block.module = weight.node.name
    return state


def _evaluate(model: TapedModel, *, gathers: bool) -> Trace:
    """Returns the trace of the held-out loss on one batch, or of the last batch of an evaluation that gathers logits.

    Such an evaluation, ``Trainer.evaluation_loop``, interrupts the training, so that the optimizer's states are there.
    It computes logits of all positions, which accelerate makes fp32 under autocast. Its variable holds the logits of
    the batch before until there are new ones, and ``nested_concat`` writes all of them into a new tensor.

    Source: transformers 5.24, trainer.py:2986 to 3049 and trainer_pt_utils.py:371; accelerate, ``convert_to_fp32``.
    """
    tape = model.tape
    trained = [weight for weight in model.weights.values() if weight.node is not None]
    states = _states_of(model, trained) if gathers else []
    tape.training = False
    for weight in trained:
        weight.node = None
    width = 4 if tape.autocast else model.head.width
    tape.trace.begin("evaluate")
    tape.module = "loss"
    before = tape.new(("N", "V"), width, term="logits") if gathers and model.sizes["F"] else None
    held = tape.new(("F", "V"), width, term=GATHERED) if gathers else None
    hidden = run_decoder(model, masked=_masked(model, model.padded))
    fused = model.loss in ALSO_IN_EVALUATION and not gathers
    logits = None if fused else run_head(model, hidden, kept=not gathers)
    if logits is None:
        fused_loss(model, hidden)
    del hidden
    tape.casts.clear()
    model.cache.clear()
    tape.module = "loss"
    wide = logits and tape.cast(logits, 4, "logits in 32 bits")
    logs = logits and tape.new(("N", "V"), 4, term="log-softmax of the logits")
    if logits and gathers:
        del wide, logs
        logits = tape.cast(logits, width, "logits in 32 bits")
        del before
        tape.new(("E", "V"), width, term=GATHERED)
        del held, logits, states
    else:
        del logits, wide, logs
    tape.trace.begin("")
    tape.trace.name_open_blocks()
    return tape.trace
