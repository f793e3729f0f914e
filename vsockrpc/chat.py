"""What a client can ask a model for, in the names and the meanings of OpenAI's API. PROTOCOL.md section 7.1.

What ``decode`` returns is within every bound that the protocol states. Construction checks nothing: whoever is sent a
request decodes it, the enclave and its engine process too. JSON schemas and the arguments of calls stay JSON texts, in
which the order of keys is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal, Self, TypeAlias, cast

from vsockrpc.fields import (
    MessageError,
    bytes_of,
    choice_of,
    fields_of,
    flag_of,
    integer_of,
    list_of,
    number_of,
    text_of,
)

MAX_CHAT_MESSAGES: Final = 1024
MAX_CONTENT_CHARACTERS: Final = 1024 * 1024
MAX_MODEL_CHARACTERS: Final = 256
MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_COMPLETION_TOKENS: Final = 1 << 20
MAX_SEED: Final = 2**32 - 2
"""llama.cpp takes the next one to mean "a random seed", which a person who names a seed does not want."""
MAX_TOP_K: Final = 1000
MAX_BIASES: Final = 300
"""As OpenAI's API."""
MAX_BIAS: Final = 100
MAX_TOKEN: Final = 2**31 - 1
MAX_PENALTY: Final = 2
MIN_REPETITION_PENALTY: Final = 0.01
MAX_REPETITION_PENALTY: Final = 4
MIN_TEMPERATURE: Final = 0.001
"""Beside 0. By less than that, logits leave what 32-bit floats hold."""
MAX_TEMPERATURE: Final = 2
MAX_TOP_LOGPROBS: Final = 20
MAX_TOOLS: Final = 128
MAX_TOOL_CALLS: Final = 128
MAX_NAME_CHARACTERS: Final = 64
MAX_ID_CHARACTERS: Final = 64
MAX_DESCRIPTION_CHARACTERS: Final = 16 * 1024
MAX_SCHEMA_CHARACTERS: Final = 64 * 1024
MAX_ARGUMENTS_CHARACTERS: Final = 256 * 1024
CACHE_SECRET_SIZE: Final = 32

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: Final[tuple[Role, ...]] = ("system", "user", "assistant", "tool")
ToolMode: TypeAlias = Literal["none", "auto", "required"]
TOOL_MODES: Final[tuple[ToolMode, ...]] = ("none", "auto", "required")
Truncation: TypeAlias = Literal["disabled", "auto"]
TRUNCATIONS: Final[tuple[Truncation, ...]] = ("disabled", "auto")


