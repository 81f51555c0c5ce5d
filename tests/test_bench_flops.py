"""Operations of a step against figures worked out by hand, and the peak that they are a share of."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from packloop.bench import ceilings as measured
from packloop.bench import flops
from packloop.bench.results import Ceilings
from packloop.bench.shapes import SHAPES
from packloop.config import parse_config
from packloop.data.loader import Batch, make_batch
from packloop.data.packing import pack
from packloop.data.tokenize import Documents
from packloop.kernels import document_kernels

LLAMA2_7B = SimpleNamespace(**SHAPES["llama2-7b"], tie_word_embeddings=False)
LLAMA3_8B = SimpleNamespace(**SHAPES["llama3-8b"], tie_word_embeddings=False)
QV = {"r": 64, "target_modules": ["q_proj", "v_proj"]}
ALL = {"r": 64, "target_modules": "all-linear"}


def run(lora=QV, attention="flash_attn", layer="fused", recompute="none"):
    kernels = {"attention": attention, "layer": layer, "dequant_cache": "none", "keep_inputs": "none"}
    return parse_config({"lora": lora, "kernels": kernels, "train": {"gradient_checkpointing": recompute}})


def batch(lengths, *, packing="wrapped", max_length=2048):
    """One micro-batch with every pack of documents of these lengths, all tokens trained on."""
    lengths = np.array(lengths)
    total = int(lengths.sum())
    documents = Documents(
        token_ids=np.arange(total, dtype=np.int32) % 7,
        counts=np.ones(total, dtype=bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        row_ids=np.arange(len(lengths)),
    )
    packs = pack(lengths, packing, max_length, np.arange(len(lengths)))
    return make_batch(
        documents, packs, np.arange(packs.num_packs), packing=packing, max_length=max_length, pad_token_id=0
    )


def needed_of(lora, micros) -> float:
    return flops.needed_flops(LLAMA2_7B, lora, flops.work_of(micros, "flash_attn"))


def executed_of(config, micros) -> float:
    return flops.executed_flops(LLAMA2_7B, config, flops.work_of(micros, config.kernels.attention))


def test_parameters_of_llama_2_7b():
    linear = 32 * flops.layer_parameters(LLAMA2_7B)
    assert linear == 32 * (4 * 4096**2 + 3 * 4096 * 11008) == 6_476_005_376
    assert linear + 32000 * 4096 == 6_607_077_376  # the N of 4 N
    assert flops.count_parameters(LLAMA2_7B) == 6_738_415_616
    assert flops.count_parameters(LLAMA3_8B) == 8_030_261_248
    assert 32 * flops.adapter_parameters(LLAMA2_7B, run(QV).lora) == 33_554_432
    assert 32 * flops.adapter_parameters(LLAMA2_7B, run(ALL).lora) == 159_907_840


def test_needed_operations_of_a_full_pack():
    """2048 tokens, the first of which is nobody's label: 26.4 GFLOP a token, attention 1.6, adapters 0.2 or 0.96."""
    micro = batch([2048])
    linear, head = 4 * 6_476_005_376 * 2048, 4 * 32000 * 4096 * 2047
    attention = 32 * 6 * 2 * 4096 * (2048 * 2049 / 2)  # six products of 2 x 4096 a pair
    needed = needed_of(run(QV).lora, [micro])
    assert needed == linear + head + attention + 6 * 33_554_432 * 2048
    assert (linear + head) / 2048 == pytest.approx(26.4e9, rel=2e-3)
    assert attention / 2048 == pytest.approx(1.61e9, rel=2e-3)
    more = needed_of(run(ALL).lora, [micro]) - needed
    assert more == 6 * (159_907_840 - 33_554_432) * 2048


