"""A real Slurm cluster of virtual hosts on this machine.

    login (net, uts, ipc, pid, mount namespaces): bridge br0, munged, slurmctld, every srun and sbatch
     ├─ n1 (its own namespaces, nested in login's): eth0, /dev/shm, /tmp, slurmd
     ├─ n2 …

Rules:
  1. All that exists lives in login's namespaces: when its first process dies, the kernel ends every process
     of the cluster and drops its network and mounts, even if Python is killed. Two clusters never meet.
  2. Nothing outside is written except below `base`: /etc/slurm, /etc/hosts, /run and /tmp are mounts that
     only the cluster sees.
  3. All hosts share the file system, as they would a home, but /tmp and /dev/shm are each host's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import final

from . import namespaces
from .execution import finish, start

HERE = Path(__file__).parent
CPUS_PER_HOST = 4
BOOT_TIMEOUT = 60.0  # seconds; one is needed on an idle two-core machine
LOG_TAIL = 4000  # characters of each log in an error

UNFINISHED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED"}


class ClusterError(Exception):
    """The cluster itself failed: a daemon ended, or a host did not come up. Carries the logs' ends."""


@final
class SlurmCluster:
    """munged, slurmctld and a slurmd on each of the virtual hosts n1…nK; use it as a context manager.

    Entering blocks until every host is idle, about a second; it raises ClusterError after a minute. Leaving
    kills all that runs. Both hold for one thread: the cluster ends if the thread that entered it ends.

    Args:
        hosts: How many; each claims four CPUs whatever the machine has.
        base: An existing directory for configuration, logs and job output. What is in it stays.
        shared: Directories below /tmp that the hosts shall see too. Outside /tmp they see everything.

    Attributes:
        boot_seconds: How long entering took.
    """

    def __init__(self, hosts: int = 3, *, base: Path, shared: Iterable[Path] = ()) -> None:
        self.hosts: tuple[str, ...] = tuple(f"n{i + 1}" for i in range(hosts))
        self.base = base.resolve()
        self.boot_seconds = 0.0
        self._shared = _below_tmp([self.base, *(path.resolve() for path in shared)])
        self._mount_points = {f"/tmp/{path.parts[2]}" for path in self._shared}
        self._login: namespaces.Space | None = None
        self._running: dict[str, namespaces.Space] = {}

    def __enter__(self) -> SlurmCluster:
        began = time.monotonic()
        try:
            self._write_files()
            self._login = self._boot_login()
            for name in self.hosts:
                self._boot_host(name)
            self.wait_idle()
        except BaseException:
            self.close()
            raise
        self.boot_seconds = time.monotonic() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of the cluster and wait until they are gone. May be called again."""
        for space in self.spaces():
            space.kill()
        self._running.clear()
        self._login = None

    # ---- running programs

    def start_srun(
        self,
        args: Sequence[str],
        *,
        nodes: int = 3,
        ntasks: int = 3,
        mpi: str = "pmix",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start `srun` on the login host and return at once; stdout and stderr are pipes, and so is stdin.

        Args:
            args: The program and its arguments; more options of srun may come before it.
            nodes: Hosts to use.
            ntasks: Ranks to start.
            mpi: Which PMI Slurm offers: ``pmix``, ``pmi2`` or ``none``.
            env: Added to this process's environment, from which what belongs to Slurm is removed.
            cwd: Of every rank; default, this process's.
        """
        where = str(cwd or Path.cwd())
        command = ["srun", f"-N{nodes}", f"-n{ntasks}", f"--mpi={mpi}", f"--chdir={where}", *args]
        return start([*self._login_space().enter(), *command], env)

    def srun(
        self,
        args: Sequence[str],
        *,
        nodes: int = 3,
        ntasks: int = 3,
        mpi: str = "pmix",
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program under `srun` and block until it ends; see `start_srun`.

        Raises:
            subprocess.TimeoutExpired: It ran for more than `timeout` seconds and was ended; has the output.
        """
        process = self.start_srun(args, nodes=nodes, ntasks=ntasks, mpi=mpi, env=env, cwd=cwd)
        return finish(process, "", timeout)

    def sbatch(
        self,
        script: str,
        *,
        nodes: int = 3,
        ntasks: int = 3,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Submit a batch script and block until the job ends.

        Returns:
            The job's exit code (128 + signal if one ended it), stdout and stderr.

        Raises:
            subprocess.CalledProcessError: `sbatch` refused the script.
            subprocess.TimeoutExpired: The job ran for more than `timeout` seconds and was cancelled.
        """
        out, err = self.base / "jobs" / "%j.out", self.base / "jobs" / "%j.err"
        where = str(cwd or Path.cwd())
        options = [
            "--parsable",
            f"-N{nodes}",
            f"-n{ntasks}",
            f"--output={out}",
            f"--error={err}",
            f"--chdir={where}",
        ]
        job = self.login_exec(["sbatch", *options], env=env, stdin=script, check=True).stdout.strip()
        return subprocess.CompletedProcess(
            args=["sbatch", *options],
            returncode=self._wait_for_job(job, timeout),
            stdout=_read(self.base / "jobs" / f"{job}.out"),
            stderr=_read(self.base / "jobs" / f"{job}.err"),
        )

    def login_exec(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        timeout: float = 30.0,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on the login host and block until it ends.

        `squeue`, `scancel`; `ip link set n2 down` cuts n2 off, `up` heals it.
        """
        return self._execute(self._login_space(), argv, env, stdin, timeout, check)

    def host_exec(
        self,
        host: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        timeout: float = 30.0,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host, outside any job, as its administrator would; block until it ends."""
        return self._execute(self._running[host], argv, env, stdin, timeout, check)

    # ---- breaking hosts

    def kill_host(self, name: str) -> None:
        """Lose a host as in a power cut: its processes end, and their peers hear nothing of it.

        Slurm notices some time after SlurmdTimeout. `processes` and `leftovers` no longer tell of it.
        """
        # First the cable, or the kernel would close the dying processes' connections.
        self.login_exec(["ip", "link", "delete", name], check=True)
        self._running.pop(name).kill()

    def start_host(self, name: str) -> None:
        """Bring back a host that was killed, with nothing left of its past; block until all are idle."""
        # Else it may still count as idle long before its new slurmd has registered.
        down = ["scontrol", "update", f"nodename={name}", "state=down", "reason=restart"]
        self.login_exec(down, check=True)
        self._boot_host(name)
        self.wait_idle()

    def sweep(self) -> None:
        """Cancel all jobs, kill and delete what they left: some MPI libraries leave files when killed."""
        self.login_exec(["scancel", "--user=root"])
        for name, space in self._running.items():
            for process in self.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            for path in self._files(space):
                self.host_exec(name, ["rm", "-rf", path])

    # ---- looking

    def processes(self, host: str) -> list[namespaces.Process]:
        """Every live process of a host beyond its first one and slurmd."""
        first = self._running[host].first
        return [
            process
            for process in namespaces.members(self._running[host])
            if process.pid != first and not (process.name == "slurmd" and process.parent == first)
        ]

    def leftovers(self) -> list[str]:
        """What jobs have left on the running hosts: processes, and files in /dev/shm and /tmp. One line each.

        A snapshot: Slurm takes some 100 ms to clean up after srun has returned.
        """
        found = []
        for name, space in self._running.items():
            found += [f"{name}: process {p.pid} {p.name}: {p.command}" for p in self.processes(name)]
            found += [f"{name}: file {path}" for path in self._files(space)]
        return found

    def node_states(self) -> dict[str, str]:
        """What Slurm thinks of each host: ``idle``, ``allocated``, ``down*``, …; empty if it is silent."""
        reply = self.login_exec(["sinfo", "--noheader", "--Node", "--format=%N %T"])
        return dict(line.split() for line in reply.stdout.splitlines()) if reply.returncode == 0 else {}

    def wait_idle(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Block until every host is idle.

        Raises:
            ClusterError: Some are not after `timeout` seconds; the text has the states and the logs' ends.
        """
        deadline = time.monotonic() + timeout
        wanted = dict.fromkeys(self.hosts, "idle")
        while (states := self.node_states()) != wanted:
            if time.monotonic() > deadline or not all(space.is_alive() for space in self.spaces()):
                raise ClusterError(f"hosts are not idle but {states}\n{self.logs()}")
            time.sleep(0.05)

    def spaces(self) -> list[namespaces.Space]:
        """What runs: the namespaces of the hosts, and of login if it was started."""
        return [*self._running.values(), *([self._login] if self._login else [])]

    def logs(self) -> str:
        """The end of each daemon's log, under its name."""
        paths = sorted((self.base / "logs").glob("*.log"))
        return "\n".join(f"--- {path.name}\n{_read(path)[-LOG_TAIL:]}" for path in paths)

    # ---- inside

    def _files(self, space: namespaces.Space) -> list[str]:
        found = []
        for folder in ("/dev/shm", "/tmp"):
            names = sorted(path.name for path in Path(f"/proc/{space.first}/root{folder}").iterdir())
            found += [f"{folder}/{name}" for name in names if f"{folder}/{name}" not in self._mount_points]
        return found

    def _write_files(self) -> None:
        for folder in ("etc/slurm", "logs", "jobs", "stage"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        addresses = {"localhost": "127.0.0.1", "login": "10.0.0.254"} | {h: _address(h) for h in self.hosts}
        lines = [f"{address} {name}\n" for name, address in addresses.items()]
        (self.base / "etc" / "hosts").write_text("".join(lines))
        configuration = (HERE / "slurm.conf").read_text().format(hosts=len(self.hosts), cpus=CPUS_PER_HOST)
        (self.base / "etc" / "slurm" / "slurm.conf").write_text(configuration)
        # Every other host is on another switch, so that neighbours by name are none by network.
        leaves = {leaf: hosts for leaf in (0, 1) if (hosts := ",".join(list(self.hosts)[leaf::2]))}
        switches = [f"SwitchName=leaf{leaf} Nodes={hosts}\n" for leaf, hosts in leaves.items()]
        switches.append(f"SwitchName=spine Switches={','.join(f'leaf{leaf}' for leaf in leaves)}\n")
        (self.base / "etc" / "slurm" / "topology.conf").write_text("".join(switches))
        # No cgroup is used, but slurmd would still set up those of version 2, which needs systemd.
        (self.base / "etc" / "slurm" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _boot_login(self) -> namespaces.Space:
        space = self._start_space("login.sh", "login", [str(self.base)])
        deadline = time.monotonic() + BOOT_TIMEOUT
        while not Path(f"/proc/{space.first}/root/run/ready").exists():
            if time.monotonic() > deadline or not space.is_alive():
                space.kill()
                raise ClusterError(f"login did not start\n{self.logs()}")
            time.sleep(0.01)
        return space

    def _boot_host(self, name: str) -> None:
        args = [name, _address(name), str(self.base / "stage"), *map(str, self._shared)]
        host = self._start_space("host.sh", name, args, inside=self._login_space())
        self._running[name] = host
        # Only the network is entered: the host's process id means something to us, not to login.
        enter = ["nsenter", "--net", "--target", str(self._login_space().first)]
        peer = ["peer", "name", "eth0", "netns", str(host.first)]
        for command in (["add", name, "type", "veth", *peer], ["set", name, "master", "br0", "up"]):
            done = finish(start([*enter, "ip", "link", *command], None), "", BOOT_TIMEOUT)
            if done.returncode:
                raise ClusterError(f"{name} got no network: {done.stderr}\n{self.logs()}")

    def _start_space(
        self, script: str, name: str, args: list[str], inside: namespaces.Space | None = None
    ) -> namespaces.Space:
        try:
            return namespaces.start_space(HERE / script, args, self._log(name), inside)
        except OSError as error:
            raise ClusterError(f"{name} did not start: {error}\n{self.logs()}") from error

    def _log(self, name: str) -> Path:
        return self.base / "logs" / f"{name}.log"

    def _login_space(self) -> namespaces.Space:
        if self._login is None:
            raise ClusterError("the cluster is not running")
        return self._login

    def _execute(
        self,
        space: namespaces.Space,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        stdin: str,
        timeout: float,
        check: bool,
    ) -> subprocess.CompletedProcess[str]:
        done = finish(start([*space.enter(), *argv], env), stdin, timeout)
        if check:
            done.check_returncode()
        return done

    def _wait_for_job(self, job: str, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while True:
            shown = self.login_exec(["scontrol", "--oneliner", "show", "job", job], check=True).stdout
            fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
            if fields["JobState"] not in UNFINISHED:
                return _exit_code(fields["JobState"], fields["ExitCode"])
            if time.monotonic() > deadline:
                self.login_exec(["scancel", job])
                raise subprocess.TimeoutExpired(
                    ["sbatch", job], timeout, output=_read(self.base / "jobs" / f"{job}.out")
                )
            time.sleep(0.1)


def _address(host: str) -> str:
    return f"10.0.0.{host.removeprefix('n')}"


def _below_tmp(paths: Iterable[Path]) -> list[Path]:
    """Those that a private /tmp would hide, without those that lie in another one."""
    hidden = sorted({path for path in paths if path.is_relative_to("/tmp")})
    return [path for path in hidden if not any(path != other and path.is_relative_to(other) for other in hidden)]


def _exit_code(state: str, exit_code: str) -> int:
    code, number = map(int, exit_code.split(":"))
    if number:
        return 128 + number
    # Slurm says 0:0 for some jobs that it ended itself.
    return code if code or state == "COMPLETED" else 1


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
