"""Draws the pictures of book/one-kernel-two-machines.md from the code they show: `python tools/draw_chapter.py [folder]`."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from nanoserve.compiler import lowering
from nanoserve.compiler.gpu import lowering as gpu_lowering
from nanoserve.kernels.cuda.paged_attention import SEGMENT

FOLDER = Path(__file__).resolve().parent.parent / "docs"
SHARED, OWN, END = "#dbeafe", "#f1f5f9", "#fef3c7"
KEYS = 1100


def box(x: int, y: int, width: int, text: str, fill: str, height: int = 28) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="#334155"/>\n'
        f'<text x="{x + width // 2}" y="{y + height // 2 + 5}" text-anchor="middle">{escape(text)}</text>\n'
    )


def line(x: int, y: int, to_x: int, to_y: int) -> str:
    return f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="#334155" marker-end="url(#tip)"/>\n'


def picture(width: int, height: int, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#334155"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}</svg>\n'
    )


def routes() -> str:
    """Both lists of stages, side by side; a stage that both have is drawn in the colour of what is shared."""
    cpu, gpu = ([stage.name for stage in stages] for stages in (lowering.STAGES, gpu_lowering.STAGES))
    body = box(180, 10, 280, "builder.py, control.py, vector_math.py", SHARED)
    sides = (
        (40, "kernels/norm.py", cpu, ["LLVM IR", "x86 machine code"]),
        (340, "kernels/cuda/norm.py", gpu, ["LLVM IR", "PTX", "cubin"]),
    )
    for x, source, stages, ends in sides:
        shared = set(cpu) & set(gpu)
        boxes = [(source, END), *((name, SHARED if name in shared else OWN) for name in stages)]
        boxes += [(name, END) for name in ends]
        body += line(320, 38, x + 130, 60)
        for i, (name, fill) in enumerate(boxes):
            body += box(x, 60 + 42 * i, 260, name, fill)
            if i:
                body += line(x + 130, 46 + 42 * i, x + 130, 60 + 42 * i)
    rows = max(len(stages) + len(ends) + 1 for _, _, stages, ends in sides)
    ir = 60 + 42 * (len(gpu) + 1)
    body += line(600, ir + 14, 640, ir + 14) + box(640, ir, 130, "emulator", END)
    return picture(790, 60 + 42 * rows + 4, body)


def segments() -> str:
    """A sequence's keys, cut at multiples of SEGMENT, and the order in which what they give is merged."""
    starts = range(0, KEYS, SEGMENT)
    body = f'<text x="20" y="24">{KEYS} keys of one sequence, cut at multiples of {SEGMENT}</text>\n'
    previous = 0
    for i, start in enumerate(starts):
        end, x = min(start + SEGMENT, KEYS), 20 + start // 2
        body += box(x, 36, (end - start) // 2, f"{start}..{end - 1}", SHARED)
        centre = x + (end - start) // 4
        body += line(centre, 64, centre, 92)
        left = max(20, centre - 85)
        body += box(left, 92, 170, f"largest, sum, values {i}", OWN)
        body += line(centre, 120, centre, 148)
        body += box(centre - 40, 148, 80, "merge", END)
        if i:
            body += line(previous + 40, 162, centre - 40, 162)
        previous = centre
    body += line(previous + 40, 162, previous + 76, 162) + f'<text x="{previous + 80}" y="167">out</text>\n'
    body += '<text x="20" y="206">attend: one program goes left to right. split: one program per segment, then merge goes left to right.</text>\n'
    return picture(760, 220, body)


PICTURES = {"two-routes.svg": routes, "split-keys.svg": segments}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")
