"""The declarations of options, and the page that is made of them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest
from helpers.paths import ROOT

from asapc.config import OPTIONS, CompileConfig
from asapc.types.options import Option, Range, declared
from asapc.writing.options_page import options_page


def test_the_page_of_options_is_what_the_declarations_say():
    page = (ROOT / "docs" / "options.md").read_text()
    # Write it anew: python -c "import asapc.writing.options_page as p; print(p.options_page(), end='')" > PAGE
    assert page == options_page()


def test_every_field_is_declared_with_a_flag_of_its_own_and_a_sentence():
    assert list(OPTIONS) == [field.name for field in fields(CompileConfig)]
    keys = [{option.key, option.name} for option in OPTIONS.values()]
    assert len(set.union(*keys)) == sum(map(len, keys))
    for option in OPTIONS.values():
        assert option.flag.startswith("-"), option
        assert option.help.endswith("."), option
        assert option.metavar or option.kind is bool, option


def test_the_docstring_describes_every_field():
    for option in OPTIONS.values():
        assert f"{option.name}: {option.help}" in CompileConfig.__doc__


def test_options_of_a_group_stand_together():
    groups = [option.group for option in OPTIONS.values()]
    assert groups == sorted(groups, key=groups.index)


def test_a_declaration_is_completed_by_its_field():
    assert OPTIONS["batches"].kind is int
    assert OPTIONS["batches"].many
    assert OPTIONS["batches"].shown_default == "1 and 32"
    assert OPTIONS["calib"].kind is Path
    assert OPTIONS["model_args"].table
    assert OPTIONS["level"].choices == (0, 1, 2)
    assert OPTIONS["early_stop"].metavar == "bound|refuse"
    assert OPTIONS["force"].shown_default == ""


def test_a_field_that_declares_no_option_is_a_defect():
    @dataclass
    class Plain:
        size: int = 0

    @dataclass
    class Annotation:
        size: Annotated[int, "in pixels"] = 0

    @dataclass
    class Declared:
        size: Annotated[int, Option("--size", "In pixels.")] = 0

    for config in (Plain, Annotation):
        with pytest.raises(TypeError, match="size declares no option"):
            declared(config)
    assert declared(Declared)["size"].kind is int


def test_a_range_holds_its_ends_and_finite_numbers_alone():
    assert 0 in Range(0)
    assert 0 not in Range(0, above=True)
    assert 4 in Range(1, 4)
    assert 5 not in Range(1, 4)
    assert 10**400 in Range(0)
    for number in (float("nan"), float("inf")):
        assert number not in Range(0)
