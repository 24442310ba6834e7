"""``peftscope memory`` and ``peftscope fit``: what a run takes, and what fits on a card."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from peftscope.errors import InputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from peftscope.memory.answer import Answer
    from peftscope.memory.question import Question

app = typer.Typer()

T = TypeVar("T")

MemoryModel = Annotated[
    str, typer.Argument(help="A preset (llama-2-7b, qwen2.5-0.5b, ...), a config.json, or a hub id.")
]
Rank = Annotated[int | None, typer.Option(help="Rank of the adapter.")]
Alpha = Annotated[float | None, typer.Option(help="Changes nothing in memory.")]
InitR = Annotated[int | None, typer.Option(help="AdaLoRA's initial rank.")]
TargetR = Annotated[int | None, typer.Option(help="AdaLoRA's final mean rank.")]
VirtualTokens = Annotated[int | None, typer.Option(help="Virtual tokens of prompt and prefix tuning.")]
Dropout = Annotated[float | None, typer.Option(help="Dropout on the input of A.")]
AdapterDtype = Annotated[str | None, typer.Option(help="fp32 (PEFT's default) or base.")]
DoubleQuant = Annotated[
    bool | None, typer.Option("--double-quant/--no-double-quant", help="Quantise the block constants (default).")
]
KbitPreparation = Annotated[
    bool | None,
    typer.Option("--kbit-preparation/--no-kbit-preparation", help="Cast what is not quantised to fp32 (default: no)."),
]
Accumulation = Annotated[int | None, typer.Option(help="Forward passes a step.")]
Targets = Annotated[str | None, typer.Option(help="minimal, attention, mlp, all-linear, or a list: q_proj,v_proj.")]
Feedforward = Annotated[
    str | None,
    typer.Option(help="Of IA3: a list of targets whose input is rescaled, not their output; default down_proj."),
]
BatchSize = Annotated[int | None, typer.Option(help="Sequences a forward pass; default 1.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens of the longest batch's sequences; default 512.")]
Precision = Annotated[str | None, typer.Option(help="bf16 (default), fp32, or amp: fp32 weights under autocast.")]
Optimizer = Annotated[str | None, typer.Option(help="adamw (default), sgd, adamw_8bit, paged_adamw, paged_adamw_8bit.")]
LossPath = Annotated[str | None, typer.Option(help="hf (default): logits everywhere; response_only.")]
Attention = Annotated[str | None, typer.Option(help="sdpa (default), eager, flash_attention_2.")]
Checkpointing = Annotated[
    bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations.")
]
Packing = Annotated[bool | None, typer.Option("--packed/--padded", help="Several examples a sequence (default: one).")]
Gpus = Annotated[int, typer.Option(help="Shard weights, gradients and states over so many cards.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs; the keys are stable.")]


@app.command("memory")
def memory_command(
    context: typer.Context,
    model: MemoryModel,
    method: Annotated[str, typer.Option(help="full, lora, qlora, dora, adalora, loftq, ...")] = "lora",
    rank: Rank = None,
    alpha: Alpha = None,
    init_r: InitR = None,
    target_r: TargetR = None,
    targets: Targets = None,
    feedforward: Feedforward = None,
    virtual_tokens: VirtualTokens = None,
    dropout: Dropout = None,
    adapter_dtype: AdapterDtype = None,
    double_quant: DoubleQuant = None,
    kbit_preparation: KbitPreparation = None,
    batch_size: BatchSize = None,
    seq_len: SequenceLength = None,
    gradient_accumulation: Accumulation = None,
    precision: Precision = None,
    optimizer: Optimizer = None,
    optimizer_implementation: Annotated[str | None, typer.Option(help="foreach, fused or single.")] = None,
    loss_path: LossPath = None,
    response_len: Annotated[
        int | None, typer.Option(help="Positions with a loss, for response_only; default half of --seq-len.")
    ] = None,
    attention: Attention = None,
    checkpointing: Checkpointing = None,
    packing: Packing = None,
    eval_batch_size: Annotated[int | None, typer.Option(help="Default --batch-size.")] = None,
    gpu: Annotated[str | None, typer.Option(help="For its CUDA context: rtx4090, a100, ..., or 24GiB.")] = None,
    gpus: Gpus = 1,
    simulate: Annotated[bool, typer.Option("--simulate", help="Run the step itself on tensors without data.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Every term with its formula and source.")] = False,
    depth: Annotated[int, typer.Option(help="Levels of the tree of modules.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Say what a training run takes on a card, without one: allocated, reserved and device memory."""
    from peftscope.hardware.cards import find_gpu
    from peftscope.memory.answer import answer_by_formula
    from peftscope.memory.question import ask, describe_model

    question = ask(
        describe_model(model),
        _run_options(context),
        responses=response_len,
        gpu=find_gpu(gpu) if gpu else None,
        gpus=gpus,
    )
    answer = _simulated(question) if simulate else answer_by_formula(question)
    if as_json:
        print(json.dumps(answer.to_json(), ensure_ascii=False))
        return
    from peftscope.memory.show import show_answer

    show_answer(answer, _wide_console(), explain=explain, depth=depth)


