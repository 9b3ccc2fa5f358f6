"""Fidelity: what is compared, and when the gate closes."""

from math import inf, isnan, nan
from pathlib import Path

import pytest
import torch
from helpers.tolerances import FLOAT32

from asapc.capturing.capture import capture
from asapc.capturing.export import export
from asapc.errors import FidelityError, OptionError, SamplesError
from asapc.fidelity.budget import check_budget
from asapc.fidelity.outputs import check_labels, compare, metric, verify
from asapc.fidelity.sites import site_fidelity
from asapc.models.vit import VisionTransformer
from asapc.ops.sinkhorn import Sinkhorn
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.budget import Bound
from asapc.types.graph import CapturedGraph
from asapc.types.model import LoadedModel
from asapc.types.results import Fidelity, Hop, Metric, SiteFidelity
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


def fidelity(**changes) -> Fidelity:
    values = {
        "samples": 4,
        "logits_rel": 0.01,
        "agreement": 0.99,
        "metric": Metric("accuracy", 0.96, 0.955),
        "hops": (),
        "variants": {},
        "sites": {"a": SiteFidelity(0.03, 0.0, 0.0, 0.01), "b": SiteFidelity(0.05, 0.0, 0.0, 0.02)},
    }
    return Fidelity(**{**values, **changes})


@pytest.mark.parametrize(
    ("met", "missed"),
    [
        (Bound("agreement", 0.99), Bound("agreement", 0.995)),
        (Bound("metric-drop", 0.51), Bound("metric-drop", 0.49)),  # percentage points: 96 - 95.5
        (Bound("relc", 0.05), Bound("relc", 0.04)),  # the worst site counts
        (Bound("column-marginal", 0.02), Bound("column-marginal", 0.015)),
    ],
)
def test_a_budget_is_met_or_missed(met, missed):
    check_budget(fidelity(), [met])
    with pytest.raises(FidelityError, match=str(missed)) as caught:
        check_budget(fidelity(), [met, missed])
    assert caught.value.exit_code == 3
    assert caught.value.hint


def test_without_a_budget_the_default_holds():
    check_budget(fidelity(), ())
    for worse in (
        fidelity(agreement=0.97),
        fidelity(sites={"a": SiteFidelity(0.3, 0.0, 0.0, 0.0)}),
    ):
        with pytest.raises(FidelityError):
            check_budget(worse, ())


def test_the_default_budget_asks_nothing_that_cannot_be_judged():
    check_budget(fidelity(agreement=None, metric=None), ())


@pytest.mark.parametrize("changes", [{"metric": None}, {"agreement": None}], ids=["no labels", "no classes"])
def test_a_budget_that_cannot_be_judged_is_refused_and_says_why(changes):
    bound = Bound("metric-drop", 100.0) if "metric" in changes else Bound("agreement", 0.0)
    # The user's option is at fault, not the compiled model: no FidelityError.
    with pytest.raises(OptionError, match="labels") as caught:
        check_budget(fidelity(**changes), [bound])
    assert str(bound) in str(caught.value)
    assert "--calib" in caught.value.hint


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_site_whose_error_is_nan_misses_every_budget_on_it(order):
    by_name = {"a": SiteFidelity(0.01, 0.0, 0.0, 0.01), "b": SiteFidelity(nan, nan, nan, nan)}
    broken = fidelity(sites={name: by_name[name] for name in order})
    for bound in (Bound("relc", 0.5), Bound("column-marginal", 0.5)):
        with pytest.raises(FidelityError):
            check_budget(broken, [bound])
    with pytest.raises(FidelityError):
        check_budget(broken, ())


def test_a_missed_budget_names_the_step_that_costs_most_and_what_to_do_about_it():
    def of(capture, amortisation, export):
        rels = {"capture": capture, "amortisation": amortisation, "export": export}
        return fidelity(agreement=0.9, hops=tuple(Hop(name, rel, rel, None) for name, rel in rels.items()))

    for hops, name, hint in [
        ((0.3, 0.1, 0.0), "capture", "--early-stop refuse"),
        ((0.0, 0.1, 0.0), "amortisation", "-O1"),
        ((0.0, 0.1, 0.2), "export", "report"),
    ]:
        with pytest.raises(
            FidelityError, match=rf"agreement.*{name} changes the outputs most, by {max(hops):.1e}"
        ) as caught:
            check_budget(of(*hops), ())
        assert hint in caught.value.hint
    # The error of an operator is seen on the graph's own activations: no other step has a part in it.
    with pytest.raises(FidelityError) as caught:
        check_budget(of(0.3, 0.1, 0.0), [Bound("relc", 0.04)])
    assert "capture" not in str(caught.value)
    assert "-O1" in caught.value.hint


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
    found = verify({name: Constant(value) for name, value in outputs.items()}, {}, {}, INDEX)
    assert [(hop.name, hop.max_abs) for hop in found.hops] == [("capture", 1), ("amortisation", 2), ("export", 4)]
    assert found.logits_rel == pytest.approx(7 * 12**0.5 / 40**0.5)
    assert (found.samples, found.agreement, found.metric) == (4, 1.0, Metric("accuracy", 1.0, 1.0))


