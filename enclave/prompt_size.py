"""How large a prompt may be before anybody cuts it into tokens, which takes its time: one that cannot fit does not hold
up those that do.
"""

from __future__ import annotations

from attestation.model_memory import MAX_PROMPT_SIZE, PROMPT_BYTES_PER_TOKEN
from enclave.generation import ContextExceeded
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest


def prompt_size(request: GenerationRequest) -> int:
    """Bytes of all text that a prompt is made of."""
    if isinstance(request, CompletionRequest):
        return len(request.prompt.encode())
    tools = [text for tool in request.tools for text in (tool.description, tool.parameters or "")]
    return sum(map(message_size, request.messages)) + sum(len(text.encode()) for text in tools)


def message_size(message: ChatMessage) -> int:
    """Its part of that."""
    return len(message.content.encode()) + sum(len(call.arguments.encode()) for call in message.tool_calls)


def most_bytes(context: int) -> int:
    """Of a prompt that is cut into tokens."""
    return min(context * PROMPT_BYTES_PER_TOKEN, MAX_PROMPT_SIZE)


def require_size(request: GenerationRequest, context: int) -> None:
    """Raises ContextExceeded for what is too large. A conversation that may lose its oldest turns may be larger: they
    are dropped by whoever cuts it into tokens (:func:`enclave.worker.truncation.without_oldest`).
    """
    truncates = isinstance(request, ChatRequest) and request.truncation == "auto"
    require_bytes(prompt_size(request), MAX_PROMPT_SIZE if truncates else most_bytes(context), context)


def require_bytes(size: int, most: int, context: int) -> None:
    """Raises ContextExceeded, which says how many bytes there are: nobody knows how many tokens."""
    if size > most:
        raise ContextExceeded(
            "the prompt is too large to be cut into tokens",
            expected=f"<= {context - 1} tokens, in <= {most} bytes",
            got=f"{size} bytes",
        )