@app.command()
def fit(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A preset, a config.json, or a hub id.")] = None,
    gpu: Annotated[str, typer.Option(help="rtx4090, a100, ..., or its memory, as in 24GiB.")] = ...,  # type: ignore[assignment]
    models: Annotated[str | None, typer.Option(help="Several models, separated by commas.")] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", "--method", help="Only these methods, separated by commas.")
    ] = None,
    rank: Rank = None,
    alpha: Alpha = None,
    init_r: InitR = None,
    target_r: TargetR = None,
    targets: Targets = None,
    feedforward: Feedforward = None,
    virtual_tokens: VirtualTokens = None,
    dropout: Dropout = None,
    adapter_dtype: AdapterDtype = None,
    double_quant: DoubleQuant = None,
    kbit_preparation: KbitPreparation = None,
    batch_size: BatchSize = None,
    seq_len: SequenceLength = None,
    gradient_accumulation: Accumulation = None,
    precision: Precision = None,
    optimizer: Optimizer = None,
    loss_path: LossPath = None,
    attention: Attention = None,
    checkpointing: Checkpointing = None,
    packing: Packing = None,
    gpus: Gpus = 1,
    as_json: AsJson = False,
) -> None:
    """Say which methods fit on a card, with what is left, the largest sizes, and what to do where nothing fits."""
    from peftscope.hardware.cards import find_gpu
    from peftscope.memory.fit import fit_methods, known_methods
    from peftscope.memory.question import describe_model

    names = [name.strip() for name in f"{model or ''},{models or ''}".split(",") if name.strip()]
    if not names:
        raise InputError(Problem("model", "none given", "peftscope fit --gpu 24GiB llama-2-7b"))
    card, chosen = find_gpu(gpu), known_methods(methods)
    found = [describe_model(name) for name in names]
    fits = []
    for one in with_progress(
        fit_methods(found, chosen, _run_options(context), card, gpus), len(found) * len(chosen), "fitting"
    ):
        fits.append(one)
    if as_json:
        print(json.dumps([one.to_json() for one in fits], ensure_ascii=False))
        return
    from peftscope.memory.show import show_fits

    show_fits(fits, card, _wide_console())


def _run_options(context: typer.Context) -> dict[str, Any]:
    """Returns the options of a command that are fields of a run or of its method."""
    from peftscope.memory.question import METHOD_OPTIONS
    from peftscope.methods.fields import TARGET_PRESETS
    from peftscope.spec import RunSpec

    known = {*METHOD_OPTIONS, *RunSpec.model_fields} - {"model"}
    options = {name: value for name, value in context.params.items() if name in known}
    targets = options.get("targets")
    if targets:
        names = [name.strip() for name in targets.split(",") if name.strip()]
        options["targets"] = names[0] if len(names) == 1 and names[0] in TARGET_PRESETS else names
    if options.get("feedforward") is not None:
        options["feedforward"] = [name.strip() for name in options["feedforward"].split(",") if name.strip()]
    return options


def quiet_libraries() -> None:
    """Silences what libraries say about their own next versions and their bars, and keeps them from asking a hub."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _simulated(question: Question) -> Answer:
    quiet_libraries()
    with Console(stderr=True).status("simulating two training steps, some seconds"):
        from peftscope.memory.simulate import answer_by_simulation

        return answer_by_simulation(question)


def with_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yields the items, with a bar and the time that is left."""
    from rich.progress import track

    yield from track(items, description=what, total=total, console=Console(stderr=True), transient=True)


def _wide_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)
