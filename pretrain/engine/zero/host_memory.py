"""Memory that was freed, back to the system."""

import ctypes


def return_freed_memory() -> None:
    """Let the C library hand its free pages back to the system.

    glibc keeps freed blocks below 32 MiB for later. Building a model under ZeRO-3 frees one for
    each of its parameters, before the states of the optimizer come, which are too large for them:
    of InternImage-H 4 GiB would stay unused for the whole run. Does nothing with other C libraries.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
