"""Forward and backward of one layer's attention, RoPE included, by every backend that runs here.

    python benchmarks/attention.py --output RESULT.json [--heads 32,32,128] [--no-search]

16,384 bf16 slots in rows of 2048 (or one row): documents as instruction data has them (mean 235), of 256, of 2048 and
of 16384 tokens. q, k, v and their gradients are column slices of one buffer, as in training. First every candidate
tiling of the document kernels is timed on the instruction-like documents and the fastest kept; then all backends, by
CUDA events, median of 20 after warm-up, the host well ahead of the device. `with RoPE` adds the RoPE kernel where the
backend does not rotate. Before anything is timed the document kernels must agree with the oracle in fp32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from packloop.kernels import flash_attention, reference
from packloop.kernels.attention import Attention, DifferentiatedAttention, DocumentLayout, load_backend
from packloop.kernels.document_attention import BackwardTiles, DocumentAttention, Tiles
from packloop.kernels.rope import Rotation, rope_

NUM_SLOTS, ROW = 16384, 2048
LAPS, WARMUP = 20, 3
# Device clock cycles that let the host enqueue all laps of a measurement: some 10 ms.
HEAD_START = 20_000_000

FORWARD = [
    Tiles(64, 32, num_warps=4, num_stages=2, max_registers=128),
    Tiles(64, 32, num_warps=4, num_stages=2, max_registers=168),
    Tiles(128, 32, num_warps=8, num_stages=2, max_registers=128),
    Tiles(64, 64, num_warps=4, num_stages=1, max_registers=128),
    Tiles(64, 64, num_warps=4, num_stages=1, max_registers=168),
    Tiles(64, 64, num_warps=4, num_stages=2),
    Tiles(128, 64, num_warps=8, num_stages=2),
]
QUERIES = [
    Tiles(64, 32, num_warps=4, num_stages=2, max_registers=168),
    Tiles(64, 32, num_warps=4, num_stages=1, max_registers=168),
    Tiles(128, 32, num_warps=8, num_stages=2, max_registers=128),
    Tiles(64, 64, num_warps=4, num_stages=2),
]
KEYS = [
    Tiles(64, 32, num_warps=4, num_stages=2),
    Tiles(64, 64, num_warps=4, num_stages=1),
    Tiles(128, 32, num_warps=8, num_stages=2),
    Tiles(128, 64, num_warps=8, num_stages=1),
    Tiles(64, 32, num_warps=8, num_stages=2, max_registers=128),
    Tiles(128, 32, num_warps=16, num_stages=2, max_registers=128),
]


def instruction_like_row(generator: torch.Generator) -> list[int]:
    """Documents of 20 to 800 tokens, mean 235 or so, that fill a row but for a tail of padding."""
    lengths = torch.exp(torch.randn(200, generator=generator) * 0.6 + 5.28).clamp(20, 800).long()
    lengths = lengths[lengths.cumsum(0) <= ROW].tolist()
    return [*lengths, ROW - sum(lengths)]


def workloads() -> dict[str, list[list[int]]]:
    """Name -> rows of document lengths."""
    generator = torch.Generator().manual_seed(0)
    num_rows = NUM_SLOTS // ROW
    return {
        "instructions": [instruction_like_row(generator) for _ in range(num_rows)],
        "256": [[256] * (ROW // 256)] * num_rows,
        "2048": [[ROW]] * num_rows,
        "16384": [[NUM_SLOTS]],
    }


@dataclass(frozen=True)
class Case:
    """One layer's tensors for rows of documents; q, k and v are slices of `qkv`, their gradients of `d_qkv`."""

    heads: tuple[int, int, int]
    layout: DocumentLayout
    rotation: Rotation
    qkv: Tensor
    d_qkv: Tensor
    d_out: Tensor

    @property
    def scale(self) -> float:
        return self.heads[2] ** -0.5

    @property
    def inputs(self) -> list[Tensor]:
        return self._split(self.qkv)

    @property
    def gradients(self) -> list[Tensor]:
        return self._split(self.d_qkv)

    def _split(self, buffer: Tensor) -> list[Tensor]:
        num_heads, num_kv_heads, head_dim = self.heads
        parts = buffer.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=1)
        return [part.unflatten(1, (-1, head_dim)) for part in parts]


def make_case(rows: list[list[int]], heads: tuple[int, int, int]) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    lengths = torch.tensor([length for row in rows for length in row])
    num_slots = int(lengths.sum())
    ids = [torch.arange(len(row), dtype=torch.int32).repeat_interleave(torch.tensor(row)) for row in rows]
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(torch.int32)
    positions_T = torch.cat([torch.arange(int(length)) for length in lengths]).cuda()
    inv_freq = 1 / 10000 ** (torch.arange(0, head_dim, 2, device="cuda") / head_dim)
    torch.manual_seed(0)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    return Case(
        heads,
        DocumentLayout(torch.stack(ids).cuda(), bounds.cuda(), int(lengths.max()), any(len(row) > 1 for row in rows)),
        Rotation(*reference.rope_tables(inv_freq, int(lengths.max())), positions_T),
        torch.randn(num_slots, width, device="cuda", dtype=torch.bfloat16),
        torch.empty(num_slots, width, device="cuda", dtype=torch.bfloat16),
        torch.randn(num_slots, num_heads, head_dim, device="cuda", dtype=torch.bfloat16),
    )


