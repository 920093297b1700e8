"""How long one decoder block takes to quantize, ours beside AutoAWQ and llm-compressor, in one run.

    scripts/peers/setup_autoawq.sh; scripts/peers/setup_llmcompressor.sh      # once each
    python scripts/bench_quantize_block.py [--blocks 4] [--repeats 3]

The blocks have a 1B llama's shape and random weights; 8 x 256 random tokens calibrate. Ours is the
whole road of `mlcawq quantize` (reading, search, packing, journal) over --blocks blocks, with the
memory after each; AutoAWQ's is its quantize(), packing shown apart; llm-compressor's is loading,
oneshot() and rounding. Peers quantize --peer-blocks of the blocks. Each runs in a process of its
own, one after the other, with --threads threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from peers.runners import AutoAwq, LlmCompressor, Ours, Runner

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


# Ours and theirs that do the same kind of thing.
SAME = (
    ("awq", "AutoAWQ"),
    ("awq", "llm-compressor AWQ"),
    ("awq+gptq", "llm-compressor GPTQ"),
    ("gptq", "llm-compressor GPTQ"),
)


@dataclass(frozen=True)
class Measured:
    """What one method of one quantizer took: seconds a block, and MiB.

    packing_seconds: of `seconds`, where it is known. block_rss_mib: resident after each block.
    """

    label: str
    ours: bool
    seconds: float
    cpu_seconds: float
    peak_rss_mib: float
    packing_seconds: float | None = None
    block_rss_mib: tuple[float, ...] = ()


def measure(
    arguments: argparse.Namespace, contenders: Sequence[tuple[Runner, str]]
) -> tuple[list[Measured], float]:
    """Contenders by runner and method's label, one after the other, and how many cores other work
    kept busy before."""
    tokens = np.random.default_rng(1).integers(
        0, arguments.vocab, (arguments.samples, arguments.seq_len)
    )
    tokenizer = word_tokenizer(arguments.vocab)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        ours = write_model(scratch / "ours", arguments, arguments.blocks, tokenizer)
        theirs = write_model(scratch / "theirs", arguments, arguments.peer_blocks, tokenizer)
        busy = psutil.cpu_percent(interval=2) * psutil.cpu_count() / 100
        for number, (runner, label) in enumerate(contenders):
            print(f"{runner.name}: {label}", file=sys.stderr, flush=True)
            mine = isinstance(runner, Ours)
            job = {
                "task": "quantize",
                "method": runner.methods[label],
                "model": str(ours if mine else runner.readable(theirs, scratch / f"{number}")),
                "tokens": tokens.tolist(),
                "bits": arguments.bits,
                "group_size": arguments.group_size,
            }
            if isinstance(runner, LlmCompressor):
                job["out"] = str(scratch / "quantized")  # jobs.py writes it after measuring
            repeats = arguments.repeats if mine else 1
            answers = [runner.run(job) for _ in range(repeats)]
            blocks = arguments.blocks if mine else arguments.peer_blocks
            found.append(_summary(label, answers, blocks, mine))
    return found, busy


def _summary(label: str, answers: Sequence[dict[str, Any]], blocks: int, ours: bool) -> Measured:
    """answers: of the runner, one a repeat, for as many blocks each."""
    seconds = [
        second
        for answer in answers
        for second in (answer["block_seconds"] if ours else [answer["seconds"] / blocks])
    ]
    packing = answers[0].get("packing_seconds")
    return Measured(
        label,
        ours,
        statistics.median(seconds),
        statistics.median(answer["cpu_seconds"] for answer in answers) / blocks,
        max(answer["peak_rss_mib"] for answer in answers),
        None if packing is None else packing / blocks,
        tuple(answers[-1].get("block_rss_mib", ())) if ours else (),
    )


def lines(found: Sequence[Measured]) -> list[str]:
    """A table; how many times as long each peer takes as our method of the same kind."""
    table = [f"{'':<22}{'s/block':>10}{'CPU s/block':>14}{'peak MiB':>10}"]
    for one in found:
        table.append(
            f"{one.label:<22}{one.seconds:>10.1f}{one.cpu_seconds:>14.1f}{one.peak_rss_mib:>10.0f}"
        )
    by_label = {one.label: one for one in found}
    said = []
    for ours, peer in SAME:
        if ours in by_label and peer in by_label:
            mine, theirs = by_label[ours], by_label[peer]
            ratio, cpu = theirs.seconds / mine.seconds, theirs.cpu_seconds / mine.cpu_seconds
            packing = ""
            if theirs.packing_seconds is not None:
                search = (theirs.seconds - theirs.packing_seconds) / mine.seconds
                packing = f"{search:.1f} without its packing, "
            memory = theirs.peak_rss_mib / mine.peak_rss_mib
            said.append(
                f"{peer} takes {ratio:.1f} times as long as {ours} ({packing}{cpu:.1f} in CPU "
                f"time) and {memory:.1f} times the memory"
            )
    for one in found:
        if one.block_rss_mib:
            memory_after = ", ".join(f"{mib:.0f}" for mib in one.block_rss_mib)
            said.append(f"{one.label}, MiB resident after each block: {memory_after}")
    return [*table, "", *said]


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
    parser.add_argument("--repeats", type=int, default=2, help="times that ours does it")
    parser.add_argument("--peer-blocks", type=int, default=1, help="blocks that a peer quantizes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--recipes", nargs="+", default=["awq", "awq+gptq"], metavar="RECIPE", help="of ours"
    )
    parser.add_argument("--autoawq", type=Path, help="the Python of AutoAWQ's environment")
    parser.add_argument(
        "--llmcompressor", type=Path, help="the Python of llm-compressor's environment"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # the runners inherit these
        os.environ[name] = str(arguments.threads)
    try:
        peers = [LlmCompressor(arguments.llmcompressor), AutoAwq(arguments.autoawq)]
        contenders = [(Ours(), recipe) for recipe in arguments.recipes]
        contenders += [(peer, label) for peer in peers for label in peer.methods]
        found, busy = measure(arguments, contenders)
    except UserError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        document = {"busy_cores_before": busy, "measured": [asdict(one) for one in found]}
        print(json.dumps(document, indent=2))
        return
    print(
        f"one block of {arguments.hidden} x {arguments.intermediate}, {arguments.heads} heads "
        f"({arguments.kv_heads} for keys and values), {arguments.samples} x {arguments.seq_len} "
        f"tokens, w{arguments.bits} g{arguments.group_size}, {arguments.threads} threads\n"
        f"cores busy with other work before: {busy:.1f}\n"
    )
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
