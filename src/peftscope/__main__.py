"""``python -m peftscope``: the same as the ``peftscope`` command."""

from peftscope.cli import main

main()
