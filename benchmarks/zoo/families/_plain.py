"""Plain PyTorch: recurrent layers, attention in all its forms, convolutions, weights that are read without a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from families._family import Family


class Around(nn.Module):
    """One module of PyTorch between two linear layers; of several outputs the first goes on."""

    def __init__(self, inner: nn.Module, width: int = 64, out: int = 64) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(width, width), inner, nn.Linear(out, width)

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(self.first(x))
        return self.last(found[0] if isinstance(found, tuple) else found)  # type: ignore[no-any-return]


class Packed(nn.Module):
    """A recurrent layer on sequences of different lengths."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn, self.last = kind(64, 64, batch_first=True), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x), 0, -1) * (x.shape[1] // len(x))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        rows, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.last(rows)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """``nn.MultiheadAttention`` of a query and other keys and values."""

    def __init__(self, keys: int = 64, values: int = 64, cross: bool = False, **settings: Any) -> None:
        super().__init__()
        self.cross, self.first = cross, settings.get("batch_first", False)
        self.query = nn.Linear(64, 64)
        if cross:
            self.key, self.value = nn.Linear(64, keys), nn.Linear(64, values)
        self.attention = nn.MultiheadAttention(64, 4, kdim=keys, vdim=values, **settings)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        if not self.cross:
            x = self.query(x)
            return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
        return self.attention(self.query(x), self.key(x), self.value(x))[0]  # type: ignore[no-any-return]


class Translate(nn.Module):
    """``nn.Transformer``, or its two halves."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        if whole:
            self.both = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
        else:
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128, batch_first=True), 2)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x, x[:, :16]) if self.whole else self.decoder(x[:, :16], x)  # type: ignore[no-any-return]


class FusedAttention(nn.Module):
    """Attention that reads the weight of its fused projection, as timm's BEiT and torchvision's Swin do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        found = F.linear(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(found[0], found[1], found[2])
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Slices(nn.Module):
    """Reads slices of a layer's weight: queries by a part of it, keys by another."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        first = F.linear(x, self.both.weight[:64], self.both.bias[:64])
        second = F.linear(x, self.both.weight[64:], self.both.bias[64:])
        return self.out(torch.cat([first, second.relu()], -1))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Stacked experts, each for the tokens that the router sends to it."""

    def __init__(self, how: str, experts: int = 4) -> None:
        super().__init__()
        self.how, self.router = how, nn.Linear(64, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, *((128, 64) if how == "linear" else (64, 128))))
        self.down = nn.Parameter(torch.randn(experts, *((64, 128) if how == "linear" else (128, 64))))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        share = self.router(flat).softmax(-1)
        if self.how == "linear":
            chosen = share.argmax(-1)
            result = torch.zeros_like(flat)
            for index in range(len(self.up)):
                rows = (chosen == index).nonzero().flatten()
                hidden = F.linear(flat[rows], self.up[index]).relu()
                result = result.index_add(0, rows, F.linear(hidden, self.down[index]))
            return x + result.view_as(x)
        if self.how == "bmm":
            hidden = torch.bmm(flat.expand(len(self.up), -1, -1), self.up).relu()
            found = torch.bmm(hidden, self.down)
        else:
            hidden = torch.einsum("td,edh->eth", flat, self.up).relu()
            found = torch.einsum("eth,ehd->etd", hidden, self.down)
        return x + torch.einsum("te,etd->td", share, found).view_as(x)


class Mixer(nn.Module):
    """A block of the MLP-Mixer."""

    def __init__(self, tokens: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(tokens, 64), nn.GELU(), nn.Linear(64, tokens))
        self.channels = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two convolutions and a shortcut, added in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norms[0](self.first(x)), inplace=True)
        out = self.norms[1](self.second(out))
        out += x
        return F.relu(out, inplace=True)


class UNet(nn.Module):
    """Down, up, and a connection across."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.down = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.bottom, self.up = nn.Conv2d(32, 32, 3, padding=1), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.outside = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inside(x).relu()
        second = self.bottom(self.down(first).relu()).relu()
        return self.outside(torch.cat([first, self.up(second)], 1))  # type: ignore[no-any-return]


def separable(into: int, out: int) -> nn.Sequential:
    depthwise = nn.Conv2d(into, into, 3, padding=1, groups=into)
    return nn.Sequential(depthwise, nn.BatchNorm2d(into), nn.ReLU6(inplace=True), nn.Conv2d(into, out, 1))


