"""What raylets and the GCS tell of tasks, actors and processes that live or wait."""

from __future__ import annotations

from random import Random
from typing import Any, TypeVar

import msgspec

from hpcray import ids
from hpcray.observe.states import STAGES, ActorReport, ProcessReport, TaskReport
from hpcray.protocol import messages as m
from hpcray.resources import UNIT
from hpcray.testing.cluster import Cluster
from hpcray.testing.process import Process

FIRST = Random(0).choice
R = TypeVar("R")


def ask(cluster: Cluster, process: Process, kind: str, report: type[R]) -> list[R]:
    number = 1000 + len(process.answers)
    process.send(m.Query(number, "states", msgspec.msgpack.encode(kind)))
    cluster.run(FIRST)
    answer = process.answers[number]
    assert answer.ok, answer.payload
    return [one for part in msgspec.msgpack.decode(answer.payload, type=list[list[report]]) for one in part]


def furthest(reports: list[TaskReport]) -> dict[bytes, Any]:
    found: dict[bytes, TaskReport] = {}
    for report in sorted(reports, key=lambda report: STAGES.index(report.state)):
        found[report.id] = report
    return found


def test_an_idle_job_has_its_processes_and_nothing_else(cluster, driver):
    assert ask(cluster, driver, "tasks", TaskReport) == []
    assert ask(cluster, driver, "actors", ActorReport) == []
    [process] = [one for one in ask(cluster, driver, "workers", ProcessReport) if one.is_driver]
    assert process.rank == 0
    assert process.job == "01000000"
    assert process.id.startswith(driver.client.prefix.hex())


def test_a_task_is_told_of_at_home_and_where_it_runs_and_is_forgotten_at_its_end(cluster, driver):
    (ref,) = driver.submit(cluster.template(driver, "f", node=2))
    waiting = [driver.submit(cluster.template(driver, "g"), [ref])[0] for _ in range(2)]
    impossible = driver.submit(cluster.template(driver, "h", resources={"CPU": 9 * UNIT}))[0]
    cluster.run(FIRST)
    reports = ask(cluster, driver, "tasks", TaskReport)
    task = ids.task_of(ref)
    at_home, there = sorted((one for one in reports if one.id == task), key=lambda one: one.rank)
    assert (at_home.rank, at_home.state, at_home.runs_on) == (0, "SUBMITTED_TO_WORKER", 2)
    assert (there.rank, there.runs_on, there.name, there.kind) == (2, 2, "f", "NORMAL_TASK")
    found = furthest(reports)
    assert {found[ids.task_of(one)].state for one in waiting} == {"PENDING_ARGS_AVAIL"}
    assert found[ids.task_of(impossible)].state == "PENDING_NODE_ASSIGNMENT"
    assert found[ids.task_of(impossible)].resources == {"CPU": 9.0}
    assert found[task].job == "01000000"
    while cluster.running:
        for worker in cluster.running:
            worker.finish()
        cluster.run(FIRST)
    assert list(furthest(ask(cluster, driver, "tasks", TaskReport))) == [ids.task_of(impossible)]


def test_an_actor_waits_for_arguments_is_created_and_lives(cluster, driver):
    (late,) = driver.submit(cluster.template(driver, "f", node=2))
    template = cluster.template(driver, "Counter", node=1, actor=m.ActorOptions())
    actor = driver.create_actor(template, [late])
    cluster.run(FIRST)
    [report] = ask(cluster, driver, "actors", ActorReport)
    assert (report.id, report.state, report.class_name) == (actor, "DEPENDENCIES_UNREADY", "Counter")
    assert furthest(ask(cluster, driver, "tasks", TaskReport))[actor].kind == "ACTOR_CREATION_TASK"
    for expected in ("PENDING_CREATION", "ALIVE"):
        for worker in cluster.running:
            worker.finish()
        cluster.run(FIRST)
        [report] = [one for one in ask(cluster, driver, "actors", ActorReport) if not one.is_part]
        assert (report.state, report.rank) == (expected, 1)
    first, second = driver.call(actor) + driver.call(actor)
    cluster.run(FIRST)
    found = furthest(ask(cluster, driver, "tasks", TaskReport))
    assert {found[ids.task_of(ref)].name for ref in (first, second)} == {"Counter.method"}
    assert {one.actor for one in found.values()} == {actor}
    driver.send(m.Kill(actor, True))
    cluster.run(FIRST)
    assert [one for one in ask(cluster, driver, "actors", ActorReport) if not one.is_part] == []
