"""An actor keeps state: tasks anywhere in the job add to one counter, and it remembers who did."""

from collections import Counter

import hpcray

TASKS = 4
ADDITIONS_PER_TASK = 25


@hpcray.remote
class CounterWithHistory:
    def __init__(self, start: int = 0) -> None:
        self.value = start
        self.history: list[tuple[str, int]] = []

    def add(self, who: str, amount: int = 1) -> int:
        self.value += amount
        self.history.append((who, self.value))
        return self.value

    def read(self) -> tuple[int, list[tuple[str, int]]]:
        return self.value, self.history


@hpcray.remote
def add_many(counter, who: str, times: int) -> list[int]:
    """Add 1 `times` times through the handle and return the values seen, in the order of the calls."""
    return hpcray.get([counter.add.remote(who) for _ in range(times)])


def main() -> None:
    hpcray.init()
    counter = CounterWithHistory.remote(start=100)
    tasks = [add_many.remote(counter, f"task {number}", ADDITIONS_PER_TASK) for number in range(TASKS)]
    seen = hpcray.get(tasks)
    value, history = hpcray.get(counter.read.remote())

    print(f"the counter went from 100 to {value}")
    for who, additions in sorted(Counter(who for who, _ in history).items()):
        print(f"  {who} added {additions} times")

    calls_ran_in_order = all(values == sorted(values) for values in seen)
    none_lost = [total for _, total in history] == list(range(101, 101 + TASKS * ADDITIONS_PER_TASK))
    print(f"each task's calls ran in order: {'yes' if calls_ran_in_order else 'no'}")
    print(f"no addition lost or doubled: {'yes' if none_lost else 'no'}")
    if not (calls_ran_in_order and none_lost):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
