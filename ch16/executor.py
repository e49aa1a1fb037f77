"""Model, weights and executor under the chapter's short module name: the very same classes as in nanoserve."""

import sys
from pathlib import Path

sys.path.append(
    str(Path(__file__).resolve().parent.parent / "python")
)  # a checkout that is built but not installed

from nanoserve import ModelConfig, ModelExecutor, load_weights, random_weights

__all__ = ["ModelConfig", "ModelExecutor", "load_weights", "random_weights"]
