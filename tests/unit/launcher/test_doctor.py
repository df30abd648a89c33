from dataclasses import replace

import pytest

from hpcray.launcher import facts
from hpcray.launcher.doctor import Finding, examine, exit_code, render
from hpcray.launcher.facts import Facts, MpiFacts
from hpcray.raylet.accelerators import Device, DeviceReport
from hpcray.raylet.detect import CpuReport, MemoryReport

GIB = 2**30
ALONE = Facts(
    launcher="none",
    rank=0,
    host="n1",
    versions=("0.1.0", "3.11.7"),
    mpi=MpiFacts("Open MPI v5.0.11", "funneled", has_ulfm=True),
    cpus=CpuReport(8, frozenset(range(8))),
    memory=MemoryReport(32 * GIB),
    gpus=DeviceReport(reason="no GPU driver on this host"),
    descriptors=65536,
)


def gpu(uuid, kind="H100"):
    return Device(uuid, uuid, int(uuid[-1]) - 1, kind, 80 * GIB, kind)


def ranks(*hosts, **changed):
    return [
        replace(ALONE, **{"launcher": "openmpi", **changed, "rank": rank, "host": host})
        for rank, host in enumerate(hosts)
    ]


def finding(title, everybody):
    (found,) = [one for one in examine(everybody) if one.title == title]
    return found


def test_a_healthy_host_is_all_ok():
    findings = examine([ALONE])
    assert {one.status for one in findings} == {"OK"}
    assert exit_code(findings) == 0
    assert all(one.detail and not one.remedy for one in findings)


def test_facts_travel():
    odd = replace(
        ALONE,
        gpus=DeviceReport((gpu("GPU-1"),), reason="CUDA_VISIBLE_DEVICES=0", problem="GPU 1 is lost"),
        slurm={"SLURM_JOB_ID": "7"},
        cpus=CpuReport(8, frozenset({1, 3}), 1.5, 2, 4, 1),
    )
    assert facts.decode(facts.encode(odd)) == odd


LONE_CPU = CpuReport(8, frozenset({0}))
H100S = DeviceReport((gpu("GPU-1"), gpu("GPU-2")))
MIXED = DeviceReport((gpu("GPU-1"), gpu("GPU-2", "A100")))
LOST = DeviceReport((gpu("GPU-1"),), problem="GPU 1 does not answer: GPU is lost")


