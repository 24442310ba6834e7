"""Writes the output of ``peftscope expand`` into marked blocks of a document. No torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from peftscope.layout import EXPERIMENTS, PUBLISHED_RESULTS

BLOCK = re.compile(r"<!-- expand (?P<arguments>[^>]*?) -->\n.*?<!-- /expand -->", re.DOTALL)


def refresh_forecasts(document: Path) -> None:
    """Renews every block of a document between ``<!-- expand ARGUMENTS -->`` and ``<!-- /expand -->``."""
    text = document.read_text()
    document.write_text(BLOCK.sub(lambda match: _block(match["arguments"]), text))


def _block(arguments: str) -> str:
    """Returns a block with the output that a clone without any runs gives."""
    with tempfile.TemporaryDirectory(prefix="peftscope-forecast-") as folder:
        for name in (str(EXPERIMENTS), str(PUBLISHED_RESULTS)):
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).symlink_to(Path(name).resolve())
        command = [sys.executable, "-m", "peftscope", "expand", *arguments.split()]
        environment = {**os.environ, "PEFTSCOPE_DEVICE": "cpu"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
    text = "\n".join(lines)
    return f"<!-- expand {arguments} -->\n```\n$ peftscope expand {arguments}\n{text}\n```\n<!-- /expand -->"
