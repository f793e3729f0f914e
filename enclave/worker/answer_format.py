"""What a request wants its answer to be, and how the answer is then read: from the request, the model's family and the
prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from attestation.model_family import REASONING_END, REASONING_START, ModelFamily
from enclave.generation import InvalidRequest
from enclave.grammar.json_grammar import json_grammar, tool_call_grammar
from enclave.worker.prompt import Prompt
from enclave.worker.reply import Reading, Reply
from enclave.worker.tool_calls import BARE, SYNTAXES, CallReader
from vsockrpc.chat import MAX_TOOL_CALLS, ChatRequest, CompletionRequest, GenerationRequest, NamedTool


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """One request's."""

    reply: Reply
    grammar: str | None
    """GBNF of what is behind the reasoning."""
    marks: frozenset[str]
    """What tells the parts of the answer apart: tokens that are these stand for their texts, although llama.cpp writes
    nothing for control tokens.
    """


def answer_format(
    request: GenerationRequest, family: ModelFamily, prompt: Prompt, *, most_reasoning: int | None = None
) -> AnswerFormat:
    """``most_reasoning`` is the budget in tokens of an answer whose request has none, or a larger one.

    Raises InvalidRequest for what no answer of this model can be.
    """
    if isinstance(request, CompletionRequest):
        reading = Reading(echo=request.prompt if request.echo else "")
        return AnswerFormat(Reply(request.stop, reading), None, frozenset())
    reasons = family.reasons
    if request.reasoning_tokens and not reasons:
        raise InvalidRequest(
            "this model does not reason, so reasoning_effort and thinking_token_budget have no effect",
            expected="neither, or one that asks for no reasoning",
            got=f"{request.reasoning_tokens} tokens",
        )
    grammar, calls, marks = _constraint(request, family)
    reading = Reading(
        reasons=reasons,
        is_open=prompt.opens_reasoning,
        must_open=family.opens_reasoning and not prompt.ends_reasoning and request.reasoning_tokens != 0,
        budget=min((each for each in (request.reasoning_tokens, most_reasoning) if each is not None), default=None),
        has_grammar=grammar is not None,
    )
    if reasons:
        marks |= {REASONING_START, REASONING_END}
    return AnswerFormat(Reply(request.stop, reading, calls), grammar, marks)


def _constraint(request: ChatRequest, family: ModelFamily) -> tuple[str | None, CallReader | None, frozenset[str]]:
    """The grammar, what reads calls, and the marks of calls."""
    choice, syntax = request.tool_choice, None if family.calls is None else SYNTAXES[family.calls]
    calls_tools = bool(request.tools) and choice != "none"
    if request.response_format is not None:
        if calls_tools:
            raise InvalidRequest(
                "an answer is JSON by response_format or a call of a tool",
                expected="tool_choice none, or no response_format",
                got="tool_choice auto",
            )
        if request.stop:
            raise InvalidRequest("a stop string could end an answer before its JSON is whole", got="stop")
        return json_grammar(request.response_format.schema), None, frozenset()
    if not calls_tools:
        return None, None, frozenset()
    is_certain = choice != "auto"
    if syntax is None:
        if not is_certain:
            raise InvalidRequest(
                "how this model calls tools by itself is not known", expected="tool_choice required, or a tool's name"
            )
        syntax = BARE
    parallel = request.parallel_tool_calls
    named = choice if isinstance(choice, NamedTool) else None
    grammar = tool_call_grammar(request.tools, named, syntax.style, parallel=parallel) if is_certain else None
    reader = CallReader(
        syntax, [tool.name for tool in request.tools], is_certain=is_certain, most=MAX_TOOL_CALLS if parallel else 1
    )
    return grammar, reader, syntax.marks
