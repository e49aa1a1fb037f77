"""Write the card of ``models/tiny-gpt`` (README.md and loss.svg) from its training log.

No number in the card is typed by hand: all of them come from training_log.json and config.json, so that the
card can be written again at any time (``tools/train_tiny.py card``) and cannot drift from what was measured.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

CARD = """\
---
license: mit
language: en
pipeline_tag: text-generation
---

# tiny-gpt

A byte-level GPT-2 of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads, context
{context} bytes), trained from scratch on the Rust documentation so that the serving demo has something
to say. One token is one byte of UTF-8; byte 0 stands between texts and is both BOS and EOS.
`GPT2LMHeadModel.from_pretrained` loads it; there is no tokenizer file: `list(text.encode())` encodes,
`bytes(ids).decode()` decodes. The weights are stored as float16 (`model.safetensors`, {file_bytes:,}
bytes), the output head is the embedding matrix.

**{bits:.3f} bits per byte** on held-out text (float16 weights computed in float32; all but the
first bytes have at least {warm} bytes of context). For scale: `xz -9` needs {xz_bits:.3f} bits per byte for
the same text after reading the training text.

## Data

{documentation} documentation as installed by `rustup component add rust-docs`: the prose of the books'
pages and, as `std`, of the standard library reference; repeated paragraphs and most code are dropped.
The last {share:.0%} of each source is held out. The licences are those of the COPYRIGHT files that come with
the documentation; the embedded book is not used (its prose is CC-BY-SA-4.0). The text is not part of this
repository.

| source | licence | training bytes | held-out bytes |
|---|---|---:|---:|
{data}
| all | | {train_bytes:,} | {heldout_bytes:,} |

## Training

```sh
python tools/train_tiny.py corpus
{command}
```

{hardware}, {minutes:.1f} minutes of wall time shared with other work, torch {torch}, {precision}.
{steps:,} steps, {seen:.1f} MB seen ({epochs:.1f} times the training text). Batches of {batch} windows,
{short} bytes long in the first half and {context} in the second; Muon (peak rate {matrix_lr}) for the block
matrices, AdamW (peak rate {lr}) for the rest, cosine decay over wall time, gradient norm clipped at 1,
no dropout, seed {seed}. The schedule follows the clock, so another machine gives other weights.{resumed}

![loss curve](loss.svg)

| step | MB seen | minutes | training loss (nats) | held-out loss (nats) | held-out bits per byte |
|---:|---:|---:|---:|---:|---:|
{table}

The held-out curve is measured on windows of {context} bytes: it stays high while training sees only windows
of {short} and falls when the long ones begin. It covers a spread of held-out windows without a warm context,
the figure at the top all of the held-out text. The log with every row is `training_log.json`; this card is
written from it by `tools/train_tiny.py card`.

## Samples

As they came out: temperature {temperature}, top-k {top_k}, seed {sample_seed}, {sample_bytes} bytes at most.

{samples}

Greedy:

```text
{greedy}
```

## Limits

A toy. It knows the English of one set of manuals: it spells, forms phrases and keeps the register, but
it does not know what is true about Rust or anything else, and it loses the thread after a sentence or
two. Not for any use but tests and demonstrations.

## Licence

