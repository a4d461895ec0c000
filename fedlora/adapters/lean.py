"""PEFT without bitsandbytes, which it imports wherever it is installed: most of a second, for quantised backbones only.

Imported before PEFT. Whoever loads a quantised backbone imports bitsandbytes, and then PEFT may see it.
"""

from __future__ import annotations

import sys


def _import_peft() -> None:
    hidden = "bitsandbytes" not in sys.modules and "peft" not in sys.modules
    if hidden:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  Python's way to say that there is none
    try:
        from peft import import_utils

        import_utils.is_bnb_available()
        import_utils.is_bnb_4bit_available()
    finally:
        if hidden:
            del sys.modules["bitsandbytes"]


def see_quantised_layers() -> None:
    """Let PEFT adapt layers of bitsandbytes if there can be any."""
    from peft import import_utils

    if "bitsandbytes" in sys.modules:
        import_utils.is_bnb_available.cache_clear()
        import_utils.is_bnb_4bit_available.cache_clear()


_import_peft()
