"""Sort more numbers than fit into the object store: an external shuffle over tasks. What does not fit waits on disk.

hpcray run --object-store-memory 64MB shuffle.py                        # four times as much data as memory for it
hpcray run -n 4 --object-store-memory 1GB --spill-dir /scratch shuffle.py --megabytes 16000
"""

import argparse

import numpy as np

import hpcray

MEGABYTE = 1_000_000
PIECE = MEGABYTE // 4  # what one block has for one range: large enough for the arena, small enough to fuse on disk


@hpcray.remote
def make_block(seed: int, numbers: int, ranges: int) -> list[np.ndarray]:
    """Random numbers, split by the range they fall in; then their checksum."""
    block = np.random.default_rng(seed).integers(0, 1 << 63, numbers, dtype=np.uint64)
    owner = (block.astype(np.float64) * (ranges / (1 << 63))).astype(np.int64)
    return [*(block[owner == which] for which in range(ranges)), block.sum()]


@hpcray.remote
def sort_range(*pieces: np.ndarray) -> np.ndarray:
    return np.sort(np.concatenate(pieces))


@hpcray.remote
def inspect(numbers: np.ndarray) -> tuple[bool, int, int, int, int]:
    """Whether they are sorted, and the least, the greatest, how many and the checksum."""
    is_sorted = bool((numbers[:-1] <= numbers[1:]).all())
    return is_sorted, int(numbers[0]), int(numbers[-1]), len(numbers), int(numbers.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="of numbers to sort (default: 256)")
    megabytes = parser.parse_args().megabytes
    hpcray.init()

    # As many blocks as ranges, each piece of a block for a range a quarter of a megabyte.
    count = max(2, round((megabytes * MEGABYTE / PIECE) ** 0.5))
    numbers = megabytes * MEGABYTE // 8 // count
    make = make_block.options(num_returns=count + 1)
    blocks = [make.remote(seed, numbers, count) for seed in range(count)]
    sums = [block.pop() for block in blocks]
    results = [sort_range.remote(*pieces) for pieces in zip(*blocks, strict=True)]
    del blocks  # from here on, each piece goes with the task that needs it
    checks = hpcray.get([inspect.remote(result) for result in results])

    expected = sum(map(int, hpcray.get(sums))) % (1 << 64)
    found = sum(check[4] for check in checks) % (1 << 64)
    borders = [border for _, least, greatest, *_ in checks for border in (least, greatest)]
    is_sorted = all(check[0] for check in checks) and borders == sorted(borders)
    is_whole = found == expected and sum(check[3] for check in checks) == numbers * count
    print(f"{numbers * count:,} numbers, {megabytes} MB, in {count} ranges of about {megabytes / count:.1f} MB each")
    print(f"sorted: {'yes' if is_sorted else 'no'}; checksum {found:016x}: {'as before' if is_whole else 'WRONG'}")
    if not (is_sorted and is_whole):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
