"""What a dual of the keys takes in ONNX Runtime: as one more channel, as the runtime's own bias, and as an added mask.

    python -m benchmarks.bias     # a minute

Batch 1, 8 heads of 64, float32. The runtime's own bias is the `attention_bias` of com.microsoft.MultiHeadAttention,
which has to have one entry for every pair; the added mask is the product, sum, softmax and product that TensorRT fuses.
Medians of interleaved calls, and how many processes wanted the machine before. Writes benchmarks/results/bias.json.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from asapc.ops.fused import attend
from asapc.timing.rounds import measure
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.attention import HEADS, SIZE, onnx_runner

RESULTS = Path(__file__).resolve().parent / "results" / "bias.json"
LENGTHS, SECONDS = (512, 2048), 12.0
TOLERANCE = 1e-4


class Unbiased(nn.Module):
    """Softmax attention, fused: the floor."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """Map queries (B, H, N, D), keys, values and a dual (B, H, 1, M), which it leaves aside, to outputs."""
        return attend(q, k, None, v)


class Channel(nn.Module):
    """As it is shipped."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """Compute softmax(q k^T + g) v."""
        return attend(q, k, g, v)


class OwnBias(nn.Module):
    """The runtime's own bias."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """Compute the same as `Channel`."""
        q, k, v, g = (tensor.flatten(0, 1) for tensor in (q, k, v, g))
        bias = g.unsqueeze(1).expand(-1, 1, q.shape[1], -1)
        output: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (q, k, v, None, None, bias),
            {"num_heads": 1, "scale": 1.0},
            dtype=q.dtype,
            shape=q.shape,
            version=1,
        )
        return torch.unflatten(output, 0, (-1, HEADS))


class AddedMask(nn.Module):
    """Product, sum, softmax and product."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """Compute the same as `Channel`."""
        return torch.softmax(q @ k.transpose(-1, -2) + g, dim=-1) @ v


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    modules = {"softmax": Unbiased(), "channel": Channel(), "own bias": OwnBias(), "added mask": AddedMask()}
    rows = []
    load = os.getloadavg()[0]
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(0)
        inputs = {name: torch.randn(2, HEADS, length, SIZE, generator=generator) for name in "qkv"}
        inputs |= {"q": inputs["q"] / SIZE**0.5, "g": torch.randn(2, HEADS, 1, length, generator=generator)}
        samples = Samples(inputs)
        with tempfile.TemporaryDirectory() as folder:
            runners = {name: onnx_runner(module, samples, Path(folder)) for name, module in modules.items()}
        (expected,) = runners["channel"](samples)
        for name in ("own bias", "added mask"):
            torch.testing.assert_close(runners[name](samples)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)
        times = {run.name: run.p50_ms for run in measure(runners, samples, 1, SECONDS)}
        row = {name: round(ms, 3) for name, ms in times.items()}
        rows.append({"batch": 1, "length": length, "milliseconds": row})
        print(length, row, flush=True)
    facts = {"threads": torch.get_num_threads(), "load": round(load, 1), "environment": environment(seed=0)}
    write_json(RESULTS, {"rows": rows, **facts})


if __name__ == "__main__":
    main()