@pytest.mark.parametrize(
    ("title", "everybody", "status", "told"),
    [
        ("versions", [*ranks("a"), *ranks("b", versions=("0.1.0", "3.12.1"))], "FAIL", "Python 3.12.1"),
        (
            "MPI library",
            [replace(ALONE, mpi=MpiFacts(error="cannot load libmpi"))],
            "WARN",
            "cannot load libmpi",
        ),
        ("MPI library", ranks("a", "b", mpi=MpiFacts(error="x")), "FAIL", "rank 0 on a: x"),
        (
            "MPI library",
            [*ranks("a"), *ranks("b", mpi=MpiFacts("MPICH", "funneled"))],
            "FAIL",
            "MPICH; Open MPI",
        ),
        ("MPI library", [replace(ALONE, mpi=MpiFacts("MPICH", "single"))], "WARN", "thread level single"),
        ("ULFM", [replace(ALONE, mpi=MpiFacts("MPICH", "multiple"))], "OK", "a lost rank ends the job"),
        ("hosts and ranks", ranks("a", "b", "b"), "OK", "3 ranks on 2 hosts (a: 1, b: 2)"),
        (
            "hosts and ranks",
            [replace(ALONE, slurm={"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4"})],
            "WARN",
            "the Slurm job has 4 hosts",
        ),
        ("CPUs", [ALONE], "OK", "8 CPUs in all"),
        ("CPUs", ranks("a", "a", "a"), "OK", "8 CPUs in all"),
        ("CPUs", ranks("a", "b", "b"), "OK", "16 CPUs in all"),
        ("CPUs", ranks("a", "a", "a", cpus=LONE_CPU), "WARN", "2 ranks of a share 1 CPU"),
        ("CPUs", ranks("a", cpus=LONE_CPU), "WARN", "bound to 1 of 8"),
        ("CPUs", [replace(ALONE, cpus=LONE_CPU)], "OK", "1 CPU in all"),
        ("CPUs", [replace(ALONE, cpus=replace(ALONE.cpus, quota=0.5))], "WARN", "allows 0.5 of one"),
        ("memory", ranks("a", "a", "b"), "OK", "64.0 GiB in all"),
        ("memory", ranks("a", "a", memory=MemoryReport(32 * GIB, GIB)), "WARN", "0.5 GiB for each rank of a"),
        ("GPUs", [ALONE], "OK", "none (no GPU driver on this host)"),
        ("GPUs", ranks("a", "a", gpus=H100S), "OK", "2 x H100"),
        ("GPUs", ranks("a", "a", gpus=LOST), "WARN", "1 x H100; rank 0 on a: GPU 1 does not answer: GPU is lost"),
        ("GPUs", [replace(ALONE, gpus=MIXED)], "WARN", "1 x H100, 1 x A100; several kinds"),
        ("GPUs", ranks("a", "a", "a", gpus=MIXED), "OK", "1 x H100, 1 x A100"),
        (
            "GPUs",
            [replace(ALONE, gpus=DeviceReport(problem="the NVIDIA driver does not answer: x"))],
            "WARN",
            "does not answer",
        ),
        ("shared memory", [replace(ALONE, memfd_error="not permitted")], "FAIL", "not permitted"),
        ("open files", [replace(ALONE, descriptors=None)], "OK", "unlimited"),
        (
            "open files",
            [replace(ALONE, descriptors=300)],
            "WARN",
            "at most 300, of which 8 CPUs may need 320",
        ),
        ("processes", [replace(ALONE, processes=50)], "WARN", "may need 96"),
        ("Slurm", [ALONE], "OK", "not in a Slurm job"),
        ("Slurm", [replace(ALONE, slurm={"SLURM_JOB_ID": "7"})], "OK", "job_id=7"),
        (
            "Slurm",
            [replace(ALONE, launcher="slurm-none", slurm={"SLURM_JOB_ID": "7"})],
            "WARN",
            "srun offers no PMI",
        ),
    ],
)
def test_what_is_found_is_judged(title, everybody, status, told):
    found = finding(title, everybody)
    assert (found.status, told in found.detail) == (status, True), found
    assert bool(found.remedy) == (status != "OK")


def test_slurms_remedy_names_the_librarys_pmi():
    step = replace(ALONE, launcher="slurm-none", slurm={"SLURM_JOB_ID": "7"})
    assert finding("Slurm", [step]).remedy == "srun --mpi=pmix"
    assert finding("Slurm", [replace(step, mpi=MpiFacts("MPICH Version: 5"))]).remedy == "srun --mpi=pmi2"


def test_only_a_failure_fails():
    assert exit_code([Finding("WARN", "t", "d", "r")]) == 0
    assert exit_code([Finding("OK", "t", "d"), Finding("FAIL", "t", "d", "r")]) == 1


def test_gpus_are_listed_by_the_rank_that_will_offer_them():
    everybody = ranks("a", "a", "a", "b", gpus=H100S)
    everybody[3] = replace(everybody[3], gpus=DeviceReport((gpu("GPU-3"),)))
    lines = render(everybody, examine(everybody)).splitlines()
    assert [line.split()[9] for line in lines[1:5]] == ["0", "1", "1", "1"]
    assert lines[6].split() == ["rank", "host", "GPU", "name", "memory", "UUID"]
    assert [line.split() for line in lines[7:10]] == [
        ["1", "a", "0", "H100", "80.0", "GiB", "GPU-1"],
        ["2", "a", "1", "H100", "80.0", "GiB", "GPU-2"],
        ["3", "b", "2", "H100", "80.0", "GiB", "GPU-3"],
    ]


def test_the_report_is_a_table_and_a_line_each():
    everybody = ranks("a", "a", "b", descriptors=100)
    text = render(everybody, examine(everybody))
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["rank", "host"]
    assert [line.split()[:2] for line in lines[1:4]] == [["0", "a"], ["1", "a"], ["2", "b"]]
    assert [line.split()[6] for line in lines[1:4]] == ["0", "8", "8"]
    warning = next(i for i, line in enumerate(lines) if line.startswith("WARN  open files"))
    assert lines[warning + 1].strip().startswith("-> ulimit -n")
