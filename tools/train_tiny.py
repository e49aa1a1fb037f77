"""Train the byte-level GPT-2 in ``models/tiny-gpt`` from an installed copy of the Rust documentation.

The serving demo needs a model that is small enough to commit and still writes recognisable English. The text comes
from the rust-docs component (``rustup component add rust-docs``); it is not committed, only rebuilt:

    python tools/train_tiny.py corpus                # HTML books -> train.bin, heldout.bin, sources.json
    python tools/train_tiny.py train --minutes 45    # exports the best weights so far after every evaluation
    python tools/train_tiny.py evaluate              # held-out bits per byte and samples of the exported weights
    python tools/train_tiny.py card                  # README.md and loss.svg from training_log.json, nothing else

One token is one byte; byte 0 stands between sections and is the BOS and EOS token.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

# Left out on purpose: embedded-book (its prose is CC-BY-SA-4.0) and the translations of rust-by-example.
BOOKS = ("book", "reference", "nomicon", "cargo", "rustc", "rustdoc", "rust-by-example", "edition-guide", "style-guide",
         "clippy", "unstable-book", "error_codes")
LICENCE = "MIT OR Apache-2.0"
CONTEXT = 512
PROMPTS = ("The compiler ", "When a value goes out of scope, ", "This function returns ")
VOID = {"br", "hr", "img", "input", "link", "meta", "wbr", "source", "col"}
SKIP_TAGS = {"script", "style", "nav", "svg", "button", "table", "header", "footer", "sup"}
SKIP_CLASSES = {"boring", "test-link", "rule", "rule-link", "grammar-container", "grammar-link", "item-info", "footnote"}
BLOCKS = {"p": "", "li": "- ", "dt": "", "dd": "- ", "h1": "# ", "h2": "# ", "h3": "# ", "h4": "# ", "h5": "# "}
PUNCTUATION = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-",
                             "\u2026": "...", "\u2192": "->", "\u00a0": " ", "\u2011": "-", "\u00d7": "x"})


class Prose(HTMLParser):
    """Collects (kind, text) blocks; kind is "heading", "code", "text" or "break" (a new page)."""

    def __init__(self, root: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = root  # "main" for a book page; "docblock" (a class) for the standard library
        self.blocks: list[tuple[str, str]] = []
        self.stack: list[tuple[str, bool, bool]] = []  # tag, skipped, inside the root element
        self.prefix, self.pre, self.text = "", 0, ""

    def flush(self, kind: str = "text") -> None:
        text = unicodedata.normalize("NFKD", self.text.translate(PUNCTUATION)).encode("ascii", "ignore").decode()
        text = text.strip("\n ") if kind == "code" else " ".join(text.split())
        if text:
            kind = "heading" if self.prefix == "# " else kind
            self.blocks.append((kind, text if kind == "code" else self.prefix + text))
            self.prefix = ""
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self.text += "\n" if tag == "br" else ""
            return
        values = dict(attrs)
        classes = set((values.get("class") or "").split())
        _, skipped, inside = self.stack[-1] if self.stack else ("", False, False)
        if inside and "page-break-before" in (values.get("style") or ""):
            self.flush()
            self.blocks.append(("break", ""))
        skipped = skipped or tag in SKIP_TAGS or bool(classes & SKIP_CLASSES)
        if self.root == "docblock" and "docblock" in classes and not inside:
            self.blocks.append(("break", ""))
        self.stack.append((tag, skipped, inside or tag == self.root or self.root in classes))
        if tag in BLOCKS or tag in ("pre", "ul", "ol", "blockquote"):
            self.flush()
            self.prefix = BLOCKS.get(tag, "") or (self.prefix if tag == "p" and self.prefix == "- " else "")
            self.pre += tag == "pre"
        elif tag == "code" and not self.pre:
            self.handle_data("`")

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or not any(entry[0] == tag for entry in self.stack):
            return
        if tag == "code" and not self.pre:
            self.handle_data("`")
        if tag in BLOCKS or tag in ("pre", "main", "div"):
            self.flush("code" if tag == "pre" else "text")
            self.pre -= tag == "pre"
        while self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1][2] and not self.stack[-1][1]:
            self.text += data


def sections(files: list[Path], root: str, seen: set[str], code_share: float = 0.08) -> Iterator[str]:
    """Sections of prose: cut at pages and headings, repeated paragraphs dropped, short code kept up to a share."""
    prose_bytes = code_bytes = 0
    for path in files:
        parser = Prose(root)
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        parts: list[tuple[str, str]] = []
        for kind, text in [*parser.blocks, ("break", "")]:
            if kind in ("break", "heading") and parts and parts[-1][0] == "heading":
                parts.pop()  # a heading with nothing under it
            size = sum(len(part[1]) for part in parts)
            if kind == "break" or (kind == "heading" and size > 1500):
                if size > 150:
                    prose_bytes += size
                    yield "\n\n".join(part[1] for part in parts).replace("\n\n- ", "\n- ")
                parts = []
            if kind == "break" or (len(text) > 30 and text in seen):
                continue
            if kind == "code":
                if text.count("\n") > 9 or code_bytes + len(text) > code_share * prose_bytes or not parts:
                    continue
                code_bytes += len(text)
            seen.add(text)
            parts.append((kind, re.sub(r"\n{2,}", "\n", text)))


def build_corpus(args: argparse.Namespace) -> None:
    """Write train.bin and heldout.bin (the last part of every source) and sources.json."""
    docs: Path | None = args.docs
    if docs is None:
        sysroot = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=True).stdout
        docs = Path(sysroot.strip()) / "share/doc/rust/html"
    if not (docs / "book/print.html").is_file():
        raise SystemExit(f"no documentation under {docs}: rustup component add rust-docs, or give --docs")
    library = [path for path in sorted((docs / "std").rglob("*.html"))
               if not {"arch", "simd", "intrinsics"} & set(path.relative_to(docs / "std").parts)]
    sources = [(name, [docs / name / "print.html"], "main") for name in BOOKS] + [("std", library, "docblock")]
    train, heldout, rows, seen = bytearray(b"\0"), bytearray(b"\0"), [], set[str]()
    for name, files, root in sources:
        texts = [text.encode() + b"\0" for text in sections([p for p in files if p.is_file()], root, seen)]
        total = sum(map(len, texts))
        done, held = 0, 0
        for text in texts:
            if done < (1 - args.heldout) * total:
                train += text
            else:
                heldout += text
                held += len(text)
            done += len(text)
        rows.append({"name": name, "licence": LICENCE, "train_bytes": total - held, "heldout_bytes": held})
        print(f"{name:16} {total:9,} bytes, {len(texts)} sections", flush=True)
    args.corpus.mkdir(parents=True, exist_ok=True)
    (args.corpus / "train.bin").write_bytes(train)
    (args.corpus / "heldout.bin").write_bytes(heldout)
    version = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout.split()[1:2]
    facts = {"documentation": "Rust " + " ".join(version), "sources": rows}
    (args.corpus / "sources.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"train {len(train):,} bytes, held out {len(heldout):,} bytes")


def load_bytes(path: Path) -> Any:
    import torch

    if not path.is_file():
        raise SystemExit(f"{path} is missing: run the corpus command first")
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def heldout_bits(model: Any, data: Any, stride: int, limit: int | None = None) -> float:
    """Bits per byte over windows of CONTEXT bytes; the last `stride` bytes of each are scored (the first: all)."""
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

    tensors = {name: value.detach().to(torch.float16).contiguous() for name, value in model.state_dict().items()
               if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))}
    temporary = out / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, out / "model.safetensors")


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def train(args: argparse.Namespace) -> None:
    """Time-boxed training: 256-byte windows first (more steps), CONTEXT-byte windows for the rest."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data, heldout = load_bytes(args.corpus / "train.bin"), load_bytes(args.corpus / "heldout.bin")
    shape = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": args.width, "n_layer": args.layers,
             "n_head": args.heads, "n_inner": 4 * args.width, "bos_token_id": 0, "eos_token_id": 0,
             "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}
    # The fused tanh GELU is the same function as gelu_new, only faster here.
    model = GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu_pytorch_tanh"))
    args.out.mkdir(parents=True, exist_ok=True)
    config = GPT2Config(**{**shape, "use_cache": True}, activation_function="gelu_new",
                        architectures=["GPT2LMHeadModel"])
    config.dtype = torch.float16  # how the weights are stored
    config.save_pretrained(args.out)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    log: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "hardware": f"{args.threads} CPU cores", "torch": torch.__version__,
        "seed": args.seed, "minutes": args.minutes, "batch": args.batch, "lr": args.lr, "matrix_lr": args.matrix_lr,
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": json.loads((args.corpus / "sources.json").read_text()), "steps": []}
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, step, seen, recent, best, next_eval = time.monotonic(), 0, 0, [], math.inf, 60.0
    while True:
        seconds = time.monotonic() - start
        progress = seconds / (60 * args.minutes)
        if seconds >= next_eval or progress >= 1:
            model.eval()
            bits = heldout_bits(model, heldout, stride=CONTEXT, limit=64)
            model.train()
            loss = sum(recent) / len(recent)
            log["steps"].append({"step": step, "bytes_seen": seen, "train_loss": round(loss, 4),
                                 "val_loss": round(bits * math.log(2), 4), "bits_per_byte": round(bits, 4),
                                 "seconds": round(seconds, 1)})
            if bits < best:
                best = bits
                export(model, args.out)
            write_json(args.out / "training_log.json", log)
            print(f"{seconds:6.0f}s step {step:6} {seen / 1e6:6.1f} MB train {loss / math.log(2):.3f} "
                  f"held out {bits:.3f} bits/byte", flush=True)
            recent, next_eval = [], seconds + 60
            if progress >= 1:
                break
        length = 256 if progress < 0.5 else CONTEXT
        scale = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
        starts = torch.randint(len(data) - length - 1, (args.batch, 1))
        batch = data[starts + torch.arange(length + 1)].long()
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            logits = model(input_ids=batch[:, :-1]).logits
            loss_value = cross_entropy(logits.reshape(-1, 256).float(), batch[:, 1:].reshape(-1))
        loss_value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss_value.item())
        step, seen = step + 1, seen + args.batch * length
    evaluate(args)
    card(args)


