import math

import torch
from helpers.paths import ROOT

from asapc.capturing.export import export
from asapc.loading.model import load_model
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.types.graph import CapturedGraph
from benchmarks.language import cross_entropy

CHECKPOINT = ROOT / "models" / "language.pt"


def test_the_shipped_checkpoint_is_what_its_training_claims():
    assert CHECKPOINT.stat().st_size < 2_000_000
    loaded = load_model(CHECKPOINT)
    texts = loaded.held_out.inputs["tokens"]
    with torch.no_grad():
        loss = cross_entropy(loaded.module(texts)[:, :-1], texts[:, 1:])
    claim = torch.load(CHECKPOINT, weights_only=True)["training"]["held_out_perplexity"]
    assert abs(math.exp(loss.item()) / claim - 1) < 1e-4


def test_every_layer_mixes_its_streams_by_a_loop_that_is_found():
    loaded = load_model(CHECKPOINT)
    samples = loaded.calibration[:8]
    graph = CapturedGraph(export(loaded.module, samples[:2].inputs), samples[:2])
    loops = [site.loop for site in find_sinkhorn(graph, samples).sites]
    assert [(loop.half_steps, loop.queries, loop.keys, loop.last) for loop in loops] == [(39, 4, 4, "columns")] * 8
