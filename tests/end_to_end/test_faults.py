"""Processes that die at the worst moment: the client says so, and the next request works once they are back."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable

import pytest

from attestation.model_family import CallFormat, Family
from tests.end_to_end.conftest import Running, end, eventually

pytestmark = [pytest.mark.processes, pytest.mark.model]

LONG = ("Write a very long story about a ship.", "--max-tokens", "400")


def ask_and_strike(running: Running, strike: Callable[[], None], url: str | None = None) -> tuple[int, str]:
    """Asks for a long answer, strikes once its first words have come, and returns how the command ended."""
    session = ("--url", url or running.url, "--policy", str(running.policy))
    process = running.home.spawn("ask", *LONG, *session)
    assert process.stdout is not None
    assert process.stdout.read(1)
    strike()
    # The pipes are read to their ends together: a full one would stop the process.
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, err


def works(running: Running) -> None:
    running.wait_until_serving()
    assert running.home.json("ask", "Say hello.", *running.session, "--max-tokens", "4")["text"]


def test_llama_killed_in_mid_answer(running: Running) -> None:
    before = running.process("enclave.worker")
    code, err = ask_and_strike(running, lambda: os.kill(before, signal.SIGKILL))
    assert code == 4
    assert "engine_failed" in err
    works(running)
    assert running.process("enclave.worker") != before
    assert running.home.state("main")["restarts"] == 0  # the enclave itself lived on


@pytest.mark.parametrize(("what", "said"), [("enclave", "truncated"), ("emulator.nsm", "engine_failed")])
def test_the_enclave_or_its_nsm_killed_in_mid_answer(running: Running, what: str, said: str) -> None:
    """Registers do not survive: both are booted anew, and the client verifies anew before it speaks."""
    restarts = running.home.state("main")["restarts"]
    first = running.home.json("verify", *running.session)["key_id"]
    code, err = ask_and_strike(running, lambda: os.kill(running.process(what), signal.SIGKILL))
    assert code == 4
    # Without its NSM an enclave is ended in order, and still says so through the channel when there is time for it.
    assert said in err or "truncated" in err
    eventually(lambda: running.home.state("main")["restarts"] > restarts, "the supervisor boots it again")
    works(running)
    assert running.home.json("verify", *running.session)["key_id"] != first


def test_the_proxy_killed_in_mid_answer(running: Running) -> None:
    process, url = running.home.proxy("main")
    code, err = ask_and_strike(running, process.kill, url)
    assert code == 4
    assert "truncated" in err
    gone = running.home.run("verify", "--url", url, "--policy", str(running.policy), expect=4)
    assert "nobody answers" in gone.stderr
    port = url.rpartition(":")[2]
    again, _ = running.home.ready("proxy", "--enclave", "main", "--listen", f"127.0.0.1:{port}")
    running.home.run("verify", "--url", url, "--policy", str(running.policy))
    assert end(again)[0] == 0


def test_a_client_that_leaves_stops_the_work(running: Running) -> None:
    """Ctrl-C in mid-answer: the one sequence is free for the next request at once, and not after 400 tokens."""
    process = running.home.spawn("ask", *LONG, *running.session)
    assert process.stdout is not None
    assert process.stdout.read(1)
    code, _, err = end(process, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    works(running)


def test_a_gateway_outlives_its_enclave(running: Running) -> None:
    """The session behind `serve` verifies the new boot by itself."""
    import openai

    serving, said = running.home.ready("serve", *running.session, "--listen", "127.0.0.1:0")
    client = openai.OpenAI(base_url=f"http://{said['listening']}/v1", api_key="none")
    [model] = client.models.list().data

    def ask() -> str | None:
        message = {"role": "user", "content": "Say hello."}
        answer = client.chat.completions.create(model=model.id, messages=[message], max_tokens=4)  # type: ignore[list-item]
        return answer.choices[0].message.content

    with client:
        assert ask()
        restarts = running.home.state("main")["restarts"]
        os.kill(running.process("enclave"), signal.SIGKILL)
        eventually(lambda: running.home.state("main")["restarts"] > restarts, "the supervisor boots it again")
        running.wait_until_serving()
        with pytest.raises(openai.InternalServerError, match="booted anew"):
            ask()  # sealed to the boot before: said, and not sent again by anybody
        assert ask()
    assert end(serving)[0] == 0


def test_many_at_once(running: Running) -> None:
    """One sequence at a time is decoded; the others wait their turn, and each gets its own answer."""
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = running.home.json("ask", f"Count from {number}.", *running.session, "--max-tokens", "8")[
            "text"
        ]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert all(answers.values())


NAMED_FIELDS: dict[str, set[str]] = {"family": set(Family), "calls": set(CallFormat)}
"""Of which fields have them, and which."""


def test_events_are_content_free(running: Running) -> None:
    """Every field of every event that this house has written is a number, a digest, a name of a fixed set, or
    nothing.
    """
    for line in running.home.run("logs", "main").stdout.splitlines():
        event = json.loads(line)
        texts = {key: value for key, value in event.items() if isinstance(value, str) and key not in ("event", "phase")}
        for key, value in texts.items():
            assert (key == "key_id" and len(value) == 32) or value in NAMED_FIELDS.get(key, ()), event
