"""Writes what commands print into the pages that show it: ``python -m benchmarks.shown``.

With ``--sitting`` it runs the whole study of the page on a method of one's own here, and writes its verdict.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.page import write_blocks

PAGE, ADVICE_PAGE, STUDY_PAGE = Path("README.md"), Path("docs/advice.md"), Path("docs/your-method.md")
SHOWN: dict[str, tuple[str, list[int]]] = {
    "shown:fits": (
        "peftscope memory llama-3-8b --method qlora --checkpointing --seq-len 1024 --gpu rtx4090",
        [5, -3, -2],
    ),
    "shown:better": ("peftscope table sums --markdown", [*range(5)]),
}
"""The command of each block, and which lines of its output the page shows. Dots stand for the others."""
ADVICE = ("peftscope advise --model llama-3-8b --gpu rtx4090 --examples 5000", [*range(9)])
STUDY = ("peftscope new-study lora_fa.py --world B --steps 40 --seeds 3", [-5, -3, -2, -1])
"""The same of the page on a method of one's own, without the lines on time, which differ from machine to machine."""
NAME = "lora-fa-study-world-b-40-steps-3-seeds"
VERDICT = (f"peftscope table {NAME} --markdown", [*range(4)])
"""The study that the command writes, and what shows its verdict once it has run."""


def show(command: str, wanted: list[int], folder: Path = Path()) -> str:
    """Returns a block with a command and some lines of what it prints in a folder."""
    program = [sys.executable, "-m", *shlex.split(command)]
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    return block(command, done.stdout.splitlines(), wanted)


def show_study(folder: Path) -> str:
    """Returns the block of a study of the page's own method, which is written into a folder."""
    method = re.findall(r"^```python\n(.*?)^```", STUDY_PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    Path(folder, "lora_fa.py").write_text(method)
    return show(*STUDY, folder)


def block(command: str, lines: list[str], wanted: list[int]) -> str:
    """Returns a command and these lines of its output, with dots for those that are left out.

    >>> print(block("x", ["a ", "b", "c", "d"], [0, -1]))
    ```console
    $ x
    a
    ...
    d
    ```
    """
    places = [number % len(lines) for number in wanted]
    shown = ["..."] * (places[0] > 0) + [lines[places[0]]]
    for before, place in pairwise(places):
        shown += ["..."] * (place > before + 1) + [lines[place]]
    shown += ["..."] * (places[-1] < len(lines) - 1)
    return "\n".join(["```console", f"$ {command}", *(line.rstrip() for line in shown), "```"])


if __name__ == "__main__" and sys.argv[1:] == ["--sitting"]:
    show_study(Path())
    subprocess.run(["make", "report", f"EXPERIMENT={NAME}"], check=True)
    write_blocks({"shown:verdict": show(*VERDICT)}, STUDY_PAGE)
elif __name__ == "__main__":
    write_blocks({name: show(*asked) for name, asked in SHOWN.items()}, PAGE)
    write_blocks({"shown:advice": show(*ADVICE)}, ADVICE_PAGE)
    with TemporaryDirectory() as folder:
        shutil.copytree("experiments", Path(folder, "experiments"))
        write_blocks({"shown:study": show_study(Path(folder))}, STUDY_PAGE)
