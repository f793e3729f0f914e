"""Whatever a client may ask and an enclave may answer, as hypothesis's strategies: all of it within its bounds."""

from __future__ import annotations

from hypothesis import strategies as st

from vsockrpc.chat import (
    CACHE_SECRET_SIZE,
    MAX_BIAS,
    MAX_COMPLETION_TOKENS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_TOKEN,
    MAX_TOOL_CALLS,
    MAX_TOP_K,
    MAX_TOP_LOGPROBS,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    TRUNCATIONS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    JsonFormat,
    NamedTool,
    Tool,
    ToolCall,
)
from vsockrpc.messages import (
    FINISH_REASONS,
    MAX_RETRY_SECONDS,
    Alternative,
    Answer,
    Counted,
    Delta,
    Description,
    Done,
    Failure,
    Start,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NAME = st.text("abcXYZ019_-", min_size=1, max_size=64)
COUNT = st.integers(0, 2**32)


def above_zero(high: float) -> st.SearchStrategy[float]:
    return st.floats(0, high, exclude_min=True)


# --- Requests ------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, st.SearchStrategy[object]] = {
    "model": st.none() | TEXT,
    "max_tokens": st.none() | st.integers(1, MAX_COMPLETION_TOKENS),
    "temperature": st.just(0.0) | st.floats(MIN_TEMPERATURE, MAX_TEMPERATURE),
    "top_p": above_zero(1),
    "top_k": st.integers(0, MAX_TOP_K),
    "min_p": st.floats(0, 1),
    "typical_p": above_zero(1),
    "frequency_penalty": st.floats(-MAX_PENALTY, MAX_PENALTY),
    "presence_penalty": st.floats(-MAX_PENALTY, MAX_PENALTY),
    "repetition_penalty": st.floats(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "seed": st.none() | st.integers(0, MAX_SEED),
    "logit_bias": st.lists(
        st.tuples(st.integers(0, MAX_TOKEN), st.floats(-MAX_BIAS, MAX_BIAS)), max_size=3, unique_by=lambda each: each[0]
    ).map(tuple),
    "stop": st.lists(TEXT.filter(bool), max_size=3).map(tuple),
    "top_logprobs": st.none() | st.integers(0, MAX_TOP_LOGPROBS),
    "cache_secret": st.none() | st.binary(min_size=CACHE_SECRET_SIZE, max_size=CACHE_SECRET_SIZE),
}
"""Every field of ``Generation``."""

TOOL_CALLS = st.builds(ToolCall, TEXT, NAME, TEXT)
MESSAGES = st.one_of(
    st.builds(ChatMessage, st.sampled_from(["system", "user", "assistant"]), TEXT),
    st.builds(ChatMessage, st.just("assistant"), TEXT, st.lists(TOOL_CALLS, min_size=1, max_size=2).map(tuple)),
    st.builds(ChatMessage, st.just("tool"), TEXT, tool_call_id=TEXT),
)
TOOLS = st.builds(Tool, NAME, TEXT, st.none() | TEXT)
FORMATS = st.builds(JsonFormat, st.none() | TEXT)


@st.composite
def _chats(draw: st.DrawFn) -> ChatRequest:
    """A conversation with tools or without."""
    tools = tuple(draw(st.lists(TOOLS, max_size=3, unique_by=lambda tool: tool.name)))
    names = [NamedTool(tool.name) for tool in tools]
    choice = draw(st.sampled_from(["none", "auto", "required", *names])) if tools else "auto"
    return draw(
        st.builds(
            ChatRequest,
            messages=st.lists(MESSAGES, min_size=1, max_size=4).map(tuple),
            response_format=st.none() | FORMATS if choice in ("none", "auto") else st.none(),
            tools=st.just(tools),
            tool_choice=st.just(choice),
            parallel_tool_calls=st.booleans() if tools else st.just(True),
            reasoning_tokens=st.none() | st.integers(0, MAX_COMPLETION_TOKENS),
            truncation=st.sampled_from(TRUNCATIONS),
            **OPTIONS,
        )
    )


CHATS = _chats()
COMPLETIONS = st.builds(CompletionRequest, prompt=TEXT, echo=st.booleans(), **OPTIONS)
GENERATIONS: st.SearchStrategy[GenerationRequest] = CHATS | COMPLETIONS

# --- Answers -------------------------------------------------------------------------------------------------------

LOGPROB = st.floats(max_value=0, allow_nan=False)
ALTERNATIVES = st.builds(Alternative, st.binary(max_size=8), LOGPROB)
LOGPROBS = st.builds(TokenLogprob, st.binary(max_size=8), LOGPROB, st.lists(ALTERNATIVES, max_size=3).map(tuple))
CALL_INDEX = st.integers(0, MAX_TOOL_CALLS - 1)
CALL_DELTAS = st.builds(ToolCallDelta, CALL_INDEX, TEXT) | st.builds(ToolCallDelta, CALL_INDEX, TEXT, TEXT, NAME)
DELTAS = st.builds(
    Delta,
    TEXT,
    TEXT,
    st.lists(CALL_DELTAS, max_size=2).map(tuple),
    st.lists(LOGPROBS, max_size=2).map(tuple),
).filter(lambda delta: bool(delta.as_map()))
DONES = st.builds(Done, st.sampled_from(FINISH_REASONS), st.builds(Usage, COUNT, COUNT, COUNT, COUNT), COUNT)
ANSWERS: st.SearchStrategy[Answer] = st.one_of(
    st.builds(Start, TEXT),
    DELTAS,
    DONES,
    st.builds(Counted, COUNT),
    st.builds(Description, TEXT, st.integers(1, 2**31), st.binary(min_size=48, max_size=48)),
    st.builds(Failure, TEXT, TEXT, st.none() | TEXT, st.none() | TEXT, st.none() | st.integers(1, MAX_RETRY_SECONDS)),
)
