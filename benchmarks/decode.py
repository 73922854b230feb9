"""How fast does a language model decode, packed in 8 and 4 bits? Products of one input row, and a whole random Llama.

    python benchmarks/decode.py products [--threads 2] [--rounds 9] [--isa avx2]
    python benchmarks/decode.py model [--threads 2] [--layers 22] [--tokens 24] [--rounds 3] [--only "int8 50"]
                                      [--llama-python PYTHON]

`products`: each weight exists several times, so that no cache holds it, as in a model. GB/s counts the bytes of the
packed weight. `model`: tokens a second of a Llama with random weights; its output head is whole, in the same bits. All
ways are timed in turn, a few tokens at a time. PYTHON is an interpreter that can import `llama_cpp` and `gguf`: it
writes a random model of the same sizes in Q4_0, and times it between our rounds, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from _timing import describe
from torch import Tensor, nn

from secateur import PackedLinear, kernels
from secateur.formats import INT4, Bitmask, DensePacked, Format

SHAPES = [(2048, 2048), (8192, 2048), (2048, 8192)]
BEYOND_CACHES = 256 << 20  # bytes of the copies of a weight
HEAD = 32000


@dataclass(frozen=True)
class Way:
    """How weights are stored and multiplied. Without a route: dense, in float32."""

    route: str = ""
    sparsity: float = 0.0

    @property
    def head(self) -> str:
        """The route of the output head, which is never pruned."""
        return {"int8": "int8-panels", "int4": "int4-panels"}.get(self.route[:4], self.route)

    def pack(self, weight: Tensor, route: str) -> Format:
        """Return the packed weight for a route."""
        dtype = INT4 if route.startswith("int4") else torch.int8
        if not route.endswith("bitmask"):
            return DensePacked.from_dense(weight, value_dtype=dtype)
        return Bitmask.from_dense(weight, torch.rand_like(weight) >= self.sparsity, value_dtype=dtype)


WAYS = {
    "float32": Way(),
    "int8": Way("int8-panels"),
    "int8 50": Way("int8-bitmask", 0.5),
    "int8 70": Way("int8-bitmask", 0.7),
    "int8 90": Way("int8-bitmask", 0.9),
    "int4": Way("int4-panels"),
    "int4 50": Way("int4-bitmask", 0.5),
    "int4 70": Way("int4-bitmask", 0.7),
}


def clone(packed: Format) -> Format:
    """The same weight in memory of its own."""
    return packed.assemble({name: t.clone() for name, t in packed.tensors().items()}, packed.shape, packed.pattern)


# Products


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return nn.functional.linear(x, weight)


def calls(way: Way, weight: Tensor) -> tuple[list[Callable[[Tensor], Tensor]], int]:
    """Products by copies of a weight, and its bytes."""
    if not way.route:
        dense = [weight.clone() for _ in range(max(1, BEYOND_CACHES // weight.nbytes))]
        return [partial(_product, w) for w in dense], weight.nbytes
    packed = way.pack(weight, way.route)
    copies = [PackedLinear(clone(packed), plan=way.route) for _ in range(max(1, BEYOND_CACHES // packed.nbytes))]
    return list[Callable[[Tensor], Tensor]](copies), packed.nbytes


@torch.inference_mode()
def products(rounds: int) -> None:
    print("| layer (out x in) | way | microseconds | GB/s | times F.linear | times int8 |\n|---|---|---|---|---|---|")
    for rows, columns in SHAPES:
        weight, x = torch.randn(rows, columns) / columns**0.5, torch.randn(1, columns)
        made = {name: calls(way, weight) for name, way in WAYS.items()}
        for copies, _ in made.values():
            for call in copies:
                call(x)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(rounds):
            for name, (copies, _) in made.items():
                began = time.perf_counter()
                for call in copies:
                    call(x)
                seconds[name].append((time.perf_counter() - began) / len(copies))
        median = {name: statistics.median(found) for name, found in seconds.items()}
        for name, (_, nbytes) in made.items():
            ratios = [
                statistics.median(a / b for a, b in zip(seconds[other], seconds[name], strict=True))
                for other in ("float32", "int8")
            ]
            speed = nbytes / median[name] / 1e9
            times = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {rows} x {columns} | {name} | {median[name] * 1e6:.0f} | {speed:.1f} | {times} |")
            print(
                json.dumps({"shape": [rows, columns], "way": name, "seconds": median[name], "gb_per_s": speed}),
                file=sys.stderr,
            )


# A whole model


def llama(way: Way, layers: int, intermediate: int) -> nn.Module:
    """A Llama with random weights. Each kind of layer is packed once, and copied."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=HEAD,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    made: dict[tuple[str, ...], Format | Tensor] = {}
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            route = way.head if name == "lm_head" else way.route
            key = (route, str(tuple(module.weight.shape)))
            if key not in made:
                weight = torch.randn(module.weight.shape) / module.in_features**0.5
                made[key] = way.pack(weight, route) if route else weight
            setattr(parent, name.rpartition(".")[2], layer_of(made[key], route))
        elif isinstance(module, LlamaRotaryEmbedding):
            setattr(parent, name.rpartition(".")[2], LlamaRotaryEmbedding(config))
        else:
            for key, parameter in list(module.named_parameters(recurse=False)):
                value = torch.ones(parameter.shape) if parameter.dim() == 1 else torch.randn(parameter.shape) * 0.02
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    return model.eval()


