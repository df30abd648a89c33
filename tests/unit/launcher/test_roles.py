import pytest

from hpcray.launcher.roles import (
    Launch,
    LaunchError,
    check_pmi,
    check_world,
    detect_launch,
    driver_rank,
    offers_cpus,
)

# Recorded with Open MPI 5.0.11 and MPICH 5.0.2; Slurm's as in srun(1) and sbatch(1). Only what names ranks.
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-vm-12@1",
}
HYDRA = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "PMI_FD": "7",
    "MPI_LOCALRANKID": "2",
    "MPI_LOCALNRANKS": "4",
    "HYDI_CONTROL_FD": "6",
}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8"}
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "99"}
STEP = {
    **ALLOCATION,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
PMIX_STEP = {**STEP, "PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.7.0"}
PMI2_STEP = {**STEP, "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "9", "PMI_JOBID": "7.0"}


@pytest.mark.parametrize(
    ("env", "launch"),
    [
        ({}, Launch("none")),
        (OPENMPI, Launch("openmpi", 1, 4, 1, 2)),
        (HYDRA, Launch("hydra", 2, 4, 2, 4)),
        (PMIX_STEP, Launch("slurm-pmix", 3, 4, 1, 2)),
        (PMI2_STEP, Launch("slurm-pmi2", 3, 4, 1, 2)),
        (STEP, Launch("slurm-none", 3, 4, 1, 2)),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "prte-1@1"}, Launch("pmix", 0)),
    ],
)
def test_each_launcher_is_known_by_what_it_leaves(env, launch):
    assert detect_launch(env) == launch


@pytest.mark.parametrize(
    "env",
    [
        ALLOCATION,
        BATCH,
        {**BATCH, "SLURM_STEP_ID": "4294967291", "SLURM_STEPID": "4294967291"},
        {**BATCH, "SLURM_STEP_ID": "-5"},
        {**BATCH, "SLURM_STEPID": "batch"},
        {**BATCH, "SLURM_STEP_ID": "4294967290"},
    ],
)
def test_a_batch_script_is_no_rank(env):
    assert not detect_launch(env).is_mpi


def test_mpirun_inside_an_allocation_counts_before_slurm():
    daemons_step = {**STEP, "SLURM_STEP_NUM_TASKS": "2"}
    assert detect_launch({**daemons_step, **OPENMPI}).launcher == "openmpi"
    assert detect_launch({**daemons_step, **HYDRA}) == Launch("hydra", 2, 4, 2, 4)


def test_an_older_slurm_without_step_tasks_still_tells_the_size():
    env = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP_")}
    assert detect_launch(env) == Launch("slurm-none", 3, 4, 1, None)


@pytest.mark.parametrize(
    ("listed", "node", "count"),
    [
        ("4", "0", 4),
        ("2,1", "1", 1),
        ("2(x3),1", "2", 2),
        ("2(x3),1", "3", 1),
        ("2", "5", None),
        ("x", "0", None),
    ],
)
def test_tasks_of_this_host_are_found_in_slurms_list(listed, node, count):
    env = {**STEP, "SLURM_STEP_TASKS_PER_NODE": listed, "SLURM_NODEID": node}
    assert detect_launch(env).local_size == count


def test_a_number_that_is_none_is_unknown():
    assert detect_launch({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "many"}).size is None


def test_a_world_as_launched_is_fine():
    check_world(Launch("openmpi", 1, 4), 4, 1, "Open MPI v5.0.11")
    check_world(Launch("pmix", 0), 4, 0, "Open MPI")
    check_world(Launch("slurm-none", 0, 1), 1, 0, "MPICH Version: 5.0.2")


@pytest.mark.parametrize(
    ("library", "pmi"),
    [
        ("Open MPI v5.0.11, package: Open MPI root@host Distribution", "pmix"),
        ("MPICH Version:      5.0.2\nMPICH Release date: x", "pmi2"),
        ("Intel(R) MPI Library 2021.9 for Linux* OS", "pmi2"),
    ],
)
@pytest.mark.parametrize("launcher", ["slurm-pmix", "slurm-pmi2", "slurm-none"])
def test_lone_ranks_under_srun_name_the_pmi_to_use(launcher, library, pmi):
    with pytest.raises(LaunchError) as caught:
        check_world(Launch(launcher, 3, 4), 1, 0, library)
    text = str(caught.value)
    assert f"--mpi={pmi} " in text
    assert "srun started 4 ranks" in text
    assert "\n" not in text


def test_lone_ranks_under_another_librarys_mpirun_name_both():
    with pytest.raises(LaunchError, match=r"MPICH's mpiexec \(hydra\) started 4 ranks, but Open MPI sees"):
        check_world(Launch("hydra", 1, 4), 1, 0, "Open MPI v5.0.11")


def test_a_world_of_another_size_is_an_error_too():
    with pytest.raises(LaunchError, match="sees a world of 3 ranks"):
        check_world(Launch("openmpi", 1, 4), 3, 1, "")


def test_a_rank_with_anothers_number_is_an_error():
    with pytest.raises(LaunchError, match="rank 0 of MPI is rank 1 of its launcher"):
        check_world(Launch("openmpi", 1, 4), 4, 0, "Open MPI")


def test_the_driver_runs_beside_rank_0_or_where_there_are_no_ranks():
    assert driver_rank(Launch("none"))
    assert driver_rank(Launch("openmpi", 0, 4))
    assert not driver_rank(Launch("openmpi", 1, 4))


@pytest.mark.parametrize(
    ("rank", "hosts", "head_cpus", "offers"),
    [
        (0, ["a"], None, True),
        (0, ["a", "a"], None, False),
        (1, ["a", "a"], None, True),
        (0, ["a", "b", "b"], None, True),
        (0, ["a", "b", "a"], None, False),
        (0, ["a", "a"], 2, True),
        (0, ["a"], 0, False),
        (1, ["a", "b"], 0, True),
    ],
)
def test_rank_0_offers_cpus_where_its_host_would_idle_or_as_told(rank, hosts, head_cpus, offers):
    assert offers_cpus(rank, hosts, head_cpus) is offers


OPEN_MPI_5 = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11"
MPICH_WHEEL = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra:gforker"


@pytest.mark.parametrize(
    ("launcher", "library", "remedy"),
    [
        ("slurm-none", OPEN_MPI_5, "--mpi=pmix"),
        ("slurm-pmi2", OPEN_MPI_5, "--mpi=pmix"),
        ("slurm-pmix", MPICH_WHEEL, "--mpi=pmi2"),
    ],
)
def test_a_pmi_that_a_library_cannot_speak_is_refused_before_mpi_init(launcher, library, remedy):
    with pytest.raises(LaunchError, match=remedy):
        check_pmi(Launch(launcher, 0, 4), library)


@pytest.mark.parametrize(
    ("launcher", "library"),
    [
        ("slurm-pmix", OPEN_MPI_5),
        ("openmpi", OPEN_MPI_5),
        ("slurm-pmi2", MPICH_WHEEL),
        ("hydra", MPICH_WHEEL),
        ("slurm-pmix", MPICH_WHEEL + " --with-pmix=/usr"),
        ("slurm-pmi2", "Open MPI v4.1.4, package: Debian"),
        ("slurm-none", "Intel(R) MPI Library 2021.10"),
    ],
)
def test_a_pmi_that_a_library_may_speak_is_let_pass(launcher, library):
    check_pmi(Launch(launcher, 0, 4), library)
