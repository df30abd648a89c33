"""The raylet's line splitter."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.worker.output import LINE_LIMIT, flush, split

MARK = b"\0hpcray:"


def lines_of(chunks: list[bytes]) -> list[tuple[str, bytes]]:
    buffer, name = bytearray(), "start"
    lines: list[tuple[str, bytes]] = []
    for chunk in chunks:
        more, name = split(buffer, chunk, name)
        lines += more
    return lines + flush(buffer, name)


def test_lines_belong_to_the_last_announced_name() -> None:
    text = b"a\n" + MARK + b"f\nb\n\nc\n" + MARK + b"g\nd\n"
    assert lines_of([text]) == [("start", b"a"), ("f", b"b"), ("f", b""), ("f", b"c"), ("g", b"d")]


def test_an_unfinished_line_ends_at_the_next_announcement() -> None:
    assert lines_of([b"no newline" + MARK + b"f\nb"]) == [("start", b"no newline"), ("f", b"b")]


def test_a_partial_line_waits_for_its_end() -> None:
    buffer = bytearray()
    assert split(buffer, b"par", "f") == ([], "f")
    assert split(buffer, b"tial\n", "f") == ([("f", b"partial")], "f")
    assert not buffer


def test_flush_of_nothing_is_nothing() -> None:
    assert flush(bytearray(), "f") == []


def test_a_nul_of_the_task_is_text() -> None:
    assert lines_of([b"a\0b\n"]) == [("start", b"a\0b")]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_long_line_comes_in_pieces(end: bytes) -> None:
    pieces = lines_of([b"x" * 1000] * 200 + [end])
    assert b"".join(piece for _, piece in pieces) == b"x" * 200_000
    assert max(len(piece) for _, piece in pieces) == LINE_LIMIT


def test_a_flood_without_newline_does_not_pile_up() -> None:
    buffer = bytearray()
    for _ in range(100):
        split(buffer, b"x" * LINE_LIMIT, "f")
    assert len(buffer) < 2 * LINE_LIMIT


@given(
    before=st.integers(LINE_LIMIT - 20, LINE_LIMIT + 20),
    cuts=st.lists(st.integers(LINE_LIMIT - 30, LINE_LIMIT + 40), max_size=4),
)
def test_a_mark_near_the_limit_is_seen_however_it_is_cut(before: int, cuts: list[int]) -> None:
    text = b"x" * before + MARK + b"f\nline\n"
    bounds = [0, *sorted(cuts), len(text)]
    lines = lines_of([text[a:b] for a, b in pairwise(bounds)])
    assert lines[-1] == ("f", b"line")
    assert b"".join(line for name, line in lines if name == "start") == b"x" * before


@given(
    lines=st.lists(
        st.tuples(st.sampled_from("fgh"), st.binary(max_size=20).filter(lambda b: b"\n" not in b and MARK not in b))
    ),
    size=st.integers(1, 9),
)
def test_chunks_do_not_matter(lines: list[tuple[str, bytes]], size: int) -> None:
    text = b"".join(MARK + name.encode() + b"\n" + line + b"\n" for name, line in lines)
    assert lines_of([text[at : at + size] for at in range(0, len(text), size)]) == lines
