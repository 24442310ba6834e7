"""What to say of a disk that is full, read-only or broken."""

from __future__ import annotations

import errno
import os
import re

_FREE = "free some space and start again: what is finished stays, and a stopped run goes on"
_ALLOW = "make this folder writable for you, or work in another one"
STORAGE_CODE = 2
"""With which a process ends that could not write its own record."""
STORAGE_REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: _FREE,
    errno.EROFS: _ALLOW,
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EIO: "the disk reports errors: look after it before you start again",
}


def storage_problem(error: BaseException) -> str:
    """Returns what to say if an error is the disk's, and nothing if it is not.

    safetensors wraps the system's error in one of its own, which only its text gives away.
    """
    wrapped = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(wrapped[1]) if wrapped else None
    if number not in STORAGE_REMEDIES:
        return ""
    file = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return f"{os.strerror(number)}{file} -> {STORAGE_REMEDIES[number]}"
