"""peftscope: what is true about LoRA and its relatives, measured.

The API is in ``peftscope.api``, and docs/api.md shows it on one screen. It is loaded with the first name of it that is
used.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftscope.api import InputError, RunRecord, RunSpec, fit, load_results, memory, run
    from peftscope.memory.answer import Answer

__version__ = "0.1.0"

__all__ = ["InputError", "RunRecord", "RunSpec", "fit", "load_results", "memory", "run"]


class _Memory(ModuleType):
    """The room ``peftscope.memory``, which can be called: the function of the API has the same name."""

    def __call__(self, model: str, method: str = "lora", **options: Any) -> Answer:
        """Returns what a training run takes on a card: see ``peftscope.api.memory``."""
        from peftscope.api import memory

        return memory(model, method, **options)


import_module("peftscope.memory").__class__ = _Memory


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("peftscope.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
