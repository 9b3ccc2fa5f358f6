import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asapc.passes.layout import align, arrange, follow_axes, invert, positions, restore

quick = settings(max_examples=100, deadline=None)
MERGED = {"z": "bh", "y": "hb"}


@st.composite
def layouts(draw, last_two="nm", whole=False):
    """Axes in any order and the length of each letter; `whole` keeps axes that the samples or heads need."""
    merged = draw(st.sampled_from(["", "z", "y"]))
    letters = list(last_two + (merged or "bh"))
    grouped = not merged and draw(st.booleans())
    letters += ["g"] if grouped else []
    sizes = {letter: draw(st.integers(2, 4)) for letter in "bhgnmde"}
    if not whole and not merged:
        for letter in draw(st.sets(st.sampled_from("bhg"))) & set(letters):
            letters.remove(letter)  # shared by all samples, heads or groups
    letters += ["1"] * draw(st.integers(0, 2))
    return "".join(draw(st.permutations(letters))), sizes, sizes["g"] if grouped else 1


def length(letter, sizes):
    if letter == "1":
        return 1
    return sizes["b"] * sizes["h"] if letter in MERGED else sizes[letter]


def numbered(axes, sizes):
    """A tensor of the layout, each of whose entries says where it is from, by number of sample, group, head ..."""
    shape = [length(letter, sizes) for letter in axes]
    total = torch.zeros(shape, dtype=torch.long)
    for axis, letter in enumerate(axes):
        along = torch.arange(shape[axis])
        if letter == "z":
            values = along // sizes["h"] * place("b") + along % sizes["h"] * place("h")
        elif letter == "y":
            values = along // sizes["b"] * place("h") + along % sizes["b"] * place("b")
        else:
            values = along * place(letter)
        total = total + values.reshape([-1 if i == axis else 1 for i in range(len(axes))])
    return total


def place(letter):
    """A digit for each letter, so that a sum tells all of them; none for axes of length 1."""
    return 0 if letter == "1" else 10 ** "bghnmde".index(letter)


