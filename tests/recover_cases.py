"""Small models that are pruned and recover, as the tests of recovery share them."""

import copy

import torch
import transformers
from shrink_models import mixtral
from shrunk_cases import gpt2, llama
from torch import nn

import secateur

METHODS = ("full", "norms", "lora", "blocks")
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.003, momentum=0.5, weight_decay=0.1),
}


class Block(nn.Module):
    def __init__(self, width=8, hidden=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Chain(nn.Module):
    """Blocks one after the other, and a head."""

    def __init__(self, blocks=2, width=8, outputs=4):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)


class Convolutions(nn.Module):
    """Convolutions of one and two dimensions, with batch norms."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu().flatten(2)).mean(2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def rows(count=6, size=8, width=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator).to(dtype) for _ in range(count)]


def texts(count=6, vocab=64, size=3, length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, vocab, (size, length), generator=generator)} for _ in range(count)]


def images(count=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, 6, 6, generator=generator) for _ in range(count)]


def tied():
    """A language model whose head is its embedding."""
    model = llama(num_hidden_layers=2, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def experts():
    model = mixtral().model
    return model


def bert(head=transformers.BertModel, **changes):
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return head(transformers.BertConfig(**config, num_attention_heads=2, max_position_embeddings=32, **changes))


MODELS = {
    "experts": (experts, lambda: texts(vocab=50)),
    "convolutions": (Convolutions, images),
    "gpt2": (gpt2, texts),
    "tied": (tied, texts),
    "lstm": (Recurrent, lambda: [x.view(2, 4, 8) for x in rows()]),
    "bert": (bert, texts),
}


def pair(make=Chain, dtype=torch.float32, **prune):
    """A pruned model and the dense one that it was made of."""
    torch.manual_seed(0)
    dense = make().to(dtype).eval()
    with torch.no_grad():  # transformers begins with weights so small that all outputs are alike
        for parameter in dense.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.mul_(0.2 / parameter.std())
    model = copy.deepcopy(dense)
    keywords = {"pattern": "unstructured"} | prune
    if ":" not in str(keywords["pattern"]).replace("block:", ""):
        keywords["sparsity"] = keywords.get("sparsity", 0.5)
    secateur.prune_(model, method="magnitude", **keywords)
    return model, dense


def zeros(model):
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim > 1}


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def changed(one, other):
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
