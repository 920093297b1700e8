"""How long one decoder block takes to quantize, ours against AutoAWQ's, in one run.

    scripts/peers/setup_autoawq.sh                     # once: AutoAWQ in an environment of its own
    python scripts/bench_quantize_block.py [--blocks 4] [--repeats 3]

The blocks have a 1B llama's shape and random weights; 8 x 256 random tokens calibrate. Ours is the
whole road of `mlcawq quantize` (reading, search, packing, journal) over --blocks blocks, with the
memory after each; AutoAWQ's is its quantize() on the first --autoawq-blocks of them, packing shown
apart. Each runs in a process of its own, one after the other, with --threads threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from peers.runners import AutoAwq, Ours

from mlcawq.checkpoint.writing import ShardWriter, write_json
from mlcawq.errors import UserError


def write_model(folder: Path, arguments: argparse.Namespace, blocks: int, tokenizer: str) -> Path:
    """A llama of random float16 weights, sized so that activations stay near one."""
    folder.mkdir()
    hidden, inner = arguments.hidden, arguments.intermediate
    head_dim = hidden // arguments.heads
    kv = arguments.kv_heads * head_dim
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "head_dim": head_dim,
        "vocab_size": arguments.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    write_json(folder / "config.json", config)
    (folder / "tokenizer.json").write_text(tokenizer)
    generator = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = generator.standard_normal((rows, columns), np.float32)
        return (values * columns**-0.5).astype(np.float16)

    writer = ShardWriter(folder)
    embedding = generator.standard_normal((arguments.vocab, hidden), np.float32)
    writer.add("model.embed_tokens.weight", embedding.astype(np.float16))
    writer.add("model.norm.weight", np.ones(hidden, np.float16))
    for i in range(blocks):
        block = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.add(
                f"{block}.{norm}.weight", generator.uniform(0.5, 1.5, hidden).astype(np.float16)
            )
        for linear, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            writer.add(f"{block}.{linear}.weight", matrix(*shape))
    writer.close()
    return folder


def word_tokenizer(size: int) -> str:
    """tokenizer.json of `size` words: a folder needs one, although ids are given here."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{i}": i for i in range(size)}
    return Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).to_str()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4, help="blocks that ours quantizes")
    parser.add_argument("--repeats", type=int, default=3, help="times that ours does it")
    parser.add_argument("--autoawq-blocks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--autoawq", type=Path, help="the Python of AutoAWQ's environment")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # the runners inherit these
        os.environ[name] = str(arguments.threads)
    try:
        result = measure(arguments, AutoAwq(arguments.autoawq))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(lines(arguments, result)))


def measure(arguments: argparse.Namespace, autoawq: AutoAwq) -> dict[str, Any]:
    """Both, one after the other; seconds, MiB, and how busy the machine was with other work."""
    tokens = np.random.default_rng(1).integers(
        0, arguments.vocab, (arguments.samples, arguments.seq_len)
    )
    job = {
        "task": "quantize",
        "method": "awq",
        "tokens": tokens.tolist(),
        "bits": arguments.bits,
        "group_size": arguments.group_size,
    }
    tokenizer = word_tokenizer(arguments.vocab)
    with tempfile.TemporaryDirectory() as scratch:
        ours_model = write_model(Path(scratch) / "ours", arguments, arguments.blocks, tokenizer)
        theirs_model = write_model(
            Path(scratch) / "theirs", arguments, arguments.autoawq_blocks, tokenizer
        )
        others = psutil.cpu_percent(interval=2) * psutil.cpu_count() / 100
        ours = []
        for number in range(arguments.repeats):
            ours.append(Ours().run({**job, "model": str(ours_model)}))
            print(f"ours, run {number + 1}: {ours[-1]['block_seconds']}", file=sys.stderr)
        print("AutoAWQ: takes minutes", file=sys.stderr)
        theirs = autoawq.run({**job, "model": str(theirs_model)})
    seconds = [second for run in ours for second in run["block_seconds"]]
    blocks = arguments.autoawq_blocks
    search = (theirs["seconds"] - theirs["packing_seconds"]) / blocks
    return {
        "ours": ours,
        "autoawq": theirs,
        "ours_seconds": statistics.median(seconds),
        "ours_cpu_seconds": statistics.median(r["cpu_seconds"] for r in ours) / arguments.blocks,
        "autoawq_seconds": theirs["seconds"] / blocks,
        "autoawq_cpu_seconds": theirs["cpu_seconds"] / blocks,
        "autoawq_search_seconds": search,
        "ratio": theirs["seconds"] / blocks / statistics.median(seconds),
        "ratio_search": search / statistics.median(seconds),
        "busy_cores_before": others,
    }


def lines(arguments: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    """The result as a table."""
    ours, theirs = result["ours"], result["autoawq"]
    memory = ", ".join(f"{mib:.0f}" for mib in ours[-1]["block_rss_mib"])
    peak = max(run["peak_rss_mib"] for run in ours)
    cpu_ratio = result["autoawq_cpu_seconds"] / result["ours_cpu_seconds"]
    return [
        f"one block of {arguments.hidden} x {arguments.intermediate}, {arguments.heads} heads "
        f"({arguments.kv_heads} for keys and values), {arguments.samples} x {arguments.seq_len} "
        f"tokens, w{arguments.bits} g{arguments.group_size}, {arguments.threads} threads",
        f"cores busy with other work before: {result['busy_cores_before']:.1f}",
        "",
        f"{'':<12}{'s/block':>10}{'CPU s/block':>14}{'peak MiB':>10}",
        f"{'ours':<12}{result['ours_seconds']:>10.1f}{result['ours_cpu_seconds']:>14.1f}"
        f"{peak:>10.0f}",
        f"{'AutoAWQ':<12}{result['autoawq_seconds']:>10.1f}{result['autoawq_cpu_seconds']:>14.1f}"
        f"{theirs['peak_rss_mib']:>10.0f}",
        "",
        f"AutoAWQ takes {result['ratio']:.1f} times as long ({result['ratio_search']:.1f} times "
        f"without its packing; {cpu_ratio:.1f} times the CPU time)",
        f"ours, MiB resident after each block: {memory}",
    ]


if __name__ == "__main__":
    main()
