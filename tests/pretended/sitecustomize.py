"""With this folder on PYTHONPATH, every process has the pretended card as soon as it has imported torch."""

import importlib.abc
import importlib.util
import sys
from typing import Any


def put_card_under(torch: Any) -> None:
    from card import install

    install()


def measure_little(ceilings: Any) -> None:
    """A card's rates are measured with products so large that a processor takes minutes for them."""
    ceilings.SIDES["cuda"], ceilings.COPIED_BYTES["cuda"] = ceilings.SIDES["cpu"], ceilings.COPIED_BYTES["cpu"]


def fill_card(way: Any) -> None:
    from card import filled
    from described import described

    if name := described().full_in:
        setattr(way, name, filled(getattr(way, name)))


AFTER = {
    "torch": put_card_under,
    "peftscope.training.ceilings": measure_little,
    "peftscope.execution.way": fill_card,
}


class Afterwards(importlib.abc.MetaPathFinder):
    """Calls a function after a module's own code has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in AFTER:
            return None
        then = AFTER.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        run = spec.loader.exec_module

        def run_both(module: Any) -> None:
            run(module)
            then(module)

        spec.loader.exec_module = run_both  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Afterwards())
