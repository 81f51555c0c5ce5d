"""What ran and for whom, read from a trace of torch.profiler: each kernel with the ranges that its launch lies in.

On a GPU the work is its kernels and copies. On a CPU it is the time that an operator spends in itself, not in another
operator that it calls; an autograd function written in Python is no operator, so its own time counts as idle.
Times are in microseconds, on the trace's clock.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_GPU_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_RANGES = {"cpu_op", "user_annotation"}
_NODE = "autograd::engine::evaluate_function: "


@dataclass(eq=False)
class Range:
    """A stretch of one host thread: an operator, or a label given with `record_function`."""

    name: str
    is_label: bool
    thread: Any
    start: float
    end: float
    args: dict[str, Any]
    parent: Range | None = None

    def chain(self) -> Iterator[Range]:
        """This range and those around it, inside out."""
        one: Range | None = self
        while one is not None:
            yield one
            one = one.parent

    @property
    def is_backward_node(self) -> bool:
        """Whether this is the autograd engine at work on one node of the graph."""
        return self.name.startswith(_NODE)

    @property
    def is_operator(self) -> bool:
        return not self.is_label and "::" in self.name and not self.name.startswith(("autograd::", "torch::autograd"))


@dataclass(frozen=True, eq=False)
class Work:
    """A kernel or copy on a GPU, or a stretch of an operator's own time on a CPU. by: the innermost range around it."""

    name: str
    start: float
    end: float
    by: Range | None


@dataclass
class Trace:
    """is_gpu: whether `work` is a GPU's."""

    is_gpu: bool
    work: list[Work]
    ranges: list[Range]
    _forward: dict[int, Range] = field(repr=False)
    _main_thread: Any = None

    def made_by(self, node: Range) -> Range | None:
        """What ran in the forward pass and made this node of the graph; None where that was inside backward."""
        if node.args.get("Fwd thread id") != self._main_thread:
            return None  # its number is another thread's
        return self._forward.get(node.args.get("Sequence number"))


def read_trace(path: Path) -> Trace:
    """The work in a Chrome trace that torch.profiler exported."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return trace_of([event for event in events if event.get("ph") == "X"])


def trace_of(events: list[dict[str, Any]]) -> Trace:
    """The same from the trace's complete events (`"ph": "X"`)."""
    ranges = [_range(event) for event in events if event.get("cat") in _RANGES]
    by_thread: dict[Any, list[Range]] = defaultdict(list)
    for one in ranges:
        by_thread[one.thread].append(one)
    for thread in by_thread.values():
        thread.sort(key=lambda one: (one.start, -one.end))
        _nest(thread)
    gpu_events = [event for event in events if event.get("cat") in _GPU_WORK]
    work = _gpu_work(gpu_events, events, ranges, by_thread) if gpu_events else _cpu_work(by_thread)
    return Trace(bool(gpu_events), work, ranges, _forward_ranges(ranges), _main_thread(ranges))


def _range(event: dict[str, Any]) -> Range:
    start = float(event["ts"])
    return Range(
        name=event["name"],
        is_label=event["cat"] == "user_annotation",
        thread=(event.get("pid"), event.get("tid")),
        start=start,
        end=start + float(event.get("dur", 0.0)),
        args=event.get("args", {}),
    )


def _nest(thread: list[Range]) -> None:
    stack: list[Range] = []
    for one in thread:
        while stack and stack[-1].end <= one.start:
            stack.pop()
        one.parent = stack[-1] if stack else None
        stack.append(one)


def _gpu_work(
    gpu_events: list[dict], events: list[dict], ranges: list[Range], by_thread: dict[Any, list[Range]]
) -> list[Work]:
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    starts = {thread: [one.start for one in found] for thread, found in by_thread.items()}
    by_external_id = {one.args["External id"]: one for one in ranges if "External id" in one.args}
    work = []
    for event in gpu_events:
        args = event.get("args", {})
        by = None
        launch = launches.get(args.get("correlation"))
        if launch is not None:
            thread = (launch.get("pid"), launch.get("tid"))
            by = _innermost(by_thread.get(thread, []), starts.get(thread, []), float(launch["ts"]))
        # The operator that the profiler names is right even where the clocks of host and driver differ by a little; but
        # of labels it knows nothing, and a launch may lie in one within that operator.
        operator = by_external_id.get(args.get("External id"))
        if operator is not None and (by is None or operator not in by.chain()):
            by = operator
        start = float(event["ts"])
        work.append(Work(event["name"], start, start + float(event.get("dur", 0.0)), by))
    return work


def _innermost(thread: list[Range], starts: list[float], at: float) -> Range | None:
    """The range begun last before `at`, or the nearest around it that has not ended by then."""
    index = bisect_right(starts, at) - 1
    if index < 0:
        return None
    return next((one for one in thread[index].chain() if one.end > at), None)


def _cpu_work(by_thread: dict[Any, list[Range]]) -> list[Work]:
    """Every stretch in which the innermost range is an operator."""
    work = []
    for thread in by_thread.values():
        stack: list[Range] = []
        reached = 0.0

        def spend(until: float, stack: list[Range] = stack) -> None:
            nonlocal reached
            if stack and stack[-1].is_operator and until > reached:
                work.append(Work(stack[-1].name, reached, until, stack[-1]))
            reached = max(reached, until)

        for one in [*thread, None]:
            while stack and (one is None or stack[-1].end <= one.start):
                spend(stack[-1].end)
                stack.pop()
            if one is not None:
                spend(one.start)
                reached = one.start
                stack.append(one)
    return work


def _forward_ranges(ranges: list[Range]) -> dict[int, Range]:
    """Of a node's operators, which share its sequence number, the last to begin outside backward made the node."""
    made: dict[int, Range] = {}
    for one in ranges:
        number = one.args.get("Sequence number")
        if number is None or one.args.get("Fwd thread id", 0) or any(r.is_backward_node for r in one.chain()):
            continue
        if number not in made or made[number].start <= one.start:
            made[number] = one
    return made


def _main_thread(ranges: list[Range]) -> Any:
    """The number that the engine has for the thread of the forward pass, on whose graph it sets out."""
    for one in ranges:
        if one.is_backward_node and "Sequence number" in one.args:
            outer = one.parent.chain() if one.parent else ()
            if not any(r.is_backward_node for r in outer):
                return one.args.get("Fwd thread id")
    return None


def exclusive_ms(work: list[Work]) -> list[float]:
    """Milliseconds of each piece in which no earlier-begun piece runs as well: they add up to the busy time."""
    found = [0.0] * len(work)
    reached = float("-inf")
    for index in sorted(range(len(work)), key=lambda index: (work[index].start, work[index].end)):
        found[index] = max(0.0, work[index].end - max(work[index].start, reached)) / 1e3
        reached = max(reached, work[index].end)
    return found