def evaluate(args: argparse.Namespace) -> None:
    """Measure the exported weights in float32 on all held-out text and sample from them; adds to the log."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(args.threads)
    model = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32).eval()
    log = json.loads((args.out / "training_log.json").read_text())
    log["exported_bits_per_byte"] = round(heldout_bits(model, load_bytes(args.corpus / "heldout.bin"), 256), 4)
    log["file_bytes"] = (args.out / "model.safetensors").stat().st_size
    log["samples"] = []
    for prompt in PROMPTS:
        for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 40}):
            torch.manual_seed(args.seed)
            ids = torch.tensor([list(prompt.encode())])
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=240, pad_token_id=0, **options)
            text = bytes(t for t in tokens[0].tolist() if t).decode("utf-8", "replace")
            ended = bool((tokens[0] == 0).any())
            log["samples"].append({"prompt": prompt, "seed": args.seed, **options, "ended": ended, "text": text})
    write_json(args.out / "training_log.json", log)
    print(f"exported weights: {log['exported_bits_per_byte']} bits per byte held out")


def card(args: argparse.Namespace) -> None:
    raise SystemExit("not yet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("corpus", build_corpus), ("train", train), ("evaluate", evaluate), ("card", card)):
        command = commands.add_parser(name, help=(function.__doc__ or "").partition("\n")[0])
        command.set_defaults(function=function)
        command.add_argument("--corpus", type=Path, default=Path("build/tiny-corpus"), help="folder of the text")
        command.add_argument("--out", type=Path, default=Path("models/tiny-gpt"), help="folder of the model")
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--threads", type=int, default=os.cpu_count())
        if name == "corpus":
            command.add_argument("--docs", type=Path, help="share/doc/rust/html; default: asked of rustc")
            command.add_argument("--heldout", type=float, default=0.05, help="share kept from the end of each source")
        elif name == "train":
            command.add_argument("--minutes", type=float, default=45.0, help="wall-clock limit of the training loop")
            command.add_argument("--layers", type=int, default=4)
            command.add_argument("--width", type=int, default=192)
            command.add_argument("--heads", type=int, default=6)
            command.add_argument("--batch", type=int, default=16, help="windows per step")
            command.add_argument("--lr", type=float, default=2e-3, help="peak rate of AdamW: embeddings, norms, biases")
            command.add_argument("--matrix-lr", type=float, default=5e-3, help="peak rate of Muon: the block matrices")
            command.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
