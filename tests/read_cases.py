"""Models that multiply weights without calling a layer, each with the slow truth of what its weights read."""

import torch
from torch import nn
from torch.nn import functional

IN, OUT, EXPERTS = 8, 12, 3


class ReadsWeight(nn.Module):
    """As windows of vision transformers do: the weight of a layer is handed to a function."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x):
        return x + self.proj(functional.linear(x, self.qkv.weight, self.qkv.bias))

    def truth(self, x):
        return {"qkv": x, "proj": functional.linear(x, self.qkv.weight, self.qkv.bias)}


class ReadsFromTheLeft(ReadsWeight):
    """As state-space models do: weight times columns."""

    def forward(self, x):
        y = (self.qkv.weight @ x.transpose(-1, -2)).transpose(-1, -2) + self.qkv.bias
        return x + self.proj(y)


class ReadsACopy(ReadsWeight):
    def forward(self, x):
        return x + self.proj(functional.linear(x.double(), self.qkv.weight.double(), self.qkv.bias.double()).to(x))


class CallsAndReads(ReadsWeight):
    """The same layer is called and read."""

    def forward(self, x):
        return x + self.proj(self.qkv(x)) + self.proj(functional.linear(2 * x, self.qkv.weight))

    def truth(self, x):
        both = torch.cat([x, 2 * x])
        return {"qkv": both, "proj": torch.cat([self.qkv(x), functional.linear(2 * x, self.qkv.weight)])}


class OwnParameter(nn.Module):
    """A plain parameter ``[in, out]``."""

    def __init__(self):
        super().__init__()
        self.kernel, self.down = nn.Parameter(torch.randn(IN, OUT)), nn.Parameter(torch.randn(IN, OUT))

    def forward(self, x):
        hidden = torch.tanh(torch.addmm(torch.zeros(1), x.flatten(0, -2), self.kernel))
        return functional.linear(hidden, self.down).view_as(x)

    def truth(self, x):
        return {"kernel": x, "down": torch.tanh(x @ self.kernel)}


class Experts(nn.Module):
    """Each token goes to the expert that its first feature names."""

    transposed = False

    def __init__(self):
        super().__init__()
        up, down = (EXPERTS, OUT, IN), (EXPERTS, IN, OUT)
        if self.transposed:
            up, down = down, up
        self.up, self.down = nn.Parameter(torch.randn(up) / 3), nn.Parameter(torch.randn(down) / 3)

    def routes(self, x):
        """The tokens of each expert."""
        tokens = x.reshape(-1, IN)
        chosen = tokens[:, 0].mul(1000).long().abs() % EXPERTS
        return tokens, [torch.where(chosen == expert)[0] for expert in range(EXPERTS)]

    def one(self, expert):
        up, down = self.up[expert], self.down[expert]
        return (up.T, down.T) if self.transposed else (up, down)

    def forward(self, x):
        tokens, routes = self.routes(x)
        y = torch.zeros_like(tokens)
        for expert, rows in enumerate(routes):
            hidden = functional.linear(tokens[rows], self.up[expert]).relu()
            y[rows] = functional.linear(hidden, self.down[expert])
        return y.view_as(x)

    def truth(self, x):
        tokens, routes = self.routes(x)
        found = {}
        for expert, rows in enumerate(routes):
            found[f"up.{expert}"] = tokens[rows]
            found[f"down.{expert}"] = functional.linear(tokens[rows], self.one(expert)[0]).relu()
        return found


class ExpertsTransposed(Experts):
    transposed = True

    def forward(self, x):
        tokens, routes = self.routes(x)
        y = torch.zeros_like(tokens)
        for expert, rows in enumerate(routes):
            y[rows] = (tokens[rows] @ self.up[expert]).relu() @ self.down[expert]
        return y.view_as(x)


class ExpertsGrouped(Experts):
    def forward(self, x):
        tokens, routes = self.routes(x)
        order, ends = torch.cat(routes), torch.tensor([len(rows) for rows in routes]).cumsum(0).int()
        hidden = functional.grouped_mm(tokens[order], self.up.transpose(-2, -1), offs=ends).relu()
        y = torch.empty_like(tokens)
        y[order] = functional.grouped_mm(hidden, self.down.transpose(-2, -1), offs=ends)
        return y.view_as(x)


class ExpertsBatched(ExpertsTransposed):
    """All experts see all tokens, those of others as zeros."""

    def padded(self, x):
        tokens, routes = self.routes(x)
        padded = tokens.new_zeros(EXPERTS, *tokens.shape)
        for expert, rows in enumerate(routes):
            padded[expert, rows] = tokens[rows]
        return padded

    def forward(self, x):
        return torch.bmm(torch.bmm(self.padded(x), self.up).relu(), self.down).sum(0).view_as(x)


class ExpertsEinsum(ExpertsBatched):
    def forward(self, x):
        hidden = torch.einsum("eti,eio->eto", self.padded(x), self.up).relu()
        return torch.einsum("eto,eoi->eti", hidden, self.down).sum(0).view_as(x)


class Chunked(nn.Module):
    """Multiplies blocks of rows of one weight by different inputs."""

    sizes = (6, 6)

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(IN, OUT)

    def forward(self, x):
        one, other = self.both.weight.split(self.sizes)
        return torch.cat([functional.linear(x, one), functional.linear(2 * x, other)], -1)[..., :IN]

    def truth(self, x):
        return {"both.weight.0": x, "both.weight.1": 2 * x}


class ChunkedUnevenly(Chunked):
    sizes = (4, 8)


class ExpertsThatShare(Experts):
    """Every expert reads all tokens, and all of them add up: their second weights are one matrix."""

    transposed = True

    def forward(self, x):
        hidden = torch.einsum("bti,eio->ebto", x, self.up).relu()
        return torch.einsum("ebto,eoi->bti", hidden, self.down)

    def truth(self, x):
        found = {f"up.{expert}": x for expert in range(EXPERTS)}
        return found | {"down": torch.cat([(x @ self.up[expert]).relu() for expert in range(EXPERTS)], -1)}


class ExpertsInRows(Experts):
    """The experts one below the other in a parameter of two dimensions."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(self.up.detach().reshape(-1, IN))
        self.down = nn.Parameter(torch.randn(EXPERTS * OUT, IN))  # [in, out] of each expert

    def one(self, expert):
        return self.up.view(EXPERTS, OUT, IN)[expert], self.down.view(EXPERTS, OUT, IN)[expert].T

    def forward(self, x):
        tokens, routes = self.routes(x)
        y = torch.zeros_like(tokens)
        for expert, rows in enumerate(routes):
            up, down = (part.view(EXPERTS, OUT, IN).chunk(EXPERTS)[expert].squeeze(0) for part in (self.up, self.down))
            y[rows] = tokens[rows].matmul(up.t()).relu().matmul(down)
        return y.view_as(x)


