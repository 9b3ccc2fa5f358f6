"""The cache of fits: what it finds again, what it does not, and what happens to its folder."""

import os
from dataclasses import replace
from math import inf, nan

import pytest
import torch
from helpers.fitted import cached_teacher, sound

from asapc.config import CompileConfig
from asapc.planning import cache as module
from asapc.planning.alternatives import look_up
from asapc.planning.cache import Cache, Entry, key_of
from asapc.planning.choose import choose, decide
from asapc.planning.costs import shipped
from asapc.types.choices import Alternatives, Candidate
from asapc.types.results import Fidelity, Hop, Metric, SiteFidelity, VariantFidelity
from asapc.types.samples import Samples

CONFIG = CompileConfig(pieces=(0,))
MODEL = shipped()


@pytest.fixture(scope="module")
def teacher():
    return cached_teacher(sound).studied


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "plans")


def alternatives(teacher, config, cache):
    with look_up(teacher, config, MODEL, cache, lambda detail: None) as check:
        return check.alternatives


def same(one, other):
    """Whether two values are the same, tensors entry by entry."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and same(list(vars(one).values()), list(vars(other).values()))
    return one == other


def test_fits_are_found_again_entry_by_entry(teacher, cache, monkeypatch):
    fitted = alternatives(teacher, CONFIG, cache)
    monkeypatch.setattr("asapc.planning.alternatives.propose", None)  # nothing is fitted again
    found = alternatives(teacher, CONFIG, Cache(cache.folder))
    assert same(list(fitted.candidates.values()), list(found.candidates.values()))
    assert (fitted.wide, fitted.ranges) == (found.wide, found.ranges)


def test_another_budget_finds_the_fits_and_chooses_as_if_there_were_no_cache(teacher, cache, monkeypatch):
    budgets = [replace(CONFIG, fidelity=(term,)) for term in ("relc<=0.5", "relc<=0.01", "agreement>=0.9")]
    expected = [choose(teacher, budget, MODEL) for budget in budgets]
    choose(teacher, CONFIG, MODEL, cache=cache)
    monkeypatch.setattr("asapc.planning.alternatives.propose", None)
    for budget, selection in zip(budgets, expected, strict=True):
        found = choose(teacher, budget, MODEL, cache=cache)
        for name, choice in selection.choices.items():
            assert same(choice.candidate, found.choices[name].candidate)


def test_what_was_checked_is_kept_too(teacher, cache, monkeypatch):
    config = replace(CONFIG, fidelity=("agreement>=0.99",))
    choose(teacher, config, MODEL, cache=cache)
    monkeypatch.setattr("asapc.planning.check.verify", None)
    choose(teacher, config, MODEL, cache=cache)


def test_fidelity_is_read_as_it_was_written(cache):
    hop = Hop("capture", 0.1, inf, None)
    variants = {"exact": VariantFidelity(None, 0.5, None)}
    sites = {"a": SiteFidelity(nan, 0.0, 0.1, 0.2)}
    fidelity = Fidelity(4, 0.1, 0.5, Metric("accuracy", 1.0, 0.5), {"out": 0.1}, (hop,), variants, sites)
    entry = Entry(Alternatives({"a": [Candidate("keep", 3, inf)]}, frozenset("a"), {"a": (0.5, 1.0)}), {"0": fidelity})
    cache.write("key", entry)
    assert repr(cache.read("key").checks) == repr(entry.checks)  # NaN is not equal to itself


@pytest.mark.parametrize(
    "changes",
    [
        {"level": 1},
        {"lowering": "materialised"},
        {"operators": "truncated,exact"},
        {"slices": (2,)},
        {"pieces": (4,)},
        {"batches": (2,)},
        {"seed": 1},
    ],
    ids=str,
)
def test_options_that_fits_follow_from_are_part_of_the_key(teacher, changes):
    assert key_of(teacher, replace(CONFIG, **changes), MODEL) != key_of(teacher, CONFIG, MODEL)


def test_budget_output_and_measuring_are_no_part_of_the_key(teacher):
    others = {"fidelity": ("relc<=0.5",), "out": "elsewhere", "seconds": 1.0, "force": True}
    assert key_of(teacher, replace(CONFIG, **others), MODEL) == key_of(teacher, CONFIG, MODEL)


def test_samples_labels_weights_and_threads_are_part_of_the_key(teacher):
    def nudged(samples):
        return Samples({name: value + 1e-3 for name, value in samples.inputs.items()}, samples.labels)

    key = key_of(teacher, CONFIG, MODEL)
    assert key_of(replace(teacher, calibration=nudged(teacher.calibration)), CONFIG, MODEL) != key
    assert key_of(replace(teacher, held_out=nudged(teacher.held_out)), CONFIG, MODEL) != key
    labelled = replace(teacher.held_out, labels=torch.zeros(len(teacher.held_out), dtype=torch.int64))
    assert key_of(replace(teacher, held_out=labelled), CONFIG, MODEL) != key
    weight = next(iter(teacher.graph.program.state_dict.values()))
    with torch.no_grad():
        weight.flatten()[0] += 1e-3
        changed = key_of(teacher, CONFIG, MODEL)
        weight.flatten()[0] -= 1e-3
    assert changed != key
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert key_of(teacher, CONFIG, MODEL) != key
    finally:
        torch.set_num_threads(threads)


def test_the_costs_are_part_of_the_key(teacher):
    dearer = replace(MODEL, milliseconds={**MODEL.milliseconds, "softmax": 1.0})
    assert key_of(teacher, CONFIG, dearer) != key_of(teacher, CONFIG, MODEL)


def test_the_code_of_asapc_is_part_of_the_key(teacher, monkeypatch):
    key = key_of(teacher, CONFIG, MODEL)
    monkeypatch.setattr(module, "code_digest", lambda: b"other code")
    assert key_of(teacher, CONFIG, MODEL) != key


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_entry_is_fitted_anew_and_replaced(teacher, cache, damage):
    expected = choose(teacher, CONFIG, MODEL, cache=cache)
    (path,) = cache.folder.iterdir()
    content = path.read_bytes()
    flipped = bytes([content[len(content) // 2] ^ 1])
    path.write_bytes({"cut": content[:-9], "empty": b"", "flipped": content[:50] + flipped + content[51:]}[damage])
    selection = choose(teacher, CONFIG, MODEL, cache=cache)
    assert "damaged" in cache.note
    assert str(path) in cache.note
    assert path.read_bytes() == content
    for name, choice in expected.choices.items():
        assert same(choice.candidate, selection.choices[name].candidate)


def test_a_folder_that_cannot_be_written_is_said_and_changes_nothing(teacher, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(tmp_path / "file")  # a file where the folder should be
    assert choose(teacher, CONFIG, MODEL, cache=cache).choices
    assert str(tmp_path / "file") in cache.note


def test_entries_that_were_not_read_for_longest_go_first(teacher, cache, monkeypatch):
    entry = Entry(alternatives(teacher, replace(CONFIG, level=1), None))
    for age, key in enumerate(("new", "old", "older")):
        cache.write(key, entry)
        os.utime(cache.folder / f"{key}.plan", (1e9 - age, 1e9 - age))
    size = (cache.folder / "new.plan").stat().st_size
    cache.read("older")
    monkeypatch.setattr(module, "MAX_BYTES", 2 * size)
    cache.write("newest", entry)
    assert {path.stem for path in cache.folder.iterdir()} == {"newest", "older"}


def test_errors_of_sites_that_were_asked_for_later_are_kept_too(teacher, cache, monkeypatch):
    """A selection that was checked whole, without its sites, and then with them."""
    for of_sites in (False, True):
        with look_up(teacher, CONFIG, MODEL, cache, lambda detail: None) as check:
            check(decide(check, replace(CONFIG, fidelity=("agreement>=0",))), of_sites)
    monkeypatch.setattr("asapc.planning.check.verify", None)
    with look_up(teacher, CONFIG, MODEL, cache, lambda detail: None) as check:
        assert check(decide(check, replace(CONFIG, fidelity=("agreement>=0",)))).sites
