"""Whether a run may begin in its output directory, asked before anything is loaded, and that it is alone there."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
from pathlib import Path
from types import TracebackType

from packloop.engine.checkpoint import disk_error, num_checkpoints
from packloop.engine.finished_run import CONFIG_FILE, METRICS_FILE
from packloop.errors import InputError

logger = logging.getLogger(__name__)

# What a run writes before its first checkpoint, CONFIG_FILE first. A tokenizer's files are those of transformers.
_WRITTEN = (CONFIG_FILE, "environment.json", METRICS_FILE)
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_FILES = {*_WRITTEN, *_TOKENIZER, *(f".{name}.tmp" for name in _WRITTEN)}
_TRACKED, _TRACKERS_FILES = "packloop", ("events.out.tfevents.", "hparams.yml")
_PROBE = ".packloop-probe-"


class Claim:
    """That a run's directory is written to by one process: a lock on the directory itself, which leaves no file there.

    Where the file system has no such lock, nothing is claimed. The lock ends with the context or the process.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def take(self) -> None:
        """Nothing where the directory does not exist yet, or is this one's already. InputError where it is in use."""
        if self._descriptor is not None or not self._path.is_dir():
            return
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise InputError(
                    f"train.output_dir={str(self._path)!r} is in use by another run of packloop; "
                    "wait for its end, or choose another train.output_dir"
                ) from None
            return
        self._descriptor = descriptor

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a forked process may hold the descriptor, too
            os.close(self._descriptor)
            self._descriptor = None


def check_output_dir(path: Path, *, resume: str | None) -> None:
    """InputError where a run cannot write there, or a new one would mix with what is there; it names the choices.

    A new run starts over in what is left of one that ended before its first checkpoint, and a line says so. Nothing is
    written or removed.
    """
    _check_writable(path)
    if resume is not None or not path.exists() or not _entries(path):
        return
    if num_checkpoints(path):
        raise InputError(
            f"train.output_dir={str(path)!r} is not empty; continue the run in it with --resume latest, "
            "or choose another train.output_dir, or remove it"
        )
    if other := _other_than_begun(path):
        raise InputError(
            f"train.output_dir={str(path)!r} is not empty ({other!r} is in it) and has no checkpoint to resume; "
            "choose another train.output_dir, or remove it"
        )
    logger.info("starting over in %s: the run in it ended before its first checkpoint", path)


def _check_writable(path: Path) -> None:
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        where = "" if existing == path else f": {str(existing)!r}"
        raise InputError(
            f"train.output_dir={str(path)!r}{where} is a file and a directory is needed; "
            "choose another train.output_dir, or remove the file"
        )
    try:  # permissions alone do not tell: a file system may be read-only, or make no directories
        os.rmdir(tempfile.mkdtemp(prefix=_PROBE, dir=existing))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_error(path, error, needed=0) from error
        raise InputError(
            f"train.output_dir={str(path)!r} cannot be written, as nothing can be made in {str(existing)!r} "
            f"({error.strerror}); choose another train.output_dir, or make that writable"
        ) from error


def _entries(path: Path) -> list[Path]:
    """What is in the directory, but for another rank's probe of it."""
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith(_PROBE))


def _other_than_begun(path: Path) -> str | None:
    """The name of something that a run without checkpoints does not leave; None where there is none."""
    entries = _entries(path)
    if not (path / CONFIG_FILE).is_file():  # then the rest is no run's, unless that file was about to be written
        entries = [entry for entry in entries if entry.name != f".{CONFIG_FILE}.tmp"]
        return entries[0].name if entries else None
    return next((entry.name for entry in entries if not _is_of_begun(entry)), None)


def _is_of_begun(entry: Path) -> bool:
    if entry.is_symlink():
        return False
    if not entry.is_dir():
        return entry.name in _FILES
    if entry.name == "checkpoints":  # of a save that was cut short
        return all(
            one.name in ("latest", ".latest.tmp") or (one.name.startswith(".step-") and one.name.endswith(".tmp"))
            for one in entry.iterdir()
        )
    files = [file for file in entry.rglob("*") if not file.is_dir()]
    return entry.name == _TRACKED and all(file.name.startswith(_TRACKERS_FILES) for file in files)
