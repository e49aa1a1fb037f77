"""The engine under the chapter's short module name: the very same classes as in nanoserve."""

import sys
from pathlib import Path

sys.path.append(
    str(Path(__file__).resolve().parent.parent / "python")
)  # a checkout that is built but not installed

from nanoserve import LLM, NanoServingEngine, Request, SamplingParams

__all__ = ["LLM", "NanoServingEngine", "Request", "SamplingParams"]
