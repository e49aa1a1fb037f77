"""Texts that tokenizers and detokenizers get wrong: strategies for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

PIECES = [
    "hello", " world", "The quick", "don't", " .", " , ", "\n\n", "\t", "  ", " ", "0123", "你好", "日本語", "한국어",
    "\u1112\u1161\u11ab",  # Hangul jamo of one syllable
    "e\u0301", "a\u0308\u0323", "مرحبا", "\u202e\u05e9\u05dc\u05d5\u05dd\u202c", "👋", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "\U0001d54f", "\ufffd", "\ufffd\ufffd", "\x00",
    "\x7f\x80\x9f", "\ufeff", "\u2581", "\u2581\u2581x", "Ġ", "Ċ", "##ing", " ##", "<0xE4>", "<0x0A>", "<s>", "</s>", "<|im_end|>",
    "<unk>", "[SEP]", "ﬀ", "ß", "\u00a0", "\u3000", "\r\n",
]  # fmt: skip


def texts(max_pieces: int = 8) -> st.SearchStrategy[str]:
    """Any Unicode without surrogates, mixed with pieces that are special to some tokenizer."""
    anything = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
    return st.lists(st.one_of(st.sampled_from(PIECES), anything), max_size=max_pieces).map("".join)
