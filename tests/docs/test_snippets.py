"""Every Python block of README.md and TUTORIAL.md runs, in order, as a reader would paste it into one session."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "TUTORIAL.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> list[tuple[int, str]]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n") + 1, match.group(1)) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the repository root with ch16/ on the path; `model.pt` is a small state dict made for the occasion."""
    import torch

    from nanoserve import ModelConfig, random_weights

    found = blocks(document)
    assert found, f"{document} has no Python block"
    weights = random_weights(ModelConfig(vocab_size=256, n_layer=2, n_head=4, n_embd=64))
    torch.save(
        {name: torch.from_numpy(array.copy()) for name, array in weights.items()}, tmp_path / "model.pt"
    )
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "ch16"))
    scope: dict[str, Any] = {"__name__": document}
    for line, code in found:
        # Padding keeps the document's own line numbers in a traceback.
        exec(compile("\n" * (line - 1) + code, str(ROOT / document), "exec"), scope)
