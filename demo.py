#!/usr/bin/env python3
"""A walk through the engine, phase by phase, on the real thing: the trained model in models/tiny-gpt.

    python3 demo.py                            stop after every phase
    python3 demo.py --non-interactive          run through
    python3 demo.py --prompt "A process is" --prompt "The compiler will"

Everything shown is read from live objects: page tables, the radix tree, what each step computed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "python"))

try:
    import numpy as np
    from rich.columns import Columns
    from rich.console import Console, Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text
    from rich.tree import Tree

    from nanoserve import (
        Batch,
        KVCachePool,
        ModelConfig,
        NanoServingEngine,
        PageTable,
        Request,
        SamplingParams,
        load_weights,
    )
    from nanoserve.cache.radix_cache import RadixCache
except ImportError as missing:
    venv = ROOT / ".venv" / "bin" / "python"
    if venv.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        os.execv(venv, [str(venv), *sys.argv])
    sys.exit(
        f"demo.py needs the built package: {missing}\nRun `make demo`, which builds it into .venv and comes back here."
    )

MODEL = ROOT / "models" / "tiny-gpt"
PROMPTS = ["The function returns ", "In this chapter, we will ", "If you want to ", "A reference to "]
COLOURS = ["cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta"]


def text_of(tokens: Any) -> str:
    """Bytes as readable text; what does not print becomes a dot or an arrow."""
    return bytes(tokens).decode("utf-8", errors="replace").replace("\n", "⏎")


class Demo:
    """Holds what the phases share: the console, the model, the user's prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Console(width=100 if options.non_interactive else None, record=options.svg is not None)
        self.config = ModelConfig.from_pretrained(MODEL)
        self.weights = load_weights(MODEL)
        self.prompts: list[str] = options.prompt or PROMPTS

    def engine(self, **settings: Any) -> NanoServingEngine:
        """A fresh engine; kernels that are not cached yet compile under a progress bar."""
        with Progress(console=self.console, transient=True) as progress:
            task = progress.add_task("kernels", total=None)
            return NanoServingEngine(
                self.config, self.weights, seed=self.options.seed,
                on_progress=lambda done, total, name: progress.update(task, completed=done, total=total, description=name),
                **settings,
            )  # fmt: skip

    def params(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=self.options.temperature, top_k=40, max_tokens=max_tokens)

    def heading(self, phase: int, title: str, explanation: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]Phase {phase}: {title}")
        self.console.print(explanation, style="italic")
        self.console.print()

    def pause(self) -> None:
        if not self.options.non_interactive:
            self.console.input("[dim]Enter for the next phase, Ctrl-C to leave [/dim]")

    # ---- phases

    def phase0(self) -> None:
        self.heading(
            0, "requests and batches",
            "A request is a prompt, its parameters and three lengths: computed, known, allowed. "
            "A batch lays pieces of several requests end to end, so that one forward pass serves them all.",
        )  # fmt: skip
        fresh, running = Request("fresh", list(self.prompts[0].encode())), Request("running", [1, 2, 3, 4])
        running.cached_len = 4
        running.append_output(5)
        batch = Batch.mixed([running], [(fresh, min(6, fresh.extend_len))])
        table = Table("row", "request", "token", "position", "gives logits")
        names = [
            r.req_id for r, count in zip(batch.requests, batch.counts, strict=True) for _ in range(count)
        ]
        for row, name in enumerate(names):
            token = int(batch.input_ids[row])
            sampled = "yes" if row in batch.sample_rows else ""
            table.add_row(
                str(row), str(name), f"{token} {text_of([token])!r}", str(batch.positions[row]), sampled
            )
        self.console.print(table)
        self.console.print(
            f"running: {running.total_len} tokens known, {running.cached_len} computed, {running.extend_len} to go. "
            f"fresh: {fresh.total_len} known, a chunk of 6 of them in this batch, so no logits yet."
        )

    def phase1(self) -> None:
        self.heading(
            1, "the paged KV pool",
            "Keys and values live in pages of 16 tokens that C++ owns and counts references on. "
            "A page table maps a sequence's positions to pages; a page with two holders is copied before it is written.",
        )  # fmt: skip
        pool = KVCachePool(32, 16, self.config.n_layer, self.config.kv_heads, self.config.dim_per_head)
        tables = {name: PageTable(pool) for name in ("A", "B", "C")}
        for name, tokens in (("A", 70), ("B", 33), ("C", 16)):
            tables[name].grow_to(tokens)
        self.console.print(pool_grid(pool, tables))
        tables["B"].release()
        fork = PageTable(pool)
        fork.adopt(tables["A"].pages)
        tables["A fork"] = fork
        fork.make_writable(len(fork) - 1)
        self.console.print(
            "B is done and gives its pages back; a fork of A shares its pages and copies the one it will write:"
        )
        self.console.print(pool_grid(pool, tables))
        stats = pool.stats()
        self.console.print(
            f"{stats['used']} of {stats['num_pages']} pages used, {stats['shared']} shared, "
            f"{stats['bytes_used'] / 1024:.0f} KiB; audit says {pool.audit([]) or 'every page is accounted for'}."
        )

    def phase2(self) -> None:
        self.heading(
            2, "prefill and decode",
            "Prefill computes a whole prompt in one forward and yields its first token; decode adds one token per step. "
            "Each step is one call into C++, which runs kernels that MLIR compiled for this machine.",
        )  # fmt: skip
        engine = self.engine(kv_cache_pages=64)
        self.console.print(
            f"{len(engine.executor.kernels)} kernels loaded, {engine.executor.num_threads} threads"
        )
        request = engine.add_request(
            list(self.prompts[0].encode()), SamplingParams(temperature=0, max_tokens=24)
        )
        table = Table("step", "kind", "tokens computed", "milliseconds", "new token", "pages")
        step = 0
        while engine.has_unfinished:
            begin = time.perf_counter()
            output = engine.step()
            elapsed = 1000 * (time.perf_counter() - begin)
            step += 1
            if step <= 8:
                kind = "decode" if output.batch.is_decode else "prefill"
                new = text_of(request.output_tokens[-1:])
                table.add_row(
                    str(step),
                    kind,
                    str(output.batch.num_tokens),
                    f"{elapsed:.2f}",
                    repr(new),
                    str(request.kv_pages),
                )
        self.console.print(table)
        self.console.print(Text(self.prompts[0]) + Text(text_of(request.output_tokens), style="bold cyan"))

    def phase3(self) -> None:
        self.heading(
            3, "chunked prefill",
            "A long prompt is computed in chunks, so that requests already decoding get their token in every step. "
            "One budget of tokens per step is shared: decode rows first, the rest to chunks.",
        )  # fmt: skip
        engine = self.engine(kv_cache_pages=128, max_chunk_size=48, max_num_batched_tokens=64)
        short = [
            engine.add_request(list(p.encode()), self.params(40), req_id=f"chat {i}")
            for i, p in enumerate(self.prompts[:2])
        ]
        for _ in range(3):
            engine.step()
        long_prompt = (" ".join(self.prompts) * 8).encode()[:300]
        short.append(engine.add_request(list(long_prompt), self.params(8), req_id="document"))
        self.console.print(budget_chart(engine, [str(request.req_id) for request in short], 64, steps=10))
        while engine.has_unfinished:
            engine.step()

    def phase4(self) -> None:
        self.heading(
            4, "the radix tree",
            "Finished prefixes stay in a tree keyed by pages of tokens; a new prompt pins what it shares and computes the rest. "
            "Memory pressure evicts the least recently used leaves, never what a running request holds.",
        )  # fmt: skip
        engine = self.engine(kv_cache_pages=128)
        system = "You are reading the reference manual of a small language. Answer in one sentence.\n"
        questions = ["What is a lifetime?", "What is a lifetime bound?", "How do I write a loop?"]
        table = Table("prompt", "tokens", "found in the tree", "computed")
        for question in [*questions, questions[0]]:
            request = engine.generate([list((system + question).encode())], self.params(20))[0]
            asked, hit = request.num_prompt_tokens, request.prefix_hit_len
            table.add_row(question, str(asked), str(hit), str(asked - hit))
        self.console.print(table)
        self.console.print(draw_tree(engine.radix_mgr.tree))
        self.console.print(f"prompt tokens found: {100 * engine.get_stats()['cache_hit_rate']:.1f}%")

    def phase5(self) -> None:
        self.heading(
            5, "continuous batching",
            "Requests join and leave the running batch at every step, whatever their lengths. "
            "Nobody waits for the slowest, and the answers are the same bits as if each ran alone.",
        )  # fmt: skip
        engine = self.engine(kv_cache_pages=128, max_batch_size=4)
        waiting = [*self.prompts, *PROMPTS][: max(5, len(self.prompts))]
        requests = [
            engine.add_request(list(p.encode()), self.params(60 + 25 * (i % 3)))
            for i, p in enumerate(waiting)
        ]
        begin = time.perf_counter()
        if self.options.non_interactive:
            while engine.has_unfinished:
                engine.step()
            self.console.print(texts(requests))
        else:
            with Live(texts(requests), console=self.console, refresh_per_second=30) as live:
                while engine.has_unfinished:
                    engine.step()
                    live.update(texts(requests))
                    time.sleep(0.02)  # slow enough to watch
        tokens = sum(len(request.output_tokens) for request in requests)
        self.console.print(
            f"{tokens} tokens for {len(requests)} requests in {time.perf_counter() - begin:.2f} s"
        )

    def phase6(self) -> None:
        self.heading(
            6, "the engine",
            "All of it together: radix cache, chunks, mixed batches, sampling, statistics. "
            "Thirty-two requests at once, and an audit of every page at the end.",
        )  # fmt: skip
        engine = self.engine(kv_cache_pages=512, max_chunk_size=64)
        prompts = [
            list((self.prompts[i % len(self.prompts)] + PROMPTS[i % 4] * (i % 5)).encode()) for i in range(32)
        ]
        begin = time.perf_counter()
        finished = engine.generate(prompts, self.params(64))
        elapsed = time.perf_counter() - begin
        for request in finished[:3]:
            self.console.print(
                Text(text_of(request.prompt_tokens)) + Text(text_of(request.output_tokens), style="bold cyan")
            )
        engine.audit()
        tokens = sum(len(request.output_tokens) for request in finished)
        table = Table(
            "statistic",
            "value",
            title=f"{tokens} tokens in {elapsed:.2f} s: {tokens / elapsed:,.0f} tokens/s; audit clean",
        )
        for name, value in engine.get_stats().items():
            table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else str(value))
        self.console.print(table)


