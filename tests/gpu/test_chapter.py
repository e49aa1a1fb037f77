"""book/one-kernel-two-machines.md: every Python block runs, in order, and prints what the block after it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.gpu.conftest import ROOT
from tools import draw_chapter

CHAPTER = ROOT / "book" / "one-kernel-two-machines.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_blocks_run_and_print_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = CHAPTER.read_text(encoding="utf-8")
    scope: dict[str, Any] = {"__name__": CHAPTER.name}
    printed, shown = "", 0
    for match in BLOCK.finditer(text):
        kind, content = match.groups()
        if kind == "text":
            assert printed == content
            printed, shown = "", shown + 1
            continue
        assert printed == "", "a block prints what the chapter does not show"
        above = text[: match.start(2)].count("\n")
        exec(compile("\n" * above + content, str(CHAPTER), "exec"), scope)
        printed = capsys.readouterr().out
    assert printed == ""
    assert shown > 4


@pytest.mark.parametrize("name", draw_chapter.PICTURES)
def test_pictures_are_what_the_code_draws(name: str) -> None:
    drawn = draw_chapter.PICTURES[name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == drawn
    ElementTree.fromstring(drawn)
    assert f"../docs/{name}" in CHAPTER.read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    prose = BLOCK.sub("", CHAPTER.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert Path(CHAPTER.parent, target).exists(), target
