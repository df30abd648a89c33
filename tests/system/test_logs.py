"""What workers print: at the driver under their names, in order, or in files."""

import re

import pytest

TALK = """
import sys
import hpcray

@hpcray.remote
class Talker:
    def talk(self, name, lines):
        for i in range(lines):
            print(f"{name} out {i:05}")
            print(f"{name} err {i:05}", file=sys.stderr)
        return lines

hpcray.init()
talkers = [Talker.remote() for _ in range(2)]
print("said", sum(hpcray.get([t.talk.remote(n, 500) for t, n in zip(talkers, "ab")])), flush=True)
"""


def lines_of(name, stream, text):
    pattern = rf"^\(Talker(?:\.talk)? pid=\d+, host=\S+\) {name} {stream} (\d+)$"
    return [int(number) for number in re.findall(pattern, text, re.MULTILINE)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_lines_of_workers_reach_the_driver_whole_and_in_order(mpi, starter, ranks):
    script = starter.write(TALK)
    argv = [mpi.python, "-m", "hpcray", "run", "-n", str(ranks), "--num-cpus", "2", "--log-dir", "logs", script]
    finished = starter.run(argv, python=mpi.python, env={"HPCRAY_DEDUP_LOGS": "0"})
    assert finished.code == 0, str(finished)
    for name in "ab":
        assert lines_of(name, "out", finished.out) == list(range(500))
        assert lines_of(name, "err", finished.err) == list(range(500))
    files = sorted((starter.folder / "logs").iterdir())
    assert len(files) == ranks
    assert all(re.fullmatch(rf".+-rank{rank}\.log", path.name) for rank, path in enumerate(files))
    kept = "".join(path.read_text() for path in files)
    for name in "ab":
        for stream in ("out", "err"):
            found = re.findall(rf"^{stream} \(Talker(?:\.talk)? pid=\d+\) {name} {stream} (\d+)$", kept, re.MULTILINE)
            assert list(map(int, found)) == list(range(500))


def test_the_driver_may_be_left_in_peace(mpi, starter):
    script = starter.write(TALK)
    argv = [mpi.python, "-m", "hpcray", "run", "-n", "2", "--no-log-to-driver", "--log-dir", "logs", script]
    finished = starter.run(argv, python=mpi.python)
    assert (finished.code, finished.out) == (0, "said 1000\n"), str(finished)
    assert "Talker" not in finished.err
    assert sum(path.read_text().count(" out 0") for path in (starter.folder / "logs").iterdir()) == 1000
