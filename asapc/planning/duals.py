"""Compares what a sliced dual estimates with the dual that it stands for, for figures."""

from collections.abc import Mapping

import torch
from torch import Tensor

from asapc.fidelity.maps import spaced
from asapc.ops.sinkhorn import scaled_closures
from asapc.planning.activations import activation
from asapc.planning.calibrate import centre, centred_target, dual_of, features_of, thin, to_dtype
from asapc.types.choices import SlicedDualParams
from asapc.types.site import Site

MAX_POINTS = 300


def true_and_predicted(site: Site, params: SlicedDualParams, values: Mapping[str, Tensor], head: int) -> Tensor:
    """Return points (2, P) of the true dual and of the operator's last estimate of it, each centred, for one head.

    Args:
        site: the site.
        params: of the operator.
        values: of its operands, by the node's name, on a few samples.
        head: the head.
    """
    activations = thin(activation(site, values))
    scores = activations[0]
    oriented = scores.transpose(-1, -2) if params.side == "queries" else scores
    params = to_dtype(params, torch.float64)
    features = features_of(site, params, activations)
    closures: list[Tensor] = []
    while len(closures) < len(params.weights) - 1:
        closures.append(scaled_closures(oriented, dual_of(params, features, closures)))
    target, live = centred_target(site, params.side, scores, params.one_pass)
    estimate = centre(dual_of(params, features, closures), live)
    points = torch.stack([target, estimate])[:, :, head, 0][:, live[:, min(head, live.shape[1] - 1), 0] > 0]
    return points[:, spaced(points.shape[1], MAX_POINTS)].float()
