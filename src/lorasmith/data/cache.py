"""Where lorasmith keeps what it can make again: tokenised data, dequantised base models."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: LORASMITH_CACHE, else ~/.cache/lorasmith (XDG_CACHE_HOME is respected)."""
    if named := os.environ.get("LORASMITH_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorasmith"
