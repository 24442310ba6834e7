"""The memory of training: simulated in stated settings, and counted on real optimizers.

A run is given by the options of ``peftscope memory``; the default is one sequence of 512 tokens. Ranges are scanned in
closed form, and the setting that decides is simulated. Numbers are those of torch's allocator on CUDA with paged states
on the card; ``device`` adds the allocator's reserve and the CUDA context.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal

import bitsandbytes.optim
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import tiny_llama, token_ids
from peftscope.hardware.cards import CONTEXT_BYTES, Gpu, find_gpu
from peftscope.memory.answer import Answer, Peaks, answer_by_formula, peaks_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.question import Question, ask
from peftscope.memory.simulate import answer_by_simulation
from peftscope.methods.fields import target_modules
from peftscope.sizing.fit import Search
from peftscope.sizing.needs import Needs, options_of_method
from peftscope.words import GIB

GB = 10**9
MODEL = "llama-2-7b"
RUN = {"batch_size": 1, "seq_len": 512}
LENGTHS = (256, 512, 1024, 2048)
MOST_CARDS = 64

_SCAN = partial(peaks_by_formula, evaluation=False)
How = Literal["simulation", "formula"]
Run = dict[str, Any]


def at_peak(kinds: list[str], run: Run, model: str = MODEL, how: How = "simulation") -> Measurement:
    """Returns the GB of some of ``peftscope.memory.trace.KINDS`` at the peak of a training step."""
    answer = _answer(model, run, how)
    return Measurement(sum(_parts(answer).get(kind, 0) for kind in kinds) / GB, evidence=_evidence(answer), model=model)


def share_of_peak(kinds: list[str], run: Run, model: str = MODEL, how: How = "simulation") -> Measurement:
    """Returns the share of some kinds of tensors in the peak of a training step; see ``at_peak``."""
    answer = _answer(model, run, how)
    share = sum(_parts(answer).get(kind, 0) for kind in kinds) / _allocated(answer)
    return Measurement(share, evidence=_evidence(answer), model=model)


def ratio_at_peak(kinds: list[str], run: Run, over: Run, model: str = MODEL, how: How = "simulation") -> Measurement:
    """Returns some kinds of tensors at the peak of a run over the same kinds at that of another; see ``at_peak``."""
    above, below = (float(at_peak(kinds, options, model, how).value) for options in (run, over))
    evidence = {"above the line, GB": above, "below the line, GB": below}
    return Measurement(above / below, evidence=evidence, model=model)


def peak(run: Run, model: str = MODEL, how: How = "simulation") -> Measurement:
    """Returns the peak of a training run in GB."""
    answer = _answer(model, run, how)
    curves = _over_lengths(model, run, lambda peaks: _allocated(peaks) / GB)
    axes = ("tokens in a sequence", "peak, GB")
    return Measurement(_allocated(answer) / GB, evidence=_evidence(answer), curves=curves, axes=axes, model=model)


def free(gpu: str, run: Run, model: str = MODEL, how: How = "simulation") -> Measurement:
    """Returns the GiB that a run leaves free on a card, after the CUDA context. A negative value is missing memory."""
    answer, card = _answer(model, run, how), find_gpu(gpu)
    options = {**RUN, **run}
    # A context of the usual size, as in the answer: not this card's own.
    search = Search(describe_model(model), str(options["method"]), options, Needs(Gpu(card.name, card.memory_bytes)))
    longest = search.largest("seq_len", search.longest())
    evidence = _evidence(answer) | {"of the card, GiB": card.memory_bytes / GIB, "longest sequence": longest or 0}
    curves = _over_lengths(model, run, lambda peaks: peaks.device_bytes / GIB)
    axes = ("tokens in a sequence", f"on the card ({card.name}), GiB")
    left = (card.memory_bytes - answer.peak_device_bytes) / GIB
    return Measurement(left, evidence=evidence, curves=curves, axes=axes, model=model)


def fewest_cards(gpu: str, regimes: dict[str, Run], run: Run, model: str = MODEL, headroom: float = 0) -> Measurement:
    """Returns the fewest cards that hold a run in any of the regimes, with everything sharded as in FSDP and ZeRO-3.

    The share ``headroom`` of each card stays free.
    """
    capacity = (1 - headroom) * find_gpu(gpu).memory_bytes
    counts: dict[str, int] = {}
    evidence: dict[str, float] = {}
    for name, changes in regimes.items():
        sizes: dict[int, int] = {}
        for gpus in range(1, MOST_CARDS + 1):
            sizes[gpus] = peaks_by_formula(_question(model, run | changes, gpus)).device_bytes
            if sizes[gpus] <= capacity:
                break
        counts[name] = len(sizes)
        evidence[f"cards, {name}"] = len(sizes)
        evidence[f"on each, {name}, GiB"] = sizes[len(sizes)] / GIB
    best = min(counts, key=lambda name: counts[name])
    if counts[best] == 1:
        evidence[f"simulated, {best}, GiB"] = _answer(model, run | regimes[best]).peak_device_bytes / GIB
    return Measurement(counts[best], evidence=evidence, n=len(regimes), model=model)


def smallest_peak_ratio(
    run: Run, against: Run, batch_sizes: tuple[int, ...] = (1,), model: str = MODEL, how: How = "simulation"
) -> Measurement:
    """Returns the ratio of the peaks of two runs at the batch size where it is smallest; see ``at_peak``."""

    def ratio(size: int) -> float:
        above, below = (_peaks(model, {**options, "batch_size": size}) for options in (run, against))
        return _allocated(above) / _allocated(below)

    ratios = {float(size): ratio(size) for size in batch_sizes}
    chosen = int(min(ratios, key=lambda size: ratios[size]))
    above, below = (_answer(model, {**options, "batch_size": chosen}, how) for options in (run, against))
    evidence = {
        "at batch size": chosen,
        "above the line, GB": _allocated(above) / GB,
        "below the line, GB": _allocated(below) / GB,
    }
    curves = {"ratio": ratios} if len(ratios) > 1 else {}
    return Measurement(
        _allocated(above) / _allocated(below),
        evidence=evidence,
        curves=curves,
        axes=("sequences in a batch", "ratio of the peaks"),
        n=len(ratios),
        model=model,
    )


def smallest_increase(changes: list[Run], run: Run, model: str = MODEL, how: How = "simulation") -> Measurement:
    """Returns the smallest increase of the peak, in GB, from one run of a list to the next."""
    answers = [_answer(model, run | change, how) for change in changes]
    evidence: dict[str, float] = {}
    for change, answer in zip(changes, answers, strict=True):
        name = ", ".join(map(str, change.values()))
        adapter = sum(_parts(answer).get(kind, 0) for kind in ("adapters", "gradients", "optimizer states"))
        evidence[f"peak, {name}, GB"] = _allocated(answer) / GB
        evidence[f"adapters and their states, {name}, GB"] = adapter / GB
    steps = [_allocated(b) - _allocated(a) for a, b in pairwise(answers)]
    return Measurement(min(steps) / GB, evidence=evidence, n=len(steps), model=model)


def optimizer_bytes(optimizer: str, dtype: str) -> Measurement:
    """Returns the bytes of state that an optimizer keeps for each parameter, counted after a step.

    Args:
        optimizer: A class of ``torch.optim`` or ``bitsandbytes.optim``, with its module.
        dtype: The torch dtype of the parameters.
    """
    parameter = torch.nn.Parameter(torch.ones(256, 256, dtype=getattr(torch, dtype)))
    library, _, name = optimizer.rpartition(".")
    made = getattr({"torch.optim": torch.optim, "bitsandbytes.optim": bitsandbytes.optim}[library], name)([parameter])
    parameter.grad = torch.ones_like(parameter)
    made.step()
    state = {key: v for key, v in made.state[parameter].items() if torch.is_tensor(v)}
    # Only the moments and their scales count: code tables and counters do not grow with the parameters.
    own = {key: v for key, v in state.items() if "qmap" not in key and v.numel() > 1}
    evidence = {f"type of {key}": str(v.dtype).removeprefix("torch.") for key, v in own.items()}
    return Measurement(sum(v.nbytes for v in own.values()) / parameter.numel(), evidence=evidence)


def adapter_bytes(method: Literal["lora", "adalora"], steps: int = 10) -> Measurement:
    """Returns the most bytes per parameter that PEFT's adapter takes in a training step, all in 32 bits.

    The bytes are those of parameters, gradients, both moments of AdamW, and AdaLoRA's importance scores.
    """
    targets = target_modules("all-linear")
    config = LoraConfig(r=12, target_modules=targets, task_type="CAUSAL_LM")
    if method == "adalora":
        ranks = {"init_r": 12, "target_r": 4, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": steps}
        config = AdaLoraConfig(target_modules=targets, task_type="CAUSAL_LM", **ranks)
    model = get_peft_model(tiny_llama(), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids, sizes, rated = token_ids(model), [], 0
    for step in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if method == "adalora":
            model.base_model.update_and_allocate(step)
        states = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
        allocator = vars(getattr(model.base_model, "rankallocator", None) or object)
        scores = [v for name in ("ipt", "exp_avg_ipt", "exp_avg_unc") for v in allocator.get(name, {}).values()]
        alive = [*trained, *(p.grad for p in trained if p.grad is not None), *states, *scores]
        sizes.append(sum(tensor.nbytes for tensor in alive))
        rated = max(rated, sum(score.nbytes for score in scores))
        optimizer.zero_grad()
    values = sum(parameter.numel() for parameter in trained)
    kept = (model.peft_config["default"].rank_pattern or {}).values() if method == "adalora" else []
    evidence = {
        "parameters": values,
        "importance scores, bytes per parameter": rated / values,
        "after the last step, bytes per parameter": sizes[-1] / values,
    }
    if kept:
        evidence["rank kept at the end, share"] = sum(map(sum, kept)) / sum(map(len, kept))
    return Measurement(max(sizes) / values, evidence=evidence, model="a Llama of two narrow layers")


def _question(model: str, run: Run, gpus: int = 1) -> Question:
    options = {**RUN, **run}
    return ask(describe_model(model), options_of_method(options["method"], options), gpus=gpus)


def _answer(model: str, run: Run, how: How = "simulation") -> Answer:
    answer = answer_by_formula if how == "formula" else answer_by_simulation
    return _asked(answer, model, json.dumps(run, sort_keys=True))


def _peaks(model: str, run: Run) -> Peaks:
    return _asked(_SCAN, model, json.dumps(run, sort_keys=True))


@cache
def _asked(answer: Callable[[Question], Any], model: str, run: str) -> Any:
    return answer(_question(model, json.loads(run)))


def _allocated(answer: Answer | Peaks) -> int:
    """Returns the bytes of tensors, including paged states."""
    if isinstance(answer, Answer):
        return answer.peak_allocated_bytes + answer.peak_device_bytes - answer.peak_reserved_bytes - CONTEXT_BYTES
    return answer.allocated_bytes + answer.device_bytes - answer.reserved_bytes - CONTEXT_BYTES


def _parts(answer: Answer) -> dict[str, int]:
    """Returns the bytes of each kind at the peak, including paged states."""
    paged = _allocated(answer) - answer.peak_allocated_bytes
    return {**answer.components, "optimizer states": answer.components.get("optimizer states", 0) + paged}


def _evidence(answer: Answer) -> dict[str, float]:
    found = {f"{kind}, GB": size / GB for kind, size in _parts(answer).items() if size}
    return found | {"peak, GB": _allocated(answer) / GB, "on the card, GiB": answer.peak_device_bytes / GIB}


def _over_lengths(model: str, run: Run, value: Any) -> dict[str, dict[float, float]]:
    """Returns curves over the length of a sequence, with activations kept and recomputed, in closed form."""
    return {
        name: {float(n): value(_peaks(model, {**run, "seq_len": n, "checkpointing": again})) for n in LENGTHS}
        for name, again in (("activations kept", False), ("activations recomputed", True))
    }
