import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("200MB", 200_000_000),
        ("200 mb", 200_000_000),
        ("4GiB", 4 * 2**30),
        ("4g", 4_000_000_000),
        ("1.5KiB", 1536),
        (".5k", 500),
        ("2TiB", 2 * 2**40),
        ("12345678901234567890B", 12345678901234567890),
    ],
)
def test_sizes_are_decimal_or_binary_as_their_unit_says(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "3q", "-1", "0", "0.1", "1e9", "inf", "2 3", "١٢", "0x10"])
def test_what_is_no_size_is_refused_with_the_text_in_the_message(text):
    with pytest.raises(ValueError, match=r"is not a size|is less than one byte"):
        parse_size(text)


def test_resources_are_numbers_by_name():
    assert parse_resources('{"licence": 2, "disk": 0.5, "none": 0}') == {
        "licence": 2.0,
        "disk": 0.5,
        "none": 0.0,
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{bad", "not JSON"),
        ("[1]", "must be a JSON object"),
        ("3", "must be a JSON object"),
        ('{"": 1}', "needs a name"),
        ('{"CPU": 1}', "--num-cpus"),
        ('{"GPU": 1}', "--num-gpus"),
        ('{"memory": 1}', "not a custom resource"),
        ('{"a": "1"}', 'must be a number, not "1"'),
        ('{"a": true}', "must be a number, not true"),
        ('{"a": NaN}', "must be a number"),
        ('{"a": Infinity}', "must be a number"),
        ('{"a": -1}', "must not be negative"),
        ('{"a": 1e-9}', "the finest that is counted"),
        ('{"object_store_memory": 1}', "--object-store-memory"),
        ('{"node:here": 1}', "every node has its own"),
    ],
)
def test_bad_resources_are_named(text, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        parse_resources(text)


def test_amounts_are_whole_where_they_can_be():
    assert repr(parse_amount("2")) == "2"
    assert repr(parse_amount("2.0")) == "2"
    assert parse_amount("0.5") == 0.5


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "two", ""])
def test_amounts_are_finite_and_not_negative(text):
    with pytest.raises(ValueError, match="is not a number >= 0"):
        parse_amount(text)


def test_gpus_are_whole():
    assert parse_count("0") == 0
    assert parse_count("16") == 16


