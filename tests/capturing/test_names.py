"""Outputs that the user names, whatever the forward calls them."""

import pytest
import torch
from torch import nn

from asapc.capturing.capture import capture_code
from asapc.capturing.names import parse_names
from asapc.errors import OptionError
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples

POINTS = torch.randn(4, 5, 3)


class Two(nn.Module):
    def forward(self, points):
        return {"logits": points.sum(1), "scores": points @ points.mT}


def captured(names, tmp_path):
    loaded = LoadedModel(Two().eval(), tmp_path / "two", "", 0, None, None, output_names=names)
    return capture_code(loaded, Samples({"points": POINTS}))


def test_names_replace_those_of_the_forward_and_survive_a_rewrite(tmp_path):
    assert captured((), tmp_path).output_names == ["logits", "scores"]
    graph = captured(("classes", "map"), tmp_path)
    assert graph.output_names == ["classes", "map"]
    assert list(graph.program.module()(POINTS)) == ["classes", "map"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("one",), "2 outputs: logits, scores"),
        (("a", "b", "c"), "gives 3 names"),
        (("points", "b"), "of an input: points"),
    ],
)
def test_names_that_do_not_fit_the_model_are_refused(names, words, tmp_path):
    with pytest.raises(OptionError, match=words):
        captured(names, tmp_path)


@pytest.mark.parametrize("text", [",", "a,", "a,,b", "a,b,a"])
def test_names_that_are_empty_or_not_apart_are_refused(text):
    with pytest.raises(OptionError):
        parse_names(text)
