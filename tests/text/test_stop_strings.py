"""Stop strings: the text does not depend on how it was cut into pieces, and nothing of a match leaks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanoserve.text import StopStrings


def definition(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The class's docstring, naively: the match that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    watch = StopStrings(stops, include)
    released, verdict = "", None
    for piece in pieces:
        text, verdict = watch.push(piece)
        released += text
    return released + watch.finish(), verdict


letters = st.text("ab<>", max_size=24)
stop_lists = st.lists(st.text("ab<>", min_size=1, max_size=5), max_size=4)


@settings(max_examples=600)
@given(text=letters, stops=stop_lists, cuts=st.lists(st.integers(0, 24), max_size=8), include=st.booleans())
@example(text="aaab", stops=["aab"], cuts=[1, 2, 3], include=False)
@example(text="abab<", stops=["abab", "bab<"], cuts=[2], include=False)
def test_any_partition(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert run(pieces, stops, include) == definition(text, stops, include)


@settings(max_examples=300)
@given(text=letters, stops=stop_lists)
def test_holds_back_no_more_than_needed(text: str, stops: list[str]) -> None:
    """After every character: what is held is exactly the longest suffix that is a proper prefix of a stop string."""
    watch = StopStrings(stops)
    released = ""
    for i, char in enumerate(text):
        new, verdict = watch.push(char)
        released += new
        if verdict is not None:
            return
        seen = text[: i + 1]
        prefixes = {stop[:n] for stop in stops for n in range(1, len(stop))}
        held = max((len(p) for p in prefixes if seen.endswith(p)), default=0)
        assert released == seen[: len(seen) - held]


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["aa", "ab"], ["aab"], ("a", "aab")),  # overlaps itself
        (["Hello <th", "ink> x"], ["<think>"], ("Hello ", "<think>")),  # across a border
        (["Hello <th", "ank"], ["<think>"], ("Hello <thank", None)),  # not one after all
        (["ab", "c"], ["abc", "ab"], ("", "ab")),  # a prefix of another: the shorter is complete first
        (["xabcde"], ["bcd", "abcde"], ("xa", "bcd")),  # complete first, although the other begins earlier
        (["xabcd"], ["cd", "abcd"], ("x", "abcd")),  # complete together: the longest
        (["", "", "a"], ["b"], ("a", None)),
        (["abc"], [], ("abc", None)),
        (["一二三"], ["二"], ("一", "二")),
    ],
)
def test_cases(pieces: list[str], stops: list[str], expected: tuple[str, str | None]) -> None:
    assert run(pieces, stops) == expected


def test_after_a_match_nothing_is_released() -> None:
    watch = StopStrings(["END"])
    assert watch.push("oneEND two") == ("one", "END")
    assert watch.push(" three") == ("", "END")
    assert watch.finish() == ""
    assert watch.matched == "END"


def test_include() -> None:
    watch = StopStrings(["END"], include=True)
    assert watch.push("oneEN") == ("one", None)
    assert watch.push("D two") == ("END", "END")


@pytest.mark.parametrize("stops", ["abc", [""], [1], ["a", None]])
def test_bad_stops(stops: object) -> None:
    with pytest.raises(ValueError, match="stop: "):
        StopStrings(stops)  # type: ignore[arg-type]


def test_hostile_stop_string_costs_linear_time() -> None:
    """aaaa...b in aaaa...: a scan from every position would take 10^10 steps."""
    watch = StopStrings(["a" * 100_000 + "b"])
    released, verdict = watch.push("a" * 200_000)
    assert (len(released), verdict) == (100_000, None)
