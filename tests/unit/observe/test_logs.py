"""Workers' lines at the driver: what is folded and what is not."""

import pytest

from hpcray.observe.logs import WINDOW, LogFolder
from hpcray.protocol.messages import LogLines


def lines(*texts, pid=1, name="f", is_error=False):
    return LogLines(b"job", name, pid, "node", is_error, list(texts))


@pytest.fixture
def folder():
    return LogFolder(folds=True)


def texts(printed):
    return [text.split(") ", 1)[-1] for _, text in printed]


def test_a_line_has_the_name_the_process_and_the_host_and_keeps_its_stream(folder):
    assert folder.feed(lines("hello", is_error=True), 0) == [(True, "(f pid=1, host=node) hello")]


def test_words_of_hpcray_itself_are_never_folded(folder):
    printed = folder.feed(lines("wait", "wait", name=""), 0)
    assert printed == [(False, "hpcray: wait")] * 2


def test_identical_lines_of_one_worker_are_counted(folder):
    assert texts(folder.feed(lines(*["again"] * 5), 0)) == ["again"]
    assert texts(folder.flush(WINDOW))[0].startswith("again [repeated 4x across cluster]")


def test_lines_of_one_worker_that_differ_in_numbers_are_all_shown_in_order(folder):
    counted = [f"epoch {number}" for number in range(5)]
    assert texts(folder.feed(lines(*counted, *counted), 0)) == [*counted, *counted]


def test_a_run_of_identical_lines_is_told_before_the_line_that_ends_it(folder):
    printed = texts(folder.feed(lines("at 1", "at 1", "at 1", "at 2"), 0))
    assert printed[0] == "at 1"
    assert printed[1].startswith("at 1 [repeated 2x across cluster]")
    assert printed[2:] == ["at 2"]


def test_lines_of_different_workers_that_differ_in_numbers_are_folded(folder):
    assert texts(folder.feed(lines("epoch 1", pid=1), 0)) == ["epoch 1"]
    for pid in range(2, 6):
        assert folder.feed(lines(f"epoch {pid}", pid=pid), 1) == []
    (told,) = folder.flush(float("inf"))
    assert told[1].startswith("(f pid=5, host=node) epoch 5 [repeated 4x across cluster]")


def test_a_single_repetition_is_shown_as_it_was(folder):
    folder.feed(lines("once more", pid=1), 0)
    folder.feed(lines("once more", pid=2), 0)
    assert list(folder.flush(float("inf"))) == [(False, "(f pid=2, host=node) once more")]


def test_the_hint_how_to_see_every_line_comes_once(folder):
    for text in ("a", "b"):
        folder.feed(lines(*[text] * 3), 0)
    assert sum("HPCRAY_DEDUP_LOGS" in text for _, text in folder.flush(float("inf"))) == 1


def test_after_the_window_a_line_is_shown_again(folder):
    folder.feed(lines("again"), 0)
    assert texts(folder.feed(lines("again"), WINDOW)) == ["again"]


def test_lines_of_numbers_alone_are_never_folded(folder):
    assert texts(folder.feed(lines("1", "1", "2"), 0)) == ["1", "1", "2"]


def test_without_folding_every_line_is_shown():
    assert len(LogFolder(folds=False).feed(lines("a", "a"), 0)) == 2
