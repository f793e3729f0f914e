"""Whatever a taken-over engine process writes, in whatever pieces, is a message or a PipeError; and so for the other
direction.
"""

from __future__ import annotations

from enclave.generation import Overloaded
from enclave.pipe import (
    MAX_TO_SERVER,
    MAX_TO_WORKER,
    Alive,
    Cancel,
    End,
    Failed,
    Generate,
    Load,
    PipeError,
    Ready,
    Refused,
    Text,
    ToServer,
    ToWorker,
    read_to_server,
    read_to_worker,
)
from vsockrpc.chat import ChatMessage, ChatRequest
from vsockrpc.messages import Done, MessageReader, Usage


def one_input(data: bytes) -> None:
    cut = data[0] if data else 0
    reader = MessageReader(MAX_TO_SERVER)
    try:
        for piece in (data[1 : cut + 1], data[cut + 1 :]):
            for message in read_to_server(reader, piece):
                [again] = read_to_server(MessageReader(MAX_TO_SERVER), message.encode())
                assert again.encode() == message.encode(), "a message that changes on the way"
    except PipeError:
        pass
    try:
        for request in read_to_worker(MessageReader(MAX_TO_WORKER), data[1:]):
            [same] = read_to_worker(MessageReader(MAX_TO_WORKER), request.encode())
            assert same == request
    except PipeError:
        pass


def seeds() -> list[bytes]:
    messages = (ChatMessage("system", "a"), ChatMessage("user", "ü"))
    request = ChatRequest(messages, max_tokens=5, temperature=0.5, seed=1, stop=("x",))
    to_server: list[ToServer] = [
        Ready(own_user=True, seccomp=True),
        Refused("model_refused", "no", "a", None),
        Alive(),
        Text(1, "ü🌞"),
        End(1, Done("stop", Usage(3, 4))),
        Failed(2, Overloaded(expected=1, got=2)),
    ]
    to_worker: list[ToWorker] = [Load("{{ x }}", 2048, 128, 2, 64, 64001, 4711), Generate(0, request), Cancel(0)]
    encoded = [message.encode() for message in to_server] + [message.encode() for message in to_worker]
    return [b"\x07" + message for message in encoded]
