"""How the process takes memory from the system."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Have glibc keep up to 1 GiB of what was freed: given back, each step would take it again, page by page, at 1 us a page.

    For the whole process, from here on. The command line and every training do it; in a loop of your own, call it before the
    first step on CPU. Without effect where the C library is another.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 28)
