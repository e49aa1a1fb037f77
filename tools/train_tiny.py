"""Train the byte-level GPT-2 in ``models/tiny-gpt`` from an installed copy of the Rust documentation.

The serving demo needs a model that is small enough to commit and still writes recognisable English. The text
comes from the rust-docs component (``rustup component add rust-docs``); it is not committed, only rebuilt:

    python tools/train_tiny.py corpus                # HTML books -> train.bin, heldout.bin, sources.json
    python tools/train_tiny.py train --minutes 45    # exports the best weights after every evaluation
    python tools/train_tiny.py evaluate              # held-out bits per byte, samples of the exported weights
    python tools/train_tiny.py card                  # README.md and loss.svg from training_log.json

One token is one byte; byte 0 stands between sections and is the BOS and EOS token.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tiny_card import write_card
from tiny_corpus import build_corpus

CONTEXT = 512
SHORT_WINDOW = 256  # windows of the first half of the training
STRIDE = 256  # of the final measurement: at least CONTEXT - STRIDE bytes of context
SAMPLE_BYTES = 240
PROMPTS = ("The compiler ", "When a value goes out of scope, ", "This function returns ")


def load_bytes(path: Path) -> Any:
    import torch

    if not path.is_file():
        raise SystemExit(f"{path} is missing: run the corpus command first")
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def heldout_bits(model: Any, data: Any, stride: int, limit: int | None = None) -> float:
    """Bits per byte over windows of CONTEXT bytes.

    With a limit: that many windows spread over the data, scored whole. Without: windows every `stride` bytes,
    of which the last `stride` bytes are scored (of the first: all), so that every byte counts once.
    """
    import torch
    from torch.nn.functional import cross_entropy

    starts = list(range(0, len(data) - CONTEXT - 1, stride))
    if limit is not None and len(starts) > limit:
        starts = [starts[i * len(starts) // limit] for i in range(limit)]
    total, count = 0.0, 0
    with torch.inference_mode():
        for begin in range(0, len(starts), 16):
            batch = torch.stack([data[s : s + CONTEXT + 1] for s in starts[begin : begin + 16]]).long()
            logits = model(input_ids=batch[:, :-1]).logits.float()
            losses = cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
            for row, start in enumerate(starts[begin : begin + 16]):
                part = losses[row] if start == 0 or limit is not None else losses[row, -stride:]
                total, count = total + part.sum().item(), count + part.numel()
    return total / count / math.log(2)


def export(model: Any, out: Path) -> None:
    """float16 weights under the Hugging Face GPT-2 names, without the tied head and the mask buffers."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    temporary = out / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, out / "model.safetensors")


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def new_model(args: argparse.Namespace) -> Any:
    """A fresh GPT-2; its config.json is written to args.out."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {
        "vocab_size": 256,
        "n_positions": CONTEXT,
        "n_embd": args.width,
        "n_layer": args.layers,
        "n_head": args.heads,
        "n_inner": 4 * args.width,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }
    names = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"]}
    config = GPT2Config(**shape, **names)
    config.dtype = torch.float16  # how the weights are stored
    args.out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(args.out)
    # The fused tanh GELU is the same function as gelu_new, only faster here.
    return GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu_pytorch_tanh", use_cache=False))


def rate_scale(step: int, progress: float) -> float:
    """Linear warm-up over 100 steps, cosine decay to 2 % over the time budget."""
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def train(args: argparse.Namespace) -> None:
    """Time-boxed training: short windows first (more steps), whole contexts in the second half."""
    import torch
    from safetensors.torch import load_model
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data, heldout = load_bytes(args.corpus / "train.bin"), load_bytes(args.corpus / "heldout.bin")
    model = new_model(args)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    log: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"{args.threads} CPU cores",
        "torch": torch.__version__,
        "seed": args.seed,
        "minutes": args.minutes,
        "batch": args.batch,
        "short_window": SHORT_WINDOW,
        "lr": args.lr,
        "matrix_lr": args.matrix_lr,
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": json.loads((args.corpus / "sources.json").read_text()),
        "steps": [],
    }
    seconds_before, step, seen, recent, best = 0.0, 0, 0, [], math.inf
    if args.resume:
        before = json.loads((args.out / "training_log.json").read_text())
        log |= {"command": f"{before['command']}\n{log['command']}", "steps": before["steps"]}
        log["resumed_at_steps"] = [*before.get("resumed_at_steps", []), before["steps"][-1]["step"]]
        load_model(model, args.out / "model.safetensors", strict=False)  # the tied head is not in the file
        last = log["steps"][-1]
        seconds_before, step, seen = last["seconds"], last["step"], last["bytes_seen"]
        best = min(row["bits_per_byte"] for row in log["steps"])
        torch.manual_seed(args.seed + step)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, next_eval, warm_from = time.monotonic() - seconds_before, seconds_before + 60, step
    while True:
        seconds = time.monotonic() - start
        progress = seconds / (60 * args.minutes)
        if recent and (seconds >= next_eval or progress >= 1):
            model.eval()
            bits = heldout_bits(model, heldout, stride=CONTEXT, limit=64)
            model.train()
            loss = sum(recent) / len(recent)
            log["steps"].append(
                {
                    "step": step,
                    "bytes_seen": seen,
                    "train_loss": round(loss, 4),
                    "val_loss": round(bits * math.log(2), 4),
                    "bits_per_byte": round(bits, 4),
                    "seconds": round(seconds, 1),
                }
            )
            if bits < best:
                best = bits
                export(model, args.out)
            write_json(args.out / "training_log.json", log)
            print(
                f"{seconds:6.0f}s step {step:6} {seen / 1e6:6.1f} MB train {loss / math.log(2):.3f} "
                f"held out {bits:.3f} bits/byte",
                flush=True,
            )
            recent, next_eval = [], seconds + 60
            if progress >= 1:
                break
        length = SHORT_WINDOW if progress < 0.5 else CONTEXT
        scale = rate_scale(step - warm_from, progress)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
        starts = torch.randint(len(data) - length - 1, (args.batch, 1))
        batch = data[starts + torch.arange(length + 1)].long()
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            # Short windows stand at random places of the context, so that every position embedding learns.
            places = torch.randint(CONTEXT - length + 1, (args.batch, 1)) + torch.arange(length)
            logits = model(input_ids=batch[:, :-1], position_ids=places).logits
            loss_value = cross_entropy(logits.reshape(-1, 256).float(), batch[:, 1:].reshape(-1))
        loss_value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss_value.item())
        step, seen = step + 1, seen + args.batch * length
    evaluate(args)
    write_card(args.out)


def evaluate(args: argparse.Namespace) -> None:
    """Measure the exported weights in float32 on all held-out text and sample from them; adds to the log."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(args.threads)
    model = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32).eval()
    log = json.loads((args.out / "training_log.json").read_text())
    bits = heldout_bits(model, load_bytes(args.corpus / "heldout.bin"), STRIDE)
    # The yardstick: what a general compressor needs for the held-out text once it has read the training text.
    train_text, text = (args.corpus / "train.bin").read_bytes(), (args.corpus / "heldout.bin").read_bytes()
    extra = len(lzma.compress(train_text + text, preset=9)) - len(lzma.compress(train_text, preset=9))
    log |= {
        "exported_bits_per_byte": round(bits, 4),
        "stride": STRIDE,
        "xz_bits_per_byte": round(8 * extra / len(text), 4),
        "file_bytes": (args.out / "model.safetensors").stat().st_size,
        "sample_bytes": SAMPLE_BYTES,
    }
    log["samples"] = []
    for prompt in PROMPTS:
        for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 40}):
            torch.manual_seed(args.seed)
            ids = torch.tensor([list(prompt.encode())])
            limits = {"max_new_tokens": SAMPLE_BYTES, "pad_token_id": 0}
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **limits, **options)[0].tolist()
            sample = {"text": bytes(t for t in tokens if t).decode("utf-8", "replace"), "ended": 0 in tokens}
            log["samples"].append({"prompt": prompt, "seed": args.seed, **options, **sample})
    write_json(args.out / "training_log.json", log)
    print(f"exported weights: {log['exported_bits_per_byte']} bits per byte held out")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, function in (
        ("corpus", lambda args: build_corpus(args.corpus, args.docs, args.heldout)),
        ("train", train),
        ("evaluate", evaluate),
        ("card", lambda args: write_card(args.out)),
    ):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument(
            "--corpus", type=Path, default=Path("build/tiny-corpus"), help="folder of the text"
        )
        command.add_argument("--out", type=Path, default=Path("models/tiny-gpt"), help="folder of the model")
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--threads", type=int, default=os.cpu_count())
        if name == "corpus":
            command.add_argument("--docs", type=Path, help="share/doc/rust/html; default: asked of rustc")
            command.add_argument(
                "--heldout", type=float, default=0.05, help="share kept from the end of each source"
            )
        elif name == "train":
            command.add_argument(
                "--minutes", type=float, default=45.0, help="wall-clock limit of the training loop"
            )
            command.add_argument("--layers", type=int, default=4)
            command.add_argument("--width", type=int, default=192)
            command.add_argument("--heads", type=int, default=6)
            command.add_argument("--batch", type=int, default=16, help="windows per step")
            command.add_argument(
                "--lr", type=float, default=2e-3, help="peak rate of AdamW: embeddings, norms, biases"
            )
            command.add_argument(
                "--matrix-lr", type=float, default=5e-3, help="peak rate of Muon: the block matrices"
            )
            command.add_argument(
                "--resume", action="store_true", help="go on from --out; the clock goes on too"
            )
            command.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