def pool_grid(pool: KVCachePool, tables: dict[str, PageTable]) -> Panel:
    """Every page of a pool as a cell coloured by its owner; shared ones show how many hold them."""
    owners: dict[int, list[int]] = {}
    for index, table in enumerate(tables.values()):
        for page in table.pages:
            owners.setdefault(page, []).append(index)
    cells = []
    for page in range(pool.num_pages):
        held = owners.get(page, [])
        style = f"black on {COLOURS[held[0] % len(COLOURS)]}" if held else "dim"
        cells.append(
            Text(f"{page:3d}{'x' + str(pool.ref_count(page)) if len(held) > 1 else '  '}", style=style)
        )
    legend = Text("  ").join(
        Text(f" {name}: {list(table.pages)} ", style=f"black on {COLOURS[i % len(COLOURS)]}")
        for i, (name, table) in enumerate(tables.items())
        if len(table)
    )
    return Panel(Group(Columns(cells), legend), title="pages")


def budget_chart(engine: NanoServingEngine, names: list[str], budget: int, steps: int) -> Panel:
    """One line per step: how many of the step's tokens went to whom."""
    lines = []
    for step in range(steps):
        if not engine.has_unfinished:
            break
        scheduled = {str(req_id): count for req_id, count in engine.step().scheduled.items()}
        line = Text(f"step {step:2d} ")
        for index, name in enumerate(names):
            line.append("█" * scheduled.get(name, 0), style=COLOURS[index])
        line.append("·" * (budget - sum(scheduled.values())), style="dim")
        line.append("  " + " + ".join(str(scheduled[name]) for name in names if name in scheduled))
        lines.append(line)
    legend = Text("  ").join(Text(f"█ {name}", style=COLOURS[index]) for index, name in enumerate(names))
    return Panel(Group(*lines, legend), title=f"who got which of the {budget} tokens of each step")


