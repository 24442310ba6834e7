"""What fits on a card: each method with its headroom, the largest sizes that still fit, and advice. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftscope.errors import InputError, Problem, close_match
from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.hardware import Gpu
from peftscope.memory.question import METHOD_OPTIONS, Model, ask
from peftscope.methods import METHODS

LARGEST_BATCH_SIZE = 4096
LARGEST_RANK = 1024
LONGEST_SEQUENCE = 131_072
"""Of models that do not state theirs."""

ADVICE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--checkpointing", {"checkpointing": True}),
    ("--batch-size 1", {"batch_size": 1}),
    ("--checkpointing --batch-size 1", {"checkpointing": True, "batch_size": 1}),
    ("--optimizer paged_adamw_8bit", {"optimizer": "adamw_8bit"}),
    (
        "--checkpointing --batch-size 1 --optimizer adamw_8bit",
        {"checkpointing": True, "batch_size": 1, "optimizer": "adamw_8bit"},
    ),
    ("--method qlora", {"method": "qlora"}),
    ("--method qlora --checkpointing", {"method": "qlora", "checkpointing": True}),
    (
        "--method qlora --checkpointing --batch-size 1",
        {"method": "qlora", "checkpointing": True, "batch_size": 1},
    ),
    (
        "--method qlora --checkpointing --batch-size 1 --seq-len 256",
        {"method": "qlora", "checkpointing": True, "batch_size": 1, "seq_len": 256},
    ),
)
"""What may help where something does not fit, mildest first."""


@dataclass(frozen=True)
class Fit:
    """Whether one method fits.

    Attributes:
        model: As it was asked for.
        method: Its name.
        peak_device_bytes: What it takes.
        capacity_bytes: What the card has.
        headroom_bytes: What is left; negative: what is missing.
        fits: Whether it does.
        largest_batch_size: With everything else as asked, one more does not fit; None: not even 1.
        largest_seq_len: The same for the length of a sequence.
        largest_rank: The same for the rank; None also where there is none.
        advice: The mildest change that makes it fit; empty if it does.
    """

    model: str
    method: str
    peak_device_bytes: int
    capacity_bytes: int
    headroom_bytes: int
    fits: bool
    largest_batch_size: int | None
    largest_seq_len: int | None
    largest_rank: int | None
    advice: str

    def to_json(self) -> dict[str, Any]:
        """Returns the fit as JSON content."""
        return asdict(self)


def known_methods(names: str | None) -> list[str]:
    """Returns the methods of a list with commas, or all that train.

    Raises:
        InputError: One is not known.
    """
    trained = [name for name, method in METHODS.items() if method.trains]
    chosen = [name.strip() for name in (names or "").split(",") if name.strip()]
    if not chosen:
        return trained
    unknown = [name for name in chosen if name not in trained]
    if unknown:
        raise InputError(
            Problem("methods", f"unknown method (got {name!r})", close_match(name, trained)) for name in unknown
        )
    return chosen


def fit_methods(
    models: Sequence[Model], methods: Sequence[str], options: Mapping[str, Any], gpu: Gpu, gpus: int
) -> Iterator[Fit]:
    """Yields one fit per model and method; an option of a method goes only to methods that have it.

    Raises:
        InputError: An option is wrong.
    """
    for model in models:
        for method in methods:
            yield _fit(model, method, options, gpu, gpus)


def options_of_method(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the options that a method has, and its name; rank means AdaLoRA's initial rank, too."""
    fields = METHODS[method].model_fields
    found = {k: v for k, v in options.items() if v is not None and (k not in METHOD_OPTIONS or k in fields)}
    if method == "adalora" and options.get("rank"):
        found |= _adalora_ranks(options["rank"])
    if not METHODS[method].supports_checkpointing:
        found.pop("checkpointing", None)
    return {**found, "method": method}


