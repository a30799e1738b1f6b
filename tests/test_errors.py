"""Errors say what was wrong, what is accepted and what was probably meant."""

import pytest

from tokenizers import errors


def test_unknown_names_the_value_the_accepted_ones_and_the_nearest():
    error = errors.unknown("loss", "hing", ("hinge", "vanilla"))
    assert isinstance(error, ValueError)
    assert str(error) == "unknown loss 'hing'. Did you mean 'hinge'? Accepted: hinge, vanilla."


@pytest.mark.parametrize(
    ("value", "accepted", "message"),
    [
        ("zzz", ("hinge",), "unknown loss 'zzz'. Accepted: hinge."),
        ("zzz", (), "unknown loss 'zzz'. Accepted: none."),
        (7, (1, 2), "unknown loss 7. Accepted: 1, 2."),
    ],
)
def test_unknown_guesses_only_what_is_near(value, accepted, message):
    assert str(errors.unknown("loss", value, accepted)) == message


def test_pick_gives_the_entry_or_the_error():
    assert errors.pick("size", "b", {"a": 1, "b": 2}) == 2
    with pytest.raises(ValueError, match="unknown size 'bb'. Did you mean 'b'"):
        errors.pick("size", "bb", {"a": 1, "b": 2})
