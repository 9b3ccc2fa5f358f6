"""Sites and small teachers that tests fit operators to."""

from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch
from helpers.tolerances import difference

from asapc.capturing.export import export
from asapc.models.vit import VisionTransformer
from asapc.ops.sinkhorn import sinkhorn_plan_ref
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.layout import score_factor, site_inputs
from asapc.passes.record import record
from asapc.planning.calibrate import FitKey, calibrate
from asapc.types import teacher as types
from asapc.types.choices import FeatureSet
from asapc.types.graph import CapturedGraph
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples
from asapc.types.site import Attention, DotProduct, Findings, Loop, Operand, Site, Wiring

HEADS, DIM, TOKENS = 2, 5, 9
SCALE = torch.tensor([0.3, 2.0], dtype=torch.float64)


def site(half_steps=6, **changes):
    """A site of attention; `changes` name fields of Site or of its parts, or "product" and "attention" as None."""
    ones = torch.ones(1, dtype=torch.float64)
    loop = Loop(half_steps, "rows", HEADS, TOKENS, TOKENS, SCALE, ones, ones, masked=False)
    operands = {name: Operand(name, f"bh{axes}") for name, axes in {"query": "nd", "key": "md"}.items()}
    folded = torch.ones(HEADS, dtype=torch.float64)
    product = DotProduct(**operands, head_dim=DIM, score_scale=SCALE, folded=folded, is_scores=True, padding=None)
    wiring = Wiring(
        scores=Operand("scores", "bhnm"),
        plan=Operand("plan", "bhnm"),
        dtype=torch.float32,
        groups=1,
        exponential=False,
        logarithm=False,
        product=product,
        attention=Attention(Operand("value", "bhme"), Operand("output", "bhne")),
        applied=True,
    )
    return changed(Site("attention", None, 0.5, loop, wiring), **changes)


def changed(site, **changes):
    """A site with other values of fields, of its own or of its parts."""
    loop, wiring = site.loop, site.wiring
    product, attention = changes.pop("product", wiring.product), changes.pop("attention", wiring.attention)

    def own(part):
        return {} if part is None else {f.name: changes.pop(f.name) for f in fields(part) if f.name in changes}

    product = product and replace(product, **own(product))
    attention = attention and replace(attention, **own(attention))
    wiring = replace(wiring, product=product, attention=attention, **own(wiring))
    return replace(site, loop=replace(loop, **own(loop)), wiring=wiring, **changes)


def studied(module, graph, findings, samples):
    """What `study` makes of a module, from a graph and findings that are at hand."""
    loaded = LoadedModel(module, Path("model.pt"), "0" * 64, 5, samples, samples)
    return types.Teacher(loaded, samples, samples, graph, findings, graph, findings.sites, findings.sites)


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
        self.studied = studied(model, self.graph, Findings(tuple(self.sites), ()), self.samples)
        names = [operand.node for operand in self.site.wiring.operands]
        recorded = record(self.graph.program.module(), held_out, names)
        given_tensors = [recorded[name] for name in names]
        self.inputs = site_inputs(self.site, given_tensors, score_factor(self.site, torch.float32))[:4]
        scores, _, _, values = self.inputs
        self.output = sinkhorn_plan_ref(scores, self.site.loop.half_steps) @ values.double()

    def calibrate(self, slices=4, closure_steps=0, pieces=0, side="keys", paired=False):
        features = FeatureSet(slices, pieces, side, paired)
        sets = {self.site.name: [features]}
        fitting, selection = self.samples[:18], self.samples[18:]
        return calibrate(self.graph, sets, [self.site], fitting, selection, closure_steps)[
            FitKey(self.site.name, features)
        ]

    def error(self, operator):
        return difference(operator(*self.inputs), self.output)


def sound(qkv):
    pass


cached_teacher = cache(Teacher)
