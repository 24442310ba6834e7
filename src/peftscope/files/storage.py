"""Messages about a disk that is full, read-only or broken, or has a file where a folder should be."""

from __future__ import annotations

import errno
import os
import re

_FREE = "free some space and start again: finished runs are kept, and a stopped run resumes"
_ALLOW = "get permission to write to this folder, or work in another one"
_MOVE = "a file or a broken link is where a folder should be: move it away, or mend the link"
STORAGE_CODE = 2
"""The exit code of a process that could not write its record."""
STORAGE_REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: _FREE,
    errno.EROFS: _ALLOW,
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EEXIST: _MOVE,
    errno.ENOTDIR: _MOVE,
    errno.ELOOP: _MOVE,
    errno.EIO: "the disk reports errors: check it before you start again",
}


def storage_problem(error: BaseException) -> str:
    """Returns a message if the disk caused an error, and an empty string if it did not.

    safetensors wraps the system's error in its own type, so only the text tells which one it was.
    """
    wrapped = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(wrapped[1]) if wrapped else None
    if number not in STORAGE_REMEDIES:
        return ""
    file = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return f"{os.strerror(number)}{file} -> {STORAGE_REMEDIES[number]}"
