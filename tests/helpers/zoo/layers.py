"""What the models share, so that each can be about one thing."""

import torch
from torch import nn

TOKENS, WIDTH, HEADS, CLASSES = 16, 16, 2, 5
HEAD_DIM = WIDTH // HEADS


def linear(n_in, n_out, gain=1.0):
    """A layer that gives `gain` times unit variance from unit variance: torch's own init leaves scores flat."""
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=gain / n_in**0.5)
    return layer


def tokens(batch, generator):
    return {"x": torch.randn(batch, TOKENS, WIDTH, generator=generator)}


class Classifier(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head((x + self.attention(x)).amax(dim=1))


class Attention(nn.Module):
    """Plain attention around a loop: subclasses say what becomes of the scores."""

    def __init__(self, half_steps, epsilon=0.4):
        super().__init__()
        self.half_steps, self.epsilon = half_steps, epsilon
        self.q, self.k, self.v = (linear(WIDTH, WIDTH) for _ in range(3))
        self.out = linear(WIDTH, WIDTH)

    def heads(self, x):
        return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)  # B H N D

    def forward(self, x):
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5  # B H N N
        return self.out(self.mix(scores, v).transpose(1, 2).flatten(2))  # B N C

    def mix(self, scores, v):
        return self.plan(scores / self.epsilon) @ v
