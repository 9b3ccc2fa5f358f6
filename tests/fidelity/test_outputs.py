"""Outputs: what is compared with what, and how."""

from math import inf, nan

import pytest
import torch

from asapc.errors import FidelityError, SamplesError
from asapc.fidelity.budget import check_budget
from asapc.fidelity.outputs import check_labels, compare, metric, verify
from asapc.types.budget import Bound
from asapc.types.results import Metric
from asapc.types.samples import Samples

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0], [5.0, 0.0, 0.0]])


def test_equal_outputs_do_not_differ():
    hop = compare("export", LOGITS, LOGITS.clone())
    assert (hop.name, hop.max_abs, hop.rel, hop.agreement) == ("export", 0.0, 0.0, 1.0)


def test_a_known_difference_is_measured():
    candidate = LOGITS.clone()
    candidate[0] = torch.tensor([0.0, 1.0, 0.0])  # one sample of four changes its class
    hop = compare("export", LOGITS, candidate)
    assert hop.max_abs == 2.0
    assert hop.rel == pytest.approx(2 / 40**0.5)  # the squares of LOGITS sum to 40
    assert hop.agreement == 0.75


def test_a_candidate_with_nan_differs_infinitely():
    candidate = LOGITS.clone()
    candidate[1, 1] = nan
    hop = compare("export", LOGITS, candidate)
    assert (hop.max_abs, hop.rel) == (inf, inf)


def test_an_output_without_a_class_axis_has_no_agreement_and_no_metric():
    for output in (torch.rand(4), torch.rand(4, 1), torch.rand(4, 6, 3)):  # the last are hidden states of tokens
        assert compare("export", output, output).agreement is None
        assert metric(output, output, torch.zeros(4)) is None


def test_with_labels_the_last_axis_is_one_of_classes():
    output = torch.rand(4, 6, 3)
    assert compare("export", output, output, labelled=True).agreement == 1.0


@pytest.mark.parametrize("value", [-inf, nan])
def test_what_is_not_finite_in_the_teacher_either_is_no_difference(value):
    masked = torch.tensor([[1.0, value], [2.0, 3.0]])
    assert compare("export", masked, masked.clone()).rel == 0.0
    assert compare("export", masked, masked + 1).rel == pytest.approx((3 / 14) ** 0.5)
    for other in (masked.nan_to_num(nan=0.0, neginf=-1e4), -masked.nan_to_num(nan=-inf), torch.full_like(masked, nan)):
        assert compare("export", masked, other).rel == inf
    # A teacher that gives nothing else is no teacher.
    assert compare("export", torch.full_like(masked, value), torch.full_like(masked, value)).rel == inf


def test_the_metric_is_the_accuracy_of_both_where_there_are_labels():
    compiled = LOGITS.roll(1, dims=0)
    assert metric(LOGITS, compiled, torch.tensor([0, 1, 2, 1])) == Metric("accuracy", 0.75, 0.25)
    assert metric(LOGITS, compiled, None) is None


class Gives:
    """A runner that gives one output whatever the samples."""

    runtime = "none"

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __call__(self, samples):
        return [torch.zeros(len(samples), *self.shape)]


def labelled(*labels: int) -> Samples:
    return Samples({"x": torch.zeros(len(labels), 2)}, torch.tensor(labels))


def test_labels_must_be_among_the_classes():
    check_labels(Gives(3), labelled(0, 1), labelled(2, 0))
    check_labels(Gives(3), Samples({"x": torch.zeros(2, 2)}))
    for parts in ((labelled(0, 1), labelled(3)), (labelled(-1, 1), labelled(2)), (labelled(99, 99),)):
        with pytest.raises(SamplesError, match="the model tells 3 classes apart") as caught:
            check_labels(Gives(3), *parts)
        assert "from 0 to 2" in caught.value.hint


def test_labels_do_not_count_where_samples_have_no_classes():
    for shape in ((), (1,), (7, 5)):  # the last gives a class for each token
        check_labels(Gives(*shape), labelled(0, 99))
        output = torch.rand(2, *shape)
        assert metric(output, output, torch.tensor([0, 99])) is None


class Constant:
    """A runner that returns the first rows of fixed logits, and of what else it is given."""

    runtime = "constant"

    def __init__(self, *outputs: torch.Tensor) -> None:
        self.outputs = outputs

    def __call__(self, samples: Samples) -> list[torch.Tensor]:
        return [output[samples.inputs["index"]] for output in self.outputs]


INDEX = Samples({"index": torch.arange(4)}, torch.tensor([0, 1, 2, 0]))


def test_each_hop_is_compared_with_the_one_before_and_the_last_with_the_first():
    outputs = {"teacher": LOGITS, "capture": LOGITS + 1, "amortisation": LOGITS + 3, "export": LOGITS + 7}
    result = verify({name: Constant(value) for name, value in outputs.items()}, {}, {}, INDEX)
    assert [(hop.name, hop.max_abs) for hop in result.hops] == [("capture", 1), ("amortisation", 2), ("export", 4)]
    assert result.logits_rel == pytest.approx(7 * 12**0.5 / 40**0.5)
    assert (result.samples, result.agreement, result.metric) == (4, 1.0, Metric("accuracy", 1.0, 1.0))


def test_a_hop_is_as_bad_as_its_worst_output_and_integers_have_no_part_in_it():
    maps, tokens = torch.rand(4, 2, 5, 5), torch.arange(4)
    hops = {
        "teacher": Constant(tokens, LOGITS, maps),
        "capture": Constant(tokens + 1, LOGITS, 3 * maps),
        "amortisation": Constant(tokens, LOGITS + 1, 3 * maps),
    }
    many = Samples({"index": torch.arange(4).repeat(20)})  # several batches
    result = verify(hops, {}, {}, many)
    capture, amortisation = result.hops
    assert (capture.rel, capture.agreement) == (pytest.approx(2.0), 1.0)
    assert capture.max_abs == pytest.approx(2 * maps.max().item())
    assert amortisation.rel == pytest.approx((12 / 40) ** 0.5)
    assert result.logits_rel == amortisation.rel  # of the first floating output alone
    broken = verify(hops | {"export": Constant(tokens, LOGITS + 1, maps * nan)}, {}, {}, many)
    with pytest.raises(FidelityError, match="from the step of export on"):
        check_budget(broken, ())


def test_variants_are_compared_with_the_teacher():
    hops = {"teacher": Constant(LOGITS), "export": Constant(LOGITS + 1)}
    variants = {"same": Constant(LOGITS), "wrong": Constant(LOGITS.roll(1, dims=1))}
    result = verify(hops, variants, {}, INDEX).variants
    assert (result["same"].logits_rel, result["same"].agreement) == (0.0, 1.0)
    assert result["wrong"].agreement == 0.0


# In the first case NaN stands where the teacher's class does, so that argmax over NaN gives the right answer.
@pytest.mark.parametrize("logits", [torch.eye(3)[[0, 0, 0, 0]], LOGITS], ids=["one class", "all classes"])
def test_a_compiled_model_that_returns_nan_misses_the_budget(logits):
    hops = {"teacher": Constant(logits), "export": Constant(torch.full_like(logits, nan))}
    broken = verify(hops, {}, {}, INDEX)
    for budget in ((), [Bound("agreement", 0.5)]):
        with pytest.raises(FidelityError) as caught:
            check_budget(broken, budget)
        assert caught.value.exit_code == 3
