"""Writes the fitted parameters of operators."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from asapc.types.choices import AmortisedParams, Selection
from asapc.types.site import Site


def write_operators(path: Path, sites: Sequence[Site], selection: Selection) -> None:
    """Write the parameters of all operators as safetensors, named "<site>.<parameter>"."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for site in sites:
        params = selection.choices[site.name].candidate.params
        product, dtype = site.wiring.product, site.wiring.dtype
        if product is None:
            tensors[f"{site.name}.loop_scale"] = site.loop.scale.to(dtype)
        else:
            tensors[f"{site.name}.score_scale"] = product.score_scale.to(dtype)
        if isinstance(params, AmortisedParams):
            for kind, of_layers in params._asdict().items():
                tensors |= {f"{site.name}.{kind}.{i}": value for i, value in enumerate(of_layers)}
        elif params is not None:
            tensors[f"{site.name}.query_basis"] = params.query_basis
            tensors[f"{site.name}.key_basis"] = params.key_basis
            tensors[f"{site.name}.knots"] = params.knots
            tensors |= {f"{site.name}.weights.{i}": w for i, w in enumerate(params.weights)}
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