class Heads(nn.Module):
    """Parameters of three dimensions that are one matrix: a head has rows of its own, or columns."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(IN, 3, 4) / 3)
        self.output = nn.Parameter(torch.randn(IN, 3, 4) / 3)

    def forward(self, x):
        heads = torch.einsum("bti,ihd->bthd", x, self.query).tanh()
        return torch.einsum("bthd,ihd->bti", heads, self.output)

    def truth(self, x):
        return {"query": x, "output": (x @ self.query.flatten(1)).tanh()}


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(IN, IN)

    def forward(self, x):
        state, steps = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            steps.append(state[0])
        return torch.stack(steps, 1)

    def truth(self, x):
        return {"cell.weight_ih": x, "cell.weight_hh": self(x)[:, :-1]}


class Attention(nn.Module):
    """Cross-attention: the query has other inputs than key and value."""

    options = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(IN, 2, batch_first=True, **self.options)
        self.sides = [self.options.get("kdim", IN), self.options.get("vdim", IN)]

    def memory(self, x):
        return [torch.cat([2 * x, x + 1], 1).repeat(1, 1, 2)[..., :side] for side in self.sides]

    def forward(self, x):
        return self.attention(x, *self.memory(x), need_weights=False)[0]

    def truth(self, x):
        inner, (keys, values) = self.attention, self.memory(x)
        if inner.in_proj_weight is None:
            weights = inner.q_proj_weight, inner.k_proj_weight, inner.v_proj_weight
            names = [f"attention.{letter}_proj_weight" for letter in "qkv"]
        else:
            weights, names = inner.in_proj_weight.chunk(3), [f"attention.in_proj_weight.{letter}" for letter in "qkv"]
        biases = inner.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(part, weight, bias).unflatten(-1, (2, -1)).transpose(1, 2)
            for part, weight, bias in zip((x, keys, values), weights, biases, strict=True)
        )
        scores = (q @ k.transpose(-1, -2) / (IN // 2) ** 0.5).softmax(-1)
        mixed = (scores @ v).transpose(1, 2).flatten(2)
        return dict(zip(names, (x, keys, values), strict=True)) | {"attention.out_proj": mixed}


class AttentionOfOtherSizes(Attention):
    options = {"kdim": 4, "vdim": 12}  # noqa: RUF012


CASES = {
    case.__name__: case
    for case in (
        ReadsWeight, ReadsFromTheLeft, ReadsACopy, CallsAndReads, OwnParameter, Experts, ExpertsTransposed,
        ExpertsGrouped, ExpertsBatched, ExpertsEinsum, ExpertsThatShare, ExpertsInRows, Chunked, ChunkedUnevenly, Heads,
        Cell, Attention, AttentionOfOtherSizes,
    )
}  # fmt: skip


class Blocks(nn.Module):
    """Several of a kind one after the other, as blocks."""

    def __init__(self, kind, count=2):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)[..., :IN]
        return x
