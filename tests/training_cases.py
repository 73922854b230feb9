"""Small models, their optimizers and their sparse trainings, as the tests of training share them."""

import torch
from torch import nn

from secateur import SparseTraining, training

METHODS = list(training.METHODS)
LEARNED = [name for name, method in training.METHODS.items() if method.learns]
MASKED = [name for name in METHODS if name not in LEARNED]


class Network(nn.Module):
    """A convolution of 4 x 3 x 3 inputs, and linear layers; all sizes divide by four."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3)
        self.body = nn.Sequential(nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 12, bias=False))
        self.norm = nn.LayerNorm(12)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x):
        return self.classifier(self.norm(self.body(self.stem(x).tanh().flatten(1))))


def images(step=0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, 5, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def mlp(inputs=8, hidden=12, outputs=4):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def rows(step=0, size=8):
    return torch.randn(16, size, generator=torch.Generator().manual_seed(step))


def sgd(model, **keywords):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | keywords))


def loss_of(model, step):
    if isinstance(model, Network):
        x, y = images(step)
        return nn.functional.cross_entropy(model(x), y)
    return (model(rows(step, model[0].weight.shape[1])) - 1).square().mean()


def train(model, optimizer, training, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        training.step()


def setup(method, model=None, **keywords):
    """A model, its optimizer and its training: unstructured at 60 % in 8 steps, masks updated every other."""
    model = Network() if model is None else model
    optimizer = keywords.pop("optimizer", sgd)(model)
    keywords = {"steps": 8, "update_every": 2, "method": method} | keywords
    if "sparsity" not in keywords and ":" not in str(keywords.get("pattern", "")).replace("block:", ""):
        keywords["sparsity"] = 0.6
    return model, optimizer, SparseTraining(model, optimizer, **keywords)


def pruned(training):
    return {name: int((~mask).sum()) for name, mask in training.masks.items()}


def weights_of(model, training):
    return {name: model.get_submodule(name).weight.detach().flatten(1) for name in training.masks}


OPTIMIZERS = {
    "sgd": lambda model: sgd(model, nesterov=True, weight_decay=0.1),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, amsgrad=True),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.05),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda model: torch.optim.Muon(model.parameters(), lr=0.05)


def snapshot(model, optimizer):
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    parameters = {name: (id(p), bool(p._backward_hooks)) for name, p in model.named_parameters()}
    return modules, parameters, {k: v.clone() for k, v in model.state_dict().items()}, str(optimizer.state_dict())


def assert_unchanged(model, optimizer, before):
    after = snapshot(model, optimizer)
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in after[2].items())
    assert after[3] == before[3]
