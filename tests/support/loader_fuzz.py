"""Loads mutated checkpoints in a process of its own: `python -m support.loader_fuzz CORPUS SEED COUNT DIRECTORY`.

The process may map 512 MiB more than it starts with, and ends with a traceback if one case takes longer than the watchdog.
It prints a JSON object: how many cases loaded, how many were refused, and what was wrong with the others.
"""

from __future__ import annotations

import faulthandler
import json
import random
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanoserve import ModelConfig
from nanoserve.models.checkpoint import load_weights
from support.mutations import mutated_bytes, mutated_json
from support.safetensors_bytes import entry, write

MORE_BYTES = 512 << 20
CASE_SECONDS = 2.0  # of this process's own time; the machine may be busy
WATCHDOG_SECONDS = 20.0
Case = Callable[[], None]

HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": entry("F32", (4, 2), (0, 32)),
    "b.weight": entry("BF16", (3, 2), (32, 44)),
    "c": entry("F16", (), (44, 46)),
    "empty": entry("F64", (0, 5), (46, 46)),
    "flag": entry("BOOL", (2,), (46, 48)),
}
SIZES = {"gpt2": {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2},
         "llama": {"max_position_embeddings": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "num_key_value_heads": 1, "intermediate_size": 24, "rope_theta": 1e4}}  # fmt: skip


def read_all(path: Path) -> None:
    for tensor in load_weights(path).values():
        if tensor.dtype in ("float16", "bfloat16", "float32", "float64"):
            assert tensor[:].shape == np.asarray(tensor).shape == tensor.shape
            tensor.forget()


def safetensors_cases(rng: random.Random, directory: Path) -> Iterator[Case]:
    path = directory / "model.safetensors"
    good = write(path, HEADER, rng.randbytes(48)).read_bytes()
    while True:
        if rng.random() < 0.5:
            path.write_bytes(mutated_bytes(rng, good, len(good) - 48))
        else:
            length = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(good)]) if rng.random() < 0.1 else None
            write(path, mutated_json(rng, HEADER), rng.randbytes(rng.choice([48, 48, 48, 47, 0, 64])), length)
        yield lambda: read_all(path)


def index_cases(rng: random.Random, directory: Path) -> Iterator[Case]:
    index, names = directory / "model.safetensors.index.json", ["one.safetensors", "two.safetensors"]
    for name in names:
        write(directory / name, {name[0]: entry(), name[1]: entry(offsets=(8, 16))}, bytes(16))
    good = {
        "metadata": {"total_size": 32},
        "weight_map": {"o": names[0], "n": names[0], "t": names[1], "w": names[1]},
    }
    while True:
        raw = mutated_json(rng, good)
        index.write_bytes(raw if rng.random() < 0.6 else mutated_bytes(rng, json.dumps(good).encode()))
        yield lambda: read_all(directory)


def config_cases(rng: random.Random, directory: Path) -> Iterator[Case]:
    from support.hub_configs import HUB

    configs = list(HUB.values())
    path = directory / "config.json"
    while True:
        good = rng.choice(configs)
        raw = mutated_json(rng, good) if rng.random() < 0.8 else mutated_bytes(rng, json.dumps(good).encode())
        path.write_bytes(raw)
        yield lambda: repr(ModelConfig.from_pretrained(directory)) and None


def llm_cases(rng: random.Random, directory: Path) -> Iterator[Case]:
    """A whole model: config.json or the weights' file changed, loaded, and asked for a token."""
    from safetensors.numpy import save_file

    from nanoserve import LLM, SamplingParams, random_weights

    def run() -> None:
        llm = LLM(directory, kv_cache_bytes=1 << 20, max_num_seqs=2, max_num_batched_tokens=16, num_threads=2)
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, temperature=0))

    goods = []
    for family, sizes in SIZES.items():
        config = {"model_type": family, "vocab_size": 23, **sizes}
        (directory / "config.json").write_text(json.dumps(config))
        weights = random_weights(ModelConfig.from_pretrained(directory))
        save_file(
            {name: np.ascontiguousarray(a) for name, a in weights.items()}, directory / "model.safetensors"
        )
        goods.append((config, (directory / "model.safetensors").read_bytes()))
        run()  # what is compiled once is compiled now
    while True:
        config, weights_file = rng.choice(goods)
        raw_config, raw_weights = json.dumps(config).encode(), weights_file
        if rng.random() < 0.6:
            raw_config = mutated_json(rng, config, edits=1)
        else:
            header_bytes = 8 + int.from_bytes(weights_file[:8], "little")
            if rng.random() < 0.5:
                raw_weights = mutated_bytes(rng, weights_file, header_bytes)
            else:  # other numbers in a file of the right length: not finite some of them, refused or served
                at = rng.randrange(header_bytes, len(weights_file) - 4)
                raw_weights = weights_file[:at] + rng.randbytes(4) + weights_file[at + 4 :]
        (directory / "config.json").write_bytes(raw_config)
        (directory / "model.safetensors").write_bytes(raw_weights)
        yield run


# What each corpus makes of a directory, and what a refusal must name.
CORPORA: dict[str, tuple[Callable[[random.Random, Path], Iterator[Case]], str]] = {
    "safetensors": (safetensors_cases, r"^model\.safetensors: "),
    "index": (index_cases, r"model\.safetensors\.index\.json|(one|two)\.safetensors|shards are missing"),
    "config": (config_cases, r"^config\.json: "),
    "llm": (llm_cases, r"config\.json|model\.safetensors|weights: |^[\w\[\]]+: "),
}


def limit_memory() -> None:
    """This process may map MORE_BYTES beyond what it has mapped now."""
    mapped = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MORE_BYTES, hard))


def run(corpus: str, seed: int, count: int, directory: Path) -> dict[str, Any]:
    make, named = CORPORA[corpus]
    cases = make(random.Random(seed), directory)
    case = next(cases)
    limit_memory()
    loaded, refused, complaints, slowest = 0, 0, [], 0.0
    for number in range(count):
        faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
        start = time.process_time()
        complaint = ""
        try:
            case()
            loaded += 1
        except ValueError as error:
            refused += 1
            message = str(error)
            if not re.search(named, message) or "\n" in message or len(message) > 1000:
                complaint = f"message {message[:300]!r}"
        except BaseException as error:
            complaint = f"{type(error).__name__}: {str(error)[:300]}"
        took = time.process_time() - start
        slowest = max(slowest, took)
        if took > CASE_SECONDS:
            complaint += f" took {took:.1f} s"
        if complaint:
            kept = {file.name: repr(file.read_bytes()[:600]) for file in sorted(directory.glob("*.json"))}
            complaints.append(f"case {number}: {complaint} {kept}")
        case = next(cases)
    faulthandler.cancel_dump_traceback_later()
    return {"loaded": loaded, "refused": refused, "complaints": complaints, "slowest": slowest}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
