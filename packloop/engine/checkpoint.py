"""Checkpoints: written whole or not at all, verified before use, never unpickled.

RUN/checkpoints/step-000100/ holds the adapter (or model) as safetensors, optimizer.safetensors, rng.safetensors,
state.json, config.resolved.yaml and manifest.json with every file's size and SHA-256. A save writes a temporary
sibling, flushes each file and the directory to disk, renames it, moves `latest`, and only then prunes older
checkpoints, of which only verified ones count as kept.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from packloop.engine.state import TrainState
from packloop.errors import ConfigError, InputError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass
class Checkpoint:
    """A verified checkpoint in memory. `weights` and `optimizer` are per-parameter tensors on the CPU."""

    path: Path
    state: TrainState
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]

    def check_processes(self, num_processes: int) -> None:
        """ConfigError unless as many processes as now wrote it, on the kind of device there is now.

        Each has generators of its own, and a step's packs are dealt out to all of them.
        """
        written = {int(name.split(".")[0]) for name in self.rng}
        kinds = ["a GPU" if on_gpu else "a CPU" for on_gpu in ("0.cuda" in self.rng, torch.cuda.is_available())]
        if written == set(range(num_processes)) and kinds[0] == kinds[1]:
            return
        given, needed = (
            f"{number} {'processes' if number > 1 else 'process'} on {kind}{' each' if number > 1 else ''}"
            for number, kind in zip((num_processes, len(written)), reversed(kinds))
        )
        raise ConfigError(
            f"cannot resume {self.path.name} with {given}: it was written by {needed}, whose random numbers and shares "
            f"of the packs are part of it; resume with {needed}, or start a new run in another train.output_dir"
        )


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary sibling of `path`, flushes it and renames it over `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def save_checkpoint(
    run_dir: Path,
    *,
    state: TrainState,
    write_weights: Callable[[Path], None],
    optimizer: dict[str, Tensor],
    rng: dict[str, Tensor],
    config_yaml: str,
    keep: int,
) -> Path:
    """Writes RUN/checkpoints/step-N, makes it the latest and keeps the newest `keep` verified ones.

    write_weights: called with the temporary directory, writes the model's files there. Raises InputError with path,
    bytes needed and free where the disk refuses; earlier checkpoints are untouched then.
    """
    root = run_dir / "checkpoints"
    final = root / checkpoint_name(state.step)
    temporary = root / f".{final.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_weights(temporary)
        save_file(optimizer, temporary / "optimizer.safetensors")
        save_file(rng, temporary / "rng.safetensors")
        (temporary / "state.json").write_text(state.to_json(), encoding="utf-8")
        (temporary / "config.resolved.yaml").write_text(config_yaml, encoding="utf-8")
        _seal(temporary)
        if final.exists():  # the same step again, after a resume: the old one goes aside until the new one stands
            aside = root / f".{final.name}.old"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(final, aside)
        os.replace(temporary, final)
        flush(root)
        write_atomically(root / "latest", lambda path: path.write_text(final.name + "\n", encoding="utf-8"))
        _prune(root, keep, current=final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(root, error, needed=_num_bytes(optimizer)) from error
    return final


@contextmanager
def disk_errors(path: Path, *, needed: int = 0) -> Iterator[None]:
    """Turns what the disk refuses inside the context into `disk_error`'s one line about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error, needed=needed) from error


