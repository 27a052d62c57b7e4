"""What makes a CPU quicker, without a change to any number."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> bool:
    """Lets this process keep memory that it frees, where the C library is glibc.

    Every step on a CPU needs the same buffers again. By default those above 32 MB, as LPIPS's first feature maps are, come from the
    system anew each time, page by page: a stage-1 step took 5 % longer.

    Returns:
        Whether it could be set.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, most))
