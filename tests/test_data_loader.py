"""Packs to batches: literal tensors, a plain reference, and the bugs that trainers have shipped here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from packloop.config import CustomTemplate, DataConfig
from packloop.data.loader import PackLoader, build_data, eval_batches, make_batch
from packloop.data.packing import epoch_packs
from packloop.data.tokenize import Documents
from packloop.errors import InputError

BOS, EOS, PAD = 0, 1, 2
PACKINGS = ["wrapped", "bfd", "none"]


def documents_of(*token_lists, counts=None, row_ids=None):
    lengths = [len(tokens) for tokens in token_lists]
    tokens = [token for tokens in token_lists for token in tokens]
    return Documents(
        token_ids=np.array(tokens, dtype=np.int32),
        counts=np.ones(len(tokens), dtype=bool) if counts is None else np.concatenate(counts),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        row_ids=np.arange(len(lengths)) if row_ids is None else np.array(row_ids),
    )


def random_documents(count, seed=0, longest=40):
    """Documents whose token ids are all different, so that a token says where it came from."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    counts = rng.random(offsets[-1]) < 0.6
    counts[offsets[1:] - 1] = True
    token_ids = np.arange(100, 100 + offsets[-1]).astype(np.int32)
    return Documents(token_ids, counts, offsets, rng.permutation(1000)[:count])


def loader_of(documents, packing="bfd", **options):
    defaults = {
        "max_length": 40, "per_device_batch_size": 2, "gradient_accumulation_steps": 2,
        "rank": 0, "world_size": 1, "seed": 3, "shuffle": True, "pad_token_id": PAD,
    }  # fmt: skip
    return PackLoader(documents, packing=packing, **(defaults | options))


def real_tokens(batch):
    return batch.input_ids[batch.document_ids >= 0].tolist()


def epoch_of(loader):
    """The windows of the epoch that the loader stands in, to its end."""
    epoch, windows = loader.state()["epoch"], []
    while loader.state()["epoch"] == epoch:
        windows.append(loader.next_window())
    return windows


def test_literal_bfd_batch():
    documents = documents_of([BOS, 11, EOS], [BOS, 21, 22, EOS], [BOS, 31, 32, 33, 34, EOS], row_ids=[7, 8, 9])
    packs, _ = epoch_packs(documents.lengths, "bfd", 8, seed=0, epoch=0, shuffle=False)
    batch = make_batch(documents, packs, np.arange(2), packing="bfd", max_length=8, pad_token_id=PAD)
    assert batch.input_ids.tolist() == [[BOS, 11, EOS, BOS, 21, 22, EOS, PAD], [BOS, 31, 32, 33, 34, EOS, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 0, 1]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0, -1, -1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 8, 14, 16]
    assert batch.max_seqlen == 6
    assert batch.label_index.tolist() == [0, 1, 3, 4, 5, 8, 9, 10, 11, 12]
    assert batch.label_ids.tolist() == [11, EOS, 21, 22, EOS, 31, 32, 33, 34, EOS]
    assert batch.row_ids == [7, 8, 9]
    assert (batch.num_slots, batch.num_real_tokens, batch.num_label_tokens) == (16, 13, 10)
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.label_index.dtype == torch.int64
    assert batch.document_ids.dtype == batch.cu_seqlens.dtype == torch.int32


