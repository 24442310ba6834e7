"""Simulates the memory of training steps: the same model code and the same step, on tensors that have only a shape.

The base is built on ``meta``, the method is applied there, and a fake tensor replaces every parameter. Then the
project's own step runs under the byte tracker. No values are computed, so even a 65B model takes no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from peftscope.data.batching import Batch
from peftscope.errors import InputError, Problem, shown
from peftscope.memory.answer import Answer, Peaks, answer_of, peaks_of
from peftscope.memory.as_on_cuda import as_on_cuda, dequantised_bytes, drop_as_on_cuda, fuse_loss, grouped_products
from peftscope.memory.beside import Beside
from peftscope.memory.depths import peaks_by_depth, with_a_second_step
from peftscope.memory.empty import attention_stand_in, empty_base, empty_batch, empty_model, fake_batch, fill_with_fakes
from peftscope.memory.formula.linear import tower_blocks
from peftscope.memory.formula.step import PAGED_FROM_VALUES
from peftscope.memory.probe import track_evaluation, track_steps
from peftscope.memory.question import Question
from peftscope.memory.trace import Block, Trace
from peftscope.memory.tracker import MemoryTracker, quantisation_tensors, tensors_of
from peftscope.memory.trl_loss import ChunkedLogProbs, take_job
from peftscope.spec import RunSpec
from peftscope.training.load import attention, training_attention
from peftscope.training.step import TrainedModel, make_optimizer


def simulate(
    spec: RunSpec,
    config: Any,
    batches: Sequence[Batch],
    evaluation_batch: Batch | None = None,
    cublas_bytes: int = 0,
    beside: Beside | None = None,
    tower: Sequence[Block] = (),
    *,
    before_ampere: bool = False,
) -> tuple[Trace, Trace | None]:
    """Returns the trace of training steps, one per batch, and the trace of an evaluation.

    The training trace equals, to the byte, the trace of the probe in a real CPU run with as many steps. The first step
    allocates the optimizer states. AdaLoRA is simulated before it prunes; pruning frees nothing. The computations that
    initialise PiSSA and LoftQ are not part of a step.

    Args:
        spec: The run.
        config: The transformers configuration of its base model.
        batches: The training batches, of which only the shapes count, and whether they have padding. Without any,
            nothing is trained.
        evaluation_batch: A batch with the shape of the evaluation's, or None for no evaluation.
        cublas_bytes: The size of cuBLAS's workspace. Above 0, the traces also contain the workspaces of CUDA kernels.
        beside: What is said beside the fields of the run: the job, the loss, modules that are trained in full.
        tower: The frozen weights of a vision tower, which lie beside.
        before_ampere: Whether the card's attention has no kernel for bf16 but the math one.
    """
    beside = beside or Beside()
    trained = empty_model(spec, config, beside)
    model = trained.model
    in_training = attention_stand_in(training_attention(spec), spec, [] if spec.packing else batches)
    if beside.job != "sft":
        reference = empty_base(spec, config, spec.method.quantization()) if beside.reference == "copy" else None
        if reference:
            reference.config._attn_implementation = in_training
        take_job(trained, beside, len(batches[0].kept_positions), reference)
    if beside.loss in ("liger", "chunked"):
        fuse_loss(model, trained.loss_function, ChunkedLogProbs.apply if beside.loss == "chunked" else None)
    # Fake tensors are CPU tensors, and autocast takes its device from the spec. Only a plain loss has logits to keep.
    kept = spec.keeps_logits and beside.loss == "plain" and beside.job == "sft"
    on_cpu = spec.model_copy(update={"device": "cpu", "keep_logits": kept})
    if cublas_bytes:
        drop_as_on_cuda(model)
    in_evaluation = attention_stand_in(spec.attention, spec, [evaluation_batch] if evaluation_batch else [])
    choices = as_on_cuda(before_ampere=before_ampere) if cublas_bytes else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), choices, grouped_products(), _Owners(trained) as owners:
        fill_with_fakes(model, spec.method.quantization(), packs_experts=beside.quantize_moe_experts)
        with attention(model, in_training):
            trace = _train(trained, owners, on_cpu, batches, cublas_bytes, tower) if batches else Trace()
        if evaluation_batch is None:
            return trace, None
        tracker = _tracker_of(model, spec, owners, cublas_bytes, tower)
        owners.outside = "loss"  # everything that an evaluation computes outside the model
        with attention(model, in_evaluation):
            track_evaluation(tracker, model, fake_batch(evaluation_batch), on_cpu)
        tracker.trace.name_open_blocks()
        return trace, tracker.trace


def _train(
    trained: TrainedModel,
    owners: _Owners,
    spec: RunSpec,
    batches: Sequence[Batch],
    cublas_bytes: int,
    tower: Sequence[Block],
) -> Trace:
    model = trained.model
    tracker = _tracker_of(model, spec, owners, cublas_bytes, tower)
    with unset_fake_temporarily():  # bitsandbytes computes its code tables value by value
        optimizer = make_optimizer(model, spec)
    parameters = {owners.clean(name): p for name, p in model.named_parameters() if p.requires_grad}

    def mark(phase: str) -> None:
        """Labels the gradients before a phase uses them, and the optimizer states after the optimizer made them."""
        for name, parameter in parameters.items():
            _name(tracker, parameter.grad, "gradients", name)
            if phase == "" and parameter in optimizer.state:
                for key, state in optimizer.state[parameter].items():
                    block = _name(tracker, state, "optimizer states", name)
                    if block and spec.optimizer.startswith("paged") and key in ("state1", "state2"):
                        block.paged = state.numel() >= PAGED_FROM_VALUES

    before: Batch | None = None
    for batch in batches:
        if batch is not before:
            before, fake = batch, fake_batch(batch)
            for tensor in tensors_of(fake):
                tracker.add(tensor).kind = "temporaries"
        track_steps(tracker, trained, [fake], optimizer, spec, before_phase=mark)
    tracker.trace.name_open_blocks()
    return tracker.trace


def _name(tracker: MemoryTracker, tensor: Any, kind: str, module: str) -> Block | None:
    block = tracker.block_of(tensor) if isinstance(tensor, torch.Tensor) else None
    if block:
        block.kind, block.module = kind, module
    return block


def _tracker_of(
    model: torch.nn.Module, spec: RunSpec, owners: _Owners, cublas_bytes: int, tower: Sequence[Block]
) -> MemoryTracker:
    """Returns a tracker that has counted the model: frozen weights first, as they are loaded before the adapter."""
    on_cuda = cublas_bytes > 0
    tracker = MemoryTracker(owner_of_now=owners.now, workspace_of=dequantised_bytes if on_cuda else lambda *_: 0)
    named = list(model.named_parameters())
    if on_cuda:  # the backward pass runs in a thread with its own cuBLAS handle and workspace
        for _ in range(2 if any(parameter.requires_grad for _, parameter in named) else 1):
            tracker.trace.born(Block(cublas_bytes, "kernel workspace", term="cuBLAS workspace"))
    for name, parameter in sorted(named, key=lambda pair: pair[1].requires_grad):
        kind = "adapters" if parameter.requires_grad and not spec.method.trains_base else "weights"
        extra = quantisation_tensors(parameter)
        for tensor in (parameter.data, *extra):
            block = tracker.add(tensor)
            block.kind, block.module = ("quantised weights" if extra else kind), owners.clean(name)
    for name, buffer in model.named_buffers():
        block = tracker.add(buffer)
        block.kind, block.module = "weights", owners.clean(name)
    for block in tower:
        tracker.trace.born(Block(block.size, block.kind, block.module, block.term))
    return tracker


def answer_by_simulation(question: Question) -> Answer:
    """Returns the answer by simulation.

    Raises:
        InputError: transformers does not know the model, or PEFT does not find the targets in it.
    """
    return answer_of(question, peaks_by_simulation(question), "simulation")


def peaks_by_simulation(question: Question, *, evaluation: bool | None = None) -> Peaks:
    """Returns the peaks by simulation, with or without an evaluation; None: with one if the question asks for it.

    Raises:
        InputError: The question names several cards, transformers does not know the model, or PEFT does not find the
            targets in it.
    """
    if question.gpus > 1 and not question.formula_only:
        has_form = question.spec.method.closed_form is not None
        message = "only the closed form can answer for several cards"
        message += "" if has_form else f", and {question.spec.method.name} has none"
        raise InputError(Problem("gpus", message, "leave out --simulate" if has_form else "ask about one card"))
    for option in question.formula_only:
        message = f"{shown(getattr(question.beside, option))} is known to the closed form only"
        remedy = "leave out --simulate" if question.has_closed_form else "leave it out: this model is simulated"
        raise InputError(Problem(option, message, remedy))
    if stored := question.model.stored:
        raise InputError(
            Problem("model", f"a base in {stored.name} is known to the closed form only", "leave out --simulate")
        )
    spec, responses = question.spec, question.responses
    counts = question.evaluates if evaluation is None else evaluation
    if reason := spec.method.why_not_simulated():
        raise InputError(Problem("method", reason, "run it: a run measures its peaks"))
    sizes: dict[str, Any] = {"width": spec.seq_len, "responses": responses, "padded": question.padded}
    batch = empty_batch(rows=question.rows, packed=spec.packing, **sizes)
    evaluation_batch = empty_batch(rows=spec.eval_batch_size, **sizes)
    fields = dict(question.model.config)

    def simulate_at(config: Any, steps: int = 2) -> tuple[Trace | None, Trace | None]:
        training, evaluated = simulate(
            spec,
            config,
            [batch] * steps if spec.method.trains else [],
            evaluation_batch if counts or not spec.method.trains else None,
            question.cublas_bytes,
            question.beside,
            tower_blocks(question),
            before_ampere=question.before_ampere,
        )
        return training if spec.method.trains else None, evaluated

    def simulate_once(config: Any) -> tuple[Trace | None, Trace | None]:
        training, evaluated = simulate_at(config, 1)
        return training and with_a_second_step(training), evaluated

    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if deep := peaks_by_depth(question, config, simulate_once):
            return deep
        training, evaluated = simulate_at(config)
    except Exception as error:  # any model may fail in its own way, and the user needs one line
        where, reason, remedy = _why_it_failed(question, error)
        raise InputError(Problem(where, f"{question.model.name} cannot be simulated: {reason}", remedy)) from error
    return peaks_of(question, training, evaluated)


def _why_it_failed(question: Question, error: Exception) -> tuple[str, str, str]:
    """Returns the option that a simulation failed by, the reason, and what to do. No library's message is repeated."""
    kind, said, causal = question.model.config["model_type"], str(error), "give the config.json of a causal model"
    if kind not in CONFIG_MAPPING:
        return "model", f"transformers {version('transformers')} has no model_type {shown(kind)}", causal
    if type(CONFIG_MAPPING[kind]()) not in AutoModelForCausalLM._model_mapping:
        return "model", f"transformers has no causal model of text for the model_type {shown(kind)}", causal
    if "scaled_dot_product_attention" in said:
        return "attention", f"transformers has no sdpa for the model_type {shown(kind)}", "give --attention eager"
    if said.startswith("Target modules"):
        return "targets", f"it has none of the modules {', '.join(question.spec.method.modules_named())}", "name others"
    if "dtype" in said:
        return "method", "it multiplies numbers of two types", "give --precision amp or --adapter-dtype base"
    return "model", f"its code ended with {type(error).__name__} where tensors have no data", "run it: a run measures"


