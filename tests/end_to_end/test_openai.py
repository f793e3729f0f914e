"""OpenAI's own package against real processes and the real model: that parameters do to the answer what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.end_to_end.conftest import Home, Running, end, start
from tests.gguf_files import tiny_model

pytestmark = [pytest.mark.processes, pytest.mark.model]

SKY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Why is the sky blue?"}]
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"colour": {"enum": ["blue", "green"]}, "at": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "at"],
    "additionalProperties": False,
}
PAINT: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "paint", "description": "Paints a thing.", "parameters": SCHEMA, "strict": True},
}


@pytest.fixture(scope="module")
def url(running: Running) -> Iterator[str]:
    running.wait_until_serving()
    serving, said = running.home.ready("serve", *running.session, "--listen", "127.0.0.1:0")
    yield f"http://{said['listening']}/v1"
    assert end(serving)[0] == 0


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def name(client: openai.OpenAI) -> str:
    [model] = client.models.list().data
    return model.id


def chat(client: openai.OpenAI, name: str, **parameters: Any) -> tuple[str, Any]:
    """The answer's text, and the answer."""
    wanted: dict[str, Any] = {"messages": SKY, "temperature": 0, "max_tokens": 12} | parameters
    completion = client.chat.completions.create(model=name, **wanted)
    return completion.choices[0].message.content or "", completion


def test_a_stream_says_what_a_whole_answer_says(client: openai.OpenAI, name: str) -> None:
    text, whole = chat(client, name)
    stream = client.chat.completions.create(
        model=name, messages=SKY, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.choices[0].finish_reason == "length"


def test_a_seed_repeats_and_another_does_not(client: openai.OpenAI, name: str) -> None:
    """Each prompt is read anew: in other batches the same numbers would come out, but for their last bits."""
    sampled: dict[str, Any] = {"temperature": 1.5, "max_tokens": 16}
    one, again, other = (
        chat(client, name, **sampled, seed=seed, prompt_cache_key=key)[0]
        for key, seed in (("first", 7), ("second", 7), ("third", 8))
    )
    assert one == again
    assert one != other


def test_a_stop_string_ends_the_answer_and_does_not_show(client: openai.OpenAI, name: str) -> None:
    text, _ = chat(client, name)
    word = text.split()[3]
    shorter, completion = chat(client, name, stop=word)
    assert shorter == text[: text.index(word)]
    assert completion.choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_likeliest(client: openai.OpenAI, name: str) -> None:
    text, completion = chat(client, name, logprobs=True, top_logprobs=3)
    entries = completion.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text
    assert len(entries) == completion.usage.completion_tokens
    for entry in entries:
        first, *others = entry.top_logprobs
        assert (first.token, first.logprob) == (entry.token, entry.logprob)
        assert [first.logprob, *(each.logprob for each in others)] == sorted(
            (each.logprob for each in entry.top_logprobs), reverse=True
        )


def test_a_biased_token_comes_always_unless_penalties_are_against_it(client: openai.OpenAI, name: str) -> None:
    biased: dict[str, Any] = {"logit_bias": {"504": 40}, "max_tokens": 32, "logprobs": True}

    def kinds(**penalties: Any) -> int:
        _, completion = chat(client, name, **biased, **penalties)
        return len({entry.token for entry in completion.choices[0].logprobs.content})

    assert kinds() == 1
    assert kinds(frequency_penalty=2) > 1
    assert kinds(extra_body={"repetition_penalty": 4}) > 1


@pytest.mark.parametrize("narrow", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}])
def test_where_only_the_likeliest_is_left_it_comes(client: openai.OpenAI, name: str, narrow: dict[str, Any]) -> None:
    greedy, _ = chat(client, name, prompt_cache_key=f"greedy {narrow}")
    wild: dict[str, Any] = {"temperature": 1.9, "seed": 5}
    assert chat(client, name, prompt_cache_key=f"wild {narrow}", **wild)[0] != greedy
    assert chat(client, name, prompt_cache_key=f"narrow {narrow}", **wild, extra_body=narrow)[0] == greedy


def test_where_only_the_most_typical_is_left_chance_has_no_say(client: openai.OpenAI, name: str) -> None:
    """It is not the likeliest: its surprise is the nearest to what is expected."""
    one, other = (
        chat(
            client,
            name,
            prompt_cache_key=f"typical {seed}",
            temperature=1.9,
            seed=seed,
            extra_body={"typical_p": 1e-6},
        )[0]
        for seed in (5, 6)
    )
    assert one == other


def test_a_presence_penalty_makes_an_answer_say_more_kinds_of_things(client: openai.OpenAI, name: str) -> None:
    def tokens(**penalty: Any) -> list[str]:
        _, completion = chat(client, name, max_tokens=48, logprobs=True, **penalty)
        return [entry.token for entry in completion.choices[0].logprobs.content]

    plain, penalised = tokens(), tokens(presence_penalty=2)
    assert len(set(plain)) < len(plain)
    assert len(set(penalised)) > len(set(plain))


def test_max_completion_tokens(client: openai.OpenAI, name: str) -> None:
    text, completion = chat(client, name, max_tokens=openai.omit, max_completion_tokens=5)
    assert (completion.usage.completion_tokens, completion.choices[0].finish_reason) == (5, "length")
    assert chat(client, name)[0].startswith(text)


def test_an_answer_by_a_schema(client: openai.OpenAI, name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True}}
    for temperature in (0, 1.5):
        text, completion = chat(client, name, response_format=form, max_tokens=64, temperature=temperature, seed=3)
        assert completion.choices[0].finish_reason == "stop"
        require_painted(json.loads(text))


