"""What a worker makes of an environment's variables."""

import pytest

from hpcray.environments.entering import failure, with_variables
from hpcray.exceptions import RuntimeEnvSetupError
from hpcray.worker.serialization import load_error


@pytest.mark.parametrize(
    ("value", "expanded"),
    [
        ("plain", "plain"), ("${HOME}/x", "/home/x"), ("$HOME/x", "/home/x"), ("${NOT_SET}x", "x"), ("$NOT_SET", "$NOT_SET"),
        ("${not_set}", "${not_set}"), ("a$", "a$"), ("${HOME", "${HOME"), ("$${HOME}", "$/home"),
    ],
)  # fmt: skip
def test_variables_are_replaced_as_ray_does(value, expanded):
    assert with_variables({"HOME": "/home"}, {"X": value}) == {"HOME": "/home", "X": expanded}


def test_variables_are_set_in_the_order_of_their_names():
    assert with_variables({"A": "0"}, {"B": "${A}", "A": "${A}1", "C": "${B}2"}) == {"A": "01", "B": "01", "C": "012"}


def test_a_variable_may_extend_itself():
    assert with_variables({"PATH": "/bin"}, {"PATH": "/own:${PATH}"}) == {"PATH": "/own:/bin"}


def test_failures_name_what_happened():
    error = load_error(failure(RuntimeEnvSetupError("pip said no")))
    assert type(error) is RuntimeEnvSetupError
    assert error.error_message == "pip said no"
    assert "No space" in str(load_error(failure(OSError(28, "No space left on device"))))