def test_a_hop_is_as_bad_as_its_worst_output_and_integers_have_no_part_in_it():
    maps, tokens = torch.rand(4, 2, 5, 5), torch.arange(4)
    hops = {
        "teacher": Constant(tokens, LOGITS, maps),
        "capture": Constant(tokens + 1, LOGITS, 3 * maps),
        "amortisation": Constant(tokens, LOGITS + 1, 3 * maps),
    }
    many = Samples({"index": torch.arange(4).repeat(20)})  # several batches
    found = verify(hops, {}, {}, many)
    capture, amortisation = found.hops
    assert (capture.rel, capture.agreement) == (pytest.approx(2.0), 1.0)
    assert capture.max_abs == pytest.approx(2 * maps.max().item())
    assert amortisation.rel == pytest.approx((12 / 40) ** 0.5)
    assert found.logits_rel == amortisation.rel  # of the first floating output alone
    broken = verify(hops | {"export": Constant(tokens, LOGITS + 1, maps * nan)}, {}, {}, many)
    with pytest.raises(FidelityError, match="from the step of export on"):
        check_budget(broken, ())


def test_variants_are_compared_with_the_teacher():
    hops = {"teacher": Constant(LOGITS), "export": Constant(LOGITS + 1)}
    variants = {"same": Constant(LOGITS), "wrong": Constant(LOGITS.roll(1, dims=1))}
    found = verify(hops, variants, {}, INDEX).variants
    assert (found["same"].logits_rel, found["same"].agreement) == (0.0, 1.0)
    assert found["wrong"].agreement == 0.0


# In the first case NaN stands where the teacher's class does, so that argmax over NaN gives the right answer.
@pytest.mark.parametrize("logits", [torch.eye(3)[[0, 0, 0, 0]], LOGITS], ids=["one class", "all classes"])
def test_a_compiled_model_that_returns_nan_misses_the_budget(logits):
    hops = {"teacher": Constant(logits), "export": Constant(torch.full_like(logits, nan))}
    broken = verify(hops, {}, {}, INDEX)
    for budget in ((), [Bound("agreement", 0.5)]):
        with pytest.raises(FidelityError) as caught:
            check_budget(broken, budget)
        assert caught.value.exit_code == 3


@pytest.fixture(scope="module")
def teacher():
    """A small Sinkhorn model as a graph, its one site, and samples."""
    torch.manual_seed(0)
    model = VisionTransformer(size=4, classes=3, width=8, depth=1, heads=2, iterations=10).eval()
    samples = Samples({"images": torch.rand(6, 4, 4)})
    loaded = LoadedModel(model, Path("model.pt"), "0" * 64, 0, samples, samples)
    graph = capture(loaded, samples)
    return graph, find_sinkhorn(graph, samples[:2]).sites, samples


def test_the_exact_operator_costs_nothing_but_rounding(teacher):
    graph, (site,), samples = teacher
    found = site_fidelity(graph, [site], {site.name: exact_operator(site)}, samples)[site.name]
    assert found.relc < FLOAT32
    assert found.plan_tv < FLOAT32
    assert found.row_marginal_error < FLOAT32


def test_softmax_in_the_place_of_sinkhorn_shows_in_every_number_but_the_rows(teacher):
    graph, (site,), samples = teacher
    softmax = Sinkhorn(1)
    exact = site_fidelity(graph, [site], {site.name: exact_operator(site)}, samples)[site.name]
    found = site_fidelity(graph, [site], {site.name: softmax}, samples)[site.name]
    for name in ("relc", "plan_tv", "column_marginal_error"):
        assert getattr(found, name) > 10 * getattr(exact, name)
    assert found.row_marginal_error < FLOAT32


class Zero(torch.nn.Module):
    """An operator whose plan is all zero, so that every error of a site is known."""

    def forward(self, scores, queries, keys, values=None) -> torch.Tensor:
        return torch.zeros_like(scores) if values is None else torch.zeros(*queries.shape[:-1], values.shape[-1])


def test_an_operator_without_mass_has_errors_that_are_known(teacher):
    graph, (site,), samples = teacher
    found = site_fidelity(graph, [site], {site.name: Zero()}, samples)[site.name]
    assert found.row_marginal_error == pytest.approx(1)
    assert found.column_marginal_error == pytest.approx(1)
    assert found.plan_tv == pytest.approx(0.5)  # half of the plan's mass, which is 1 a row
    assert found.relc >= 1  # the teacher's output over itself without its mean


class NotANumber(Zero):
    """An operator that is broken altogether."""

    def forward(self, scores, queries, keys, values=None) -> torch.Tensor:
        return super().forward(scores, queries, keys, values) * nan