def test_literal_wrapped_batch():
    documents = documents_of([BOS, 11, EOS], [BOS, 21, 22, EOS], row_ids=[7, 8])
    packs, _ = epoch_packs(documents.lengths, "wrapped", 4, seed=0, epoch=0, shuffle=False)
    batch = make_batch(documents, packs, np.arange(2), packing="wrapped", max_length=4, pad_token_id=PAD)
    assert batch.input_ids.tolist() == [[BOS, 11, EOS, BOS], [21, 22, EOS, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0], [0, 0, 0, -1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert batch.label_index.tolist() == [0, 1, 2, 4, 5]
    assert batch.label_ids.tolist() == [11, EOS, BOS, 22, EOS]
    assert batch.row_ids == [7, 8]


def test_literal_none_batch():
    documents = documents_of(
        [BOS, 11, EOS], [BOS, 21, 22, 23, EOS], counts=[[False, False, True], [False] * 2 + [True] * 3]
    )
    packs, _ = epoch_packs(documents.lengths, "none", 100, seed=0, epoch=0, shuffle=False)
    batch = make_batch(documents, packs, np.arange(2), packing="none", max_length=100, pad_token_id=PAD)
    assert batch.input_ids.tolist() == [[BOS, 11, EOS, PAD, PAD], [BOS, 21, 22, 23, EOS]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 10]
    assert batch.max_seqlen == 5
    assert batch.label_index.tolist() == [1, 6, 7, 8]
    assert batch.label_ids.tolist() == [EOS, 22, 23, EOS]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seed", range(8))
def test_batches_equal_a_plain_reference(packing, seed):
    """One token at a time, from the definition: what is in a row, what predicts what, where documents end."""
    documents = random_documents(30, seed)
    packs, order = epoch_packs(documents.lengths, packing, 40, seed=seed, epoch=0, shuffle=True)
    chosen = order[:5]
    batch = make_batch(documents, packs, chosen, packing=packing, max_length=40, pad_token_id=PAD)
    num_columns = batch.input_ids.shape[1]
    index, labels, borders, num_real, row_ids = [], [], [], 0, []
    for row, pack in enumerate(chosen):
        column = 0
        for place, segment in enumerate(range(packs.pack_offsets[pack], packs.pack_offsets[pack + 1])):
            document = packs.segment_document[segment]
            row_ids += [documents.row_ids[document]] if documents.row_ids[document] not in row_ids else []
            for token in range(packs.segment_start[segment], packs.segment_stop[segment]):
                first = column == 0 if packing == "wrapped" else token == 0
                borders += [row * num_columns + column] if first else []
                flat = documents.offsets[document] + token
                assert batch.input_ids[row, column] == documents.token_ids[flat]
                assert batch.position_ids[row, column] == (column if packing == "wrapped" else token)
                assert batch.document_ids[row, column] == (0 if packing == "wrapped" else place)
                if documents.counts[flat] and not first:
                    index.append(row * num_columns + column - 1)
                    labels.append(documents.token_ids[flat])
                column += 1
                num_real += 1
        if column < num_columns:
            borders.append(row * num_columns + column)
        assert (batch.input_ids[row, column:] == PAD).all()
        assert (batch.document_ids[row, column:] == -1).all()
    assert batch.label_index.tolist() == index
    assert batch.label_ids.tolist() == labels
    assert batch.cu_seqlens.tolist() == [*borders, 5 * num_columns]
    assert batch.max_seqlen == int(np.diff([*borders, 5 * num_columns]).max())
    assert (batch.num_slots, batch.num_real_tokens, batch.num_label_tokens) == (5 * num_columns, num_real, len(labels))
    assert batch.row_ids == row_ids


def test_row05_first_label_of_each_document_masked_and_positions_restart():
    documents = random_documents(60)
    documents.counts[:] = True
    first_tokens = set(documents.token_ids[documents.offsets[:-1]].tolist())
    num_labels = 0
    for batch in (batch for window in epoch_of(loader_of(documents, "bfd")) for batch in window):
        assert first_tokens.isdisjoint(batch.label_ids.tolist())
        begins = batch.cu_seqlens[:-1].long()
        assert (batch.position_ids.flatten()[begins] == 0).all()
        assert sorted(first_tokens & set(real_tokens(batch))) == sorted(
            batch.input_ids.flatten()[begins][batch.document_ids.flatten()[begins] >= 0].tolist()
        )
        # A label lies in the document of the token that predicts it.
        document_of_slot = torch.bucketize(torch.arange(batch.num_slots), batch.cu_seqlens[1:], right=True)
        assert torch.equal(document_of_slot[batch.label_index], document_of_slot[batch.label_index + 1])
        num_labels += batch.num_label_tokens
    assert num_labels == len(documents.token_ids) - len(documents)


def test_row05_wrapped_positions_run_through_the_row_and_every_label_is_trained():
    documents = random_documents(60)
    documents.counts[:] = True
    num_labels = num_rows = 0
    for batch in (batch for window in epoch_of(loader_of(documents, "wrapped")) for batch in window):
        assert torch.equal(batch.position_ids, torch.arange(40).expand_as(batch.position_ids))
        num_labels += batch.num_label_tokens
        num_rows += len(batch.input_ids)
    assert num_labels == len(documents.token_ids) - num_rows


@pytest.mark.parametrize("packing", PACKINGS)
def test_row06_pad_equal_to_eos_leaves_every_real_eos_counting(packing):
    """data half: padding is told from EOS by place, not by id."""
    token_lists = [[BOS, *range(10, 10 + n), EOS] for n in (3, 7, 1, 12, 5, 2, 9)]
    documents = documents_of(*token_lists)
    batches = [
        batch for window in epoch_of(loader_of(documents, packing, max_length=16, pad_token_id=EOS)) for batch in window
    ]
    num_rows_begun_by_eos = sum(int((batch.input_ids[:, 0] == EOS).sum()) for batch in batches)
    num_eos_labels = sum(int((batch.label_ids == EOS).sum()) for batch in batches)
    assert any(batch.num_slots > batch.num_real_tokens for batch in batches)
    assert num_eos_labels == len(token_lists) - num_rows_begun_by_eos
    assert packing == "wrapped" or num_rows_begun_by_eos == 0
    for batch in batches:
        assert (batch.document_ids.flatten()[batch.label_index + 1] >= 0).all()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("count", "batch", "accumulation"), [(1, 2, 2), (7, 2, 2), (23, 1, 3), (50, 3, 1), (8, 2, 2)])
def test_row09_every_token_of_every_document_is_delivered_once_an_epoch(packing, count, batch, accumulation):
    documents = random_documents(count)
    loader = loader_of(documents, packing, per_device_batch_size=batch, gradient_accumulation_steps=accumulation)
    for _ in range(3):
        batches = [one for window in epoch_of(loader) for one in window]
        tokens = sorted(token for one in batches for token in real_tokens(one))
        assert tokens == documents.token_ids.tolist()
        assert sum(one.num_real_tokens for one in batches) == len(tokens)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
@pytest.mark.parametrize(("batch", "accumulation", "world"), [(1, 1, 1), (2, 2, 1), (3, 1, 2), (2, 4, 4), (16, 1, 1)])
def test_row10_steps_announced_are_steps_iterated(packing, count, batch, accumulation, world):
    documents = random_documents(count)
    for rank in range(world):
        loader = loader_of(
            documents, packing,
            per_device_batch_size=batch, gradient_accumulation_steps=accumulation, rank=rank, world_size=world,
        )  # fmt: skip
        announced = loader.steps_per_epoch
        assert announced == -(-loader.num_packs // (batch * accumulation * world))
        for epoch in range(3):
            assert loader.state() == {"seed": 3, "epoch": epoch, "cursor": 0}
            assert len(epoch_of(loader)) == loader.steps_per_epoch == announced


def window_rows(window):
    return [batch.row_ids for batch in window]


def assert_same_windows(windows, others):
    for window, other in zip(windows, others, strict=True):
        assert window_rows(window) == window_rows(other)
        for batch, twin in zip(window, other, strict=True):
            for field in ("input_ids", "position_ids", "document_ids", "cu_seqlens", "label_index", "label_ids"):
                assert torch.equal(getattr(batch, field), getattr(twin, field))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_row25_resume_at_any_step_continues_the_uninterrupted_order(packing, shuffle):
    documents = random_documents(41)
    loader = loader_of(documents, packing, shuffle=shuffle)
    num_windows = 3 * loader.steps_per_epoch
    states, windows = [], []
    for _ in range(num_windows):
        states.append(json.dumps(loader.state()))
        windows.append(loader.next_window())
    for step in range(num_windows):
        resumed = loader_of(documents, packing, shuffle=shuffle)
        resumed.load_state(json.loads(states[step]))
        assert_same_windows(windows[step : step + 4], [resumed.next_window() for _ in windows[step : step + 4]])


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_row25_each_row_once_an_epoch_with_a_resume_in_the_middle(packing):
    documents = random_documents(41)
    loader = loader_of(documents, packing)
    orders = []
    for _ in range(3):
        ledger = []
        for step in range(loader.steps_per_epoch):
            ledger += [row for batch in loader.next_window() for row in batch.row_ids]
            if step == loader.steps_per_epoch // 2:
                position, loader = loader.state(), loader_of(documents, packing)
                loader.load_state(position)
        assert sorted(ledger) == sorted(documents.row_ids.tolist())
        orders.append(ledger)
    assert orders[0] != orders[1] != orders[2]


def test_row25_resume_on_another_number_of_ranks_goes_on_with_the_rows_not_yet_seen():
    documents = random_documents(41)
    loader = loader_of(documents, "none")
    seen = [row for _ in range(3) for batch in loader.next_window() for row in batch.row_ids]
    for rank in range(2):
        resumed = loader_of(documents, "none", rank=rank, world_size=2)
        resumed.load_state(loader.state())
        seen += [row for window in epoch_of(resumed) for batch in window for row in batch.row_ids]
    assert sorted(seen) == sorted(documents.row_ids.tolist())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (2, 1), (2, 2), (1, 3), (4, 2)])
