"""`packloop push`: a run's adapter, its full model or its merged model to the Hugging Face Hub.

What is uploaded is a list of known names, shown before anything leaves the machine. Checkpoints, tracker logs and
whatever else stands in the directory are never on it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.text import Text

from packloop.engine.finished_run import ADAPTER_FILE, CONFIG_FILE, METRICS_FILE, MODEL_FILES, open_run
from packloop.errors import ConfigError, InputError

_COMMON_FILES = (
    "README.md",
    CONFIG_FILE,
    "environment.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_ADAPTER_FILES = (ADAPTER_FILE, "adapter_config.json")
_FULL_MODEL_FILES = ("config.json", "generation_config.json", *MODEL_FILES)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|_KEY)$")
_HUB_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")
_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Upload:
    """What goes where. `exists`: the repository is there already and keeps its visibility."""

    repo_id: str
    private: bool
    exists: bool
    files: tuple[Path, ...]


def push(
    run_dir: str | Path,
    repo_id: str,
    *,
    merged: bool = False,
    base: str = "original",
    private: bool = False,
    metrics: bool = False,
    yes: bool = False,
    console: Console | None = None,
) -> str | None:
    """Uploads a run (or a directory that `merge` wrote) in one commit and returns its address; None where declined.

    merged: merges first, into the weights that `base` names, in a temporary directory beside the run. metrics: uploads
    metrics.jsonl too. Without `yes` it asks, after showing every file, its size, the repository and who can see it.
    Raises InputError without a token or network, for a bad repository name, and where a file holds a secret.
    """
    console = console or Console()
    _check_repo_id(repo_id)
    run_dir = Path(run_dir)
    run = open_run(run_dir) if merged else None
    files = [] if merged else files_to_upload(run_dir, metrics=metrics)
    token = get_token()
    if token is None:
        raise InputError("no Hugging Face token is found; log in with `hf auth login` or set HF_TOKEN, then push again")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    exists, private = _look_up(api, repo_id, private)
    if run is None:
        return _confirm_and_upload(api, Upload(repo_id, private, exists, tuple(files)), yes, console)

    from packloop.engine.merge import merge

    root = run.root.resolve()
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-merged-", dir=root.parent) as directory:
        console.print(Text("merging the adapter into its base"), soft_wrap=True)
        files = files_to_upload(merge(run_dir, Path(directory) / "merged", base=base))
        return _confirm_and_upload(api, Upload(repo_id, private, exists, tuple(files)), yes, console)


def files_to_upload(directory: Path, *, metrics: bool = False) -> list[Path]:
    """The files of a run or a merged model that belong on the Hub, by name, in a fixed order.

    Raises ConfigError where the directory holds no weights, or is a checkpoint instead of a finished run.
    """
    if (directory / CONFIG_FILE).exists():
        run = open_run(directory)
        if run.root != run.weights:
            raise ConfigError(f"{str(directory)!r} is a checkpoint; push the finished run, {str(run.root)!r}")
    if (directory / ADAPTER_FILE).is_file():
        wanted = (*_COMMON_FILES, *_ADAPTER_FILES)
    elif any((directory / name).is_file() for name in MODEL_FILES):
        shards = sorted(path.name for path in directory.iterdir() if _SHARD.fullmatch(path.name))
        wanted = (*_COMMON_FILES, *_FULL_MODEL_FILES, *shards)
    else:
        raise ConfigError(
            f"{str(directory)!r} holds neither {ADAPTER_FILE} nor {MODEL_FILES[0]}; "
            "give the directory of a finished run or one that `packloop merge` wrote"
        )
    if metrics:
        wanted = (*wanted, METRICS_FILE)
    files = [directory / name for name in wanted]
    return [file for file in files if file.is_file() and not file.is_symlink()]


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        reason = "" if "/" in repo_id else "it has no owner"
    except HFValidationError as error:
        reason = " ".join(str(error).split())
    if reason:
        raise ConfigError(f"repository {repo_id!r}: owner/name is needed, such as me/my-adapter ({reason})")


def _look_up(api: HfApi, repo_id: str, private: bool) -> tuple[bool, bool]:
    """(whether it exists, whether it is or will be private); InputError where it is public and must not be."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return False, private
    except (HTTPError, OSError) as error:
        raise _hub_error(api, repo_id, error) from error
    if private and not info.private:
        raise InputError(
            f"repository {repo_id!r} exists and is public, and --private is asked for; make it private in its settings "
            "or name another"
        )
    return True, bool(info.private)


def _confirm_and_upload(api: HfApi, upload: Upload, yes: bool, console: Console) -> str | None:
    _check_no_secrets(upload.files, api.token)
    for line in describe(upload):
        console.print(Text(line), soft_wrap=True)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("nothing is uploaded without a yes; there is no terminal to ask on, so say --yes")
        if console.input("Upload these? [y/N] ").strip().lower() not in ("y", "yes"):
            console.print(Text("nothing was uploaded"))
            return None
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in upload.files]
    try:
        if not upload.exists:
            api.create_repo(upload.repo_id, private=upload.private)
        commit = api.create_commit(upload.repo_id, operations, commit_message="Upload with packloop")
    except (HTTPError, OSError, ValueError) as error:  # ValueError: the Hub does not like the card's front matter
        raise _hub_error(api, upload.repo_id, error) from error
    console.print(Text(f"uploaded: {commit.commit_url}"), soft_wrap=True)
    return f"{api.endpoint}/{upload.repo_id}"


def describe(upload: Upload) -> list[str]:
    """What will be uploaded, a line a file, and where to."""
    visibility = "private" if upload.private else "public, for everyone to see"
    state = "exists" if upload.exists else "will be created"
    total = sum(file.stat().st_size for file in upload.files)
    lines = [f"to {upload.repo_id} ({state}; {visibility}), {len(upload.files)} files, {_mebibytes(total)}:"]
    return lines + [f"  {_mebibytes(file.stat().st_size):>12}  {file.name}" for file in upload.files]


def _check_no_secrets(files: tuple[Path, ...], token: str) -> None:
    """InputError naming a text file that holds the Hub token, the like of one, or a secret of the environment."""
    secrets = {value.encode() for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 12}
    secrets.add(token.encode())
    for file in files:
        if file.suffix == ".safetensors":
            continue
        content = file.read_bytes()
        if _HUB_TOKEN.search(content) or any(secret in content for secret in secrets):
            raise InputError(
                f"{str(file)!r} holds what looks like a token or password; remove it there, then push again"
            )


def _hub_error(api: HfApi, repo_id: str, error: Exception) -> InputError:
    reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        remedy = "log in with a token that may write there (`hf auth login`, or HF_TOKEN)"
    elif status is None:
        remedy = "check the network (and HF_ENDPOINT, HF_HUB_OFFLINE where set), then push again"
    else:
        remedy = "check the name, then push again"
    return InputError(f"{repo_id!r} at {api.endpoint} cannot be reached or written ({reason}); {remedy}")


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / _MEBIBYTE:,.2f} MiB"
