"""Scrubbed environments and thread limits."""

from __future__ import annotations

import pytest

from hpcray.launcher.environment import (
    DRIVER_SOCKET,
    driver_socket_value,
    parse_driver_socket,
    scrub,
    thread_limits,
)

SET_BY_OPEN_MPI = [
    "OMPI_ARGV",
    "OMPI_COMMAND",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_NODE_RANK",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_FILE_LOCATION",
    "OMPI_LIBDIR_LOC",
    "OMPI_MCA_PREFIXES",
    "OMPI_MCA_cpu_type",
    "OMPI_MCA_initial_wdir",
    "OMPI_MCA_num_procs",
    "OMPI_NUM_APP_CTX",
    "OMPI_TOOL_NAME",
    "OMPI_UNIVERSE_SIZE",
    "OMPI_VERSION",
    "OMPI_WORLD_LOCAL_SIZE",
    "OMPI_WORLD_SIZE",
    "OPAL_USER_PARAMS_GIVEN",
    "PMIX_BFROP_BUFFER_TYPE",
    "PMIX_GDS_MODULE",
    "PMIX_HOSTNAME",
    "PMIX_NAMESPACE",
    "PMIX_PARAM_FILE_PASSED",
    "PMIX_RANK",
    "PMIX_SECURITY_MODE",
    "PMIX_SERVER_TMPDIR",
    "PMIX_SERVER_URI2",
    "PMIX_SERVER_URI21",
    "PMIX_SERVER_URI3",
    "PMIX_SERVER_URI4",
    "PMIX_SERVER_URI41",
    "PMIX_SYSTEM_TMPDIR",
    "PMIX_VERSION",
    "PRTE_LAUNCHED",
    "PRTE_SHARED_FS",
]
SET_BY_HYDRA = [
    "HYDI_CONTROL_FD",
    "MPI_LOCALNRANKS",
    "MPI_LOCALRANKID",
    "PMI_FD",
    "PMI_HOSTNAME",
    "PMI_RANK",
    "PMI_SIZE",
]
SET_BY_SRUN = [
    "SLURM_STEP_ID",
    "SLURM_STEPID",
    "SLURM_STEP_NODELIST",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_TASK_PID",
    "SLURM_GTIDS",
    "SLURM_SRUN_COMM_HOST",
    "SLURM_LAUNCH_NODE_IPADDR",
    "SLURM_CPU_BIND",
    "SLURM_CPU_BIND_LIST",
    "SLURM_PMIX_MAPPING_SERV",
    "SLURMD_NODENAME",
    "PMI2_JOBID",
]
THE_USERS = [
    "PATH",
    "HOME",
    "OMPI_ALLOW_RUN_AS_ROOT",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM",
    "OMPI_MCA_btl",
    "OMPI_MCA_pml",
    "OMPI_CC",
    "OPAL_PREFIX",
    "PMIX_MCA_psec",
    "PMIX_PREFIX",
    "PRTE_MCA_rmaps_default_mapping_policy",
    "HYDRA_LAUNCHER",
    "HYDRA_IFACE",
    "MPICH_CC",
    "MPIR_CVAR_NOLOCAL",
    "UCX_TLS",
    "SLURM_JOB_ID",
    "SLURM_JOBID",
    "SLURM_JOB_NODELIST",
    "SLURM_NODELIST",
    "SLURM_CPUS_PER_TASK",
    "SLURM_TMPDIR",
    "OMP_NUM_THREADS",
]


@pytest.mark.parametrize("name", [*SET_BY_OPEN_MPI, *SET_BY_HYDRA, *SET_BY_SRUN, DRIVER_SOCKET])
def test_what_makes_a_process_a_rank_is_removed(name: str) -> None:
    assert scrub({name: "1"}) == {}


@pytest.mark.parametrize("name", THE_USERS)
def test_what_the_user_sets_stays(name: str) -> None:
    assert scrub({name: "x"}) == {name: "x"}


@pytest.mark.parametrize(("num_cpus", "threads"), [(0, "1"), (0.5, "1"), (1, "1"), (2.9, "2"), (16, "16")])
def test_threads_follow_the_cpus(num_cpus: float, threads: str) -> None:
    assert thread_limits(num_cpus, ())["OMP_NUM_THREADS"] == threads
    assert thread_limits(num_cpus, ())["MKL_NUM_THREADS"] == threads


def test_a_variable_of_the_user_is_not_touched() -> None:
    limits = thread_limits(4, {"MKL_NUM_THREADS"})
    assert "MKL_NUM_THREADS" not in limits
    assert limits["OPENBLAS_NUM_THREADS"] == "4"


def test_the_users_omp_num_threads_governs_all() -> None:
    assert thread_limits(4, {"OMP_NUM_THREADS"}) == {}


def test_the_drivers_socket_survives_its_text() -> None:
    assert parse_driver_socket(driver_socket_value(7, 4711)) == (7, 4711)


@pytest.mark.parametrize("value", ["", "7", "7:", "a:b", "1:2:3"])
def test_a_bad_driver_socket_is_refused(value: str) -> None:
    with pytest.raises(ValueError):
        parse_driver_socket(value)