def test_row26_seven_rows_on_two_ranks_are_not_padded_with_repeats(packing, batch, accumulation):
    documents = random_documents(7)
    loaders = [
        loader_of(
            documents, packing,
            per_device_batch_size=batch, gradient_accumulation_steps=accumulation, rank=rank, world_size=2,
        )
        for rank in range(2)
    ]  # fmt: skip
    packs, _ = epoch_packs(documents.lengths, packing, 40, seed=3, epoch=0, shuffle=True)
    tokens, rows, num_labels, num_slots = [], [], 0, 0
    for _ in range(loaders[0].steps_per_epoch):
        windows = [loader.next_window() for loader in loaders]
        assert len(windows[0]) == len(windows[1]) <= accumulation
        for one in (one for window in windows for one in window):
            tokens += real_tokens(one)
            rows += one.row_ids
            num_labels += one.num_label_tokens
            num_slots += one.num_slots
            assert one.num_label_tokens == len(one.label_index) == len(one.label_ids)
            assert len(one.input_ids) <= batch
    assert sorted(tokens) == documents.token_ids.tolist()
    assert packing == "wrapped" or sorted(rows) == sorted(documents.row_ids.tolist())
    one_process = [one for window in epoch_of(loader_of(documents, packing)) for one in window]
    assert num_labels == sum(one.num_label_tokens for one in one_process)
    assert packing == "none" or num_slots == packs.num_packs * 40
    assert [loader.state() for loader in loaders] == [{"seed": 3, "epoch": 1, "cursor": 0}] * 2