def layer_of(weight: Format | Tensor, route: str) -> nn.Module:
    if isinstance(weight, Format):
        return PackedLinear(clone(weight), plan=route)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


@torch.inference_mode()
def decoder(model: nn.Module, tokens: int) -> Callable[[], float]:
    """What decodes a few tokens after a prompt, and returns the seconds of each."""
    from transformers import DynamicCache

    prompt = torch.randint(0, HEAD, (1, 8))

    def decode() -> float:
        cache = DynamicCache(config=model.config)
        token = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        began = time.perf_counter()
        for _ in range(tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return (time.perf_counter() - began) / tokens

    return torch.inference_mode()(decode)


# Run by another interpreter. The sizes are those of `llama` above.
LLAMA_CPP = """
import sys, time, numpy as np, os
path, layers, intermediate, threads, tokens = sys.argv[1], *map(int, sys.argv[2:6])
if not os.path.exists(path):
    import gguf
    kind, hidden, heads, kv, vocab = gguf.GGMLQuantizationType.Q4_0, 2048, 32, 4, 32000
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(layers); w.add_context_length(2048); w.add_embedding_length(hidden)
    w.add_feed_forward_length(intermediate); w.add_head_count(heads); w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(1e-6); w.add_rope_dimension_count(hidden // heads); w.add_vocab_size(vocab)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0); w.add_tokenizer_model("no_vocab")
    made = {}
    def add(name, rows, columns):
        if (rows, columns) not in made:
            weight = (np.random.randn(rows, columns) / columns ** 0.5).astype(np.float32)
            made[rows, columns] = gguf.quants.quantize(weight, kind)
        w.add_tensor(name, made[rows, columns], raw_dtype=kind)
    add("token_embd.weight", vocab, hidden); add("output.weight", vocab, hidden)
    w.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(layers):
        b = f"blk.{i}."
        add(b + "attn_q.weight", hidden, hidden); add(b + "attn_output.weight", hidden, hidden)
        add(b + "attn_k.weight", hidden * kv // heads, hidden); add(b + "attn_v.weight", hidden * kv // heads, hidden)
        add(b + "ffn_gate.weight", intermediate, hidden); add(b + "ffn_up.weight", intermediate, hidden)
        add(b + "ffn_down.weight", hidden, intermediate)
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(b + norm + ".weight", np.ones(hidden, np.float32))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
from llama_cpp import Llama
model = Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=512, verbose=False)
model.eval(list(range(8)))
for token in range(4):
    model.eval([token])
began = time.perf_counter()
for token in range(tokens):
    model.eval([token])
print((time.perf_counter() - began) / tokens)
"""


@contextmanager
def llama_cpp(python: str | None, sizes: list[int]) -> Iterator[Callable[[], float] | None]:
    """What times llama.cpp once, in a process of its own; None without an interpreter that has it."""
    if python is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", LLAMA_CPP, str(Path(folder) / "random.gguf"), *map(str, sizes)]
        yield lambda: float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def whole_model(args: argparse.Namespace) -> None:
    chosen = args.only or ["int8", "int8 50", "int8 70", "int4", "int4 50"]
    ways: dict[str, Callable[[], float]] = {}
    sizes: dict[str, int] = {}
    for name in chosen:
        torch.manual_seed(0)
        made = llama(WAYS[name], args.layers, args.intermediate)
        sizes[name] = sum(layer.nbytes for layer in made.modules() if isinstance(layer, PackedLinear))
        ways[name] = decoder(made, args.tokens)
        ways[name]()
    with llama_cpp(args.llama_python, [args.layers, args.intermediate, args.threads, args.tokens]) as other:
        if other is not None:
            ways["llama.cpp Q4_0"] = other
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, decode in ways.items():
                seconds[name].append(decode())
    print("| way | MB of a token | tokens/s | range | GB/s | times llama.cpp |\n|---|---|---|---|---|---|")
    for name, found in seconds.items():
        speed, nbytes = 1 / statistics.median(found), sizes.get(name, 0)
        beside = seconds.get("llama.cpp Q4_0")
        ratio = statistics.median(a / b for a, b in zip(beside, found, strict=True)) if beside else 0.0
        around = f"{1 / max(found):.1f} to {1 / min(found):.1f}"
        print(f"| {name} | {nbytes / 1e6:.0f} | {speed:.1f} | {around} | {nbytes * speed / 1e9:.1f} | {ratio:.2f} |")
        print(json.dumps({"way": name, "nbytes": nbytes, "tokens_per_s": speed, "ratio": ratio}), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["products", "model"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", help="of the kernels; the default is the best")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", action="append", choices=[*WAYS], help="may be given several times")
    parser.add_argument("--llama-python", help="an interpreter that can import llama_cpp and gguf")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe(), file=sys.stderr)
    with kernels.use("native", isa=args.isa) if args.isa else nullcontext():
        if args.what == "products":
            products(args.rounds)
        else:
            whole_model(args)


if __name__ == "__main__":
    main()
