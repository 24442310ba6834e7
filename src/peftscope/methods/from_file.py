"""A method from a single file: one class, named as its file is, and known by the hash of the file's content."""

from __future__ import annotations

import math
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal, cast

from pydantic import create_model

from peftscope.errors import InputError, Problem, shown
from peftscope.files.hub import without_hub_kernels
from peftscope.files.manifest import file_sha256
from peftscope.methods.fields import Method, RunSpec


class FromFile(Method):
    """The mark of a method that comes from a file: the file's content is part of each spec, run id and record."""

    file_sha256: str

    def canonical(self) -> dict[str, Any]:
        """Returns the fields for a run's id, the content of the file among them."""
        return super().canonical() | {"file_sha256": self.file_sha256}

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the model to train.

        Raises:
            InputError: The spec was made with another content of the file.
        """
        if self.file_sha256 != type(self).model_fields["file_sha256"].default:
            name = self.__dict__["name"]
            raise InputError(Problem(f"method {name}", "its file has changed since", "expand the experiment again"))
        return super().build(model, spec)


def name_of(path: Path) -> str:
    """Returns the name of a file's method: the file's, with hyphens.

    >>> name_of(Path("my_method.py"))
    'my-method'
    """
    return path.stem.replace("_", "-")


def line_in(path: Path, error: BaseException) -> str:
    """Returns the file and the line of it that an error comes from, or the file alone if it comes from elsewhere."""
    places = [(frame.filename, frame.lineno) for frame in extract_tb(error.__traceback__)]
    places += [(str(error.filename), error.lineno)] if isinstance(error, SyntaxError) else []
    lines = [line for name, line in places if Path(name).absolute() == path.absolute()]
    return f"{path}:{lines[-1]}" if lines else str(path)


def load_file(path: Path) -> tuple[type[Method] | None, str]:
    """Returns the method in a file, or None and what is wrong with it. The file's code runs."""
    digest, name = file_sha256(path), name_of(path)
    module_name = f"peftscope_method_{name.replace('-', '_')}"
    location = spec_from_file_location(module_name, path)
    if location is None or location.loader is None:
        return None, "is no Python file: its name must end in .py"
    module = module_from_spec(location)
    sys.modules[module_name] = module  # where pydantic and inspect look for it
    try:
        with without_hub_kernels():  # a file may import PEFT, and with it bitsandbytes
            location.loader.exec_module(module)
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module_name
        ]
        if len(own) != 1:
            return None, f"must have one subclass of peftscope.methods.fields.Method (it has {len(own)})"
        if not isinstance(getattr(own[0], "label", None), str):
            return None, "needs a `label: ClassVar[str]`, its name in tables"
        if "learning_rate" not in own[0].run_defaults:
            return None, "needs `run_defaults: ClassVar[dict]` with a learning_rate"
        rate = own[0].run_defaults["learning_rate"]
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            return None, f"its learning_rate in `run_defaults` must be a number above 0 (got {shown(rate)})"
        if own[0].build is Method.build:
            return None, "needs `build`, which makes the model to train"
        fields: dict[str, Any] = {"name": (Literal[name], name), "file_sha256": (str, digest)}
        made = cast(
            type[Method],
            create_model(
                own[0].__name__, __base__=(FromFile, own[0]), __module__=module_name, __doc__=own[0].__doc__, **fields
            ),
        )
        made.model_validate(made().model_dump())  # pydantic checks no default
    except Exception as error:  # any file may fail in its own way, and the user needs one line
        why = " ".join(str(error).partition("For further information")[0].split())
        said = f"cannot be loaded: {type(error).__name__}: {why}"
        return None, f"{said} ({place})" if (place := line_in(path, error)) != str(path) else said
    return made, ""
