"""The table of docs/loading.md is what asapc says."""

from helpers.formats import table
from helpers.paths import ROOT


def test_the_table_of_formats_is_true():
    document = (ROOT / "docs" / "loading.md").read_text()
    missing = [row for row in table() if row not in document]
    assert not missing
