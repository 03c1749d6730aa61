import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringexport.runtime.streaming import StopMatcher


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    shown = [matcher.feed(piece) for piece in pieces]
    shown.append(matcher.flush())
    return shown, matcher.matched


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "matched"),
    [
        (["a", "b"], [], ["a", "b", ""], None),
        (["xE", "N", "Dy"], ["END"], ["x", "", "", ""], "END"),
        (["xE", "N", "O"], ["END"], ["x", "", "ENO", ""], None),
        (["EEN", "D"], ["END"], ["E", "", ""], "END"),
        (["tail E"], ["END"], ["tail ", "E"], None),
        (["xabcdy"], ["abcd", "b"], ["xa", ""], "b"),
        (["aab"], ["ab", "aab"], ["", ""], "aab"),
        (["\n", "\n"], ["\n\n"], ["", "", ""], "\n\n"),
    ],
)
def test_stop_texts(
    pieces: list[str], stops: list[str], shown: list[str], matched: str | None
) -> None:
    assert run(pieces, stops) == (shown, matched)


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
)
def test_pieces_give_the_text_that_its_characters_give(pieces: list[str], stops: list[str]) -> None:
    shown, matched = run(pieces, stops)
    alone, alone_matched = run(list("".join(pieces)), stops)
    assert ("".join(shown), matched) == ("".join(alone), alone_matched)
    assert not any(stop in "".join(shown) for stop in stops)