Weights: MIT. Training text: as in the table above.
"""


def write_card(out: Path) -> None:
    """Write README.md and loss.svg; every number in them comes from training_log.json and config.json."""
    log = json.loads((out / "training_log.json").read_text())
    config = json.loads((out / "config.json").read_text())
    steps, sources = log["steps"], log["corpus"]["sources"]
    last = steps[-1]
    train_bytes = sum(source["train_bytes"] for source in sources)
    heldout_bytes = sum(source["heldout_bytes"] for source in sources)
    count = min(12, len(steps))
    rows = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    table = "\n".join(
        f"| {row['step']:,} | {row['bytes_seen'] / 1e6:.1f} | {row['seconds'] / 60:.1f} | "
        f"{row['train_loss']:.3f} | {row['val_loss']:.3f} | {row['bits_per_byte']:.3f} |"
        for row in rows
    )
    data = "\n".join(
        f"| {source['name']} | {source['licence']} | {source['train_bytes']:,} | "
        f"{source['heldout_bytes']:,} |"
        for source in sources
    )
    samples = "\n\n".join(
        f"Prompt `{sample['prompt']}` ({'ended by itself' if sample['ended'] else 'cut at the limit'}):\n\n"
        f"```text\n{sample['text']}\n```"
        for sample in log["samples"]
        if sample["do_sample"]
    )
    greedy = next(sample for sample in log["samples"] if not sample["do_sample"])
    drawn = next(sample for sample in log["samples"] if sample["do_sample"])
    resumed = " and ".join(f"{step:,}" for step in log.get("resumed_at_steps", []))
    precision = "float32" if "--float32" in log["command"] else "bfloat16 autocast over float32 weights"
    text = CARD.format(
        parameters=log["parameters"],
        layers=config["n_layer"],
        width=config["n_embd"],
        heads=config["n_head"],
        context=config["n_positions"],
        file_bytes=log["file_bytes"],
        bits=log["exported_bits_per_byte"],
        xz_bits=log["xz_bits_per_byte"],
        warm=config["n_positions"] - log["stride"],
        share=heldout_bytes / (train_bytes + heldout_bytes),
        short=log["short_window"],
        resumed=f" Resumed at step {resumed} with fresh optimizer state." if resumed else "",
        sample_bytes=log["sample_bytes"],
        documentation=log["corpus"]["documentation"],
        data=data,
        train_bytes=train_bytes,
        heldout_bytes=heldout_bytes,
        command=log["command"],
        hardware=log["hardware"],
        minutes=last["seconds"] / 60,
        torch=log["torch"],
        precision=precision,
        steps=last["step"],
        seen=last["bytes_seen"] / 1e6,
        epochs=last["bytes_seen"] / train_bytes,
        batch=log["batch"],
        seed=log["seed"],
        matrix_lr=log["matrix_lr"],
        lr=log["lr"],
        table=table,
        samples=samples,
        sample_seed=drawn["seed"],
        temperature=drawn["temperature"],
        top_k=drawn["top_k"],
        greedy=greedy["text"],
    )
    (out / "README.md").write_text(text)
    (out / "loss.svg").write_text(loss_svg(steps))


def loss_svg(steps: list[dict[str, float]]) -> str:
    """The two curves, bits per byte against bytes seen, as a plain SVG."""
    width, height, left, top, right, bottom = 720, 360, 56, 20, 700, 310
    curves = {
        "training batches": ("#1f77b4", [row["train_loss"] / math.log(2) for row in steps]),
        "held out": ("#d62728", [row["bits_per_byte"] for row in steps]),
    }
    values = [value for _, points in curves.values() for value in points]
    low, high, end = math.floor(2 * min(values)) / 2, math.ceil(2 * max(values)) / 2, steps[-1]["bytes_seen"]

    def x(seen: float) -> float:
        return left + (right - left) * seen / end

    def y(bits: float) -> float:
        return bottom - (bottom - top) * (bits - low) / (high - low)

    font = 'font-family="sans-serif" font-size="12"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i in range(round(2 * (high - low)) + 1):
        bits = low + i / 2
        lines += [
            f'<line x1="{left}" y1="{y(bits):.1f}" x2="{right}" y2="{y(bits):.1f}" stroke="#ddd"/>',
            f'<text x="{left - 8}" y="{y(bits) + 4:.1f}" text-anchor="end">{bits:.1f}</text>',
        ]
    for mark in range(0, int(end / 1e6) + 1, 5):
        lines.append(f'<text x="{x(mark * 1e6):.1f}" y="{bottom + 18}" text-anchor="middle">{mark}</text>')
    for i, (name, (colour, points)) in enumerate(curves.items()):
        path = " ".join(
            f"{x(row['bytes_seen']):.1f},{y(value):.1f}" for row, value in zip(steps, points, strict=True)
        )
        lines += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{right - 150}" y="{top + 20 + 18 * i}" fill="{colour}">{name}</text>',
        ]
    middle, axis = (top + bottom) / 2, "bits per byte"
    lines += [
        f'<text x="{(left + right) / 2}" y="{height - 10}" text-anchor="middle">million bytes seen</text>',
        f'<text y="14" transform="translate(0 {middle}) rotate(-90)" text-anchor="middle">{axis}</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
