"""The sealed channel's records and messages, and a request's opening, as an enclave and a client meet them."""

from __future__ import annotations

from attestation.secret import Secret
from vsockrpc.fields import MessageError
from vsockrpc.messages import MessageReader, Request, Usage, decode_answer
from vsockrpc.sealed import RecordOpener, RecordSealer, SealedError, split_opening

KEY = Secret(bytes(32))


def one_input(data: bytes) -> None:
    """The first byte chooses what the rest is: records as they arrive, what a peer with the key would put inside them,
    or an opening.
    """
    kind, rest = data[:1], data[1:]
    try:
        if kind == b"r":
            opener = RecordOpener(KEY)
            for start in range(0, len(rest), 97):
                opener.feed(rest[start : start + 97])
            opener.finish()
        elif kind == b"o":
            split_opening(rest)
        else:
            for message in MessageReader().feed(rest):
                read(message)
    except (SealedError, MessageError):
        return


def read(message: dict[str, object]) -> None:
    try:
        Request.decode(message)
    except MessageError:
        decode_answer(message)


def seeds() -> list[bytes]:
    from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, JsonFormat, Tool
    from vsockrpc.messages import Counted, CountRequest, Delta, DescribeRequest, Done, Failure, Start

    sealer = RecordSealer(KEY, 64)
    records = sealer.seal(b"one", final=False) + sealer.seal(b"two", final=True)
    chat = ChatRequest((ChatMessage("user", "hi"),), max_tokens=5, stop=("x",), logit_bias=((5, 1.5),))
    tools = ChatRequest(chat.messages, tools=(Tool("f", "", "{}"),), response_format=JsonFormat("{}"))
    bodies = (chat, tools, CompletionRequest(prompt="hi", top_logprobs=3), CountRequest(chat), DescribeRequest())
    answers = (
        Start("m"),
        Delta("text"),
        Done("stop", Usage(1, 2)),
        Counted(5),
        Failure("code", "text", "1", None),
    )
    return [
        b"r" + records,
        *(b"m" + Request(bytes(16), body).encode() for body in bodies),
        *(b"m" + answer.encode() for answer in answers),
        b"o\x01" + bytes(1168),
    ]
