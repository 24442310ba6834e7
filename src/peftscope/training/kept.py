"""Trained weights as they were at one step of a training, in a file of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_kept(path: Path, model: Any) -> None:
    """Writes the trained parameters of a model by their names, in the precision in which they are trained."""
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(
        {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}, unfinished
    )
    unfinished.replace(path)
