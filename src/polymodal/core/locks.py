"""One writer at a time: a lock on a file that ends with the process, however it ends."""

from __future__ import annotations

import sys
from typing import BinaryIO


def lock(file: BinaryIO) -> None:
    """Take the lock of an open file; closing the file gives it back.

    Raises:
        OSError: if another process holds it.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
