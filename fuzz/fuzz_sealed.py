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
    from vsockrpc.chat import ChatMessage, ChatRequest
    from vsockrpc.messages import Delta, Done, Failure, Start

    sealer = RecordSealer(KEY, 64)
    records = sealer.seal(b"one", final=False) + sealer.seal(b"two", final=True)
    request = Request(bytes(16), ChatRequest((ChatMessage("user", "hi"),), max_tokens=5, stop=("x",)))
    answers = (Start("m"), Delta("text"), Done("stop", Usage(1, 2)), Failure("code", "text", "1", None))
    return [
        b"r" + records,
        b"m" + request.encode(),
        *(b"m" + answer.encode() for answer in answers),
        b"o\x01" + bytes(1168),
    ]
