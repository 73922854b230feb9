"""What tests of plans share: small models, and times that follow from their sizes."""

import torch
from torch import nn

from secateur.planning._probes import Bench, Timed


class Block(nn.Module):
    """A residual block with neurons that can go."""

    def __init__(self, width=16, neurons=32):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, neurons), nn.Linear(neurons, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Residual(nn.Module):
    """Blocks between an input and an output layer."""

    def __init__(self, blocks=4):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def residual(blocks=4, seed=0):
    torch.manual_seed(seed)
    return Residual(blocks).eval()


def inputs(count=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 8, generator=generator) for _ in range(count)]


def weights_of(model):
    """How many weights are not zero."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def times_by_size(monkeypatch, engine=2.0, asked=None):
    """Let a model take a millisecond for each weight that is not zero, and half of that in an engine.

    Args:
        monkeypatch: of the test.
        engine: how many times as fast as PyTorch the engines are.
        asked: list that gets each job that is measured.
    """

    def measure(self, jobs, effect=None, hinder=None):
        dense = weights_of(self.model)
        found = {}
        for way, probe in jobs:
            if asked is not None:
                asked.append((way, probe))
            size = weights_of(self.made(probe))
            times = dense / size * (1.0 if way == "torch" else engine)
            found[way, probe] = Timed((times,) * len(self.timed), 4 * size, None if effect is None else 0.001)
        return found

    monkeypatch.setattr(Bench, "measure", measure)
    monkeypatch.setattr(
        Bench, "milliseconds", property(lambda self: (float(weights_of(self.model)),) * len(self.timed))
    )
