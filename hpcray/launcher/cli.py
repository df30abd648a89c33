"""The command line: `hpcray run`, `hpcray doctor`, `hpcray memory`, `hpcray stop`, and `python -m hpcray`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from hpcray import __version__
from hpcray.launcher.mpirun import MpirunNotFound
from hpcray.launcher.options import (
    JobOptions,
    interpreter_flags,
    job_arguments,
    parse_amount,
    parse_count,
    parse_labels,
    parse_resources,
    parse_size,
    with_environment,
)
from hpcray.launcher.roles import LaunchError, detect_launch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _size(text: str) -> int:
    with _as_bad_parameter():
        return parse_size(text)


def _resources(text: str) -> Mapping[str, float]:
    with _as_bad_parameter():
        return parse_resources(text)


def _amount(text: str) -> float:
    with _as_bad_parameter():
        return parse_amount(text)


def _count(text: str) -> int:
    with _as_bad_parameter():
        return parse_count(text)


def _labels(text: str) -> Mapping[str, str]:
    with _as_bad_parameter():
        return parse_labels(text)


@contextlib.contextmanager
def _as_bad_parameter() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_JOB_OPTIONS = [
    click.option(
        "--num-cpus",
        type=_amount,
        metavar="NUMBER",
        help="CPUs each rank offers (default: those it may use).",
    ),
    click.option(
        "--num-gpus",
        type=_count,
        metavar="NUMBER",
        help="GPUs each rank offers (default: its share of those it sees).",
    ),
    click.option(
        "--resources",
        type=_resources,
        metavar="JSON",
        help="Custom resources each rank offers: '{\"licence\": 2}'.",
    ),
    click.option(
        "--labels",
        type=_labels,
        metavar="LABELS",
        help="Labels of each rank's node: rack=7,kind=fast, or as JSON.",
    ),
    click.option(
        "--object-store-memory",
        type=_size,
        metavar="SIZE",
        help="Size of each rank's object store: 200MB, 4GiB, or bytes.",
    ),
    click.option(
        "--head-cpus",
        type=_amount,
        metavar="NUMBER",
        help="CPUs rank 0 offers (default: none if it shares its host).",
    ),
    click.option("--namespace", metavar="NAME", help="The script's namespace for named actors."),
    click.option(
        "--spill-dir",
        type=click.Path(exists=True, file_okay=False, writable=True),
        metavar="DIR",
        help="Where each node puts objects that do not fit into memory (default: $SLURM_TMPDIR, $TMPDIR or /tmp).",
    ),
    click.option("--log-dir", type=click.Path(file_okay=False), metavar="DIR", help="Keep the job's full logs here."),
    click.option(
        "--bind-workers", is_flag=True, help="Keep each task on CPUs of its own, near its memory (default: no)."
    ),
    click.option(
        "--fail-infeasible",
        is_flag=True,
        help="Fail what no node could ever run, rather than wait (default: wait, as Ray).",
    ),
    click.option("--log-to-driver/--no-log-to-driver", default=True, help="Show what workers print (default: yes)."),
    click.option("--as-ray", is_flag=True, help="Let 'import ray' mean hpcray, in SCRIPT and its workers."),
    click.option("-m", "is_module", is_flag=True, help="SCRIPT is the name of a module, as under python -m."),
    click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGS]..."),
]


def _takes_job_options(function: _Function) -> _Function:
    for option in reversed(_JOB_OPTIONS):
        function = option(function)
    return function


class _Hinting(click.Group):
    """Answers `hpcray script.py` with the command that was meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and (args[0].endswith(".py") or Path(args[0]).is_file()):
            raise click.UsageError(f"no command {args[0]!r}; did you mean: hpcray run {' '.join(args)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Hinting)
@click.version_option(__version__, message="hpcray %(version)s")
def _cli() -> None:
    """Ray's programming model as one MPI job."""


@_cli.command("run", context_settings={"allow_interspersed_args": False})
@click.option(
    "-n",
    "--ranks",
    type=click.IntRange(min=1),
    help="Start this many ranks with mpirun (default: one, without MPI).",
)
@click.option(
    "--mpirun",
    envvar="HPCRAY_MPIRUN",
    metavar="PATH",
    help="The mpirun to use (default: Python's, then PATH's).",
)
@_takes_job_options
def _run(ranks: int | None, mpirun: str | None, **job: Any) -> NoReturn:
    """Run a Ray-style SCRIPT with its ARGS as one job.

    Options come before SCRIPT; all that follows it belongs to it. Under mpirun or srun each rank takes its
    part; elsewhere this is one rank, or -n of them. The exit code is the script's.

    What a rank offers may also be said in its environment: HPCRAY_NUM_CPUS, HPCRAY_NUM_GPUS, HPCRAY_HEAD_CPUS,
    HPCRAY_OBJECT_STORE_MEMORY, HPCRAY_RESOURCES, HPCRAY_LABELS.
    """
    if not job["command"]:
        what = "module" if job["is_module"] else "script"
        raise click.UsageError(f"no {what} given: hpcray run [OPTIONS] SCRIPT [ARGS]...")
    _start(_job_options(**job), ranks, mpirun)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-n", "--ranks", type=click.IntRange(min=1), help="Start this many ranks with mpirun.")
@click.option("--mpirun", envvar="HPCRAY_MPIRUN", metavar="PATH", help="The mpirun to use.")
@_takes_job_options
def _module(ranks: int | None, mpirun: str | None, **job: Any) -> NoReturn:
    """Run a Ray-style SCRIPT with its ARGS as one job, or, without SCRIPT, a job that drivers attach to."""
    _start(_job_options(**job), ranks, mpirun)


@_cli.command("doctor")
@click.option("--ray-api", is_flag=True, help="List Ray's public names instead, and which of them hpcray has.")
def _doctor(*, ray_api: bool) -> NoReturn:
    """Say what hpcray finds here: MPI, hosts, CPUs, memory, GPUs, limits. Alone or under mpirun/srun.

    Exits with 1 if something will not work, else with 0.
    """
    if ray_api:
        from hpcray.launcher.ray_api import report

        sys.exit(report())

    from hpcray.launcher import bootstrap, doctor

    sys.exit(bootstrap.run_doctor(doctor.report))


@_cli.command("stop")
def _stop() -> NoReturn:
    """Stop this user's job on this host that was started without a script."""
    from hpcray.launcher import bootstrap

    sys.exit(bootstrap.stop_job())


@_cli.command("memory")
@click.option("--address", default="auto", metavar="ADDRESS", help="The job, if several of yours run on this host.")
@click.option("--limit", type=click.IntRange(min=0), default=50, metavar="N", help="Show the N largest objects (50).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def _memory(address: str, limit: int, as_json: bool) -> NoReturn:
    """Show what lies in the object stores of this user's running job, on rank 0's host.

    Per object: size, the ranks that have it and how, who looks at its memory, who refers to it, who made it. Then a line
    per rank. Exits with 2 if there is no job to look at.
    """
    from hpcray.launcher import memory

    sys.exit(memory.show(address, limit=limit, as_json=as_json))


@_cli.command("explain")
@click.argument("name")
@click.option("--address", default="auto", metavar="ADDRESS", help="The job, if several of yours run on this host.")
def _explain(name: str, address: str) -> NoReturn:
    """Say why NAME waits, or where it runs: a task, actor, object or placement group of this user's running job.

    NAME is the name of a function, class, actor or placement group, or an id in hexadecimal digits. Exits with 1 if the job
    does not know it, with 2 if there is no job to ask.
    """
    from hpcray.launcher import explain

    sys.exit(explain.show(address, name))


def main() -> NoReturn:
    """The `hpcray` command. Ends the process: with 2 and one line for a wrong call."""
    _invoke(_cli, "hpcray", sys.argv[1:])


def main_module() -> NoReturn:
    """``python -m hpcray [run] [OPTIONS] [SCRIPT ARGS…]``, and the other commands. Ends the process."""
    arguments = sys.argv[1:]
    if arguments and (arguments[0] in _cli.commands or arguments[0] == "--version"):
        _invoke(_cli, "python -m hpcray", arguments)
    _invoke(_module, "python -m hpcray", arguments)


def _invoke(command: click.Command, name: str, arguments: Sequence[str]) -> NoReturn:
    try:
        status = command.main(list(arguments), prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()))
    except (LaunchError, MpirunNotFound) as error:
        _fail(str(error))
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> NoReturn:
    click.echo(f"hpcray: {message}", err=True)
    sys.exit(2)


def _job_options(command: tuple[str, ...], is_module: bool, **options: Any) -> JobOptions:
    if command and not is_module and not Path(command[0]).exists():
        raise click.UsageError(f"no such script: {command[0]}")
    if options["as_ray"]:
        if not command:
            raise click.UsageError("--as-ray needs a script; drivers that attach call hpcray.as_ray() themselves")
        if sys.flags.ignore_environment or sys.flags.no_site:
            raise click.UsageError(
                "--as-ray cannot reach a script under python -E, -I or -S: call hpcray.as_ray() in it"
            )
    for name in ("resources", "labels"):
        options[name] = options[name] or {}
    script = None
    if command:
        flags = interpreter_flags(sys.orig_argv)
        script = [sys.executable, *flags, *(["-m"] if is_module else []), *command]
    try:
        return with_environment(JobOptions(script=script, **options), os.environ)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _start(options: JobOptions, ranks: int | None, mpirun: str | None) -> NoReturn:
    launch = detect_launch(os.environ)
    if launch.is_mpi and ranks is not None:
        raise click.UsageError(f"-n {ranks} inside a job that {launch.launcher} started; leave -n out")
    if ranks is None or ranks == 1:  # one rank needs no MPI
        from hpcray.launcher.bootstrap import serve_job

        serve_job(options)

    from hpcray.launcher.mpirun import find_mpirun, run_mpirun

    sys.exit(run_mpirun(find_mpirun(mpirun), ranks, _rank_command(options)))


def _rank_command(options: JobOptions) -> list[str]:
    flags = interpreter_flags(sys.orig_argv)
    script = options.script[1 + len(flags) :] if options.script else []
    # With a script, `run` keeps one named "doctor" apart from the command; without, only the module will do.
    module = ["-m", "hpcray", "run"] if script else ["-m", "hpcray"]
    return [sys.executable, *flags, *module, *job_arguments(options), *script]
