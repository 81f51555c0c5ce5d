"""Tokenizers small enough to know every id of, a base model and rows to train on, and the optional real data."""

from __future__ import annotations

import csv
import gc
import json
import os
from pathlib import Path

import pytest

# Read when torch, tokenizers and huggingface_hub are first imported, also in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    """Hides a GPU from all tests but those of `-m gpu`: they are of the CPU, where runs are equal to the last bit."""
    if config.option.markexpr != "gpu" and not any("gpu" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="session")
def write_rows():
    """write_rows(path, rows) -> path, in the format that the path's ending names."""
    return _write_rows


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real rows and the Llama 2 tokenizer; they are not part of the repository."""
    path = Path(os.environ.get("PACKLOOP_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; PACKLOOP_SHARED_DATA names another directory")
    return path


@pytest.fixture(scope="session")
def llama2_tokenizer(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "llama2-tokenizer")


@pytest.fixture(scope="session", autouse=True)
def _rare_garbage_collection():
    """In Triton's interpreter, which makes objects by the million: a seventh of its time went into looking at them."""
    from interpreter import INTERPRETING

    if INTERPRETING:
        gc.set_threshold(200_000, 50, 50)
        gc.freeze()


@pytest.fixture
def short_beginnings(monkeypatch):
    """Documents of a few tokens share what they begin with, in rows of a few slots."""
    from packloop.data import layout, prefix

    monkeypatch.setattr(layout, "SLOT_MULTIPLE", 8)
    monkeypatch.setattr(prefix, "LEAST_PREFIX", 3)


@pytest.fixture
def poisoned_outputs():
    """In Triton's interpreter new memory holds NaN, so an element that a kernel leaves out shows."""
    from interpreter import INTERPRETING

    if not INTERPRETING:
        yield
        return
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory) -> Path:
    """A random Llama of 2 layers and its tokenizer of 300 tokens."""
    from tiny_run import save_base

    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def small_rows(tmp_path_factory) -> Path:
    """23 instruction rows, which make 23 documents of 30 to 96 tokens."""
    from small_job import write_rows

    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Byte b is token b + 3; <s> 0, </s> 1, <pad> 2; the merges ab 259, :a 260 and two newlines 261."""
    return _byte_level()


@pytest.fixture(
    scope="session", params=["byte", "byte_adding_bos_and_eos", "byte_without_bos", "metaspace", "prepend", "llama2"]
)
def any_tokenizer(request):
    """Byte-level and SentencePiece-like tokenizers, some of which add BOS or EOS by themselves, and Llama 2's."""
    if request.param == "llama2":
        return request.getfixturevalue("llama2_tokenizer")
    return {
        "byte": _byte_level,
        "byte_adding_bos_and_eos": lambda: _byte_level(adds_specials=True),
        "byte_without_bos": lambda: _byte_level(bos=False),
        "metaspace": lambda: _sentencepiece_like(legacy=False),
        "prepend": lambda: _sentencepiece_like(legacy=True),
    }[request.param]()


def _byte_level(*, adds_specials: bool = False, bos: bool = True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's printable stand-ins for bytes: the printable Latin-1 characters stand for themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    newline = stand_in[10]
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2} | {stand_in[byte]: byte + 3 for byte in range(256)}
    vocab |= {"ab": 259, ":a": 260, newline * 2: 261}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), (":", "a"), (newline, newline)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _wrapped(backend, adds_specials=adds_specials, bos=bos)


def _sentencepiece_like(*, legacy: bool):
    """Llama's two layouts: `▁` put in front by the pre-tokenizer, or (legacy) by the normalizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    characters = ["▁", *map(chr, range(33, 127))]
    merges = [("▁", "a"), ("a", "b"), (":", "a"), ("▁", "▁"), ("▁", "#")]
    tokens = ["<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *map("".join, merges)]
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(backend, adds_specials=True, bos=True)


def _wrapped(backend, *, adds_specials: bool, bos: bool):
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<pad>")]
    )
    if adds_specials:
        backend.post_processor = TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )
