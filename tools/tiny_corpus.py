"""Turn the HTML of an installed rust-docs component into plain prose for ``train_tiny.py``.

Pages are cut into sections (byte 0 between them), quotes and dashes become ASCII, navigation, tables,
grammars and hidden lines go, paragraphs seen before are dropped, and short code blocks stay up to a small
share. The text itself is not committed: ``rustup component add rust-docs`` and this script give it back.
"""

from __future__ import annotations

import json
import re
import subprocess
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# Left out on purpose: embedded-book (its prose is CC-BY-SA-4.0) and the translations of rust-by-example.
BOOKS = (
    "book",
    "reference",
    "nomicon",
    "cargo",
    "rustc",
    "rustdoc",
    "rust-by-example",
    "edition-guide",
    "style-guide",
    "clippy",
    "unstable-book",
    "error_codes",
)
LICENCE = "MIT OR Apache-2.0"
VOID = {"br", "hr", "img", "input", "link", "meta", "wbr", "source", "col"}
SKIP_TAGS = {"script", "style", "nav", "svg", "button", "table", "header", "footer", "sup"}
SKIP_CLASSES = {
    "boring",
    "test-link",
    "rule",
    "rule-link",
    "grammar-container",
    "grammar-link",
    "item-info",
    "footnote",
}
BLOCKS = {
    "p": "",
    "li": "- ",
    "dt": "",
    "dd": "- ",
    "h1": "# ",
    "h2": "# ",
    "h3": "# ",
    "h4": "# ",
    "h5": "# ",
}
PUNCTUATION = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\u2192": "->",
        "\u00a0": " ",
        "\u2011": "-",
        "\u00d7": "x",
    }
)


class Prose(HTMLParser):
    """Collects (kind, text) blocks; kind is "heading", "code", "text" or "break" (a new page)."""

    def __init__(self, root: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = root  # "main" for a book page; "docblock" (a class) for the standard library
        self.blocks: list[tuple[str, str]] = []
        self.stack: list[tuple[str, bool, bool]] = []  # tag, skipped, inside the root element
        self.prefix, self.pre, self.text = "", 0, ""

    def flush(self, kind: str = "text") -> None:
        text = (
            unicodedata.normalize("NFKD", self.text.translate(PUNCTUATION)).encode("ascii", "ignore").decode()
        )
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
    """Sections of prose, cut at pages and headings; no paragraph twice; short code up to a share."""
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


def docs_version(docs: Path) -> str:
    """The release the documentation belongs to, as its own version page says; empty if there is none."""
    page = docs / "version_info.html"
    found = re.search(r"\d+\.\d+\.\d+", page.read_text(encoding="utf-8")) if page.is_file() else None
    return found.group() if found else ""


def build_corpus(corpus: Path, docs: Path | None, heldout_share: float) -> None:
    """Write train.bin and heldout.bin (the last part of every source) and sources.json."""
    if docs is None:
        sysroot = subprocess.run(
            ["rustc", "--print", "sysroot"], capture_output=True, text=True, check=True
        ).stdout
        docs = Path(sysroot.strip()) / "share/doc/rust/html"
    if not (docs / "book/print.html").is_file():
        raise SystemExit(f"no documentation under {docs}: rustup component add rust-docs, or give --docs")
    library = [
        path
        for path in sorted((docs / "std").rglob("*.html"))
        if not {"arch", "simd", "intrinsics"} & set(path.relative_to(docs / "std").parts)
    ]
    sources = [(name, [docs / name / "print.html"], "main") for name in BOOKS] + [
        ("std", library, "docblock")
    ]
    train, heldout, rows, seen = bytearray(b"\0"), bytearray(b"\0"), [], set[str]()
    for name, files, root in sources:
        texts = [text.encode() + b"\0" for text in sections([p for p in files if p.is_file()], root, seen)]
        total = sum(map(len, texts))
        done, held = 0, 0
        for text in texts:
            if done < (1 - heldout_share) * total:
                train += text
            else:
                heldout += text
                held += len(text)
            done += len(text)
        rows.append({"name": name, "licence": LICENCE, "train_bytes": total - held, "heldout_bytes": held})
        print(f"{name:16} {total:9,} bytes, {len(texts)} sections", flush=True)
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "train.bin").write_bytes(train)
    (corpus / "heldout.bin").write_bytes(heldout)
    facts = {"documentation": f"Rust {docs_version(docs)}".strip(), "sources": rows}
    (corpus / "sources.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"train {len(train):,} bytes, held out {len(heldout):,} bytes")
