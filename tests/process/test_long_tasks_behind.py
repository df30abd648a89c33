"""Short tasks that turn out to be long: nobody waits behind one while another worker is idle, and each runs once."""

import time
from collections import Counter

import pytest

pytestmark = [
    pytest.mark.usefixtures("ray_start"),
    pytest.mark.beyond_ray("Ray does not take tasks back from a worker, since it sends none ahead"),
]


@pytest.fixture
def work(hpcray, tmp_path):
    """A task that notes its number and takes so long, and ``work.ran()``: how often each number was noted."""
    notes = tmp_path / "notes"
    notes.touch()

    @hpcray.remote
    def work(number, seconds=0.0):
        with notes.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(seconds)

    work.ran = lambda: Counter(map(int, notes.read_text().split()))
    return work


def test_tasks_behind_a_long_one_run_on_the_idle_worker(hpcray, work):
    hpcray.get([work.remote(number) for number in range(300)])
    start = time.monotonic()
    long, *short = [work.remote(number, 0.0 if number > 300 else 1.0) for number in range(300, 340)]
    hpcray.get(short)
    assert time.monotonic() - start < 0.5
    hpcray.get(long)
    assert work.ran() == Counter(range(340))


def test_long_tasks_among_short_ones_take_as_long_as_they_must(hpcray, work):
    hpcray.get([work.remote(number) for number in range(50)])
    start = time.monotonic()
    hpcray.get([work.remote(number, 0.5 if number % 10 == 5 else 0.0) for number in range(50, 130)])
    # Eight of half a second on two workers.
    assert 2.0 <= time.monotonic() - start < 2.0 + 0.7
    assert work.ran() == Counter(range(130))
