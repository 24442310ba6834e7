"""Contexts that keep other libraries quiet, and keep them from loading files from a hub. No torch.

Each context restores the process when it ends, so that a notebook can use peftscope beside anything else.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

OFFLINE = "HF_HUB_OFFLINE"
"""The environment variable that keeps Hugging Face's libraries from asking a hub. If the user sets it, it is kept."""


@contextmanager
def quiet_libraries(bars: bool = True) -> Iterator[None]:
    """Hides warnings, log messages below errors, and tqdm's progress bars inside this context.

    Warnings that the user asks for (``python -W default -m peftscope ...``) are still shown.

    Args:
        bars: Whether something inside may draw bars. If not, tqdm is not imported, which takes 25 ms.
    """
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), _hidden_bars() if bars else nullcontext():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)


@contextmanager
def _hidden_bars() -> Iterator[None]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # then nothing draws bars
        yield
        return
    begin, bars, interval = tqdm.__init__, vars(tqdm)["__init__"], tqdm.monitor_interval

    def begin_hidden(bar: Any, *arguments: Any, **options: Any) -> None:
        begin(bar, *arguments, **{**options, "disable": True})

    tqdm.__init__, tqdm.monitor_interval = begin_hidden, 0  # no thread that monitors bars
    try:
        yield
    finally:
        tqdm.__init__, tqdm.monitor_interval = bars, interval


@contextmanager
def offline() -> Iterator[None]:
    """Keeps Hugging Face's libraries from asking a hub, and waiting for its answer, inside this context."""
    from huggingface_hub import constants  # it reads the variable only once, at its import

    if OFFLINE in os.environ:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    os.environ[OFFLINE], constants.HF_HUB_OFFLINE = "1", True
    try:
        yield
    finally:
        del os.environ[OFFLINE]
        constants.HF_HUB_OFFLINE = before