def _adalora_ranks(rank: int) -> dict[str, int]:
    """Returns initial and target rank; the initial one is at least 2, for there must be something to prune."""
    return {"init_r": max(2, rank), "target_r": max(1, rank // 2)}


def _fit(model: Model, method: str, asked: Mapping[str, Any], gpu: Gpu, gpus: int) -> Fit:
    options = options_of_method(method, asked)

    def device_bytes(**changes: Any) -> int:
        return _device_bytes(model, {**options, **changes}, gpu, gpus)

    def most(field: str, limit: int) -> int | None:
        return largest(lambda value: device_bytes(**{field: value}), gpu.memory_bytes, limit)

    taken = device_bytes()
    virtual = getattr(ask(model, options).spec.method, "virtual_tokens", 0)
    limit = (model.config.get("max_position_embeddings") or LONGEST_SEQUENCE) - virtual
    advice = ""
    if taken > gpu.memory_bytes:
        advice = _advice(model, method, asked, gpu, gpus)
    return Fit(
        model=model.name,
        method=method,
        peak_device_bytes=taken,
        capacity_bytes=gpu.memory_bytes,
        headroom_bytes=gpu.memory_bytes - taken,
        fits=taken <= gpu.memory_bytes,
        largest_batch_size=most("batch_size", LARGEST_BATCH_SIZE),
        largest_seq_len=most("seq_len", limit),
        largest_rank=_largest_rank(method, device_bytes, gpu, _rank_limit(model)),
        advice=advice,
    )


def _device_bytes(model: Model, options: Mapping[str, Any], gpu: Gpu, gpus: int) -> int:
    # An evaluation of the same batch keeps nothing for a backward pass, so that it does not decide.
    return peaks_by_formula(ask(model, options, gpu=gpu, gpus=gpus), evaluation=False).device_bytes


def _largest_rank(method: str, device_bytes: Callable[..., int], gpu: Gpu, limit: int) -> int | None:
    if "rank" in METHODS[method].model_fields:
        return largest(lambda value: device_bytes(rank=value), gpu.memory_bytes, limit)
    if "init_r" in METHODS[method].model_fields:  # at least two, for there must be something to prune
        return largest(lambda value: device_bytes(**_adalora_ranks(value)), gpu.memory_bytes, limit)
    return None


def _rank_limit(model: Model) -> int:
    narrowest = min(min(la.inputs, la.outputs) for la in model.shape.block) if model.shape else LARGEST_RANK
    return min(LARGEST_RANK, narrowest)


def _advice(model: Model, method: str, asked: Mapping[str, Any], gpu: Gpu, gpus: int) -> str:
    for words, changes in ADVICE:
        options = options_of_method(changes.get("method", method), asked)
        try:
            taken = _device_bytes(model, {**options, **changes}, gpu, gpus)
        except InputError:
            continue
        if taken <= gpu.memory_bytes:
            return words
    return "a smaller model, a larger card, or --gpus"


def largest(takes: Callable[[int], int], capacity: int, limit: int) -> int | None:
    """Returns a number up to ``limit`` whose bytes fit while those of one more do not; None if those of 1 do not fit.

    It is the largest where more never takes less. Reserved bytes fall now and then, where a length fragments less, so
    that some number beyond may fit as well. Bytes are nearly a straight line, so that a guess along it is close.

    >>> largest(lambda n: 10 + 3 * n, 100, 1000), largest(lambda n: 10 + 3 * n, 12, 1000), largest(lambda n: n, 100, 50)
    (30, None, 50)
    """
    low, low_bytes = 1, takes(1)
    if low_bytes > capacity:
        return None
    high, high_bytes = limit + 1, 0
    step = 1.0
    while high - low > 1:
        if high_bytes:
            step = (high_bytes - low_bytes) / (high - low)
            guess = low + int((capacity - low_bytes) / step)
        else:
            guess = 2 if low == 1 else low + int((capacity - low_bytes) / step)
        # Never only one end: a guess just above what fits settles most searches.
        guess = min(max(guess, low + 1), high - 1)
        size = takes(guess)
        if size <= capacity:
            step = max(1.0, (size - low_bytes) / (guess - low))
            low, low_bytes = guess, size
            if low + 1 < high and takes(low + 1) > capacity:
                return low
        else:
            high, high_bytes = guess, size
    return low
