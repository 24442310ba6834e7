"""What fits, and that nothing says otherwise."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from test_memory import TRAINED, model_of

from peftscope.hardware.cards import Gpu
from peftscope.memory.answer import answer_by_formula
from peftscope.memory.question import ask
from peftscope.models.presets import PRESETS
from peftscope.sizing.fit import fit_methods
from peftscope.sizing.needs import options_of_method
from peftscope.words import MIB

SHAPES = [PRESETS[name].shape.model_copy(update={"num_layers": 2}) for name in ("smollm2-135m", "qwen2.5-0.5b")]


@pytest.mark.slow
def test_fit_and_memory_never_contradict_each_other() -> None:
    draw, verdicts = Random(0), []
    for _ in range(300):
        model, method = model_of(draw.choice(SHAPES)), draw.choice(TRAINED)
        options: dict[str, Any] = {
            "batch_size": draw.randint(1, 16),
            "seq_len": draw.choice((64, 300, 512)),
            "checkpointing": draw.random() < 0.5,
            "loss": draw.choice(("plain", "liger", "chunked")),
            "evaluation": draw.random() < 0.3,
        }
        asked = options_of_method(method, options)
        size = answer_by_formula(ask(model, asked)).peak_device_bytes
        card = Gpu("a card", size + draw.randint(-300, 100) * MIB)
        found = answer_by_formula(ask(model, asked, gpu=card))
        (fit,) = fit_methods([model], [method], options, card)
        assert fit.peak_allocated_bytes == found.peak_allocated_bytes
        assert fit.fits == card.fits(found.least_device_bytes, found.peak_device_bytes), (method, options)
        verdicts.append(fit.fits)
    assert {*verdicts} == {"yes", "tight", "no"}