def test_rank_with_nothing_left_gets_empty_batches():
    documents = random_documents(3)
    loaders = [loader_of(documents, "none", rank=rank, world_size=4, per_device_batch_size=1) for rank in range(4)]
    batches = [loader.next_window() for loader in loaders]
    assert [len(window) for window in batches] == [1, 1, 1, 1]
    (empty,) = batches[3]
    assert empty.row_ids == []
    assert empty.label_index.shape == empty.label_ids.shape == (0,)
    assert (empty.num_slots, empty.num_real_tokens, empty.num_label_tokens) == (0, 0, 0)
    assert (empty.document_ids == -1).all()
    assert empty.cu_seqlens.tolist() == [0, empty.input_ids.numel()]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_held_out_pack_is_evaluated_once(packing, world):
    documents = random_documents(23)
    shares = [
        list(
            eval_batches(
                documents, packing=packing, max_length=40, per_device_batch_size=2, rank=rank, world_size=world,
                pad_token_id=PAD,
            )
        )
        for rank in range(world)
    ]  # fmt: skip
    assert len({len(share) for share in shares}) == 1
    assert (
        sorted(token for share in shares for one in share for token in real_tokens(one)) == documents.token_ids.tolist()
    )


@pytest.mark.parametrize(
    "state",
    [
        {"seed": 3, "epoch": 0, "cursor": 10_000},
        {"seed": 3, "epoch": -1, "cursor": 0},
        {"seed": -3, "epoch": 0, "cursor": 0},
        {"seed": 3, "epoch": 0, "cursor": -1},
    ],
)
def test_positions_outside_the_data_are_refused(state):
    with pytest.raises(ValueError, match="lies outside an epoch of"):
        loader_of(random_documents(10)).load_state(state)


def test_loader_needs_documents():
    with pytest.raises(ValueError, match="at least one document"):
        loader_of(documents_of())


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


QUESTION = CustomTemplate(prompt="{q}:", response="{a}")