def require_painted(value: Any) -> None:
    assert [*value] == ["colour", "at"]
    assert value["colour"] in ("blue", "green")
    assert 0 <= value["at"] <= 99


def test_a_model_whose_template_has_no_place_for_tools_says_so(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        chat(client, name, tools=[PAINT], tool_choice="required")


def test_a_completion_with_its_prompt_and_the_places_of_its_tokens(client: openai.OpenAI, name: str) -> None:
    echoed = client.completions.create(model=name, prompt="One, two, three,", temperature=0, max_tokens=4, echo=True)
    assert echoed.choices[0].text.startswith("One, two, three,")
    plain = client.completions.create(model=name, prompt="One, two, three,", temperature=0, max_tokens=4, logprobs=2)
    assert echoed.choices[0].text == "One, two, three," + plain.choices[0].text
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.text_offset
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert plain.choices[0].text[offset:].startswith(token)


def test_a_second_turn_is_not_read_again_under_its_key(client: openai.OpenAI, name: str) -> None:
    key: dict[str, Any] = {"prompt_cache_key": "a conversation", "max_tokens": 8}
    text, first = chat(client, name, **key)
    turns: list[ChatCompletionMessageParam] = [
        *SKY,
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And at night?"},
    ]
    _, second = chat(client, name, **key, messages=turns)
    _, other = chat(client, name, prompt_cache_key="another", messages=turns)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 8
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_a_conversation_that_does_not_fit(client: openai.OpenAI, name: str) -> None:
    filler: list[ChatCompletionMessageParam] = []
    for number in range(20):
        filler += [
            {"role": "user", "content": f"This is line {number}, and it is long enough to take some of the room."},
            {"role": "assistant", "content": "I have read it, and I remember what it says."},
        ]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, name, messages=[*filler, *SKY])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    _, completion = chat(client, name, messages=[*filler, *SKY], extra_body={"truncation": "auto"})
    assert 0 < completion.model_extra["strongroom"]["dropped_messages"] < len(filler)


def test_counting(client: openai.OpenAI, name: str, url: str) -> None:
    _, completion = chat(client, name)
    counted = httpx2.post(f"{url}/chat/completions/input_tokens", json={"messages": SKY}, trust_env=False).json()
    assert counted["input_tokens"] == completion.usage.prompt_tokens


# --- Tools and thinking ----------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for tool in tools %}{{ tool | tojson }}<|end|>{% endfor %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>"
    "{% endfor %}<|assistant|>{% if enable_thinking and not tools %}<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def other(home: Home) -> Iterator[openai.OpenAI]:
    """Before a tiny model whose template has places for both. What it says is noise, but where a grammar governs."""
    path = home.folder / "tiny.gguf"
    path.write_bytes(tiny_model(chat_template=TEMPLATE).encode())
    files = start(home, path, "tiny")
    proxy, at = home.proxy("tiny")
    serving, said = home.ready("serve", "--url", at, "--policy", str(files / "policy.toml"), "--listen", "127.0.0.1:0")
    with openai.OpenAI(base_url=f"http://{said['listening']}/v1", api_key="none", max_retries=0) as client:
        yield client
    assert end(serving)[0] == 0
    assert end(proxy)[0] == 0
    home.run("stop", "tiny")


def test_a_tool_that_has_to_be_called_is(other: openai.OpenAI) -> None:
    calls: dict[str, Any] = {"tools": [PAINT], "parallel_tool_calls": False, "max_tokens": 300, "temperature": 1.5}
    calls["extra_body"] = {"thinking_token_budget": 6}
    for choice in ("required", {"type": "function", "function": {"name": "paint"}}):
        _, completion = chat(other, "tiny", tool_choice=choice, seed=3, **calls)
        [only] = completion.choices
        [call] = only.message.tool_calls
        assert (only.finish_reason, only.message.content, call.function.name) == ("tool_calls", None, "paint")
        require_painted(json.loads(call.function.arguments))
        turns = [*SKY, only.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "It is blue now."}]
        _, done = chat(other, "tiny", messages=turns, tools=[PAINT], tool_choice="none")
        assert done.choices[0].finish_reason == "length"


def test_a_call_streams(other: openai.OpenAI) -> None:
    stream = other.chat.completions.create(
        model="tiny", messages=SKY, tools=[PAINT], tool_choice="required", parallel_tool_calls=False, max_tokens=300,
        temperature=1.5, seed=3, stream=True, extra_body={"thinking_token_budget": 6},
    )  # fmt: skip
    chunks = [chunk.choices[0] for chunk in stream]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
    assert {part.index for part in parts} == {0}
    assert [part.function.name for part in parts if part.function is not None and part.function.name] == ["paint"]
    require_painted(json.loads("".join(part.function.arguments or "" for part in parts if part.function is not None)))
    assert chunks[-1].finish_reason == "tool_calls"


def test_thinking_has_its_budget_and_a_place_of_its_own(other: openai.OpenAI) -> None:
    text, completion = chat(other, "tiny", max_tokens=40, extra_body={"thinking_token_budget": 12})
    assert text
    assert completion.choices[0].message.reasoning_content
    assert completion.usage.completion_tokens_details.reasoning_tokens == 12
    assert "</think>" not in text + completion.choices[0].message.reasoning_content
    stream = other.chat.completions.create(
        model="tiny", messages=SKY, max_tokens=40, temperature=0, stream=True,
        extra_body={"thinking_token_budget": 12},
    )  # fmt: skip
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(delta.content or "" for delta in deltas) == text
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == completion.choices[0].message.reasoning_content