@pytest.mark.parametrize("text", ["-1", "nan", "0.5", "1e2", "two", "", "²"])
def test_a_part_of_a_gpu_is_not_offered(text):
    with pytest.raises(ValueError, match="is not a whole number >= 0"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", {}),
        ("rack=7", {"rack": "7"}),
        ("rack=7, kind = fast,", {"rack": "7", "kind": "fast"}),
        ("empty=", {"empty": ""}),
        ("ray.io/market-type=spot,my.site/x_y.z=A-1", {"ray.io/market-type": "spot", "my.site/x_y.z": "A-1"}),
        (' {"rack": "7", "ray.io/node-group": "gpu"}', {"rack": "7", "ray.io/node-group": "gpu"}),
    ],
)
def test_labels_are_pairs_or_json(text, labels):
    assert parse_labels(text) == labels


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rack", "'rack' is not a label"),
        ("=7", "'' is not the key of a label"),
        ("-a=7", "'-a' is not the key of a label"),
        ("a/b/c=7", "'a/b/c' is not the key of a label"),
        ("/a=7", "'/a' is not the key of a label"),
        (f"{'k' * 64}=7", "is not the key of a label"),
        (f"{'d.' * 150}d/k=7", "is not the key of a label"),
        ("a=b=c", "'b=c' is not a value of the label 'a'"),
        ("a=b c", "'b c' is not a value of the label 'a'"),
        (f"a={'v' * 64}", "is not a value of the label 'a'"),
        ("hpcray/rank=3", "the label 'hpcray/rank' is set by hpcray itself"),
        ("ray.io/node-id=3", "the label 'ray.io/node-id' is set by hpcray itself"),
        ('{"a": 7}', "7 is not a value of the label 'a'"),
        ('{"a"}', "not JSON"),
    ],
)
def test_bad_labels_are_named(text, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        parse_labels(text)


EVERYTHING = {
    "HPCRAY_NUM_CPUS": "1.5",
    "HPCRAY_NUM_GPUS": "2",
    "HPCRAY_HEAD_CPUS": "0",
    "HPCRAY_OBJECT_STORE_MEMORY": "1GiB",
    "HPCRAY_RESOURCES": '{"licence": 2, "disk": 1}',
    "HPCRAY_LABELS": "rack=7",
}


def test_the_environment_gives_what_was_left_open():
    assert with_environment(JobOptions(), {}) == JobOptions()
    assert with_environment(JobOptions(), dict.fromkeys(EVERYTHING, "")) == JobOptions()
    assert with_environment(JobOptions(), EVERYTHING) == JobOptions(
        num_cpus=1.5,
        num_gpus=2,
        head_cpus=0,
        object_store_memory=2**30,
        resources={"licence": 2.0, "disk": 1.0},
        labels={"rack": "7"},
    )


def test_what_was_asked_for_outdoes_the_environment():
    asked = JobOptions(
        num_cpus=0,
        num_gpus=0,
        head_cpus=1,
        object_store_memory=5,
        resources={"licence": 1.0},
        labels={"rack": "8", "kind": "fast"},
    )
    merged = {"licence": 1.0, "disk": 1.0}
    assert with_environment(asked, EVERYTHING) == replace(asked, resources=merged)


@pytest.mark.parametrize("name", [*EVERYTHING])
def test_a_variable_that_does_not_parse_is_named(name):
    with pytest.raises(ValueError, match=f"the environment variable {name}: "):
        with_environment(JobOptions(), {name: "?"})


@pytest.mark.parametrize(
    ("orig_argv", "flags"),
    [
        (["python", "/usr/bin/hpcray", "run", "-u", "x.py"], []),
        (["python", "-m", "hpcray", "run", "x.py"], []),
        (["python", "-u", "-m", "hpcray"], ["-u"]),
        (["python", "-X", "dev", "-W", "error", "-m", "hpcray", "-W"], ["-X", "dev", "-W", "error"]),
        (["python", "-Xdev", "-Wignore", "-m", "hpcray"], ["-Xdev", "-Wignore"]),
        (["python", "-Im", "hpcray", "-u"], ["-I"]),
        (["python", "-OO", "-c", "import x", "-u"], ["-OO"]),
        (["python", "-mhpcray"], []),
        (["python", "--check-hash-based-pycs", "always", "x"], ["--check-hash-based-pycs", "always"]),
        (["python"], []),
        (["python", "-", "-u"], []),
    ],
)
def test_interpreter_flags_end_where_the_program_begins(orig_argv, flags):
    assert interpreter_flags(orig_argv) == flags


_NAMES = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=8)


@given(
    num_cpus=st.none() | st.integers(0, 300) | st.floats(0, 300),
    resources=st.dictionaries(_NAMES, st.floats(0, 1e6), max_size=3),
    store=st.none() | st.integers(1, 2**40),
    log_to_driver=st.booleans(),
    namespace=st.none() | _NAMES,
)
def test_options_survive_the_command_line(num_cpus, resources, store, log_to_driver, namespace):
    options = JobOptions(
        num_cpus=num_cpus,
        resources=resources,
        object_store_memory=store,
        log_to_driver=log_to_driver,
        namespace=namespace,
    )
    arguments = job_arguments(options)
    assert job_arguments(replace(options, as_ray=True)) == [*arguments, "--as-ray"]
    assert ("--no-log-to-driver" in arguments) == (not log_to_driver)
    given_options = dict(
        zip(arguments[::2], arguments[1::2], strict=False)
    )  # the flag, the only one without a value, comes last
    assert ("--num-cpus" in given_options) == (num_cpus is not None)
    if num_cpus is not None:
        assert parse_amount(given_options["--num-cpus"]) == num_cpus
    if store is not None:
        assert parse_size(given_options["--object-store-memory"]) == store
    if resources:
        assert json.loads(given_options["--resources"]) == resources
    assert given_options.get("--namespace") == namespace
