"""Share one array: it is put once, and each task averages a block of its rows without copying it."""

import numpy as np

import hpcray

SIDE = 1_000
TASKS = 4


@hpcray.remote
def mean_of_rows(array: np.ndarray, start: int, stop: int) -> tuple[float, bool]:
    """Average rows `start` to `stop`; also say whether they are a read-only view of shared memory."""
    rows = array[start:stop]
    is_view = not rows.flags.owndata and not rows.flags.writeable
    return float(rows.mean()), is_view


def main() -> None:
    hpcray.init()
    array = np.random.default_rng(seed=7).normal(loc=5.0, size=(SIDE, SIDE))
    shared = hpcray.put(array)

    starts = range(0, SIDE, SIDE // TASKS)
    results = hpcray.get([mean_of_rows.remote(shared, start, start + SIDE // TASKS) for start in starts])

    for start, (mean, is_view) in zip(starts, results, strict=True):
        print(f"rows from {start:3}: mean {mean:.6f}, {'zero-copy' if is_view else 'copied'}")

    # The blocks are of one size, so the mean of their means is the mean of all.
    total = sum(mean for mean, _ in results) / TASKS
    equal = bool(np.isclose(total, array.mean(), rtol=1e-12))
    zero_copy = all(is_view for _, is_view in results)
    print(f"whole array:   mean {total:.6f}")
    print(f"equal to numpy's mean in the driver: {'yes' if equal else 'no'}")
    if not (equal and zero_copy):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