def draw_tree(tree: RadixCache) -> Tree:
    """The radix tree with the text of each edge, its pages and its pins."""
    drawn = Tree("root")
    at: dict[int, Tree] = {}
    for _, node in tree.walk():
        tokens = np.frombuffer(node.key, dtype=np.int32).tolist()
        label = Text(f"{text_of(tokens)!r}", style="cyan")
        label.append(
            f"  pages {node.pages}" + (f"  pinned x{node.pin_count}" if node.is_pinned else ""), style="dim"
        )
        at[node.node_id] = at.get(node.parent, drawn).add(label)
    return drawn


def texts(requests: list[Request]) -> Group:
    """Prompts and what has been written so far."""
    lines = []
    for index, request in enumerate(requests):
        line = Text(f"[{request.state.value:>9}] ", style="dim")
        line.append(text_of(request.prompt_tokens), style="not dim")
        line.append(text_of(request.output_tokens), style=f"bold {COLOURS[index % len(COLOURS)]} not dim")
        lines.append(line)
    return Group(*lines)


def save_picture(console: Console, path: Path) -> None:
    """The recorded output as one SVG that needs nothing from elsewhere: any monospaced font will do."""
    drawn = console.export_svg(title="nanoserve: python3 demo.py")
    path.write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--non-interactive", action="store_true", help="do not stop between phases")
    parser.add_argument("--prompt", action="append", help="a prompt of your own; may be given several times")
    parser.add_argument("--phase", type=int, choices=range(7), help="show one phase only")
    parser.add_argument("--svg", type=Path, help="save what is shown as a picture")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not sys.stdin.isatty():
        options.non_interactive = True
    try:
        demo = Demo(options)
        phases = [demo.phase0, demo.phase1, demo.phase2, demo.phase3, demo.phase4, demo.phase5, demo.phase6]
        chosen = phases if options.phase is None else [phases[options.phase]]
        for index, phase in enumerate(chosen):
            phase()
            if index + 1 < len(chosen):
                demo.pause()
        if options.svg is not None:
            save_picture(demo.console, options.svg)
    except ValueError as error:
        sys.exit(f"demo.py: {error}")
    except (KeyboardInterrupt, EOFError):
        sys.exit(130)


if __name__ == "__main__":
    main()
