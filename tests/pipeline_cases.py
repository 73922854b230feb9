"""What tests of pipelines share: a tiny encoder whose output depends on all its layers, texts, and a short recipe."""

from tiny import with_tokenizer

WORDS = (
    "the model",
    "reads",
    "a line",
    "of text",
    "and gives",
    "one row",
    "of numbers",
    "for each",
    "of its",
    "tokens",
)


def sentences(first, count):
    """Different sentences, in lines."""
    picked = (
        " ".join(WORDS[(first + number * step + number // 7) % len(WORDS)] for step in range(1, 9))
        for number in range(first, first + count)
    )
    return "".join(f"{number} {line}.\n" for number, line in enumerate(picked, first))


def make_encoder(path, seed=0):
    """Write a tiny encoder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(path)
    return with_tokenizer(path)


def make_texts(folder):
    """Write a text to learn from and another to measure on."""
    (folder / "learn.txt").write_text(sentences(0, 80), encoding="utf-8")
    (folder / "test.txt").write_text(sentences(500, 40), encoding="utf-8")


TOP = """
schema = 1
calibration = { file = "learn.txt", samples = 4, sequence_length = 16 }
evaluate = "test.txt"
"""

STAGES = {
    "shrink": """
[[stage]]
run = "shrink"
keep = { ffn = 0.5 }
""",
    "prune": """
[[stage]]
run = "prune"
sparsity = 0.5
method = "magnitude"
""",
    "recover": """
[[stage]]
run = "recover"
steps = 4
batch_size = 8
sequence_length = 16
""",
    "evaluate": """
[[stage]]
run = "evaluate"
""",
    "pack": """
[[stage]]
run = "pack"
batch_sizes = [1]
""",
    "export": """
[[stage]]
run = "export"
to = "onnx"
""",
}


def recipe(*stages, top=TOP):
    """The text of a recipe: names of stages, and lines that are added to the stage before them."""
    return top + "".join(STAGES.get(stage, f"{stage}\n") for stage in stages)
