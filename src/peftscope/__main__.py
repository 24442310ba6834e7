"""``python -m peftscope``: the same as the ``peftscope`` command."""

from peftscope.cli.main import main

main()