# --- A conversation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made earlier in the conversation."""

    id: str
    name: str
    arguments: str
    """JSON text: an object, as the model wrote it."""

    def encode(self) -> dict[str, object]:
        return {"id": self.id, "name": self.name, "arguments": self.arguments}

    @classmethod
    def decode(cls, value: object, param: str) -> Self:
        fields = fields_of(value, param=param, required={"id", "name", "arguments"})
        return cls(
            text_of(fields["id"], f"{param}.id", MAX_ID_CHARACTERS),
            _name(fields["name"], f"{param}.name"),
            text_of(fields["arguments"], f"{param}.arguments", MAX_ARGUMENTS_CHARACTERS),
        )


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant's turn, whose content may be empty then."""
    tool_call_id: str | None = None
    """Which call a tool's turn answers; with that role and no other."""

    def encode(self) -> dict[str, object]:
        body: dict[str, object] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            body["tool_calls"] = [call.encode() for call in self.tool_calls]
        if self.tool_call_id is not None:
            body["tool_call_id"] = self.tool_call_id
        return body

    @classmethod
    def decode(cls, value: object, param: str) -> Self:
        optional = frozenset({"tool_calls", "tool_call_id"})
        fields = fields_of(value, param=param, required={"role", "content"}, optional=optional)
        role = cast(Role, choice_of(fields["role"], f"{param}.role", ROLES))
        calls = list_of(fields.get("tool_calls", []), f"{param}.tool_calls", MAX_TOOL_CALLS)
        if calls and role != "assistant":
            raise MessageError("only an assistant calls tools", param=f"{param}.tool_calls", expected="assistant")
        identity = fields.get("tool_call_id")
        if (identity is None) == (role == "tool"):
            raise MessageError(
                "a tool's turn names the call that it answers, and no other turn does", param=f"{param}.tool_call_id"
            )
        return cls(
            role,
            text_of(fields["content"], f"{param}.content", MAX_CONTENT_CHARACTERS),
            tuple(ToolCall.decode(call, f"{param}.tool_calls[{index}]") for index, call in enumerate(calls)),
            None if identity is None else text_of(identity, f"{param}.tool_call_id", MAX_ID_CHARACTERS),
        )


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: str | None = None
    """JSON text: the schema of its arguments, an object; None takes none."""

    def encode(self) -> dict[str, object]:
        body: dict[str, object] = {"name": self.name, "description": self.description}
        if self.parameters is not None:
            body["parameters"] = self.parameters
        return body

    @classmethod
    def decode(cls, value: object, param: str) -> Self:
        fields = fields_of(value, param=param, required={"name", "description"}, optional=frozenset({"parameters"}))
        parameters = fields.get("parameters")
        return cls(
            _name(fields["name"], f"{param}.name"),
            text_of(fields["description"], f"{param}.description", MAX_DESCRIPTION_CHARACTERS),
            None if parameters is None else text_of(parameters, f"{param}.parameters", MAX_SCHEMA_CHARACTERS),
        )


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The tool that has to be called."""

    name: str


ToolChoice: TypeAlias = ToolMode | NamedTool


@dataclass(frozen=True, slots=True)
class JsonFormat:
    """The answer is JSON: by ``schema``, a JSON text, or any object where that is None."""

    schema: str | None = None

    def encode(self) -> dict[str, object]:
        return {} if self.schema is None else {"schema": self.schema}

    @classmethod
    def decode(cls, value: object, param: str) -> Self:
        fields = fields_of(value, param=param, required=set(), optional=frozenset({"schema"}))
        schema = fields.get("schema")
        return cls(None if schema is None else text_of(schema, f"{param}.schema", MAX_SCHEMA_CHARACTERS))


# --- What is the same for every kind of request ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How an answer is made. ``None`` leaves the choice to the enclave."""

    model: str | None = None
    max_tokens: int | None = None
    """Tokens of the answer at most, reasoning among them."""
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """More than 0."""
    top_k: int = 0
    """0 for all tokens."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """More than 0; 1 for all tokens."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """1 for none."""
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, each once, and what is added to their logits."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    top_logprobs: int | None = None
    """The log probability of each token of the answer, and of as many of the likeliest in its place."""
    cache_secret: bytes | None = None
    """32 bytes. What was computed for one request serves another of the same secret, and no other. None: nothing is
    kept."""

    def _encode_options(self) -> dict[str, object]:
        """Those that are not as they are by themselves."""
        body: dict[str, object] = {}
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                body[name] = value
        if self.stop:
            body["stop"] = list(self.stop)
        if self.logit_bias:
            body["logit_bias"] = [list(entry) for entry in self.logit_bias]
        return body


_DEFAULTS: Final[Mapping[str, object]] = asdict(Generation())


def _options_of(fields: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a :class:`Generation`. Raises MessageError naming the field."""

    def given(name: str) -> object:
        return fields.get(name, _DEFAULTS[name])

    model, tokens, seed = given("model"), given("max_tokens"), given("seed")
    logprobs, secret = given("top_logprobs"), given("cache_secret")
    stops = list_of(given("stop"), "stop", MAX_STOPS)
    options: dict[str, object] = {
        "model": None if model is None else text_of(model, "model", MAX_MODEL_CHARACTERS),
        "max_tokens": None if tokens is None else integer_of(tokens, "max_tokens", 1, MAX_COMPLETION_TOKENS),
        "temperature": _temperature(given("temperature")),
        "top_p": _above_zero(given("top_p"), "top_p", 1),
        "top_k": integer_of(given("top_k"), "top_k", 0, MAX_TOP_K),
        "min_p": number_of(given("min_p"), "min_p", 0, 1),
        "typical_p": _above_zero(given("typical_p"), "typical_p", 1),
        "frequency_penalty": number_of(given("frequency_penalty"), "frequency_penalty", -MAX_PENALTY, MAX_PENALTY),
        "presence_penalty": number_of(given("presence_penalty"), "presence_penalty", -MAX_PENALTY, MAX_PENALTY),
        "repetition_penalty": number_of(
            given("repetition_penalty"), "repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        ),
        "seed": None if seed is None else integer_of(seed, "seed", 0, MAX_SEED),
        "logit_bias": _biases(given("logit_bias")),
        "stop": tuple(text_of(stop, f"stop[{index}]", MAX_STOP_CHARACTERS) for index, stop in enumerate(stops)),
        "top_logprobs": None if logprobs is None else integer_of(logprobs, "top_logprobs", 0, MAX_TOP_LOGPROBS),
        "cache_secret": None if secret is None else bytes_of(secret, "cache_secret", CACHE_SECRET_SIZE),
    }
    if "" in stops:
        raise MessageError("an empty stop string stops everything", param="stop", expected="text", got="''")
    return options


def _temperature(value: object) -> float:
    number = number_of(value, "temperature", 0, MAX_TEMPERATURE)
    if 0 < number < MIN_TEMPERATURE:
        expected = f"0, or {MIN_TEMPERATURE}..{MAX_TEMPERATURE}"
        raise MessageError("temperature is out of range", param="temperature", expected=expected, got=number)
    return number


def _above_zero(value: object, param: str, high: float) -> float:
    number = number_of(value, param, 0, high)
    if number == 0:
        raise MessageError(f"{param} is out of range", param=param, expected="more than 0", got=0)
    return number


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for index, entry in enumerate(list_of(value, "logit_bias", MAX_BIASES)):
        param = f"logit_bias[{index}]"
        pair = list_of(entry, param, 2)
        if len(pair) != 2:
            raise MessageError(f"{param} is no pair", param=param, expected="a token and a bias", got=len(pair))
        token = integer_of(pair[0], param, 0, MAX_TOKEN)
        if token in biases:
            raise MessageError("a token has two biases", param=param, expected="each token once", got=token)
        biases[token] = number_of(pair[1], param, -MAX_BIAS, MAX_BIAS)
    return tuple(biases.items())


def _name(value: object, param: str) -> str:
    """OpenAI's rule for a function's name."""
    name = text_of(value, param, MAX_NAME_CHARACTERS)
    if not name or not all(character.isascii() and (character.isalnum() or character in "_-") for character in name):
        raise MessageError(f"{param} is no name", param=param, expected="letters, digits, _ and -")
    return name


# --- Requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChatRequest(Generation):
    """A chat completion."""

    messages: tuple[ChatMessage, ...]
    """In order; the last is what is answered."""
    response_format: JsonFormat | None = None
    """None for text."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    """``none`` without tools."""
    parallel_tool_calls: bool = True
    """The answer may hold several calls."""
    reasoning_tokens: int | None = None
    """Tokens that a reasoning model may think, at most: 0 asks for no thinking. None: as many as it wants."""
    truncation: Truncation = "disabled"
    """``auto``: where the conversation does not fit, its oldest turns are dropped whole, the system's never."""

    def encode(self) -> dict[str, object]:
        body = self._encode_options() | {"messages": [message.encode() for message in self.messages]}
        if self.response_format is not None:
            body["response_format"] = self.response_format.encode()
        if self.tools:
            choice = self.tool_choice
            body["tools"] = [tool.encode() for tool in self.tools]
            body["tool_choice"] = {"name": choice.name} if isinstance(choice, NamedTool) else choice
            body["parallel_tool_calls"] = self.parallel_tool_calls
        if self.reasoning_tokens is not None:
            body["reasoning_tokens"] = self.reasoning_tokens
        if self.truncation != "disabled":
            body["truncation"] = self.truncation
        return body

    @classmethod
    def decode(cls, value: object) -> ChatRequest:
        """Raises MessageError naming the field."""
        own = frozenset(
            {"response_format", "tools", "tool_choice", "parallel_tool_calls", "reasoning_tokens", "truncation"}
        )
        fields = fields_of(value, param="body", required={"messages"}, optional=own | _DEFAULTS.keys())
        entries = list_of(fields["messages"], "messages", MAX_CHAT_MESSAGES)
        if not entries:
            raise MessageError("messages is empty", param="messages", expected="at least 1", got=0)
        tools = _tools(fields.get("tools", []))
        if not tools and {"tool_choice", "parallel_tool_calls"} & fields.keys():
            raise MessageError("there are no tools to choose from", param="tool_choice", expected="tools")
        form, budget = fields.get("response_format"), fields.get("reasoning_tokens")
        choice = _tool_choice(fields.get("tool_choice", "auto"), tools)
        if form is not None and choice not in ("none", "auto"):
            raise MessageError(
                "an answer is JSON of its own or a call", param="response_format", expected="one of them"
            )
        return cls(
            messages=tuple(ChatMessage.decode(entry, f"messages[{index}]") for index, entry in enumerate(entries)),
            response_format=None if form is None else JsonFormat.decode(form, "response_format"),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=flag_of(fields.get("parallel_tool_calls", True), "parallel_tool_calls"),
            reasoning_tokens=None
            if budget is None
            else integer_of(budget, "reasoning_tokens", 0, MAX_COMPLETION_TOKENS),
            truncation=cast(Truncation, choice_of(fields.get("truncation", "disabled"), "truncation", TRUNCATIONS)),
            **_options_of(fields),  # type: ignore[arg-type]  # checked there, by name
        )


@dataclass(frozen=True, slots=True)
class CompletionRequest(Generation):
    """Text that goes on where ``prompt`` ends, without a chat template."""

    prompt: str
    echo: bool = False
    """The answer begins with the prompt."""

    def encode(self) -> dict[str, object]:
        return self._encode_options() | {"prompt": self.prompt, "echo": self.echo}

    @classmethod
    def decode(cls, value: object) -> CompletionRequest:
        """Raises MessageError naming the field."""
        fields = fields_of(value, param="body", required={"prompt"}, optional=frozenset({"echo"}) | _DEFAULTS.keys())
        return cls(
            prompt=text_of(fields["prompt"], "prompt", MAX_CONTENT_CHARACTERS),
            echo=flag_of(fields.get("echo", False), "echo"),
            **_options_of(fields),  # type: ignore[arg-type]  # checked there, by name
        )


GenerationRequest: TypeAlias = ChatRequest | CompletionRequest


def _tools(value: object) -> tuple[Tool, ...]:
    entries = list_of(value, "tools", MAX_TOOLS)
    tools = tuple(Tool.decode(entry, f"tools[{index}]") for index, entry in enumerate(entries))
    if len({tool.name for tool in tools}) != len(tools):
        raise MessageError("two tools have one name", param="tools", expected="each name once")
    return tools


def _tool_choice(value: object, tools: tuple[Tool, ...]) -> ToolChoice:
    if not isinstance(value, dict):
        return cast(ToolMode, choice_of(value, "tool_choice", TOOL_MODES))
    name = _name(fields_of(value, param="tool_choice", required={"name"})["name"], "tool_choice.name")
    if name not in {tool.name for tool in tools}:
        raise MessageError("no tool has the name that has to be called", param="tool_choice.name", got=name)
    return NamedTool(name)
