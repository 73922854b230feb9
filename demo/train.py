"""Train the demo's language model: a small Llama on the Python standard library's own source.

    python demo/train.py --output src/secateur/demo/model

writes `model.safetensors` (float16), `config.json`, the tokenizer, `calibration.txt` and `heldout.txt` to the output
directory and prints the log kept in `demo/train.log`. The corpus is whatever standard library the running interpreter
has, so another Python version gives a slightly different model. Modules whose path hashes to a held-out bucket are
never trained on, nor shown to the tokenizer; `heldout.txt` is drawn from them, `calibration.txt` from the others.
"""

import argparse
import hashlib
import math
import platform
import random
import sysconfig
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20261122
VOCABULARY = 2048
CONTEXT = 256
BATCH = 16
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
TEXT_BYTES = 400_000  # of calibration.txt and of heldout.txt, each

# Tables of data rather than code, and packages that are not part of the library proper.
LEFT_OUT = {"site-packages", "__pycache__", "encodings", "pydoc_data", "ensurepip", "lib2to3", "turtledemo"}


def corpus() -> tuple[dict[str, str], dict[str, str]]:
    """Return (training, held-out) modules as {relative path: source}; tests are for training only."""
    root = Path(sysconfig.get_path("stdlib"))
    training, heldout = {}, {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT & set(relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of test files are deliberately not UTF-8
        name = relative.as_posix()
        bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 16
        is_test = bool({"test", "tests", "idle_test"} & set(relative.parts))
        if bucket == 0 and not is_test:
            heldout[name] = source
        else:
            training[name] = source
    return training, heldout


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def encode(tokenizer: PreTrainedTokenizerFast, sources: list[str]) -> Tensor:
    """All sources as one stream of token ids, each followed by the end-of-text token."""
    ids: list[int] = []
    for source in sources:
        ids += tokenizer.backend_tokenizer.encode(source).ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def heldout_loss(model: nn.Module, ids: Tensor, windows: int = 64) -> float:
    """Mean cross-entropy in nats per token over the first `windows` windows."""
    model.eval()
    batches = ids[: windows * CONTEXT].view(-1, 8, CONTEXT)
    losses: list[float] = [model(input_ids=batch, labels=batch).loss.item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def excerpt(sources: dict[str, str], rng: random.Random) -> str:
    """Whole modules in random order, cut at TEXT_BYTES."""
    names = sorted(sources)
    rng.shuffle(names)
    text = ""
    for name in names:
        text += f"# {name}\n{sources[name]}\n"
        if len(text.encode()) >= TEXT_BYTES:
            break
    return text.encode()[:TEXT_BYTES].decode(errors="ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    training, heldout = corpus()
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"seed {SEED}, {torch.get_num_threads()} threads, {len(training)} training and {len(heldout)} held-out modules"
    )

    tokenizer = train_tokenizer([training[name] for name in sorted(training)])
    library = {name: source for name, source in training.items() if "test" not in Path(name).parts}
    order = sorted(training)
    rng.shuffle(order)
    stream = encode(tokenizer, [training[name] for name in order])
    validation_order = sorted(heldout)
    rng.shuffle(validation_order)
    validation = encode(tokenizer, [heldout[name] for name in validation_order])
    bytes_per_token = sum(len(source.encode()) for source in heldout.values()) / len(validation)
    print(f"{len(stream):,} training tokens, {len(validation):,} held-out tokens, {bytes_per_token:.2f} bytes a token")

    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(arguments.output)
    (arguments.output / "calibration.txt").write_text(excerpt(library, rng), encoding="utf-8")
    (arguments.output / "heldout.txt").write_text(excerpt(heldout, rng), encoding="utf-8")

    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(SEED)
    began = time.perf_counter()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps)
        starts = torch.randint(len(stream) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([stream[start : start + CONTEXT] for start in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == arguments.steps - 1:
            tokens = (step + 1) * BATCH * CONTEXT
            rate = tokens / (time.perf_counter() - began)
            after = heldout_loss(model, validation)
            figures = f"train {loss.item():.3f}  held-out {after:.3f}  {rate:,.0f} tokens/s"
            print(f"step {step:5d}  tokens {tokens:11,}  {figures}", flush=True)

    final = heldout_loss(model, validation, windows=256)
    per_byte = final / bytes_per_token
    print(f"held-out {final:.4f} nats a token, perplexity {math.exp(final):.2f}, {per_byte:.4f} nats a byte")
    model.to(torch.float16).save_pretrained(arguments.output)
    model.float().eval()
    prompt = tokenizer("def read_lines(path", return_tensors="pt", return_token_type_ids=False)
    sample = model.generate(**prompt, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=40)
    print("sample:\n" + tokenizer.decode(sample[0]))


if __name__ == "__main__":
    main()
