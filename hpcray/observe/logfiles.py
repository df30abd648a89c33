"""Full logs as files: one per rank, so that a parallel file system sees few of them."""

from __future__ import annotations

from pathlib import Path

from hpcray.protocol.messages import LogLines


class LogFiles:
    """The log file of one rank, `<host>-rank<N>.log`: all that its workers print.

    Args:
        directory: Made if it does not exist.
        host: This rank's host.
        rank: This rank.

    Raises:
        OSError: The directory or file cannot be made.
    """

    def __init__(self, directory: str, host: str, rank: int) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{host}-rank{rank}.log"
        self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1 << 16)

    def write(self, lines: LogLines) -> None:
        """Append lines, each with its stream, task or actor name, and process."""
        stream = "err" if lines.is_error else "out"
        head = f"{stream} ({lines.name} pid={lines.pid})"
        for line in lines.lines:
            self._file.write(f"{head} {line}\n")
        self._file.flush()

    def close(self) -> None:
        """Write out and close."""
        self._file.close()
