"""``python -m peftscope``, and the ``peftscope`` command."""

from __future__ import annotations

import gc
import os
import sys

from peftscope.errors import InputError


def main() -> None:
    """Runs the command line; a method of a file that cannot be used becomes a message and exit code 2.

    The options come from the fields of all methods, so that this shows as soon as the commands are imported.
    """
    if "PEFTSCOPE_DIES_WITH_PARENT" in os.environ:  # the Snakefile's jobs; before the slow imports
        from peftscope.execution.process import die_with_parent

        die_with_parent()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # it would look for some in every package
    gc.disable()  # what imports make stays: looking for cycles in it takes a tenth of the start
    try:
        from peftscope.cli.main import main as run_command
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    gc.freeze()
    gc.enable()
    run_command()


if __name__ == "__main__":
    main()
