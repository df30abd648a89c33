"""`hpcray explain`: why a task, actor or placement group of a running job waits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from hpcray.client import Client
from hpcray.exceptions import RayError
from hpcray.launcher.visit import visit
from hpcray.observe.findings import Finding

MOST_STEPS = 20
"""How far a chain of things that wait for one another is followed."""


def show(address: str, asked: str) -> int:
    """Print what the job knows of it; the exit code of the command. Blocks for some round trips."""
    try:
        client = visit(address)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        print(f"hpcray: {error}", file=sys.stderr)
        return 2
    try:
        lines = explain(client, asked)
    except RayError as error:
        print(f"hpcray: {error}", file=sys.stderr)
        return 1
    finally:
        client.close()
    if not lines:
        print(
            f"hpcray: the job has no task, actor, object or placement group {asked!r} that is not over: take the name of a "
            "function, class, actor or group, or an id in hexadecimal digits (ref.hex(), hpcray memory)",
            file=sys.stderr,
        )
        return 1
    print("\n".join(lines))
    return 0


def explain(client: Client, asked: str) -> list[str]:
    """What all ranks know of something, and of what it waits for, as lines for people."""
    lines: list[str] = []
    asked_before: set[str] = set()
    steps = [(asked, 0)]
    while steps and len(asked_before) < MOST_STEPS:
        name, depth = steps.pop()
        if name in asked_before:
            continue
        asked_before.add(name)
        findings = _ask(client, name)
        if len(findings) > 1:  # that a task's result does not exist yet goes without saying
            findings = [f for f in findings if f.kind != "object" or f.story.startswith("it exists")] or findings
        reasons = _reasons(client, findings)
        for finding in findings:
            lines += _lines(finding, finding.why or reasons.get(finding.waiting, ""), depth)
            steps += [(other, depth + 1) for other in reversed(finding.others)]
    return lines


def _ask(client: Client, name: str) -> list[Finding]:
    parts = msgspec.convert(client.query("explain", name), list[list[Finding]])
    return [finding for part in parts for finding in part]


def _reasons(client: Client, findings: Sequence[Finding]) -> dict[bytes, str]:
    classes = {finding.waiting for finding in findings if finding.waiting}
    return {template: client.query("why", template) for template in classes}


def _lines(finding: Finding, reason: str, depth: int) -> list[str]:
    margin = "  " * depth
    known_as = f" ({finding.id})" if finding.id and finding.kind != "object" else ""
    lines = [f"{margin}{finding.name}{known_as} {finding.story} [rank {finding.rank}]"]
    return lines + [f"{margin}  {line}" for line in reason.splitlines()]
