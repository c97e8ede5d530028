"""How a program should be started, for what cannot be changed once it runs."""

import os
import platform
import sys

_TUNABLE = "glibc.malloc.hugetlb=1"


def has_huge_pages() -> bool:
    """Whether this process was started with huge pages for large allocations."""
    return _TUNABLE in os.environ.get("GLIBC_TUNABLES", "")


def use_huge_pages() -> None:
    """Host side: start this program again with huge pages, if it has none.

    XLA allocates hundreds of megabytes anew in each step on CPUs, and Linux hands them
    out in pages of 4 KiB, one fault each: up to two fifths of a step. The variable is
    read by the C library before Python starts, so the process replaces itself. Does
    nothing outside Linux with glibc, or where GLIBC_TUNABLES is set already.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    environment = os.environ | {"GLIBC_TUNABLES": _TUNABLE}
    os.execve(sys.executable, sys.orig_argv, environment)
