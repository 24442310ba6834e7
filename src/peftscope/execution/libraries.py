"""What other libraries may do while peftscope works: no talk to its user, no code and no files from a hub. No torch.

Each context leaves the process as it found it, so that a notebook may use peftscope beside anything else.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OFFLINE = "HF_HUB_OFFLINE"
"""The environment variable that keeps Hugging Face's libraries from asking a hub; who sets it decides."""


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Makes the import of the package ``kernels`` an error inside this context.

    bitsandbytes, as it is imported, and transformers ask that package, where it is installed, for native code from a
    hub, which nobody checked. A library that is first imported inside this context does without that code for the rest
    of the process; what the process had imported before stays as it is.
    """
    found = {"kernels": sys.modules["kernels"]} if "kernels" in sys.modules else {}
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        sys.modules.update(found)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides warnings, log messages below errors, and tqdm's progress bars inside this context.

    Warnings that were asked for (``python -W default -m peftscope ...``) are shown all the same.
    """
    from tqdm import tqdm

    begin = tqdm.__init__
    bars, interval, disabled = vars(tqdm)["__init__"], tqdm.monitor_interval, logging.root.manager.disable

    def begin_hidden(bar: Any, *arguments: Any, **options: Any) -> None:
        begin(bar, *arguments, **{**options, "disable": True})

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        tqdm.__init__, tqdm.monitor_interval = begin_hidden, 0  # no thread that looks after bars
        try:
            yield
        finally:
            tqdm.__init__, tqdm.monitor_interval = bars, interval
            logging.disable(disabled)


@contextmanager
def offline() -> Iterator[None]:
    """Keeps Hugging Face's libraries from asking a hub inside this context: without it, they ask and wait."""
    from huggingface_hub import constants  # it reads the variable once, as it is imported

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
