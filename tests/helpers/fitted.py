"""Sites and small teachers that tests fit operators to."""

from dataclasses import replace
from functools import cache

import torch
from helpers.tolerances import difference

from asapc.capturing.export import export
from asapc.models.vit import VisionTransformer
from asapc.ops.sinkhorn import sinkhorn_plan_ref
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.layout import operands, score_factor, site_inputs
from asapc.passes.record import record
from asapc.planning.calibrate import Fitted, calibrate
from asapc.types.choices import FeatureSet
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Operand, Site

HEADS, DIM, TOKENS = 2, 5, 9
SCALE = torch.tensor([0.3, 2.0], dtype=torch.float64)


def site(half_steps=6, **changes):
    axes = {"scores": "bhnm", "plan": "bhnm", "query": "bhnd", "key": "bhmd", "value": "bhme", "output": "bhne"}
    made = Site(
        name="attention",
        source=None,
        half_steps=half_steps,
        last="rows",
        scale=SCALE,
        row_mass=torch.ones(1, dtype=torch.float64),
        column_mass=torch.ones(1, dtype=torch.float64),
        masked=False,
        groups=1,
        heads=HEADS,
        queries=TOKENS,
        keys=TOKENS,
        head_dim=DIM,
        dtype=torch.float32,
        share=0.5,
        exponential=False,
        logarithm=False,
        product=True,
        padding=None,
        temperature=SCALE,
        folded=torch.ones(HEADS, dtype=torch.float64),
        applied=True,
        **{name: Operand(name, letters) for name, letters in axes.items()},
    )
    return replace(made, **changes)


class Teacher:
    """A tiny untrained model with sharp scores, its sites, and the first one's activations on held-out images."""

    def __init__(self, change, depth=1):
        torch.manual_seed(0)
        model = VisionTransformer(size=4, width=32, depth=depth, heads=2, epsilon=0.05, iterations=5).eval()
        with torch.no_grad():
            for block in model.blocks:
                change(block.attention.qkv)
        images = torch.rand(40, 4, 4)
        self.samples, held_out = Samples({"images": images[:24]}), Samples({"images": images[24:]})
        self.graph = CapturedGraph(export(model, self.samples[:2].inputs), self.samples[:2])
        self.sites = find_sinkhorn(self.graph, self.samples[:2]).sites
        assert len(self.sites) == depth
        self.site = self.sites[0]
        recorded = record(self.graph.program.module(), held_out, [operand.node for operand in operands(self.site)])
        given_tensors = [recorded[operand.node] for operand in operands(self.site)]
        self.inputs = site_inputs(self.site, given_tensors, score_factor(self.site, torch.float32))
        scores, _, _, values = self.inputs
        self.output = sinkhorn_plan_ref(scores, self.site.half_steps) @ values.double()

    def calibrate(self, slices=4, closure_steps=0, pieces=0, side="keys", paired=False):
        features = FeatureSet(slices, pieces, side, paired)
        sets = {self.site.name: [features]}
        fitting, selection = self.samples[:18], self.samples[18:]
        return calibrate(self.graph, sets, [self.site], fitting, selection, closure_steps)[
            Fitted(self.site.name, features)
        ]

    def error(self, operator):
        return difference(operator(*self.inputs), self.output)


def sound(qkv):
    pass


cached_teacher = cache(Teacher)
