"""The methods of the suite: one file each, one line each in ``OwnMethod``. Importing this needs no torch.

``experiments/methods`` holds methods of a single file each. They are loaded when ``METHODS`` or ``AnyMethod`` is first
used, so that they can import ``peftscope.methods.fields``.
"""

from __future__ import annotations

from functools import cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import Field

from peftscope.errors import Problem, raise_any
from peftscope.layout import METHOD_FILES
from peftscope.methods.adalora import AdaLoRA
from peftscope.methods.dora import DoRA
from peftscope.methods.fields import Method
from peftscope.methods.from_file import load_file, name_of
from peftscope.methods.full import Full
from peftscope.methods.ia3 import IA3
from peftscope.methods.loftq import LoftQ
from peftscope.methods.lora import LoRA
from peftscope.methods.lora_plus import LoRAPlus
from peftscope.methods.none import Untouched
from peftscope.methods.peft_tuner import PeftTuner
from peftscope.methods.pissa import PiSSA
from peftscope.methods.prefix_tuning import PrefixTuning
from peftscope.methods.prompt_tuning import PromptTuning
from peftscope.methods.qlora import QLoRA
from peftscope.methods.random_subspace import RandomSubspace
from peftscope.methods.rounded import Rounded
from peftscope.methods.rslora import RsLoRA

OwnMethod = (
    Untouched
    | Full
    | LoRA
    | QLoRA
    | DoRA
    | AdaLoRA
    | LoftQ
    | LoRAPlus
    | RsLoRA
    | PiSSA
    | IA3
    | PromptTuning
    | PrefixTuning
    | RandomSubspace
    | Rounded
    | PeftTuner
)
"""The methods of this package, in the order of tables."""

if TYPE_CHECKING:
    AnyMethod = Annotated[OwnMethod, Field(discriminator="name")]
    METHODS: dict[str, type[Method]]
else:

    def __getattr__(name: str) -> Any:
        """Returns ``METHODS``, every method by its name in specs, or ``AnyMethod``, the type of any of them.

        Raises:
            InputError: A method of a file cannot be used.
        """
        if name == "METHODS":
            return _methods()
        if name == "AnyMethod":
            return Annotated[reduce(or_, _methods().values()), Field(discriminator="name")]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _methods() -> dict[str, type[Method]]:
    """Returns all methods by name: those of this package in the order of tables, then those of files by name."""
    return _own() | _from_files()


def _own() -> dict[str, type[Method]]:
    return {cls.model_fields["name"].default: cls for cls in get_args(OwnMethod)}


@cache
def _from_files() -> dict[str, type[Method]]:
    methods: dict[str, type[Method]] = {}
    problems = []
    for path in sorted(METHOD_FILES.glob("*.py")):
        name = name_of(path)
        taken = name in _own() or name in methods
        method, wrong = (None, f"the name {name!r} belongs to another method") if taken else load_file(path)
        if method is None:
            problems.append(Problem(str(path), wrong, "repair or remove it"))
        else:
            methods[name] = method
    raise_any(problems)
    return methods


def versions_of(name: str) -> dict[str, str]:
    """Returns the file that a method comes from, with its hash; nothing for a method of this package."""
    if name not in _from_files():
        return {}
    digest: str = _from_files()[name].model_fields["file_sha256"].default
    return {path.as_posix(): digest for path in METHOD_FILES.glob("*.py") if name_of(path) == name}
