"""The methods of the suite: one file each, one line each in ``OwnMethod``. Importing this needs no torch.

Other packages add methods through entry points of the group ``peftscope.methods``, and ``experiments/methods`` holds
methods of a single file each. Both are loaded when ``METHODS`` or ``AnyMethod`` is first used, so that they can import
``peftscope.methods.fields``.
"""

from __future__ import annotations

from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import Field

from peftscope.errors import InputError, Problem, shown
from peftscope.files.manifest import file_sha256
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

GROUP = "peftscope.methods"
"""The group of entry points through which other packages add methods."""

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
            InputError: A method of another package cannot be used.
        """
        if name == "METHODS":
            return _methods()
        if name == "AnyMethod":
            return Annotated[reduce(or_, _methods().values()), Field(discriminator="name")]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _methods() -> dict[str, type[Method]]:
    """Returns all methods by name: those of this package in the order of tables, then all others by name."""
    return _own() | {name: cls for name, (cls, _) in _outside().items()}


def _own() -> dict[str, type[Method]]:
    return {cls.model_fields["name"].default: cls for cls in get_args(OwnMethod)}


@cache
def _outside() -> dict[str, tuple[type[Method], dict[str, str]]]:
    """Returns the methods of other packages and of files by name, each with what it comes from and its version."""
    methods: dict[str, tuple[type[Method], dict[str, str]]] = {}
    problems = []
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, _owner(point), point.value))
    sources: list[EntryPoint | Path] = [*points, *sorted(METHOD_FILES.glob("*.py"))]
    for source in sources:
        name = source.name if isinstance(source, EntryPoint) else name_of(source)
        owners = dict.fromkeys(_own(), "peftscope") | {one: _told(of) for one, (_, of) in methods.items()}
        if name in owners:
            method, wrong = None, f"the name {name!r} belongs to a method of {owners[name]}"
        else:
            method, wrong = _load(source) if isinstance(source, EntryPoint) else load_file(source)
        if method is not None:
            methods[name] = method, _origin(source)
        elif isinstance(source, EntryPoint):
            where = f"entry point {name} = {source.value} of {_owner(source)}"
            problems.append(Problem(where, wrong, "repair or uninstall it"))
        else:
            problems.append(Problem(str(source), wrong, "repair or remove it"))
    if problems:
        raise InputError(problems)
    return methods


def _load(point: EntryPoint) -> tuple[type[Method] | None, str]:
    """Returns the method behind an entry point, or None and what is wrong with it."""
    try:
        method = point.load()
    except Exception as error:  # any module may fail in its own way, and the user needs one line
        return None, f"cannot be loaded: {type(error).__name__}: {error}"
    if not (isinstance(method, type) and issubclass(method, Method)):
        return None, f"is not a subclass of peftscope.methods.fields.Method (got {shown(method)})"
    name = method.model_fields.get("name")
    if name is None or name.default != point.name or get_args(name.annotation) != (point.name,):
        return None, f'needs the field `name: Literal["{point.name}"] = "{point.name}"`, the name of its entry point'
    if not isinstance(getattr(method, "label", None), str):
        return None, "needs a `label`, its name in tables"
    return method, ""


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"


def _origin(source: EntryPoint | Path) -> dict[str, str]:
    if isinstance(source, Path):
        return {source.as_posix(): file_sha256(source)}
    return {source.dist.name: source.dist.version} if source.dist is not None else {}


def _told(origin: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in origin.items())


def versions_of(name: str) -> dict[str, str]:
    """Returns what a method comes from: its distribution's version, or the hash of its file; nothing for our own."""
    return _outside()[name][1] if name in _outside() else {}
