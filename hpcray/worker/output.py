"""A worker's stdout and stderr, and whose line is whose.

A worker writes to two pipes that its raylet reads. Before a task runs, the worker writes a marker to both: a
NUL, a word and the task's name. What follows, from Python or from a C library, belongs to that name.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys

LINE_LIMIT = 64 * 1024  # bytes; a longer line is passed on in pieces
NAME_LIMIT = 1024  # bytes; with the marker well below PIPE_BUF, so that a marker is written whole

_MARK = b"\0hpcray:"


def install() -> None:
    """Make `sys.stdout` and `sys.stderr` line-buffered UTF-8 streams on descriptors 1 and 2."""
    sys.stdout = sys.__stdout__ = _line_buffered(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _line_buffered(2)  # type: ignore[misc]


def announce(name: str) -> None:
    """From here on, what is written to descriptors 1 and 2 belongs to `name`. Blocks while a pipe is full."""
    marker = _MARK + name.encode(errors="replace").replace(b"\n", b" ")[:NAME_LIMIT] + b"\n"
    for stream, fd in ((sys.__stdout__, 1), (sys.__stderr__, 2)):
        with contextlib.suppress(BrokenPipeError):  # the raylet is gone, and the worker about to notice
            if stream is not None:
                stream.flush()
            os.write(fd, marker)


def split(buffer: bytearray, chunk: bytes, name: str) -> tuple[list[tuple[str, bytes]], str]:
    """Cut what a worker wrote into lines. Pure but for `buffer`.

    Args:
        buffer: What is left of earlier chunks; an incomplete line stays in it.
        chunk: What was just read.
        name: Whom the bytes in `buffer` belong to.

    Returns:
        ``(lines, name)``: pairs of a name and a line without its newline, and the name for the next call.
        Lines over `LINE_LIMIT` come in pieces.
    """
    buffer += chunk
    lines: list[tuple[str, bytes]] = []
    start = 0
    while (end := buffer.find(b"\n", start)) >= 0:
        text, mark, announced = bytes(buffer[start:end]).partition(_MARK)
        if text or not mark:
            lines += ((name, piece) for piece in _pieces(text))
        if mark:
            name = announced.decode(errors="replace")
        start = end + 1
    del buffer[:start]
    # A marker may follow an unfinished line: enough bytes stay to see it whole.
    while len(buffer) >= LINE_LIMIT + len(_MARK):
        mark_at = buffer.find(_MARK, 0, LINE_LIMIT + len(_MARK))
        if mark_at == 0:
            break
        cut = LINE_LIMIT if mark_at < 0 else min(LINE_LIMIT, mark_at)
        lines.append((name, bytes(buffer[:cut])))
        del buffer[:cut]
    return lines, name


def flush(buffer: bytearray, name: str) -> list[tuple[str, bytes]]:
    """At the end of the pipe: the last line, if it had no newline. Empties `buffer`."""
    lines, _ = split(buffer, b"\n", name) if buffer else ([], name)
    return lines


def _line_buffered(fd: int) -> io.TextIOWrapper:
    raw = io.FileIO(fd, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)


def _pieces(line: bytes) -> list[bytes]:
    return [line[at : at + LINE_LIMIT] for at in range(0, max(len(line), 1), LINE_LIMIT)]
