"""What `hpcray memory` makes of the ranks' reports."""

from __future__ import annotations

import json

from hpcray.launcher.memory import Found, as_data, as_text
from hpcray.observe.statistics import Amount, ObjectReport, StoreStatistics

NOTHING = Amount()
STORE = StoreStatistics(
    rank=1, host="n1", size=7_000_000_000, free=6_000_000_000, largest_free=6_000_000_000, writing=0,
    primary=Amount(2, 999_000_000), secondary=NOTHING, unused=NOTHING, freed=Amount(1, 1_000_000), pinned=Amount(3, 10**9),
    spilled=NOTHING, mapped=NOTHING, inline=Amount(5, 500), hits=12, misses=3, spills=NOTHING, restores=NOTHING,
    received=Amount(3, 4_000_000), sent=NOTHING, received_per_second=1500.4, sent_per_second=0.0,
)  # fmt: skip
OBJECT = Found(
    b"\xab" * 28,
    [
        ObjectReport(
            id=b"\xab" * 28, rank=0, size=998_000_000, state="primary", made_by="make() for driver 7", clients=["driver 7"],
            holds=2, borrowers={1: 1}, pinned_by=["driver 7", "rank 2"],
        ),
        ObjectReport(id=b"\xab" * 28, rank=1, size=998_000_000, state="copy", guests=1, pinned_by=["worker 9 (Reader)"]),
    ],
)  # fmt: skip


def test_an_object_is_one_line_with_all_that_the_ranks_know():
    lines = as_text([STORE], [OBJECT], 50).splitlines()
    assert lines[0].split() == ["SIZE", "ON", "RANK", "PINNED", "BY", "REFERENCES", "MADE", "BY", "OBJECT"]
    cells = [cell.strip() for cell in lines[1].split("  ") if cell.strip()]
    assert cells == [
        "998.0 MB",
        "0 primary, 1 copy",
        "driver 7, rank 2, worker 9 (Reader)",
        "driver 7, 2 in tasks, objects or pickles, rank 1, 1 in tasks from elsewhere",
        "make() for driver 7",
        "ab" * 28,
    ]


def test_a_rank_is_one_line():
    cells = [cell.strip() for cell in as_text([STORE], [], 50).splitlines()[-1].split("  ") if cell.strip()]
    assert cells == [
        "1", "n1", "7.0 GB", "6.0 GB", "999.0 MB (2)", "-", "-", "1.0 MB (1)", "0 B", "1.0 GB (3)", "-", "500 B (5)", "12", "3",
        "4.0 MB 1.5 kB/s", "0 B 0 B/s",
    ]  # fmt: skip


def test_an_empty_store_says_so_and_a_cut_list_says_how_to_see_more():
    assert as_text([STORE], [], 50).startswith("no objects\n")
    assert "(the 1 largest; --limit shows more)" in as_text([STORE], [OBJECT], 1)
    assert "--limit" not in as_text([STORE], [OBJECT], 2)


def test_json_has_the_same_with_ids_as_a_reference_shows_them():
    data = json.loads(json.dumps(as_data([STORE], [OBJECT])))
    assert data["ranks"][0]["primary"] == {"objects": 2, "bytes": 999_000_000}
    (found,) = data["objects"]
    assert (found["id"], found["size"], found["made_by"]) == ("ab" * 28, 998_000_000, "make() for driver 7")
    assert [(rank["rank"], rank["state"]) for rank in found["ranks"]] == [(0, "primary"), (1, "copy")]
    assert found["ranks"][0]["borrowers"] == {"1": 1}