def test_attention_is_counted_within_documents_and_padding_is_not_needed():
    alone = needed_of(run().lora, [batch([300], packing="bfd"), batch([500], packing="bfd")])
    packed = batch([500, 300], packing="bfd")
    assert (packed.num_real_tokens, packed.num_slots) == (800, 2048)
    assert needed_of(run().lora, [packed]) == alone
    executed = executed_of(run(), [packed])
    padding = 1248
    pairs = sum(length * (length + 1) // 2 for length in (500, 300, padding))
    expected = 2048 * (4 * 6_476_005_376 + 6 * 33_554_432 - 2 * 3 * 4096**2) + 4 * 32000 * 4096 * 798
    assert executed == expected + 32 * 14 * 4096 * pairs


def test_what_is_executed_depends_on_the_way():
    micro = batch([2048, 2048])
    slots, products = 4096, 2 * 6_476_005_376 // 32
    plain = executed_of(run(), [micro])
    pairs = 2048 * 2049  # of both rows
    adapters = 2 * 33_554_432 // 32

    of_seven = executed_of(run(recompute=7), [micro]) - plain
    without_last = products - 2 * 4096 * 11008
    assert of_seven == 7 * (slots * (without_last + adapters) + 4 * 4096 * pairs)
    of_all = executed_of(run(recompute="all", layer="stock"), [micro]) - plain
    assert of_all == 32 * (slots * (products + adapters) + 4 * 4096 * pairs)
    assert of_all / plain == pytest.approx(0.48, abs=0.01)  # 2 N more than 4 N, the head and adapters apart

    down = {"r": 64, "target_modules": ["down_proj"]}
    again = [executed_of(run(down, recompute=count), [micro]) for count in (0, 1)]
    assert again[1] - again[0] == slots * (without_last + 2 * 64 * 11008) + 4 * 4096 * pairs  # A's projection only

    eager = executed_of(run(attention="eager"), [micro])
    assert eager - plain == 32 * 4096 * (12 * 2 * 2048**2 - 14 * pairs)
    masked = batch([1000, 1000], packing="bfd")
    by_mask, by_document = (executed_of(run(attention=name), [masked]) for name in ("sdpa", "varlen"))
    visited = 2 * (1000 * 1001 // 2) + 48 * 49 // 2
    assert by_mask - by_document == 32 * 4096 * 14 * (2048**2 - visited)


def test_document_attention_executes_the_products_of_its_kernels():
    source = Path(document_kernels.__file__).read_text()
    products = {
        function.name: sum(isinstance(node, ast.Attribute) and node.attr == "dot" for node in ast.walk(function))
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
    }
    assert products["document_attention_forward_kernel"] == 2
    both = products["_query_part"] + products["_key_part"]
    micro = batch([2048, 2048])
    by_document, others = (executed_of(run(attention=name), [micro]) for name in ("document", "flash_attn"))
    assert by_document - others == 32 * 4096 * 2 * (both - 5) * 2048 * 2049


def test_grouped_heads_have_smaller_projections():
    shapes = flops.linear_shapes(LLAMA3_8B)
    assert shapes["k_proj"] == shapes["v_proj"] == (4096, 1024)
    assert flops.layer_parameters(LLAMA3_8B) == 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336


def figures(device, dtype="bfloat16", ceilings=None):
    """Of a step of two full packs in 500 ms."""
    micros = [batch([2048])] * 2
    needed, executed = needed_of(run().lora, micros), executed_of(run(attention="sdpa"), micros)
    return flops.flop_figures(
        needed=needed, executed=executed, step_ms=500.0, device=device, dtype=dtype, ceilings=ceilings
    )


def test_utilisation_is_of_this_gpu_s_peak():
    of_a10g = figures("NVIDIA A10G")
    needed = 2 * needed_of(run().lora, [batch([2048])])  # a step has two micro-batches
    assert of_a10g.model_tflops == pytest.approx(needed / 0.5 / 1e12)
    assert of_a10g.peak_tflops == 70
    assert of_a10g.model_utilisation == pytest.approx(needed / 0.5 / 70e12)
    assert of_a10g.hardware_utilisation > of_a10g.model_utilisation
    assert figures("NVIDIA H200").peak_tflops == 989


def test_an_unknown_gpu_and_float32_are_held_to_the_measured_rate():
    ceilings = Ceilings(gemm_tflops=123.0, copy_tb_per_s=1.0)
    unknown = figures("NVIDIA H200 MIG 1g.18gb", ceilings=ceilings)
    assert unknown.peak_tflops == 123
    assert "measured beside the steps, as NVIDIA H200 MIG 1g.18gb is not in the table" in unknown.peak_source
    assert "as products in float32" in figures("NVIDIA H200", "float32", ceilings).peak_source
    assert figures("an unknown GPU") is None


@pytest.mark.parametrize("held_up", [0, 1, 3])
def test_a_call_that_was_held_up_does_not_shorten_the_laps_of_a_ceiling(monkeypatch, held_up):
    """Of calls that take 0.1 ms and 1 ms to start a lap; while the laps are sized one is held up for a second."""
    laps = []

    def lap_seconds(_run, repeats):
        laps.append(repeats)
        return 1.0 if len(laps) - 1 == held_up else 1e-3 + repeats * 1e-4

    monkeypatch.setattr(measured, "_lap_seconds", lap_seconds)
    assert measured._seconds(lambda: None) == pytest.approx(1.1e-4, rel=0.02)
    assert laps[-1] == 91, "0.1 s in calls of 1.1 ms"


def shared_batch(num_prefix: int, own: list[int], alone: list[int], tail: int) -> Batch:
    """A beginning of `num_prefix` tokens, documents that go on after it, others by themselves, and filling.

    All tokens are trained on but each document's first.
    """
    runs = [num_prefix, *own, *alone, tail]
    numbers = torch.tensor([*range(len(runs) - 1), -1], dtype=torch.int32)
    bounds = torch.tensor([0, *runs]).cumsum(0)
    num_slots, num_documents = sum(runs), len(own)
    # Each slot but a document's last one has a target; a document's are those of the beginning, and its own.
    has_target = torch.ones(num_slots, dtype=torch.bool)
    has_target[bounds[2:] - 1] = False
    has_target[num_slots - tail :] = False
    weights = torch.ones(num_slots)
    weights[:num_prefix] = num_documents
    lengths = [num_prefix + length for length in own] + alone
    return Batch(
        input_ids=torch.zeros(1, num_slots, dtype=torch.int64),
        position_ids=torch.zeros(1, num_slots, dtype=torch.int64),
        document_ids=numbers.repeat_interleave(torch.tensor(runs))[None],
        cu_seqlens=bounds.int(),
        max_seqlen=max(runs),
        label_index=has_target.nonzero().flatten(),
        label_ids=torch.zeros(int(has_target.sum()), dtype=torch.int64),
        row_ids=[0],
        num_slots=num_slots,
        num_real_tokens=sum(lengths),
        num_label_tokens=sum(lengths) - len(lengths),
        prefix_of=torch.tensor([-1, *[0] * num_documents, *[-1] * len(alone), -1], dtype=torch.int32),
        label_weights=weights[has_target],
    )


def test_a_shared_beginning_is_needed_by_every_document_and_executed_once():
    shared = shared_batch(30, [10, 20, 5], [7], tail=4)
    assert float(shared.label_weights.sum()) == shared.num_label_tokens == 40 + 50 + 35 + 7 - 4
    whole = batch([40, 50, 35, 7], packing="bfd", max_length=132)
    assert whole.num_real_tokens == whole.num_slots == shared.num_real_tokens
    work, of_whole = flops.work_of([shared], "document"), flops.work_of([whole], "document")
    assert (work.real_tokens, work.label_tokens, work.pairs) == (
        of_whole.real_tokens,
        of_whole.label_tokens,
        of_whole.pairs,
    )
    assert work.slots == 30 + 10 + 20 + 5 + 7 + 4
    assert work.head_rows == 30 + 9 + 19 + 4 + 6, "a target of the beginning is one row of the head"
    triangles = sum(length * (length + 1) // 2 for length in (30, 10, 20, 5, 7, 4))
    assert work.visited_pairs == triangles + 30 * (10 + 20 + 5)
    config = run(attention="document")
    needed = flops.needed_flops(LLAMA2_7B, config.lora, work)
    assert needed == flops.needed_flops(LLAMA2_7B, config.lora, of_whole)
    executed = flops.executed_flops(LLAMA2_7B, config, work)
    assert executed < min(needed, flops.executed_flops(LLAMA2_7B, config, of_whole))
