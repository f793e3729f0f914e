"""Where an answer is heard."""

from __future__ import annotations

import pytest

from strongroom.conversation import Voice
from vsockrpc.messages import Delta


def test_an_answer_that_breaks_off_leaves_a_line_of_its_own_for_what_is_said_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConnectionError), Voice() as voice:
        voice.say(Delta("Once upon"))
        voice.say(Delta(" a time"))
        raise ConnectionError
    assert capsys.readouterr().out == "Once upon a time\n"


def test_who_said_nothing_ends_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Voice() as voice:
        voice.say(Delta(reasoning="a file gets none of it"))
    assert capsys.readouterr().out == ""
