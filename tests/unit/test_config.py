"""Settings from the environment."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from hpcray.config import Config, load


def test_without_variables_all_is_default():
    assert load({}) == Config()


@pytest.mark.parametrize("field", fields(Config), ids=lambda field: field.name)
def test_every_setting_can_be_set(field):
    examples = {"bool": ("1", True), "int": ("17", 17), "float": ("0.25", 0.25), "str": ("/scratch", "/scratch")}
    text, value = examples[field.type]
    assert getattr(load({f"HPCRAY_{field.name.upper()}": text}), field.name) == value


@pytest.mark.parametrize(("text", "value"), [("1", True), ("0", False), ("true", True), ("FALSE", False)])
def test_booleans(text, value):
    assert load({"HPCRAY_CHECK": text}).check is value


@pytest.mark.parametrize(
    ("name", "text"), [("HPCRAY_CHECK", "maybe"), ("HPCRAY_INLINE_LIMIT", "10k"), ("HPCRAY_STORE_TIMEOUT", "")]
)
def test_what_does_not_parse_is_an_error_that_names_the_variable(name, text):
    with pytest.raises(ValueError, match=f"{name}={text!r}"):
        load({name: text})


def test_other_variables_are_none_of_its_business():
    assert load({"HPCRAY_DRIVER": "7:token", "PATH": "/bin"}) == Config()


def test_settings_do_not_change_later():
    with pytest.raises(FrozenInstanceError):
        Config().check = True


def test_every_setting_is_documented():
    import inspect

    source = inspect.getsource(Config)
    for field in fields(Config):
        after = source.split(f"    {field.name}:", 1)[1].split("\n", 2)[1]
        assert after.strip().startswith('"""'), f"{field.name} has no docstring"