def test_build_data(tmp_path, byte_tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", [{"q": f"q{n}", "a": f"a{n}"} for n in range(10)])
    config = DataConfig(source=source, template=QUESTION, eval_split=3, packing="bfd", max_length=32)
    data = build_data(config, byte_tokenizer, seed=0)
    assert (len(data.train), len(data.eval)) == (7, 3)
    assert sorted(data.train_rows.row_ids + data.eval_rows.row_ids) == list(range(10))
    assert data.train.row_ids.tolist() == data.train_rows.row_ids
    assert (data.report.num_rows, data.eval_report.num_rows) == (7, 3)
    assert data.template.name == "custom"
    again = build_data(config, byte_tokenizer, seed=0)
    assert again.eval_rows.row_ids == data.eval_rows.row_ids
    assert build_data(config, byte_tokenizer, seed=1).eval_rows.row_ids != data.eval_rows.row_ids


def test_build_data_without_held_out_rows(tmp_path, byte_tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", [{"q": "q", "a": "a"}])
    data = build_data(DataConfig(source=source, template=QUESTION), byte_tokenizer, seed=0)
    assert data.eval is data.eval_rows is data.eval_report is None


def test_no_row_with_a_label_token_is_an_error(tmp_path, byte_tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", [{"q": "q" * 50, "a": "a"}] * 3)
    config = DataConfig(source=source, template=QUESTION, packing="bfd", max_length=16, loss_on="response")
    with pytest.raises(
        InputError, match=r"none of 3 rows is left to train on \(3 no label token .*data\.max_length=16"
    ):
        build_data(config, byte_tokenizer, seed=0)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("file", "columns"), [("alpaca_800.json", {"response": "output"}), ("dolly_100.jsonl", {})])
def test_real_rows_through_the_loader(shared_data, llama2_tokenizer, packing, file, columns):
    config = DataConfig(source=str(shared_data / file), columns=columns, packing=packing, max_length=1024)
    data = build_data(config, llama2_tokenizer, seed=0)
    loader = loader_of(data.train, packing, max_length=1024, pad_token_id=llama2_tokenizer.eos_token_id)
    batches = [batch for window in epoch_of(loader) for batch in window]
    assert sum(batch.num_real_tokens for batch in batches) == data.report.num_tokens == data.report.num_tokens_in
    assert {row for batch in batches for row in batch.row_ids} == set(data.train_rows.row_ids)
    for batch in batches:
        assert torch.equal(batch.input_ids.flatten()[batch.label_index + 1], batch.label_ids)
    if packing != "wrapped":
        num_eos = sum(int((batch.label_ids == llama2_tokenizer.eos_token_id).sum()) for batch in batches)
        assert num_eos == len(data.train_rows)


def test_a_digest_tells_documents_apart():
    """By ids, counts, borders and order; not by the rows they come from."""
    same = [documents_of([5, 6, 7], [8, 9]), documents_of([5, 6, 7], [8, 9], row_ids=[4, 2])]
    others = [
        documents_of([5, 6, 7], [8, 1]),
        documents_of([5, 6], [7, 8, 9]),
        documents_of([8, 9], [5, 6, 7]),
        documents_of([5, 6, 7], [8, 9], counts=[[True, False, True], [True, True]]),
        documents_of([5, 6, 7], [8, 9], [5, 6]),
    ]
    assert len({one.digest() for one in same}) == 1
    assert len({one.digest() for one in [same[0], *others]}) == 1 + len(others)


@pytest.mark.parametrize(
    ("row", "loss_on", "is_used"),
    [
        ({"instruction": "Say a", "context": "", "response": "a"}, "response", True),
        ({"instruction": "", "context": " ", "response": "a"}, "all", False),
        ({"instruction": "Say a", "context": "", "response": "\n"}, "response", False),
        ({"instruction": "Say a", "context": "", "response": ""}, "all", True),
    ],
)
def test_rows_without_text_to_learn_from_are_bad_ones(tmp_path, byte_tokenizer, write_rows, row, loss_on, is_used):
    good = {"instruction": "Say b", "context": "c", "response": "b"}
    source = write_rows(tmp_path / "rows.jsonl", [good, row, good])
    settings = {"source": str(source), "template": "dolly", "packing": "bfd", "loss_on": loss_on}
    data = build_data(DataConfig(on_bad_row="skip", **settings), byte_tokenizer, seed=0)
    assert data.train_rows.row_ids == ([0, 1, 2] if is_used else [0, 2])
    assert len(data.train_rows.skipped) == (0 if is_used else 1)
    if not is_used:
        with pytest.raises(InputError, match=r"line 2: fields? .* blank, and text is needed; mend it, or set data"):
            build_data(DataConfig(**settings), byte_tokenizer, seed=0)
