import pytest
from helpers.documents import tables

from benchmarks.study.frozen import against_claim, section


def form(error: float, speed: float, accuracy: float = 0.9) -> dict:
    return {
        "relative": [error / 2, error],
        "relc": [error, 2 * error],
        "columns": [0.0, 0.1],
        "agreement": 0.95,
        "accuracy": accuracy,
        "ms": [1.0, 1.0],
        "speed": [(speed, speed - 0.1, speed + 0.1), (speed, speed - 0.1, speed + 0.1)],
    }


def row(seed: int, **forms: dict) -> dict:
    fixed = {"as written": form(0.0, 1.0), "exact": form(1e-7, 4.0), "softmax": form(0.9, 20.0)}
    return {
        "task": "points",
        "seed": seed,
        "half_steps": 40,
        "tokens": 64,
        "heads": 4,
        "head_size": 16,
        "batch": 8,
        "threads": 1,
        "accuracy": 0.9,
        "planned": ["keys, hinges, 1 steps", "exact 40"],
        "forms": {"default": form(0.04, 8.0 + 4 * seed)} | fixed | forms,
    }


def test_a_table_has_a_row_for_each_form_with_the_spread_of_the_seeds():
    lines = list(section({"a": row(0), "b": row(1)}))
    assert lines[0] == "## The frozen layer"
    assert "### points: 40 half-steps, 64 tokens, 4 heads of 16, 2 seeds" in lines
    (table,) = tables(lines)
    assert [cells[0] for cells in table[1:]] == ["default", "as written", "exact", "softmax"]
    errors = ["0.0300 ± 0.0000", "0.0600 ± 0.0000", "0.0500 ± 0.0000"]
    assert table[1][1:4] == errors
    assert table[1][-1] == "10.0 ± 2.8"


def test_what_beats_the_default_is_named():
    text = "\n".join(section({"a": row(0), "b": row(1)}))
    assert "By default the planner takes exact 40 or keys, hinges, 1 steps: 10.0 ± 2.8 times as fast" in text
    assert "The exact form takes 2.50 ± 0.71 times as long as that, softmax 0.500 ± 0.141 times." in text
    assert "No other form is as close and as fast." in text
    assert "As accurate and no slower: softmax." in text
    truncated = {"truncated 8": form(0.03, 9.5)}
    assert "As close and no slower: truncated 8." in "\n".join(section({"a": row(0, **truncated)}))


def test_the_widest_interval_is_told():
    assert "are at most 10.0% to either side" in "\n".join(section({"a": row(0)}))


@pytest.mark.parametrize(
    ("half_steps", "least", "share", "told"),
    [
        (40, 5.3, 1.0, "which every seed reaches"),
        (40, 5.2, 0.99, "which not every seed reaches"),
        (40, 9.0, 0.98, "The accuracy is not matched"),
        (10, 9.0, 1.0, ""),
    ],
)
def test_the_claim_is_about_loops_of_its_length_at_matched_accuracy(half_steps, least, share, told):
    text = against_claim(half_steps, least, share)
    assert told in text
    assert bool(text) == bool(told)
