import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcray.launcher.options import (
    JobOptions,
    interpreter_flags,
    job_arguments,
    parse_amount,
    parse_resources,
    parse_size,
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
        ('{"a": -1}', "must not be negative"),
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
