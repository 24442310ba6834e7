"""What is alive at the peak of large models, in closed form, for the figure of the README and the reports."""

from __future__ import annotations

import pandas as pd

from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.fit import options_of_method
from peftscope.memory.question import ask, describe_model
from peftscope.memory.trace import by_kind

CENTRE = {"rank": 8, "seq_len": 512, "batch_size": 1, "targets": "all-linear"}
SIZES = ("llama-2-7b", "llama-2-13b", "llama-33b", "codellama-34b", "llama-65b", "llama-2-70b")
BARS = ({"method": "full"}, {"method": "lora"}, {"method": "qlora", "checkpointing": True})
"""The bars of the QLoRA paper, and bars for the methods that it replaces."""


def bars() -> pd.DataFrame:
    """Returns the bytes that are alive at the peak: one row per model, method and kind."""
    rows = []
    for name in SIZES:
        model = describe_model(name)
        for options in BARS:
            method = str(options["method"])
            peaks = peaks_by_formula(ask(model, options_of_method(method, CENTRE | options)))
            for kind, size in by_kind(peaks.alive(peaks.binding_phase)).items():
                rows.append({"model": name, "method": method, "kind": kind, "bytes": size})
    return pd.DataFrame(rows)
