"""Text in and out: tokenizer, incremental detokenizer, stop strings, chat template, generation defaults.

Knows no model and no engine: a checkpoint directory and token ids come in, text and token ids go out.
"""

from nanoserve.text.byte_tokenizer import ByteTokenizer
from nanoserve.text.chat_template import ChatTemplate
from nanoserve.text.detokenizer import IncrementalDetokenizer
from nanoserve.text.generation_config import GenerationConfig
from nanoserve.text.stop_strings import StopStrings
from nanoserve.text.text_output import TextOutput
from nanoserve.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "GenerationConfig",
    "IncrementalDetokenizer",
    "StopStrings",
    "TextOutput",
    "Tokenizer",
    "load_tokenizer",
]
