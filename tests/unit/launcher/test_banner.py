from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.launcher.banner import BannerFilter

RULE = b"-" * 74 + b"\n"
BANNER = (
    RULE
    + b"prterun detected that one or more processes exited with non-zero status,\n"
    + b"thus causing the job to be terminated. The first process to do so was:\n\n"
    + b"   Process name: [prterun-vm-5788@1,1]\n   Exit code:    3\n"
    + RULE
)
BANNER_4 = (
    RULE
    + b"mpirun detected that one or more processes exited with non-zero status, thus causing\n"
    + b"the job to be terminated. The first process to do so was:\n\n"
    + b"  Process name: [[24862,1],0]\n  Exit code:    3\n"
    + RULE
)
KILLED = RULE + b"prterun noticed that process rank 1 with PID 1 on node vm exited on\nsignal 9 (Killed).\n" + RULE


def shown(*pieces):
    one = BannerFilter()
    return b"".join([one.feed(piece) for piece in pieces] + [one.flush()])


@pytest.mark.parametrize("banner", [BANNER, BANNER_4])
def test_the_banner_is_dropped(banner):
    assert shown(b"Traceback\nValueError: x\n" + banner + b"more\n") == b"Traceback\nValueError: x\nmore\n"


@given(st.lists(st.integers(0, 500), max_size=8))
def test_the_banner_is_dropped_however_it_is_cut(cuts):
    whole = b"before\n" + BANNER + b"between" + b"\n" + KILLED + BANNER + b"after"
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    pieces = [whole[a:b] for a, b in pairwise(edges)]
    assert shown(*pieces) == b"before\nbetween\n" + KILLED + b"after"


@given(st.lists(st.sampled_from([b"-", b"\n", b"x", b"-" * 60, RULE, b"Exit code:", b"\r\n"]), max_size=30))
def test_everything_else_passes_unchanged(pieces):
    assert shown(*pieces) == b"".join(pieces)


@pytest.mark.parametrize("text", [KILLED, RULE + b"\n" * 20 + RULE, RULE * 3, BANNER[:-10], BANNER[75:]])
def test_what_only_looks_like_the_banner_passes(text):
    assert shown(text) == text


def test_unfinished_lines_are_shown_at_once():
    one = BannerFilter()
    assert one.feed(b"50 %") == b"50 %"
    assert one.feed(b"\r60 %") == b"\r60 %"
    assert one.feed(b"name? -") == b"name? -"
    assert not one.holds


def test_what_may_be_the_banner_is_held_and_flush_gives_it():
    one = BannerFilter()
    assert one.feed(b"x\n---") == b"x\n"
    assert one.holds
    assert one.flush() == b"---"
    assert not one.holds
    assert one.feed(RULE[3:]) == RULE[3:]
