"""What tests that measure model directories share."""

import torch
from tiny import with_tokenizer

SIZES = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
LINES = ["def read(path):", "with open(path) as file:", "a, b = 1, 2", "return file.read()", "import os, sys"]


def make_classifier(path, **settings):
    """Write a tiny encoder with a head for two classes, and return its directory."""
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **LAYERS, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    model.save_pretrained(path)
    return with_tokenizer(path)
