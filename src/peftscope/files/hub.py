"""Downloads from a Hugging Face hub, or from a folder that stands in for one. No torch.

If ``PEFTSCOPE_HUB`` names a folder, models and data sets are looked up in ``FOLDER/org/name`` before the hub. This
serves shared disks, and machines without a network.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from peftscope.errors import InputError, Problem

MIRROR = "PEFTSCOPE_HUB"
TIMEOUT_SECONDS = 10.0
REACH_SECONDS = 3.0
"""A hub that does not answer after so long is not asked; its client would try again for half a minute."""

REMEDY = (
    f"check the id, the network, and `hf auth login` for gated ones; or put it into FOLDER/org/name, {MIRROR}=FOLDER"
)

Kind = Literal["model", "dataset"]

KERNELS_LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")
"""It warns at its import, on processors with bf16 instructions, that the kernels of a hub are missing."""


def mirrored(repository: str) -> Path | None:
    """Returns the folder that stands in for a repository, if there is one.

    Raises:
        InputError: ``PEFTSCOPE_HUB`` does not name a folder.
    """
    root = os.environ.get(MIRROR)
    if not root:
        return None
    if not Path(root).is_dir():
        raise InputError(Problem(MIRROR, f"no such folder (got {root!r})", "unset it to use the hub"))
    folder = Path(root) / repository
    return folder if folder.is_dir() else None


def check_reached(where: str, remedy: str) -> None:
    """Checks that the hub answers.

    Raises:
        InputError: It does not, or the user told Hugging Face's libraries not to ask it.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except Exception:  # the client raises many kinds
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        raise InputError(Problem(where, f"is not here, and the hub is not reached: {reason}", remedy)) from None


def commit_of(repository: str, revision: str | None, kind: Kind) -> str:
    """Returns the commit to which a revision points on the hub now.

    Raises:
        InputError: The hub does not answer, or does not know the revision.
    """
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    check_reached(f"{kind} {repository}", REMEDY)
    with _asking(kind, repository):
        return str(HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=TIMEOUT_SECONDS).sha)


def fetch_files(repository: str, revision: str | None, patterns: Iterable[str], target: Path) -> dict[str, str]:
    """Downloads a model's files into a folder, or links those of a mirror, and returns their source.

    Raises:
        InputError: The files cannot be downloaded.
    """
    folder = mirrored(repository)
    if folder:
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            (target / path.name).symlink_to(path.resolve())
        return {"mirror": str(folder)}
    from huggingface_hub import snapshot_download

    commit = commit_of(repository, revision, "model")
    with _asking("model", repository):
        snapshot_download(repository, revision=commit, local_dir=target, allow_patterns=list(patterns))
    return {"commit": commit}


def load_rows(dataset: str, config: str | None, split: str, revision: str | None = None) -> tuple[Any, dict[str, str]]:
    """Returns one split of a data set, of the library ``datasets``, and the hub's ``commit`` or the ``mirror``.

    Raises:
        InputError: The data set cannot be loaded.
    """
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    folder = mirrored(dataset)
    if folder:
        # Plain files without a card that names configurations have one configuration only.
        named = config if (folder / "README.md").is_file() else None
        with _asking("dataset", dataset):
            return load_dataset(str(folder), named, split=split), {"mirror": str(folder)}
    commit = commit_of(dataset, revision, "dataset")
    with _asking("dataset", dataset):
        return load_dataset(dataset, config, split=split, revision=commit), {"commit": commit}


@contextmanager
def _asking(kind: Kind, repository: str) -> Iterator[None]:
    """Turns whatever the hub's libraries raise inside this context into an error for people."""
    try:
        yield
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise InputError(Problem(f"{kind} {repository}", f"cannot download it: {said}", REMEDY)) from error


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Makes the import of the package ``kernels`` an error inside this context, and hides bitsandbytes' warning of it.

    If that package is installed, transformers and bitsandbytes use it to load native code from a hub, which nobody
    checked. A library that is first imported inside this context does without this code for the rest of the process. A
    library that was imported before keeps what it loaded.
    """
    before = {"kernels": sys.modules["kernels"]} if "kernels" in sys.modules else {}
    level = KERNELS_LOGGER.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    KERNELS_LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        KERNELS_LOGGER.setLevel(level)
        del sys.modules["kernels"]
        sys.modules.update(before)
