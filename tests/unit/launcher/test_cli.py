import sys

import pytest

from hpcray.launcher import cli
from hpcray.launcher.options import JobOptions


class Ended(Exception):
    """What the stand-ins for starting a job raise, with what they were asked."""


@pytest.fixture(autouse=True)
def outside_of_a_job(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").touch()
    (tmp_path / "doctor").touch()
    monkeypatch.setattr(sys, "orig_argv", ["python", "hpcray"])
    monkeypatch.setattr(cli.os, "environ", {})


@pytest.fixture
def asked(monkeypatch):
    """Calls the command line; gives the (options, ranks, mpirun) of the job that it would start."""

    def start(options, ranks, mpirun):
        raise Ended(options, ranks, mpirun)

    monkeypatch.setattr(cli, "_start", start)

    def call(*arguments, main=cli.main):
        monkeypatch.setattr(sys, "argv", ["hpcray", *arguments])
        with pytest.raises(Ended) as caught:
            main()
        return caught.value.args

    return call


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls the command line; gives the one line by which it refuses."""

    def call(*arguments, main=cli.main):
        monkeypatch.setattr(sys, "argv", ["hpcray", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert caught.value.code == 2
        assert out == ""
        assert err.startswith("hpcray: ")
        assert err.count("\n") == 1
        return err

    return call


def test_all_after_the_script_belongs_to_it(asked):
    options, ranks, mpirun = asked("run", "-n", "3", "script.py", "-n", "4", "--help", "--", "-m", "x")
    assert options == JobOptions(script=[sys.executable, "script.py", "-n", "4", "--help", "--", "-m", "x"])
    assert (ranks, mpirun) == (3, None)


def test_every_option_arrives(asked):
    options, _, mpirun = asked(
        "run",
        *[
            "--num-cpus",
            "2",
            "--num-gpus",
            "3",
            "--labels",
            "rack=7",
            "--resources",
            '{"disk": 1}',
            "--object-store-memory",
            "4KiB",
        ],
        *[
            "--head-cpus",
            "0",
            "--log-dir",
            "logs",
            "--no-log-to-driver",
            "--namespace",
            "n",
            "--mpirun",
            "/m",
        ],
        "script.py",
    )
    assert options == JobOptions(
        script=[sys.executable, "script.py"],
        num_cpus=2,
        num_gpus=3,
        labels={"rack": "7"},
        resources={"disk": 1.0},
        object_store_memory=4096,
        head_cpus=0,
        log_dir="logs",
        log_to_driver=False,
        namespace="n",
    )
    assert mpirun == "/m"


def test_the_environment_says_what_the_command_line_leaves_open(asked, refused, monkeypatch):
    told = {"HPCRAY_NUM_CPUS": "3", "HPCRAY_NUM_GPUS": "1", "HPCRAY_LABELS": "rack=7,kind=slow"}
    monkeypatch.setattr(cli.os, "environ", told)
    options, _, _ = asked("run", "--num-gpus", "2", "--labels", "kind=fast", "script.py")
    assert (options.num_cpus, options.num_gpus, options.labels) == (3, 2, {"rack": "7", "kind": "fast"})
    told["HPCRAY_RESOURCES"] = "licence=2"
    assert "the environment variable HPCRAY_RESOURCES: not JSON" in refused("run", "script.py")


def test_a_module_needs_no_file(asked):
    options, _, _ = asked("run", "-m", "package.module", "-m", "--x")
    assert options.script == [sys.executable, "-m", "package.module", "-m", "--x"]


def test_python_dash_m_takes_a_script_with_or_without_run(asked):
    for arguments in (["script.py", "-n"], ["run", "script.py", "-n"]):
        options, ranks, _ = asked(*arguments, main=cli.main_module)
        assert options.script == [sys.executable, "script.py", "-n"]
        assert ranks is None


def test_python_dash_m_without_a_script_is_a_job_that_stays(asked):
    options, ranks, _ = asked("--num-cpus", "1", main=cli.main_module)
    assert options == JobOptions(num_cpus=1)
    assert ranks is None


def test_the_scripts_python_has_this_ones_flags(asked, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-X", "dev", "-m", "hpcray", "script.py"])
    options, _, _ = asked("script.py", main=cli.main_module)
    assert options.script == [sys.executable, "-u", "-X", "dev", "script.py"]


@pytest.mark.parametrize(
    "options",
    [
        JobOptions(),
        JobOptions(script=["PYTHON", "script.py", "--num-cpus", "3"], num_cpus=1, resources={"a": 1.0}),
        JobOptions(script=["PYTHON", "doctor"], head_cpus=2, log_to_driver=False, object_store_memory=5),
        JobOptions(script=["PYTHON", "-m", "package.module", "-x"], namespace="n", log_dir="d", num_gpus=0),
        JobOptions(labels={"rack": "7", "ray.io/market-type": ""}, num_gpus=2),
    ],
)
def test_a_rank_that_mpirun_starts_is_asked_for_the_same(asked, options):
    if options.script:
        options.script[0] = sys.executable
    python, dash_m, hpcray, *arguments = cli._rank_command(options)
    assert (python, dash_m, hpcray) == (sys.executable, "-m", "hpcray")
    assert asked(*arguments, main=cli.main_module) == (options, None, None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run"], "no script given"),
        (["run", "-m"], "no module given"),
        (["run", "nosuch.py"], "no such script: nosuch.py"),
        (["run", "-n", "0", "script.py"], "0 is not in the range x>=1"),
        (["run", "-n", "x", "script.py"], "'x' is not a valid integer"),
        (["run", "--frob", "script.py"], "--frob"),
        (["run", "--resources", "{", "script.py"], "'--resources': not JSON"),
        (["run", "--resources", '{"CPU": 1}', "script.py"], "it comes from num_cpus (--num-cpus)"),
        (["run", "--num-gpus", "0.5", "script.py"], "'--num-gpus': '0.5' is not a whole number >= 0"),
        (
            ["run", "--labels", "rack", "script.py"],
            "'--labels': 'rack' is not a label; write for example rack=7,kind=fast",
        ),
        (["run", "--labels", "ray.io/node-id=x", "script.py"], "'ray.io/node-id' is set by hpcray itself"),
        (["run", "--num-cpus", "-1", "script.py"], "'--num-cpus': '-1' is not a number >= 0"),
        (["run", "--object-store-memory", "3q", "script.py"], "'3q' is not a size"),
        (["script.py", "x"], "did you mean: hpcray run script.py x"),
        (["nosuch.py"], "did you mean: hpcray run nosuch.py"),
        (["frob"], "No such command 'frob'"),
    ],
)
def test_a_wrong_call_gets_one_line_and_2(refused, arguments, told):
    assert told in refused(*arguments)


def test_n_inside_a_job_is_refused(refused, monkeypatch):
    monkeypatch.setattr(cli.os, "environ", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"})
    assert "-n 2 inside a job that openmpi started" in refused("run", "-n", "2", "script.py")


def test_a_missing_mpirun_is_one_line(refused, monkeypatch):
    assert "no such mpirun: /nowhere" in refused("run", "--mpirun", "/nowhere", "-n", "2", "script.py")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"]])
@pytest.mark.parametrize("main", [cli.main, cli.main_module])
def test_version_and_help_end_well(monkeypatch, capsys, arguments, main):
    monkeypatch.setattr(sys, "argv", ["hpcray", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert "hpcray" in capsys.readouterr().out
