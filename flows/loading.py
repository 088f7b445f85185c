"""Loads libraries without looking through them for garbage: what they make stays."""

from __future__ import annotations

import atexit
import gc
import importlib
import sys


def load(module: str) -> None:
    """Import a module and all that it imports, and leave what they made out of collections.

    Python's collector would look through all of it, again and again as it grows.
    """
    # a second time there is only what a run has made meanwhile, which may be garbage
    if module in sys.modules:
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module(module)
        gc.freeze()
    finally:
        if collects:
            gc.enable()


def end_without_collecting() -> None:
    """Have Python not look through all that was loaded when it ends, which takes over a second."""
    atexit.register(gc.freeze)
