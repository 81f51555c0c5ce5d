"""Memory that PyTorch's caching allocator reserves for a run of allocations, with expandable segments.

A pool is one growing range of addresses. A request takes the smallest free block that holds it, the lowest of equals,
and its rest stays free; the block at the range's mapped end counts as large as it can grow, so that it is taken last.
Neighbours that are free become one. The range is mapped in whole pages and never given back. Source: PyTorch's
c10/cuda/CUDACachingAllocator.cpp (v2.11), one stream, no limit on splitting.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable

_ROUNDING = 512
_SMALL = 2**20
_PAGE_SMALL, _PAGE_LARGE = 2 * 2**20, 20 * 2**20


class ReservedMemory:
    """Follows allocations and their ends; `reserved` and `allocated` are bytes, now, `peak_allocated` the most."""

    def __init__(self) -> None:
        self._pools = _Pool(_PAGE_SMALL), _Pool(_PAGE_LARGE)
        self._blocks: dict[Hashable, tuple[_Pool, int, int]] = {}
        self.allocated = self.peak_allocated = 0

    @property
    def reserved(self) -> int:
        return sum(pool.mapped for pool in self._pools)

    def allocate(self, name: Hashable, num_bytes: int) -> None:
        size = -(-num_bytes // _ROUNDING) * _ROUNDING
        pool = self._pools[size > _SMALL]
        self._blocks[name] = pool, pool.take(size), size
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, name: Hashable) -> None:
        pool, start, size = self._blocks.pop(name)
        pool.give(start, size)
        self.allocated -= size

    def replay(self, events: Iterable[tuple]) -> None:
        """events: (name, bytes, ...), bytes negative for an end."""
        for name, num_bytes, *_ in events:
            if num_bytes > 0:
                self.allocate(name, num_bytes)
            else:
                self.free(name)


class _Pool:
    def __init__(self, page: int) -> None:
        self._page, self.mapped = page, 0
        self._by_size: list[tuple[int, int]] = []  # (size, start) of free blocks
        self._by_start: dict[int, int] = {}  # start -> size
        self._by_end: dict[int, int] = {}  # end -> start

    def take(self, size: int) -> int:
        tail = self._by_end.get(self.mapped)
        place = bisect_left(self._by_size, (size, -1))
        if place < len(self._by_size) and self._by_size[place][1] == tail:
            place += 1
        if place < len(self._by_size):
            found, start = self._by_size[place]
            self._remove(start)
            self._put(start + size, found - size)
            return start
        # Only the tail is left, or the range's end that is yet to be mapped.
        start, free = (self.mapped, 0) if tail is None else (tail, self.mapped - tail)
        if tail is not None:
            self._remove(tail)
        if size > free:
            self.mapped += -(-(size - free) // self._page) * self._page
        self._put(start + size, self.mapped - start - size)
        return start

    def give(self, start: int, size: int) -> None:
        if (before := self._by_end.get(start)) is not None:
            size += self._remove(before)
            start = before
        if (after := start + size) in self._by_start:
            size += self._remove(after)
        self._put(start, size)

    def _put(self, start: int, size: int) -> None:
        if size:
            insort(self._by_size, (size, start))
            self._by_start[start] = size
            self._by_end[start + size] = start

    def _remove(self, start: int) -> int:
        size = self._by_start.pop(start)
        del self._by_end[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size
