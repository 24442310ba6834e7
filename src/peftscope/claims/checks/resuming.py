"""Training that resumes from a saved adapter."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import get_linear_schedule_with_warmup

from peftscope.claims.lora_subjects import adapted_llama, logits_of
from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import BLOCK_LINEAR, TINY, flat, tiny_llama, token_ids


def reloaded_logit_difference() -> Measurement:
    """Returns the largest difference of logits between a trained adapter and the same adapter saved and reloaded."""
    model = adapted_llama()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(tiny_llama(), f"{folder}/first", is_trainable=True).eval()
    evidence = {"change of the logits by the adapter": float((logits_of(model) - logits_of(tiny_llama())).abs().max())}
    return Measurement(float((logits_of(model) - logits_of(loaded)).abs().max()), evidence=evidence, model=TINY)


def resumed_run_difference(restored: Sequence[str], steps: int = 24) -> Measurement:
    """Returns how far a resumed run ends from an uninterrupted one, in % of the distance of the run's second half.

    The run trains on a few sequences with AdamW and a learning rate that falls linearly to zero. Order and dropout come
    from torch's generator.

    Args:
        restored: The states that are restored besides the adapter: ``optimizer``, ``schedule``, ``rng``. Without
            ``rng``, the new process starts with the seed of the first one.
        steps: The steps of the whole run, which is interrupted half-way.
    """
    half = steps // 2
    run = _Run(steps)
    run.train(half)
    with tempfile.TemporaryDirectory() as folder:
        run.model.save_pretrained(folder, save_embedding_layers=False)
        checkpoint = run.state()
        start = run.values()
        run.train(steps - half)
        resumed = _Run(steps, folder)
    resumed.load({key: checkpoint[key] for key in restored})
    resumed.train(steps - half)
    difference = run.values() - resumed.values()
    curves = {"uninterrupted": dict(enumerate(run.losses, 1)), "resumed": dict(enumerate(resumed.losses, half + 1))}
    return Measurement(
        100 * float(difference.norm() / (run.values() - start).norm()),
        evidence={
            "largest difference of a parameter": float(difference.abs().max()),
            "largest parameter": float(torch.maximum(run.values().abs(), start.abs()).max()),
            "loss of the first step after the stop, uninterrupted": run.losses[half],
            "loss of the first step after the stop, resumed": resumed.losses[0],
        },
        curves={name: {float(step): loss for step, loss in curve.items()} for name, curve in curves.items()},
        axes=("step", "training loss"),
        model=TINY,
    )


class _Run:
    """A small LoRA training whose whole state can be saved and restored."""

    def __init__(self, steps: int, folder: str = "") -> None:
        base = tiny_llama()
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=list(BLOCK_LINEAR))
        if folder:
            self.model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        else:
            self.model = get_peft_model(base, config)
        self.model.train()
        self.data = token_ids(base, batch=16)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-2)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 0, steps)
        self.losses: list[float] = []
        torch.manual_seed(1)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            batch = self.data[torch.randint(len(self.data), (4,))]
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.losses.append(float(loss.detach()))

    def state(self) -> dict[str, Any]:
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        return copy.deepcopy(state) | {"rng": torch.get_rng_state()}

    def load(self, state: dict[str, Any]) -> None:
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if "schedule" in state:
            self.schedule.load_state_dict(state["schedule"])
            for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
                group["lr"] = rate
        if "rng" in state:
            torch.set_rng_state(state["rng"])

    def values(self) -> torch.Tensor:
        return flat(p.detach() for p in self.trained)