def disk_error(path: Path, error: Exception, *, needed: int) -> InputError:
    """One line for a write that the disk refused: where, why, bytes needed and free."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    roots = (path, path / "checkpoints", path.parent / "checkpoints")  # path: of a run, or of something in it
    again = "start again"
    if any(_newest_first(root) for root in roots):
        again = "continue with --resume latest: what was written before is intact"
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    remedy = "free some space or choose another train.output_dir" if full else "check the disk and its permissions"
    return InputError(
        f"cannot write to {str(path)!r}: {error} (at least {needed / 2**20:.2f} MiB needed, "
        f"{free / 2**20:.2f} MiB free); {remedy}, then {again}"
    )


def num_checkpoints(run_dir: Path) -> int:
    """Checkpoints that `--resume latest` would look at, whole or not."""
    return len(_newest_first(run_dir / "checkpoints"))


def find_checkpoint(run_dir: Path, resume: str) -> Checkpoint:
    """The checkpoint that `--resume` names: `latest` or a directory.

    `latest` takes the newest that verifies; one that does not is renamed to `NAME.damaged` and the next older is
    tried. A named directory must verify itself. InputError where none does, ConfigError where it is not there.
    """
    if resume != "latest":
        path = Path(resume)
        if not path.is_dir():
            raise ConfigError(
                f"--resume {resume}: no such directory; name one in {str(run_dir / 'checkpoints')!r}, or latest"
            )
        fault = verify(path)
        if fault:
            raise InputError(f"checkpoint {str(path)!r} cannot be used: {fault}; --resume latest finds one that can")
        return load_checkpoint(path)
    root = run_dir / "checkpoints"
    for path in _newest_first(root):
        fault = verify(path)
        if not fault:
            return load_checkpoint(path)
        logger.warning("checkpoint %s is damaged (%s): set aside as %s", path.name, fault, _set_aside(path, "damaged"))
    raise InputError(f"no usable checkpoint in {str(root)!r}; start a new run without --resume")


def set_newer_aside(run_dir: Path, step: int) -> None:
    """Renames checkpoints after `step` to `NAME.superseded`: a run resumed from an older one is about to pass them.

    Otherwise `latest` would return to them, and to steps that metrics.jsonl no longer has.
    """
    for path in _newest_first(run_dir / "checkpoints"):
        if _step_of(path) > step:
            logger.warning("checkpoint %s is newer: set aside as %s", path.name, _set_aside(path, "superseded"))


def verify(path: Path) -> str | None:
    """None where every file of the checkpoint is as its manifest says, otherwise what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        listed = manifest["files"]
        present = {entry.name for entry in path.iterdir()} - {MANIFEST}
        if present != set(listed):
            return f"files {sorted(present ^ set(listed))} are missing or extra"
        for name in (MANIFEST, *listed):
            if (path / name).is_symlink() or not (path / name).is_file():
                return f"{name} is not a plain file"
        for name, expected in listed.items():
            file = path / name
            if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
                return f"{name} does not match the manifest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint that `verify` accepted. Safetensors and JSON only."""
    weights = next(iter(sorted(path.glob("*model.safetensors"))))
    return Checkpoint(
        path=path,
        state=TrainState.from_json((path / "state.json").read_text(encoding="utf-8")),
        weights=load_file(weights),
        optimizer=load_file(path / "optimizer.safetensors"),
        rng=load_file(path / "rng.safetensors"),
    )


def capture_rng(rank: int) -> dict[str, Tensor]:
    """This rank's generators (Python, NumPy, torch CPU, the current CUDA device) as tensors named `rank.kind`."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        f"{rank}.python": torch.tensor([version, *words], dtype=torch.int64),
        f"{rank}.python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        f"{rank}.numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        f"{rank}.numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        f"{rank}.numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        f"{rank}.torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors[f"{rank}.cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: dict[str, Tensor], rank: int) -> None:
    """Sets this rank's generators, which a checkpoint has that `check_processes` accepts."""
    version, *words = tensors[f"{rank}.python"].tolist()
    gauss = tensors[f"{rank}.python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = tensors[f"{rank}.numpy_position"].tolist()
    keys = tensors[f"{rank}.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, tensors[f"{rank}.numpy_gauss"].item()))
    torch.set_rng_state(tensors[f"{rank}.torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{rank}.cuda"])


def _seal(directory: Path) -> None:
    """Flushes every file, writes the manifest over them and flushes the directory."""
    listed = {}
    for file in sorted(directory.iterdir()):
        flush(file)
        listed[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    (directory / MANIFEST).write_text(json.dumps({"version": 1, "files": listed}, indent=2), encoding="utf-8")
    flush(directory / MANIFEST)
    flush(directory)


def _prune(root: Path, keep: int, current: Path) -> None:
    for leftover in root.glob(".step-*"):  # of a save that a crash cut short
        shutil.rmtree(leftover, ignore_errors=True)
    kept = 1
    for path in _newest_first(root):
        if _step_of(path) >= _step_of(current):
            continue
        if kept < keep and verify(path) is None:
            kept += 1
            continue
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path, why: str) -> str:
    aside = path.with_name(f"{path.name}.{why}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside.name


def _newest_first(root: Path) -> list[Path]:
    """The checkpoints in `root`, whole or not, without those set aside."""
    found = [path for path in root.glob("step-*") if path.is_dir() and _step_of(path) is not None]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None for one that was set aside."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def flush(path: Path) -> None:
    """Waits until the file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
