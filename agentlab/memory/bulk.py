"""Many rows at once."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Leave Python's search for cycles out while many small objects are made, none of which is in one.

    It would look through all of them again and again as they become more: a fifth of the time that they take to make.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
