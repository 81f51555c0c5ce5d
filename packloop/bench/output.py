"""Where results go: looked at before the work that is to fill it."""

from __future__ import annotations

import os
from pathlib import Path

from packloop.errors import ConfigError, InputError


def require_writable(output: Path) -> None:
    """InputError where `output` is a file, or lies where no directory can be made or written to."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {str(output)!r} is a file; give a directory")
    above = next(one for one in (output, *output.absolute().parents) if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        reason = "cannot be written to" if above.is_dir() else "is a file"
        raise InputError(f"--output {str(output)!r}: {str(above)!r} {reason}; give a directory elsewhere")