def expected(axes, last_two, sizes, groups, heads):
    """What `arrange` should give, entry by entry: 0 where the layout lacks a letter."""
    has = set("".join(MERGED.get(letter, letter) for letter in axes))
    samples = sizes["b"] if "b" in has else 1
    heads = heads if groups > 1 or "h" in has else 1
    rows, columns = (sizes[letter] for letter in last_two)
    result = torch.zeros(samples, heads, rows, columns, dtype=torch.long)
    for head in range(heads):
        digits = {"g": head // sizes["h"], "h": head % sizes["h"]}
        result[:, head] += sum(place(letter) * digit for letter, digit in digits.items() if letter in has)
    for axis, letter in ((0, "b"), (2, last_two[0]), (3, last_two[1])):
        if letter in has:
            along = place(letter) * torch.arange(result.shape[axis])
            result += along.reshape([-1 if i == axis else 1 for i in range(4)])
    return result


@quick
@given(st.sampled_from(["nm", "nd", "me"]).flatmap(lambda two: st.tuples(st.just(two), layouts(two))))
def test_every_entry_lands_where_its_letters_say(case):
    last_two, (axes, sizes, groups) = case
    heads = groups * sizes["h"]
    actual = arrange(numbered(axes, sizes), axes, last_two, groups, heads)
    assert torch.equal(actual, expected(axes, last_two, sizes, groups, heads))


@quick
@given(st.sampled_from(["nm", "ne"]).flatmap(lambda two: st.tuples(st.just(two), layouts(two, whole=True))))
def test_restoring_undoes_arranging_and_the_other_way_round(case):
    last_two, (axes, sizes, groups) = case
    heads = groups * sizes["h"]
    tensor = numbered(axes, sizes)
    arranged = arrange(tensor, axes, last_two, groups, heads)
    assert arranged.shape == (sizes["b"], heads, *(sizes[letter] for letter in last_two))
    assert torch.equal(restore(arranged, axes, last_two, groups, heads), tensor)
    noise = torch.randn(arranged.shape)
    restored = restore(noise, axes, last_two, groups, heads)
    assert restored.shape == tensor.shape
    assert torch.equal(arrange(restored, axes, last_two, groups, heads), noise)


@quick
@given(st.permutations("bnm"), st.integers(0, 2))
def test_a_layout_without_heads_is_restored_too(letters, ones):
    axes = "1" * ones + "".join(letters)
    tensor = torch.randn([{"1": 1, "b": 3, "n": 4, "m": 5}[letter] for letter in axes])
    assert torch.equal(restore(arrange(tensor, axes, "nm", 1, 1), axes, "nm", 1, 1), tensor)


def test_samples_and_heads_in_one_axis_are_told_apart_by_their_order():
    by_sample = torch.arange(6).reshape(6, 1, 1)
    assert arrange(by_sample, "znm", "nm", 1, 3)[..., 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrange(by_sample, "ynm", "nm", 1, 3)[..., 0, 0].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_heads_in_groups_that_share_their_keys_are_repeated_group_by_group():
    keys = torch.arange(2).reshape(1, 2, 1, 1)  # one for each group of three heads
    assert arrange(keys, "bgmd", "md", 2, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]


@st.composite
def sources(draw):
    """Letters and lengths of a source tensor, and how its axes are moved about."""
    letters = "".join(draw(st.permutations("bhnm")))
    return letters, [draw(st.integers(2, 4)) for _ in letters]


@quick
@given(sources(), st.data())
def test_axes_are_followed_through_permutations_and_new_axes(source, data):
    letters, shape = source
    order = data.draw(st.permutations(range(4)))
    actual, wanted = positions(shape).permute(order), [letters[i] for i in order]
    for _ in range(data.draw(st.integers(0, 2))):
        axis = data.draw(st.integers(0, actual.dim()))
        actual = actual.unsqueeze(axis)
        wanted.insert(axis, "1")
    assert follow_axes(actual, letters, shape) == "".join(wanted)


@quick
@given(sources(), st.sampled_from(["z", "y"]), st.data())
def test_samples_and_heads_that_are_merged_are_followed(source, letter, data):
    letters, shape = source
    outer, inner = MERGED[letter]
    rest = [a for a in letters if a not in "bh"]
    merged = positions(shape).permute([letters.index(a) for a in (outer, inner, *rest)]).flatten(0, 1)
    order = data.draw(st.permutations(range(3)))
    names = [letter, *rest]
    assert follow_axes(merged.permute(order), letters, shape) == "".join(names[i] for i in order)


@quick
@given(st.permutations("bhn11"), st.sampled_from(["bh", "z", "y"]), st.data())
def test_aligning_is_arranging_and_restoring(axes, heads, data):
    axes, target = "".join(axes), "".join(data.draw(st.permutations([*heads, "n", "1"])))
    tensor = torch.arange(24).reshape([{"b": 2, "h": 3, "n": 4, "1": 1}[letter] for letter in axes])
    expected = restore(arrange(tensor, axes, "nm", 1, 3), target, "nm", 1, 3)
    assert torch.equal(align(tensor, axes, target), expected)


@quick
@given(sources(), st.data())
def test_what_takes_axes_apart_is_not_followed(source, data):
    letters, shape = source
    actual = positions(shape)
    axis = data.draw(st.integers(0, 3))
    kind = data.draw(st.sampled_from(["flip", "roll", "expand", "repeat", "merge"]))
    if kind == "flip":
        actual = actual.flip(axis)
    elif kind == "roll":
        actual = actual.roll(1, axis)
    elif kind == "expand":
        actual = actual.unsqueeze(axis).expand(*shape[:axis], 2, *shape[axis:])
    elif kind == "repeat":
        actual = actual.repeat_interleave(2, axis)
    else:
        assume({letters[axis], letters[(axis + 1) % 4]} != {"b", "h"})
        actual = actual.movedim((axis, (axis + 1) % 4), (0, 1)).flatten(0, 1)
    assert follow_axes(actual, letters, shape) is None


def test_heads_that_were_taken_apart_and_stacked_are_followed():
    actual = positions((2, 3, 4, 5))
    assert (
        follow_axes(torch.cat([part.squeeze(1) for part in actual.split(1, dim=1)], dim=0), "bhnm", actual.shape)
        == "ynm"
    )
    assert follow_axes(torch.stack(actual.unbind(1), dim=-1), "bhnm", actual.shape) == "bnmh"


def test_a_part_of_an_axis_is_none():
    actual = positions((2, 3, 4, 5))
    assert follow_axes(actual[..., 1:], "bhnm", actual.shape) is None
    assert follow_axes(actual[..., :-1], "bhnm", actual.shape) is None


@quick
@given(sources(), st.data())
def test_positions_are_inverted_where_they_match_one_to_one(source, data):
    _, shape = source
    moved = positions(shape).permute(data.draw(st.permutations(range(4))))
    back = invert(moved, shape)
    assert back.shape == tuple(shape)
    assert torch.equal(moved.flatten()[back], positions(shape))
    assert invert(moved.flatten()[1:], shape) is None
    assert invert(torch.zeros_like(moved), shape) is None
