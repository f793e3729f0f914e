"""Whatever a taken-over engine process writes, in whatever pieces, is a message or a PipeError; and so for the other
direction.
"""

from __future__ import annotations

from attestation.model_family import CallFormat, Family, ModelFamily
from attestation.model_memory import KvType
from enclave.config import EngineSettings
from enclave.generation import Overloaded
from enclave.pipe import (
    MAX_TO_SERVER,
    MAX_TO_WORKER,
    Alive,
    Cancel,
    Count,
    Counted,
    End,
    Failed,
    Generate,
    Load,
    Piece,
    PipeError,
    Ready,
    Refused,
    ToServer,
    ToWorker,
    read_to_server,
    read_to_worker,
)
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, NamedTool, Tool, ToolCall
from vsockrpc.messages import Alternative, Delta, Done, MessageReader, TokenLogprob, ToolCallDelta, Usage


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
    call = ToolCall("call_1", "weather", "{}")
    chat = ChatRequest(
        (
            ChatMessage("system", "a"),
            ChatMessage("assistant", "", (call,)),
            ChatMessage("tool", "ü", tool_call_id="call_1"),
        ),
        tools=(Tool("weather", "says it", "{}"),),
        tool_choice=NamedTool("weather"),
        max_tokens=5,
        temperature=0.5,
        seed=1,
        stop=("x",),
        logit_bias=((5, -100.0),),
        top_logprobs=2,
        cache_secret=bytes(32),
    )
    settings = EngineSettings(
        context=2048,
        parallel=4,
        cells=4096,
        kv_type=KvType.Q8_0,
        repack=True,
        batch=256,
        prefill=64,
        prompt_tokens=0,
        answer_tokens=0,
        reasoning_tokens=0,
        threads=2,
        queue=64,
        uid=64001,
    )
    likely = TokenLogprob(b"\xc3", -0.5, (Alternative(b"\xc3", -0.5), Alternative(b"e", -1.5)))
    to_server: list[ToServer] = [
        Ready(True, True, ModelFamily(Family.QWEN3, True, True, CallFormat.HERMES)),
        Refused("model_refused", "no", "a", None),
        Alive(),
        Piece(1, Delta("ü🌞", logprobs=(likely,))),
        Piece(1, Delta(reasoning="hm", tool_calls=(ToolCallDelta(0, "", "call_1", "weather"), ToolCallDelta(0, "{")))),
        End(1, Done("tool_calls", Usage(3, 4, 2, 1), 5)),
        Counted(2, 7),
        Failed(2, Overloaded(expected=1, got=2)),
    ]
    to_worker: list[ToWorker] = [
        Load("{{ x }}", settings, 4711),
        Generate(0, chat),
        Generate(1, CompletionRequest(prompt="Es war", echo=True, min_p=0.1)),
        Count(2, chat),
        Cancel(0),
    ]
    encoded = [message.encode() for message in to_server] + [message.encode() for message in to_worker]
    return [b"\x07" + message for message in encoded]
