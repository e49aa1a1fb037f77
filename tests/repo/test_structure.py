"""Rules about the tree itself: imports point one way, files stay small, nothing unpickles or evaluates."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "nanoserve"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own rank and below. `errors` and `native` are below everything; `observe` imports nothing.
RANKS = [
    {
        "checks",
        "checkpoint_json",
        "device_name",
        "errors",
        "json_schema",
        "machine_memory",
        "native",
        "observe",
        "quantization_error",
        "structured",
    },
    {
        "constraint",
        "sampling",
        "sampler",
        "random_stream",
        "logits",
        "logits_processors",
        "logprobs",
        "request",
        "batch",
        "draws",
        "compiler",
    },
    {"cache", "emulator", "kernels", "precision", "text"},
    {"scheduling", "models", "paged"},
    {"packed_form", "weight_cache"},
    {"packed_weights"},
    {"bound_op"},
    {"cuda", "executor", "memory_plan"},
    {"nano_engine"},
    {"outputs", "text_request", "workloads"},
    {"llm"},
    {"server"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def unit(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """nanoserve modules a file imports when it runs: not those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nanoserve."):
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "nanoserve":
            found.update(f"nanoserve.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("nanoserve."))
    return found


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name != "__init__.py" or p.parent != PACKAGE], ids=str
)
def test_imports_point_one_way(path: Path) -> None:
    """request/batch/sampling <- cache <- scheduling <- engine, and compiler <- kernels <- models <- executor."""
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    assert own in RANK, f"{own} has no place in the order of imports: give it one"
    for module in imports(path):
        other = unit(module)
        assert RANK[other] <= RANK[own], f"{relative} imports {module}, which is above it"
        if own == "observe":
            assert other == "observe", f"{relative} imports {module}; observe imports none"
        if own == "scheduling":
            assert other not in {"models", "kernels", "compiler"}, (
                f"{relative} must not know models: {module}"
            )
        if own == "text":
            assert other in {"text", "checks", "checkpoint_json", "errors", "structured"}, (
                f"{relative} imports {module}; text knows no engine"
            )
        if own == "compiler":
            assert other == "compiler", f"{relative} imports {module}"


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "src").rglob("*.[ch]*"))], ids=str)
def test_files_stay_small(path: Path) -> None:
    """One noun per file: at most 400 lines, and the core aims at 300."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


BANNED = re.compile(
    r"\b(pickle|marshal|dill|shelve)\b\s*[.(]|import (pickle|marshal|dill|shelve)\b|(?<![\w.])(eval|exec)\("
)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    """No pickle, marshal, eval or exec in the package; torch.load only with weights_only=True."""
    text = path.read_text(encoding="utf-8")
    assert not BANNED.search(text)
    for call in re.findall(r"torch\.load\([^)]*\)", text):
        assert "weights_only=True" in call


def test_the_rules_can_fail() -> None:
    """The patterns catch what they are for."""
    assert BANNED.search("import pickle")
    assert BANNED.search("x = eval(text)")
    assert not BANNED.search("model.eval()")
    assert RANK["scheduling"] < RANK["nano_engine"]