def test_an_operator_that_returns_nan_has_no_finite_error(teacher):
    graph, (site,), samples = teacher
    found = site_fidelity(graph, [site], {site.name: NotANumber()}, samples)[site.name]
    assert isnan(found.relc) or found.relc == inf


def test_sites_without_an_operator_are_left_out(teacher):
    graph, sites, samples = teacher
    assert site_fidelity(graph, sites, {}, samples) == {}


def test_the_size_of_the_batches_does_not_change_the_answer(teacher):
    graph, (site,), samples = teacher
    operator = {site.name: Sinkhorn(2)}
    many = Samples({"images": samples.inputs["images"].repeat(11, 1, 1)})  # 66 samples: several batches
    few = site_fidelity(graph, [site], operator, samples)[site.name]
    again = site_fidelity(graph, [site], operator, many)[site.name]
    assert again.relc == pytest.approx(few.relc, rel=FLOAT32)


class Padded(torch.nn.Module):
    """Sinkhorn attention that leaves padded keys out."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, live):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        scores = (4 * q @ k.mT).masked_fill(~live[:, None, None, :], -inf)
        for i in range(7):
            sums = torch.logsumexp(scores, dim=-1 - i % 2, keepdim=True)
            scores = scores - sums.where(sums > -inf, 0.0)
        return scores.exp() @ v


@pytest.fixture(scope="module")
def padded():
    """A masked site, and samples of several lengths."""
    torch.manual_seed(0)
    lengths = torch.tensor([6, 3, 5, 1, 4, 6])
    samples = Samples({"x": torch.randn(6, 6, 8), "live": torch.arange(6) < lengths.unsqueeze(-1)})
    graph = CapturedGraph(export(Padded().eval(), samples[:2].inputs), samples[:2])
    [site] = find_sinkhorn(graph, samples[:3]).sites
    assert (site.loop.half_steps, site.loop.last, site.loop.masked) == (7, "rows", True)
    return graph, site, samples


def test_the_exact_operator_of_a_masked_site_costs_nothing_but_rounding(padded):
    graph, site, samples = padded
    found = site_fidelity(graph, [site], {site.name: exact_operator(site)}, samples)[site.name]
    assert max(found.relc, found.plan_tv, found.row_marginal_error) < FLOAT32
    # The teacher's own columns: half-steps that end on rows leave them off.
    reference = site_fidelity(graph, [site], {site.name: Sinkhorn(301, masked=True)}, samples)[site.name]
    assert reference.column_marginal_error < min(FLOAT32, found.column_marginal_error)


def test_an_operator_that_does_not_see_the_mask_is_found_out(padded):
    graph, site, samples = padded
    softmax = site_fidelity(graph, [site], {site.name: Sinkhorn(1, masked=True)}, samples)[site.name]
    assert softmax.row_marginal_error < FLOAT32
    assert min(softmax.relc, softmax.plan_tv, softmax.column_marginal_error) > 0.01

    class Unmasked(torch.nn.Module):
        def forward(self, scores, queries, keys, values=None):
            return Sinkhorn(7)(queries @ keys.mT, values=values)

    assert site_fidelity(graph, [site], {site.name: Unmasked()}, samples)[site.name].relc > 0.1


def test_a_sample_without_any_live_key_is_left_out_of_the_fidelity(padded):
    graph, site, samples = padded
    operator = {site.name: Sinkhorn(3, masked=True)}
    before = site_fidelity(graph, [site], operator, samples)[site.name]
    empty = Samples({"x": torch.randn(1, 6, 8), "live": torch.zeros(1, 6, dtype=torch.bool)})
    more = Samples({name: torch.cat([value, empty.inputs[name]]) for name, value in samples.inputs.items()})
    after = site_fidelity(graph, [site], operator, more)[site.name]
    for name in ("relc", "plan_tv", "row_marginal_error", "column_marginal_error"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=FLOAT32, abs=FLOAT32)


def test_a_plan_whose_logarithm_is_the_answer_is_compared_as_a_plan():
    class Matching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            scores = 4 * self.to_q(x) @ self.to_k(x).mT
            for i in range(6):
                scores = scores.log_softmax(dim=-1 - i % 2)
            return scores

    samples = Samples({"x": torch.randn(4, 5, 8)})
    graph = CapturedGraph(export(Matching().eval(), samples[:2].inputs), samples[:2])
    [site] = find_sinkhorn(graph, samples[:2]).sites
    assert (site.wiring.logarithm, site.loop.last, site.wiring.applied) == (True, "columns", False)
    found = site_fidelity(graph, [site], {site.name: exact_operator(site)}, samples)[site.name]
    assert max(found.relc, found.plan_tv, found.column_marginal_error) < FLOAT32
    fewer = site_fidelity(graph, [site], {site.name: exact_operator(site, 2)}, samples)[site.name]
    assert min(fewer.relc, fewer.plan_tv) > 0.01
