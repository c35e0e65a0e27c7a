"""What the C library does with memory that is free."""

import ctypes


def return_freed_memory() -> None:
    """Give freed memory back to the system, which glibc does only at the end of its heap.

    A calibration batch leaves holes between what lives on; over the blocks of a model they add up to a tenth of the
    process. Other C libraries have no such call and need none.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
