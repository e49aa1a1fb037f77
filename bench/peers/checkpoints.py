"""Writes the checkpoints that all engines are compared on: published shapes, random weights, a tokenizer that fills the vocabulary.

    python -m bench.peers.checkpoints FOLDER/models [small Qwen3-0.6B]

Beside each, NAME-w8a8 is the same model in the compressed-tensors layout that vLLM reads as 8 bits: weights rounded per row,
activations per token at run time. Speed does not depend on what the weights say, and nothing has to be downloaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bench.random_checkpoint import write_random_checkpoint
from bench.shapes import SHAPES
from nanoserve.kernels.panels import to_bfloat16
from nanoserve.models.checkpoint import load_weights
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import checkpoint_shapes

MAX_POSITIONS = 8192
SMALL: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8192, "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
CHECKPOINTS = {"small": SMALL, "Qwen3-0.6B": SHAPES["Qwen3-0.6B"]}
SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")  # the last ids of the vocabulary


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """config.json, model.safetensors in bfloat16, and a tokenizer."""
    last = shape["vocab_size"] - 1
    ids = {"bos_token_id": last - 2, "eos_token_id": last - 1, "pad_token_id": last}
    config_json = {**shape, **ids, "max_position_embeddings": MAX_POSITIONS}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json))
    config = ModelConfig.from_pretrained(folder)
    write_random_checkpoint(folder, config_json, checkpoint_shapes(config), dtype="bfloat16")
    byte_pairs(shape["vocab_size"]).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_POSITIONS,
        **dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True)),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def byte_pairs(vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly this size: bytes, then merges of printable ASCII, then the special tokens.

    ASCII, because a server that streams text keeps back what ends inside a character: tokens would seem to come late.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: index for index, text in enumerate(alphabet)}
    merges = []
    for left, right in islice(_pairs(), vocab_size - len(SPECIAL) - len(vocab)):
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def _pairs() -> Iterator[tuple[str, str]]:
    """All pairs of printable characters, then all triples as a pair and a character."""
    printable = [chr(code) for code in range(0x21, 0x7F)]
    yield from product(printable, printable)
    for left, right, more in product(printable, printable, printable):
        yield left + right, more


def write_w8a8(source: Path, target: Path) -> None:
    """The checkpoint with int8 projections: round(weight / scale), scale = max |row| / 127; embedding and norms as they are."""
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for name, tensor in load_weights(source).items():
        weight = np.asarray(tensor[:], np.float32)
        if not name.endswith("proj.weight"):
            tensors[name] = "BF16", to_bfloat16(weight)
            continue
        scale = to_bfloat16(np.maximum(np.abs(weight).max(1, keepdims=True) / 127, 1e-8))
        tensors[name] = "I8", np.rint(weight / _widened(scale)).clip(-127, 127).astype(np.int8)
        tensors[name.removesuffix("weight") + "weight_scale"] = "BF16", scale
    _write_safetensors(target / "model.safetensors", tensors)
    config = json.loads((source / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target)


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _write_safetensors(file: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, values) in tensors.items():
        end = position + values.nbytes
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for _, values in tensors.values():
            stream.write(np.ascontiguousarray(values).data)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(CHECKPOINTS), help=f"of {', '.join(CHECKPOINTS)}")
    args = parser.parse_args()
    for name in args.names:
        if name not in CHECKPOINTS:
            parser.error(f"names: {name!r} must be one of {', '.join(CHECKPOINTS)}")
        write_checkpoint(args.folder / name, CHECKPOINTS[name])
        write_w8a8(args.folder / name, args.folder / f"{name}-w8a8")
        print(args.folder / name)


if __name__ == "__main__":
    main()