def median_ms(function: Callable[[], object]) -> float:
    for _ in range(WARMUP):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(LAPS)]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def time_backend(backend: Attention, case: Case, *, rotates: bool) -> tuple[float, float]:
    """(forward, backward) in ms."""
    options = {"rotation": case.rotation} if rotates else {}
    common, gradients = (*case.inputs, case.layout, case.scale), case.gradients

    def forward():
        return backend.forward(*common, **options)[1]

    def backward(saved) -> None:
        backend.backward(saved, case.d_out, *common, *gradients, **options)

    forward_ms = median_ms(forward)
    if isinstance(backend, DifferentiatedAttention):  # its graph serves one backward pass
        return forward_ms, median_ms(lambda: backward(forward())) - forward_ms
    saved = forward()
    return forward_ms, median_ms(lambda: backward(saved))


def time_rope(case: Case) -> tuple[float, float]:
    """(forward, inverse on the gradients) in ms."""
    times = []
    for tensors, inverse in ((case.inputs, False), (case.gradients, True)):
        q_TQD, k_TKD = (x.flatten(1) for x in tensors[:2])
        rotation = case.rotation
        arguments = (q_TQD, k_TKD, rotation.cos_PD, rotation.sin_PD, rotation.position_ids_T)
        times.append(median_ms(lambda arguments=arguments, inverse=inverse: rope_(*arguments, inverse=inverse)))
    return times[0], times[1]


def check(case: Case, backend: DocumentAttention) -> float:
    """Greatest error of the output's first head against the oracle in fp32; exits where it is no rounding error."""
    buffer = case.qkv.clone()
    q, k, v = replace(case, qkv=buffer).inputs
    before = [x[:, :1].float() for x in (q, k, v)]
    out, _ = backend.forward(q, k, v, case.layout, case.scale, rotation=case.rotation)
    rotation = case.rotation
    turned = [reference.rope(x, rotation.cos_PD, rotation.sin_PD, rotation.position_ids_T) for x in before[:2]]
    ids_BL = case.layout.document_ids_BL.long()
    ids_T = (ids_BL + ids_BL.shape[1] * torch.arange(len(ids_BL), device=ids_BL.device)[:, None]).flatten()
    exact = reference.attention(*turned, before[2], ids_T, scale=case.scale)
    error = float((out[:, :1].float() - exact).abs().max())
    if not error < 0.05:
        sys.exit(f"document attention is wrong: its output is {error:.3f} off the fp32 oracle, 0.05 is allowed")
    return error


def _compile(heads: tuple[int, int, int], forward: Tiles | None, backward: BackwardTiles | None) -> None:
    """Runs the kernels once on a few slots, which leaves them in Triton's cache on disk."""
    case = make_case([[64]], heads)
    backend = DocumentAttention(forward, backward)
    try:
        _, saved = backend.forward(*case.inputs, case.layout, case.scale, rotation=case.rotation)
        if backward is not None:
            backend.backward(
                saved, case.d_out, *case.inputs, case.layout, case.scale, *case.gradients, rotation=case.rotation
            )
        torch.cuda.synchronize()
    except _triton_errors():
        pass  # the search meets it again and says so


def _triton_errors() -> type[BaseException]:
    from triton.runtime.errors import TritonError

    return TritonError


def search(case: Case) -> tuple[Tiles, BackwardTiles, list[dict]]:
    """The fastest of the candidates on these documents, and every time measured."""
    candidates = [(tiles, None) for tiles in FORWARD]
    candidates += [(FORWARD[0], BackwardTiles(queries, KEYS[0])) for queries in QUERIES]
    candidates += [(FORWARD[0], BackwardTiles(QUERIES[0], keys)) for keys in KEYS[1:]]
    with multiprocessing.get_context("spawn").Pool(min(len(candidates), os.cpu_count() or 1, 12)) as pool:
        pool.starmap(_compile, [(case.heads, *candidate) for candidate in candidates], chunksize=1)
    times = []

    def fastest(part: str, options: list, timed: Callable[[object], float]):
        measured = {}
        for option in options:
            try:
                measured[option] = timed(option)
            except _triton_errors() as error:
                print(f"{part:10} {option}: {str(error).splitlines()[0]}", flush=True)
                continue
            times.append({"part": part, "tiles": asdict(option), "ms": measured[option]})
            print(f"{part:10} {measured[option]:7.3f} ms  {option}", flush=True)
        return min(measured, key=measured.get)

    def backward_ms(tiles: BackwardTiles) -> float:
        return time_backend(DocumentAttention(FORWARD[0], tiles), case, rotates=True)[1]

    forward = fastest("forward", FORWARD, lambda t: time_backend_forward(DocumentAttention(t), case))
    queries = fastest("dq", [BackwardTiles(t, KEYS[0]) for t in QUERIES], backward_ms).queries
    # Candidates were compiled beside the first tiles of the other part; each part is a kernel of its own.
    both = [BackwardTiles(queries, t) for t in KEYS]
    return forward, fastest("backward", both, backward_ms), times


