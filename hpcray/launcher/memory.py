"""`hpcray memory`: what lies in a running job's object stores, who holds it, and where it came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from hpcray.client import Client
from hpcray.exceptions import RayError
from hpcray.launcher.visit import visit
from hpcray.observe.statistics import Amount, ObjectReport, ObjectsWanted, StoreStatistics


class Found(msgspec.Struct, frozen=True):
    """One object, as all ranks that know of it report it."""

    id: bytes
    reports: list[ObjectReport]

    @property
    def size(self) -> int:
        """Bytes, where any rank knows."""
        return max(report.size for report in self.reports)

    @property
    def made_by(self) -> str:
        """What its home says."""
        return next((report.made_by for report in self.reports if report.made_by), "")


def show(address: str, *, limit: int, as_json: bool) -> int:
    """Print the job's objects, largest first, and its stores; the exit code of the command. Blocks for some round trips."""
    try:
        client = visit(address)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        print(f"hpcray: {error}", file=sys.stderr)
        return 2
    try:
        stores, objects = look(client, limit)
    except RayError as error:
        print(f"hpcray: {error}", file=sys.stderr)
        return 1
    finally:
        client.close()
    print(as_text(stores, objects, limit) if not as_json else json.dumps(as_data(stores, objects), indent=2))
    return 0


def look(client: Client, limit: int) -> tuple[list[StoreStatistics], list[Found]]:
    """All stores, and the `limit` largest objects with what every rank knows of them."""
    stores = msgspec.convert(client.query("store_statistics", None), list[StoreStatistics])
    largest = _ask(client, ObjectsWanted(limit=limit))
    chosen = [found.id for found in _together(largest)[:limit]]
    return stores, _together(_ask(client, ObjectsWanted(ids=chosen))) if chosen else []


def _ask(client: Client, wanted: ObjectsWanted) -> Iterable[ObjectReport]:
    parts = msgspec.convert(client.query("objects", wanted), list[list[ObjectReport]])
    return (report for part in parts for report in part)


def _together(reports: Iterable[ObjectReport]) -> list[Found]:
    by_id: dict[bytes, list[ObjectReport]] = {}
    for report in reports:
        by_id.setdefault(report.id, []).append(report)
    found = [Found(identifier, parts) for identifier, parts in by_id.items()]
    return sorted(found, key=lambda one: (-one.size, one.id))


# ------------------------------------------------------------------------------------------------------------- printing
def as_data(stores: Sequence[StoreStatistics], objects: Sequence[Found]) -> dict[str, Any]:
    """The same as JSON has it; ids are in hexadecimal digits, as in an ObjectRef's `hex()`."""
    return {
        "ranks": msgspec.to_builtins(list(stores)),
        "objects": [
            {
                "id": found.id.hex(),
                "size": found.size,
                "made_by": found.made_by,
                "ranks": [
                    {name: value for name, value in _fields(report).items() if name not in ("id", "size", "made_by")}
                    for report in found.reports
                ],
            }
            for found in objects
        ],
    }


def _fields(report: ObjectReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


def as_text(stores: Sequence[StoreStatistics], objects: Sequence[Found], limit: int) -> str:
    """For people: a line for each object, then one for each rank."""
    rows = [
        (
            _size(found.size),
            ", ".join(f"{report.rank} {report.state}" for report in found.reports),
            ", ".join(name for report in found.reports for name in report.pinned_by) or "-",
            _references(found.reports) or "-",
            found.made_by or "-",
            found.id.hex(),
        )
        for found in objects
    ]
    lines = (
        _table(("SIZE", "ON RANK", "PINNED BY", "REFERENCES", "MADE BY", "OBJECT"), rows) if rows else ["no objects"]
    )
    if len(objects) == limit:
        lines.append(f"(the {limit} largest; --limit shows more)")
    header = (
        "RANK", "HOST", "STORE", "FREE", "PRIMARY", "COPIES", "UNUSED", "FREED", "WRITING", "PINNED", "SPILLED", "SMALL",
        "HITS", "MISSES", "IN", "OUT",
    )  # fmt: skip
    return "\n".join([*lines, "", *_table(header, [_store(store) for store in stores])])


def _store(store: StoreStatistics) -> tuple[str, ...]:
    amounts = (store.primary, store.secondary, store.unused, store.freed)
    return (
        str(store.rank),
        store.host,
        _size(store.size),
        _size(store.free),
        *map(_amount, amounts),
        _size(store.writing),
        *map(_amount, (store.pinned, store.spilled, store.inline)),
        str(store.hits),
        str(store.misses),
        f"{_size(store.received.bytes)} {_size(round(store.received_per_second))}/s",
        f"{_size(store.sent.bytes)} {_size(round(store.sent_per_second))}/s",
    )


def _references(reports: Sequence[ObjectReport]) -> str:
    parts: list[str] = []
    for report in reports:
        parts += report.clients
        if report.holds:
            parts.append(f"{report.holds} in tasks, objects or pickles")
        if report.guests:
            parts.append(f"{report.guests} in tasks from elsewhere")
        parts += [f"rank {rank}" for rank in report.borrowers]
    return ", ".join(parts)


def _amount(amount: Amount) -> str:
    return f"{_size(amount.bytes)} ({amount.objects})" if amount.objects else "-"


def _size(size: int) -> str:
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if size >= 1000**power:
            return f"{size / 1000**power:.1f} {unit}"
    return f"{size} B"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