class _Owners:
    """Tells which module owns a new block: the one that runs, or the one whose backward pass runs."""

    def __init__(self, trained: TrainedModel) -> None:
        self._names = {id(module): self.clean(name) for name, module in trained.model.named_modules()}
        self._stack: list[str] = []
        self._of_node: dict[int, str] = {}
        self._loss_function = trained.loss_function
        self.outside = ""

    @staticmethod
    def clean(name: str) -> str:
        """Returns a dotted path without the parts that the wrapper adds."""
        return name.removeprefix("base_model.").removeprefix("model.").replace("model.", "")

    def __enter__(self) -> _Owners:
        self._hooks = [
            register_module_forward_pre_hook(lambda one, _: self._stack.append(self._names.get(id(one), ""))),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        # The loss is not a module, so no hook sees it: this wrapper names its blocks.
        self._loss = self._loss_function._loss
        self._loss_function._loss = self._named_loss
        return self

    def __exit__(self, *_: object) -> None:
        self._loss_function._loss = self._loss
        for hook in self._hooks:
            hook.remove()

    def _leave_module(self, *_: object) -> None:
        self._stack.pop()

    def _named_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._stack.append("loss")
        try:
            return self._loss(*args, **kwargs)
        finally:
            self._stack.pop()

    def now(self) -> tuple[str, str]:
        """Returns the module of a new block, and its kind if that is already known."""
        node = torch._C._current_autograd_node()
        if node is None:
            name, kind = (self._stack[-1] if self._stack else self.outside), ""
            self._of_node[torch._C._autograd._get_sequence_nr() - 1] = name
        elif self._stack:  # gradient checkpointing reruns modules inside the backward pass
            name, kind = self._stack[-1], "saved activations"
        else:
            name, kind = self._of_node.get(node._sequence_nr(), ""), "temporaries"
        return name, "logits and loss" if name in ("lm_head", "loss") else kind