def time_backend_forward(backend: DocumentAttention, case: Case) -> float:
    return median_ms(lambda: backend.forward(*case.inputs, case.layout, case.scale, rotation=case.rotation))


def kernel_ms(case: Case, backend: DocumentAttention) -> list[tuple[str, float]]:
    """(kernel, ms) of one forward and backward in their order, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            _, saved = backend.forward(*case.inputs, case.layout, case.scale, rotation=case.rotation)
            backend.backward(
                saved, case.d_out, *case.inputs, case.layout, case.scale, *case.gradients, rotation=case.rotation
            )
        torch.cuda.synchronize()
    launches = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    launches.sort(key=lambda event: event.time_range.start)
    num_kernels = len(launches) // 10
    passes = [launches[start : start + num_kernels] for start in range(0, 10 * num_kernels, num_kernels)]
    return [
        (group[0].name, statistics.median(event.time_range.elapsed_us() for event in group) / 1000)
        for group in zip(*passes)
    ]


def backends_for(case: Case, tuned: DocumentAttention) -> list[tuple[str, Attention, bool]]:
    """(name, backend, whether it rotates)."""
    device, dtype, head_dim = case.qkv.device, case.qkv.dtype, case.heads[2]
    found = [("document", tuned, True), ("document, turned before", tuned, False)]
    names = [name for name in flash_attention.BACKENDS if name != "document"]
    found += [
        (name, load_backend(name), False)
        for name in names
        if flash_attention.why_not(name, dtype=dtype, device=device, head_dim=head_dim) is None
    ]
    if not case.layout.is_packed:
        found += [(name, load_backend(name), False) for name in ("cudnn", "sdpa")]
    return found


def copy_gb_per_s() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--heads", default="32,32,128", help="query heads, key heads, features of a head")
    parser.add_argument("--no-search", action="store_true", help="time the document kernels with their default tiles")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/attention.py needs a CUDA GPU; torch sees none here")
    heads = tuple(int(count) for count in arguments.heads.split(","))
    rows_of = workloads()
    case = make_case(rows_of["instructions"], heads)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "heads": heads,
        "slots": NUM_SLOTS,
        "copy_gb_per_s": copy_gb_per_s(),
        "error": check(case, DocumentAttention()),
    }
    moved = case.qkv.nbytes + case.d_out.nbytes
    floor_ms = [size / result["copy_gb_per_s"] / 1e6 for size in (moved, 2 * moved)]
    print(f"copy {result['copy_gb_per_s']:.0f} GB/s: forward cannot take less than {floor_ms[0]:.3f} ms, ", end="")
    print(f"backward than {floor_ms[1]:.3f} ms; error of the output {result['error']:.4f}", flush=True)
    tuned = DocumentAttention()
    if not arguments.no_search:
        forward, backward, result["search"] = search(case)
        print(f"fastest: forward {forward}\n         backward {backward}", flush=True)
        result["fastest"] = {"forward": asdict(forward), "backward": asdict(backward)}
        tuned = DocumentAttention(forward, backward)
    result["times"] = []
    print(f"\n{'documents':14}{'backend':26}{'forward':>9}{'backward':>10}{'with RoPE':>11}{'':4}ms", flush=True)
    for documents, rows in rows_of.items():
        case = make_case(rows, heads)
        rope_ms = sum(time_rope(case))
        for name, backend, rotates in backends_for(case, tuned):
            forward_ms, backward_ms = time_backend(backend, case, rotates=rotates)
            total_ms = forward_ms + backward_ms + (0 if rotates else rope_ms)
            times = {"forward_ms": forward_ms, "backward_ms": backward_ms, "with_rope_ms": total_ms}
            result["times"].append({"documents": documents, "backend": name, **times})
            print(f"{documents:14}{name:26}{forward_ms:9.3f}{backward_ms:10.3f}{total_ms:11.3f}", flush=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\nkernels on the instruction-like documents:")
    for name, ms in kernel_ms(make_case(rows_of["instructions"], heads), tuned):
        print(f"{ms:7.3f} ms  {name}", flush=True)


if __name__ == "__main__":
    main()
