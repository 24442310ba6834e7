"""Retention: bits per byte on held-out English prose, before and after training.

The text was written for this project, so no base model has seen it.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from importlib.resources import files
from typing import Any

import torch

from peftscope.data.batching import first_tokens
from peftscope.files.atomic import write_json
from peftscope.layout import PROSE_FOLDER
from peftscope.spec import RunSpec
from peftscope.training.load import autocast

PROSE_SHA256 = "581b983304f5e052f63566da1961f656f81d1b73b9f3db74dbb38e0ed5da5e24"
WINDOW_TOKENS = 256


def prose() -> str:
    """Returns the held-out text.

    Raises:
        RuntimeError: The text differs from the one that all records were made with.
    """
    content = files("peftscope.evaluation").joinpath("prose.txt").read_bytes()
    if hashlib.sha256(content).hexdigest() != PROSE_SHA256:
        raise RuntimeError("evaluation/prose.txt was changed; scores on it would not be comparable")
    return content.decode()


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, spec: RunSpec, alike: str = "") -> float:
    """Returns the code length of the first ``spec.retention_tokens`` tokens of the prose, per byte of text.

    The prose is split into windows of ``WINDOW_TOKENS``, each scored from its second token on, behind the tokens that
    the tokenizer puts before any text. Only the bytes of scored tokens count.

    Most runs begin with the same model, because an adapter has no effect yet. A model that gives the first window the
    logits of one that was scored before, to the last bit, has its score. ``alike`` says what else decides the score of
    a model with these logits. If empty, no other score is taken. The model is in evaluation mode.
    """
    ids = tokenizer(prose(), add_special_tokens=False)["input_ids"][: spec.retention_tokens]
    windows = [ids[start : start + WINDOW_TOKENS] for start in range(0, len(ids), WINDOW_TOKENS)]
    windows = [window for window in windows if len(window) > 1]
    nats, scored_bytes, file = 0.0, 0, None
    first = first_tokens(tokenizer)
    offset = spec.method.logit_offset() + len(first)
    for window in windows:
        tokens = torch.tensor([[*first, *window]], device=spec.device)
        positions = torch.arange(len(window) - 1, device=spec.device) + offset
        with autocast(spec):
            logits = model(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), logits_to_keep=positions, use_cache=False
            ).logits
        if alike and file is None and len(windows) > 1:
            seen = hashlib.sha256(alike.encode() + logits.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            file = PROSE_FOLDER / f"{seen.hexdigest()[:32]}.json"
            with suppress(OSError, ValueError):  # there is none yet, or it is damaged
                return float(json.loads(file.read_text())["bits_per_byte"])
        nats += torch.nn.functional.cross_entropy(
            logits[0].float(), tokens[0, len(first) + 1 :], reduction="sum"
        ).item()
        scored_bytes += len(tokenizer.decode(window[1:]).encode())
    score = nats / math.log(2) / scored_bytes
    if file is not None:
        with suppress(OSError, ValueError):  # a full disk, or a score that is not a number
            write_json(file, {"bits_per_byte": score})
    return score
