"""Sizes that stay open: heads in the batch, by splits of which there are as many for every batch, and distances."""

import pytest
import torch
from torch import nn

from asapc.capturing.export import export
from asapc.types.graph import DynamicAxis


class Parts(nn.Module):
    """Puts heads into the batch, and takes them out again."""

    def __init__(self, apart) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, x):
        heads = torch.cat(x.split(4, dim=-1), 0).tanh()
        return torch.cat(self.apart(heads, x.shape[0]), dim=2)


WAYS = {
    "split": lambda heads, batch: heads.split(batch, 0),
    "split by name": lambda heads, batch: torch.split(heads, split_size_or_sections=batch, dim=0),
    "split another axis": lambda heads, batch: [p.mT for p in heads.mT.transpose(0, 2).split(batch, dim=-1)],
    "chunk": lambda heads, batch: heads.chunk(3),
    "chunk by name": lambda heads, batch: torch.chunk(input=heads, chunks=3, dim=0),
}


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_the_batch_are_the_same_for_every_batch(way):
    module = Parts(WAYS[way])
    program = export(module, {"x": torch.rand(2, 5, 12)}).module()
    for batch in (1, 2, 3, 7):
        x = torch.rand(batch, 5, 12)
        assert torch.equal(program(x), module(x))


def test_an_axis_of_fixed_length_is_split_as_always():
    program = export(Parts(lambda heads, batch: heads.split((2, 3), 1)[1:]), {"x": torch.rand(2, 5, 12)})
    assert any("split" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("points", [lambda x: x, lambda x: x.flatten(1)])  # of each sample, and of the batch
@pytest.mark.parametrize("arguments", [{}, {"p": 1.0}, {"compute_mode": "donot_use_mm_for_euclid_dist"}])
def test_distances_of_any_number_of_points(points, arguments):
    class Distances(nn.Module):
        def forward(self, x):
            return torch.cdist(points(x), points(x).flip(-1), **arguments)

    axes = {"x": {0: DynamicAxis("batch", 1, None), 1: DynamicAxis("points", 2, 64)}}
    for example in (torch.rand(3, 5, 4), torch.rand(40, 30, 4)):
        program = export(Distances(), {"x": example}, axes).module()
        for batch, length in ((1, 2), (2, 26), (30, 64)):
            x = torch.rand(batch, length, 4)
            torch.testing.assert_close(program(x), Distances()(x))
