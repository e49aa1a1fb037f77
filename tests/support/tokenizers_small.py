"""Small tokenizers of every kind that checkpoints bring, trained on a few sentences and saved by transformers.

kind            as in          algorithm
gpt2            GPT-2          byte-level BPE; one special token is BOS and EOS, none is added
gpt2-prefix                    the same with a space before the first word
qwen2           Qwen2.5/3      byte-level BPE, NFC, <|im_start|> and <|im_end|>; EOS differs from the padding
llama3          Llama 3        byte-level BPE, the post-processor adds BOS
llama2          Llama 2, Phi-3 SentencePiece-style BPE: a space is U+2581, unknown bytes are <0x00>..<0xFF>; adds BOS
gemma           Gemma          the same without the space before the first word
unigram         T5             Unigram with Metaspace, unknown characters are <unk>
unigram-bytes                  Unigram with bytes
wordpiece       BERT           WordPiece: a continuation is ##
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, don't you think? It's 12345 miles away.",
    "def main():\n    return {'a': 1, \"b\": [2, 3]}\n\nif __name__ == '__main__':\n\tmain()\n",
    "Über den Wölken muß die Freiheit wohl grenzenlos sein. Ça va très bien, naïve café.",
    "你好世界,今天天气很好。我们去公园散步吧。日本語のテキストもあります。한국어 문장도 있습니다.",
    "Привет мир! Как дела? مرحبا بالعالم שלום עולם 👋🌍 👩‍👩‍👧 e\u0301 a\u0308",
    "once upon a time there was a tiny model that learned to serve many many requests at once",
] * 4

KINDS = ("gpt2", "gpt2-prefix", "qwen2", "llama3", "llama2", "gemma", "unigram", "unigram-bytes", "wordpiece")
SPECIAL: dict[str, dict[str, str]] = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "llama2": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "gemma": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
    "unigram": {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"},
    "wordpiece": {
        "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]",
    },
}  # fmt: skip
SPECIAL |= {"gpt2-prefix": SPECIAL["gpt2"], "unigram-bytes": SPECIAL["unigram"]}
EXTRA = {
    "qwen2": ["<|im_start|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
}
SPACE = "\u2581"
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tokenizer(
    kind: str, directory: Path, vocab_size_max: int = 400, chat_template: str | None = None
) -> Any:
    """Train a tokenizer with at most `vocab_size_max` ids (300 or more) and save its files into `directory`.

    Returns transformers' tokenizer object, the oracle. Training is deterministic.
    """
    from transformers import PreTrainedTokenizerFast

    trained = _train(kind, vocab_size_max)
    assert trained.get_vocab_size() <= vocab_size_max
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, extra_special_tokens=EXTRA.get(kind, []), **SPECIAL[kind]
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return tokenizer


def special_texts(kind: str) -> list[str]:
    return list(dict.fromkeys([*SPECIAL[kind].values(), *EXTRA.get(kind, [])]))


def _train(kind: str, size: int) -> tokenizers.Tokenizer:
    if kind in ("gpt2", "gpt2-prefix", "qwen2", "llama3"):
        return _byte_level(kind, size)
    if kind in ("llama2", "gemma"):
        return _sentencepiece_bpe(kind, size)
    if kind in ("unigram", "unigram-bytes"):
        return _unigram(kind, size)
    assert kind == "wordpiece", kind
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=special_texts(kind), limit_alphabet=size // 3, show_progress=False
        ),
    )
    cls_sep = [(text, tokenizer.token_to_id(text)) for text in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=cls_sep)
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _byte_level(kind: str, size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if kind in ("gpt2", "gpt2-prefix"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "gpt2-prefix")
    else:
        split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = special_texts(kind)
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if kind == "llama3":
        bos = "<|begin_of_text|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _sentencepiece_bpe(kind: str, size: int) -> tokenizers.Tokenizer:
    special = special_texts(kind)
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    small = tokenizers.Tokenizer(models.BPE())
    small.pre_tokenizer = pre_tokenizers.Metaspace()
    room = size - len(pieces)
    small.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=room, limit_alphabet=max(1, room // 2), show_progress=False)
    )
    trained = json.loads(small.to_str())["model"]
    pieces += sorted(trained["vocab"], key=trained["vocab"].get)
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
        to_text.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(to_text)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    bos = SPECIAL[kind]["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def _unigram(kind: str, size: int) -> tokenizers.Tokenizer:
    special = special_texts(kind)
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "unigram-bytes" else []
    small = tokenizers.Tokenizer(models.Unigram())
    small.pre_tokenizer = pre_tokenizers.Metaspace()
    short = [line.encode("ascii", "ignore").decode() for line in CORPUS] if byte_pieces else CORPUS
    small.train_from_iterator(
        short,
        trainers.UnigramTrainer(
            vocab_size=size - len(byte_pieces), special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    vocab = [tuple(item) for item in json.loads(small.to_str())["model"]["vocab"]]
    room = size - len(byte_pieces) - len(special)
    vocab = (
        [(text, 0.0) for text in special]
        + [(piece, 0.0) for piece in byte_pieces]
        + vocab[len(special) :][:room]
    )
    unk_id = special.index("<unk>")
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id, bool(byte_pieces)))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if byte_pieces:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    eos = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[eos])
    return tokenizer
