"""Models and samples that are objects in memory become what a file would give, or are refused with what to give."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from asapc.errors import AsapcError, CheckpointError, OptionError, SamplesError
from asapc.loading.objects import hash_weights, load_object, read_samples
from asapc.loading.samples import UNNAMED

X, MASK, LABELS = torch.rand(20, 5), torch.rand(20, 5) > 0.5, torch.arange(20) % 3


class One(nn.Module):
    def forward(self, x):
        return x


class Two(nn.Module):
    def forward(self, x, mask):
        return x * mask


class Optional(nn.Module):
    def forward(self, x, mask=None):
        return x


class Many(nn.Module):
    def forward(self, *tensors):
        return tensors[0]


def read(samples, model=One, most=1000):
    return read_samples(samples, load_object(model()), most)


@pytest.mark.parametrize(
    ("samples", "model", "names", "labelled"),
    [
        (X, One, [UNNAMED], False),
        (X.numpy(), One, [UNNAMED], False),
        ((X,), One, ["x"], False),
        ((X, LABELS), One, ["x"], True),
        ((X, MASK), Two, ["x", "mask"], False),
        ((X, MASK, LABELS), Two, ["x", "mask"], True),
        ((X, MASK), Optional, ["x", "mask"], False),
        (((X, MASK), LABELS), Two, ["x", "mask"], True),
        (({"x": X, "mask": MASK}, LABELS), Two, ["x", "mask"], True),
        ({"x": X.numpy(), "mask": MASK, "labels": LABELS.numpy()}, Two, ["x", "mask"], True),
        ({"x": X, "mask": None}, Optional, ["x"], False),
        ((X, MASK), Many, ["input_0", "input_1"], False),
    ],
)
def test_samples_are_named_as_the_forward_names_them(samples, model, names, labelled):
    for given in (samples, [samples], iter([samples])):  # one batch alone is all samples
        result = read(given, model)
        assert list(result.inputs) == names
        torch.testing.assert_close(next(iter(result.inputs.values())), X)
        assert (result.labels is not None) == labelled


def test_a_loader_is_read_up_to_a_bound_and_no_further():
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=8)
    result = read(loader, most=12)
    torch.testing.assert_close(result.inputs["x"], X[:12])
    torch.testing.assert_close(result.labels, LABELS[:12])

    def endless():
        while True:
            yield X

    assert len(read(endless(), most=50)) == 50


def test_the_path_of_a_file_is_read_as_from_the_command_line(tmp_path):
    np.savez(tmp_path / "samples.npz", x=X.numpy())
    for path in (tmp_path / "samples.npz", str(tmp_path / "samples.npz")):
        torch.testing.assert_close(read(path).inputs["x"], X)


@pytest.mark.parametrize(
    ("samples", "model", "message"),
    [
        ((X, LABELS), Optional, "may be the input mask or labels"),
        ((X, MASK, MASK), One, "has 3 arrays; the forward takes x"),
        ((X, X), One, "has 2 arrays"),  # a target that is no class
        ((X,), Two, "has 1 arrays"),
        (5, One, "are a int"),
        (None, One, "are a NoneType"),
        ([], One, "are empty"),
        (["x"], One, "a batch of the samples is a str"),
        ([{"x": "text"}], One, "hold a str where an array belongs"),
        (TensorDataset(X), One, "gives single samples"),
        ([X, X[:, :3]], One, "batch 1 of the samples holds an array (3,) float32, the first an array (5,) float32"),
        ([(X, LABELS), X], One, "batch 1"),
        (np.array(["a"]), One, "array of <U1"),
        (np.ma.masked_array(X.numpy(), MASK.numpy()), One, "masked entries"),
        (X * float("nan"), One, "the samples: the array holds NaN"),
        (torch.tensor(1.0), One, "sample axis"),
        (X.to_sparse(), One, "torch.sparse_coo"),
        (X.to("meta"), One, "on meta"),
        (((X, "x"), LABELS), Two, "begins with a tuple"),
    ],
)
def test_what_is_no_samples_is_refused_with_what_would_be(samples, model, message):
    with pytest.raises(SamplesError) as caught:
        read(samples, model)
    assert message in str(caught.value)
    assert caught.value.hint


def test_a_module_is_copied_and_its_mode_device_and_gradients_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train()
    loaded = load_object(model)
    assert model.training
    assert not loaded.module.training
    assert loaded.module[0].weight is not model[0].weight
    assert (loaded.parameters, str(loaded.path)) == (12, "<Sequential>")
    assert loaded.sha256 == hash_weights(model)
    with torch.no_grad():
        model[0].bias[0] += 1
    assert loaded.sha256 != hash_weights(model)


def test_wrappers_are_taken_off():
    model = nn.Linear(2, 2)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert isinstance(load_object(wrapped).module, nn.Linear)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.last = self.weight * 2


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(2, 2).state_dict(), OptionError, "not a OrderedDict"),
        (nn.Linear, OptionError, "not a type"),
        (None, OptionError, "not a NoneType"),
        (nn.Linear(2, 2, device="meta"), CheckpointError, "no values for weight"),
        (nn.LazyLinear(2), CheckpointError, "no values for weight"),
        (Remembering(), CheckpointError, "<Remembering> cannot be copied"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_do(model, error, message):
    with pytest.raises(error) as caught:
        load_object(model)
    assert message in str(caught.value)
    assert caught.value.hint


def test_weights_that_are_no_numbers_are_refused():
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(AsapcError, match="weight holds NaN"):
        load_object(model)
