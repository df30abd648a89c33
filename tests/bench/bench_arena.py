"""Figures of the arena and its allocator, as JSON: ``python tests/bench/bench_arena.py [--megabytes 800]``.

Copies are in GB/s with their ratio to the yardstick: a copy between two warm numpy arrays of the same size,
taken in the same run. Each is the best of `--repeat`. Needs three times `--megabytes` of free memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from hpcray.store.allocator import Allocator
from hpcray.store.arena import CONTROL_PAGE, PREFAULT_STEP, Arena

Bytes = npt.NDArray[np.uint8]


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@contextmanager
def new_arena(size: int, *, touched: bool) -> Iterator[Arena]:
    arena = Arena.create(size)
    if touched:
        while arena.prefault_step():
            pass
    yield arena
    arena.close()


def copy(arena: Arena, source: Bytes) -> None:
    np.copyto(np.frombuffer(arena.view(CONTROL_PAGE, source.nbytes), np.uint8), source)


def copy_by_slice(arena: Arena, source: Bytes) -> None:
    arena.view(CONTROL_PAGE, source.nbytes)[:] = source.data


def copy_by_pwrite(arena: Arena, source: Bytes) -> None:
    done = 0
    while done < source.nbytes:
        done += os.pwrite(arena.fd, source.data[done:], CONTROL_PAGE + done)


def warm_and_copy(arena: Arena, source: Bytes) -> None:
    arena.warm(CONTROL_PAGE, source.nbytes)
    copy(arena, source)


def write(arena: Arena, source: Bytes) -> None:
    arena.write(CONTROL_PAGE, [source.data])


def measure_copies(size: int, repeat: int) -> dict[str, dict[str, float]]:
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    best: dict[str, float] = {}

    def take(name: str, action: Callable[[], object]) -> None:
        best[name] = min(best.get(name, float("inf")), seconds(action))

    def copy_between_arrays_by_slice() -> None:
        target.data[:] = source.data

    for _ in range(repeat):
        take("memcpy", lambda: np.copyto(target, source))
        take("memcpy, by slice assignment", copy_between_arrays_by_slice)
        for name, action in (
            ("never touched", copy),
            ("never touched, warmed before", warm_and_copy),
            ("never touched, by pwrite", copy_by_pwrite),
            ("never touched, by Arena.write", write),
        ):
            with new_arena(size, touched=False) as arena:
                take(name, lambda arena=arena, action=action: action(arena, source))  # type: ignore[misc]
        with new_arena(size, touched=True) as arena:
            for name, action in (
                ("new mapping", copy),
                ("new mapping, warmed before", warm_and_copy),
                ("new mapping, by Arena.write", write),
            ):
                peer = Arena.attach(os.dup(arena.fd), size=arena.size)
                take(name, lambda peer=peer, action=action: action(peer, source))  # type: ignore[misc]
                peer.close()
            arena.warm(CONTROL_PAGE, size)
            take("warm mapping", lambda arena=arena: copy(arena, source))  # type: ignore[misc]
            take("warm mapping, by Arena.write", lambda arena=arena: write(arena, source))  # type: ignore[misc]
            take("warm mapping, by slice assignment", lambda arena=arena: copy_by_slice(arena, source))  # type: ignore[misc]
    return {
        name: {"GB/s": round(size / taken / 1e9, 2), "of memcpy": round(best["memcpy"] / taken, 3)}
        for name, taken in best.items()
    }


def measure_prefault(size: int) -> dict[str, float]:
    with new_arena(size, touched=False) as arena:
        steps = [seconds(arena.prefault_step) for _ in range(size // PREFAULT_STEP)]
    return {
        "step bytes": PREFAULT_STEP,
        "step ms, median": round(statistics.median(steps) * 1e3, 2),
        "step ms, 99 %": round(statistics.quantiles(steps, n=100)[98] * 1e3, 2),
        "GB/s": round(len(steps) * PREFAULT_STEP / sum(steps) / 1e9, 2),
    }


def measure_pins(count: int) -> dict[str, float]:
    def released() -> None: ...

    def pin_and_release(sizes: list[int]) -> float:
        start = time.perf_counter()
        for n in sizes:
            arena.pinned_view(CONTROL_PAGE, n, released)
        return round((time.perf_counter() - start) / len(sizes) * 1e6, 2)

    with new_arena(1 << 30, touched=False) as arena:
        return {
            "one size, us": pin_and_release([200_000] * count),
            "all sizes different, us": pin_and_release(list(range(200_000, 200_000 + count))),
        }


def measure_allocator(operations: int, live: int, seed: int) -> dict[str, float]:
    """Free a random block and allocate another, `live` blocks at a time, sizes from 100 KiB to 4 MiB."""
    choose = random.Random(seed)
    sizes = [int(100 * 1024 * 40 ** choose.random()) for _ in range(operations)]
    victims = [choose.randrange(live) for _ in range(operations)]
    allocator = Allocator(CONTROL_PAGE, live << 22)
    offsets = [allocator.allocate(choose.choice(sizes)) for _ in range(live)]
    slowest = 0.0
    start = time.perf_counter()
    for n, victim in zip(sizes, victims, strict=True):
        before = time.perf_counter()
        offset = offsets[victim]
        assert offset is not None
        allocator.free(offset)
        offsets[victim] = allocator.allocate(n)
        slowest = max(slowest, time.perf_counter() - before)
    taken = time.perf_counter() - start
    allocator.check()
    return {
        "live blocks": live,
        "free blocks": len(allocator._by_size),
        "allocate or free per second": round(2 * operations / taken),
        "slowest pair, us": round(slowest * 1e6, 1),
    }


def measure_fragmentation(rounds: int, seed: int) -> dict[str, float]:
    """Keep a 16 GiB arena as full as it gets: each failure frees random blocks until the request fits."""
    choose = random.Random(seed)
    size = 16 << 30
    allocator = Allocator(CONTROL_PAGE, size)
    offsets: list[tuple[int, int]] = []
    full: list[float] = []
    in_one_piece: list[float] = []
    asked = 0
    for _ in range(rounds):
        n = int(100 * 1024 * 640 ** choose.random())  # 100 KiB to 64 MiB, all magnitudes alike
        asked += n
        failed = False
        while (offset := allocator.allocate(n)) is None:
            if not failed:
                full.append(allocator.used / size)
                in_one_piece.append(allocator.largest_free / allocator.available)
            failed = True
            index = choose.randrange(len(offsets))
            offsets[index], offsets[-1] = offsets[-1], offsets[index]
            allocator.free(offsets.pop()[0])
        offsets.append((offset, n))
    allocator.check()
    late, late_in_one_piece = full[len(full) // 2 :], in_one_piece[len(full) // 2 :]
    return {
        "used when a request fails, mean": round(statistics.mean(late), 3),
        "used when a request fails, least": round(min(late), 3),
        "largest free block, of all free bytes, then": round(statistics.mean(late_in_one_piece), 3),
        "lost to rounding, of used bytes": round(1 - sum(n for _, n in offsets) / allocator.used, 5),
        "free blocks": len(allocator._by_size),
        "live blocks": len(offsets),
        "bytes asked for, of the arena": round(asked / size, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    size = options.megabytes * 1_000_000
    figures = {
        "copies": measure_copies(size, options.repeat),
        "prefault": measure_prefault(size),
        "pinned_view and its release": measure_pins(20_000),
        "allocator": measure_allocator(100_000, 10_000, options.seed),
        "fragmentation": measure_fragmentation(50_000, options.seed),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
