"""Small real tokenizers of the two kinds that models use, trained here."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

TEXT = [
    "The capital of France is Paris. Two and two make four.",
    "What is the opposite of hot? Cold.\n\nDas Wetter ist schön; naïve café 🙂 你好 世界.",
    "def f(x):\n    return x + 1\n",
]
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level(path: Path) -> Path:
    """As GPT-2, Llama 3 and Qwen: bytes, BPE, special tokens; plus one that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=CHATML_SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|late|>", special=True, rstrip=True)])
    tokenizer.save(str(path))
    return path


def sentencepiece_like(path: Path, prepend: str = "always") -> Path:
    """As Llama 2 and Mistral: ▁ for spaces, BPE on characters, bytes for what is unknown."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    seed = Tokenizer(models.BPE(unk_token="<unk>"))
    seed.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=LLAMA_SPECIALS + bytes_)
    seed.train_from_iterator(TEXT[:1] * 2, trainer)
    vocab = seed.get_vocab(with_added_tokens=False)
    merges = [tuple(m) for m in json.loads(seed.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if prepend == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in LLAMA_SPECIALS])
    tokenizer.save(str(path))
    return path
