"""Trackers through accelerate: only checked here, before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from packloop.errors import ConfigError


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError for a tracker whose package is not installed; accelerate would go on without it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.trackers names {name}, which is not installed; pip install {name}, or leave it out")