def encoder_layer(**settings: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(64, 4, 128, **{"batch_first": True, **settings})


def rows(*shape: int) -> list[Any]:
    return [torch.randn(*shape) for _ in range(2)]


MAKES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(inplace=True), nn.Linear(128, 64)), (128, 64)),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2), (4, 32, 64)),
    "TransformerEncoder norm_first": (
        lambda: nn.TransformerEncoder(encoder_layer(norm_first=True), 2, enable_nested_tensor=False),
        (4, 32, 64),
    ),
    "TransformerEncoder seq_first": (
        lambda: nn.TransformerEncoder(encoder_layer(batch_first=False), 2, enable_nested_tensor=False),
        (32, 4, 64),
    ),
    "TransformerDecoder": (lambda: Translate(whole=False), (4, 32, 64)),
    "Transformer": (lambda: Translate(whole=True), (4, 32, 64)),
    "MultiheadAttention": (Attention, (4, 32, 64)),
    "MultiheadAttention batch_first": (lambda: Attention(batch_first=True), (4, 32, 64)),
    "MultiheadAttention cross": (lambda: Attention(cross=True, batch_first=True), (4, 32, 64)),
    "MultiheadAttention kdim vdim": (lambda: Attention(32, 48, cross=True, batch_first=True), (4, 32, 64)),
    "MultiheadAttention bias_kv": (lambda: Attention(add_bias_kv=True, batch_first=True), (4, 32, 64)),
    "MultiheadAttention zero_attn": (lambda: Attention(add_zero_attn=True, bias=False), (4, 32, 64)),
    "LSTM": (lambda: Around(nn.LSTM(64, 64, batch_first=True)), (4, 32, 64)),
    "LSTM 2 layers": (lambda: Around(nn.LSTM(64, 64, 2, batch_first=True)), (4, 32, 64)),
    "LSTM bidirectional": (lambda: Around(nn.LSTM(64, 64, bidirectional=True), out=128), (32, 4, 64)),
    "LSTM proj_size": (lambda: Around(nn.LSTM(64, 64, proj_size=32, batch_first=True), out=32), (4, 32, 64)),
    "LSTM packed sequence": (lambda: Packed(nn.LSTM), (4, 32, 64)),
    "GRU": (lambda: Around(nn.GRU(64, 64, 2, batch_first=True)), (4, 32, 64)),
    "GRU packed sequence": (lambda: Packed(nn.GRU), (4, 32, 64)),
    "RNN": (lambda: Around(nn.RNN(64, 64, bidirectional=True, batch_first=True), out=128), (4, 32, 64)),
    "GRUCell": (lambda: Around(nn.GRUCell(64, 64)), (128, 64)),
    "LSTMCell": (lambda: Around(nn.LSTMCell(64, 64)), (128, 64)),
    "Bilinear": (lambda: Pair(nn.Bilinear(64, 64, 16)), (128, 64)),
    "ConvNet": (
        lambda: nn.Sequential(
            *(nn.Conv2d(4, 16, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(inplace=True)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16)),
        ),
        (8, 4, 16, 16),
    ),
    "ResNet block": (lambda: nn.Sequential(Residual(16), Residual(16)), (8, 16, 12, 12)),
    "Conv1d stack": (
        lambda: nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.GELU(), nn.Conv1d(32, 64, 1)),
        (4, 16, 64),
    ),
    "Conv1d dilated and causal": (
        lambda: nn.Sequential(nn.Conv1d(16, 32, 3, dilation=2), nn.ReLU(), nn.Conv1d(32, 16, 3, dilation=4)),
        (4, 16, 64),
    ),
    "Conv3d": (
        lambda: nn.Sequential(nn.Conv3d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 8, 1)),
        (2, 4, 6, 8, 8),
    ),
    "Conv2d groups": (
        lambda: nn.Sequential(nn.Conv2d(16, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 16, 1, groups=2)),
        (8, 16, 12, 12),
    ),
    "Autoencoder ConvTranspose2d": (
        lambda: nn.Sequential(
            *(
                nn.Conv2d(4, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.ReLU(),
            ),
            *(nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(16, 4, 2, stride=2)),
        ),
        (4, 4, 16, 16),
    ),
    "Vocoder ConvTranspose1d": (
        lambda: nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.ReLU(), nn.ConvTranspose1d(32, 16, 4, 2, 1)),
        (4, 16, 32),
    ),
    "U-Net": (UNet, (4, 4, 16, 16)),
    "Depthwise separable": (lambda: nn.Sequential(separable(16, 32), separable(32, 16)), (8, 16, 12, 12)),
    "MLP-Mixer": (lambda: nn.Sequential(Mixer(), Mixer()), (4, 32, 64)),
    "F.linear on a layer's weight": (FusedAttention, (4, 32, 64)),
    "F.linear on slices of a weight": (Slices, (4, 32, 64)),
    "Experts by F.linear": (partial(Experts, "linear"), (8, 64, 64)),
    "Experts by bmm": (partial(Experts, "bmm"), (8, 64, 64)),
    "Experts by einsum": (partial(Experts, "einsum"), (8, 64, 64)),
}


class Pair(nn.Module):
    """A module of two inputs, given the same one twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(64, 64), inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.inner(x, x)  # type: ignore[no-any-return]


PLAIN: tuple[Family, ...] = tuple(
    Family(name, "plain PyTorch", make, partial(rows, *shape)) for name, (make, shape) in MAKES.items()
)
