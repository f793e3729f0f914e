"""The vectors of tests/vectors/rpc: what they expect, in whatever portions the bytes come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import vectors_rpc
from vsockrpc.connection import Connection
from vsockrpc.errors import RemoteProtocolError
from vsockrpc.events import Event
from vsockrpc.limits import Limits
from vsockrpc.state import Role

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "rpc").glob("*.json"))


@pytest.mark.parametrize("portion", [1, 5, 1 << 20])
@pytest.mark.parametrize("path", VECTORS, ids=[path.stem for path in VECTORS])
def test_vector(path: Path, portion: int) -> None:
    vector = json.loads(path.read_text())
    connection = Connection(Role(vector["role"]), Limits(**vector["limits"]))
    connection.data_to_send(1)
    stream = bytes.fromhex(vector["bytes"])
    events: list[Event] = []
    expect = "events"
    try:
        if vector["before"]:
            connection.receive_data(bytes.fromhex(vector["before"]))
        for complete in vector["opened"]:
            connection.open_call("m", {}, end=complete)
        connection.data_to_send(1)
        for start in range(0, len(stream), portion):
            events += connection.receive_data(stream[start : start + portion])
    except RemoteProtocolError as error:
        expect = error.code
        events = []
    assert expect == vector["expect"]
    assert vectors_rpc.described(events) == vector["events"]
    assert b"".join(map(bytes, connection.data_to_send(1 << 20))).hex() == vector["answer"]


def test_the_vectors_are_those_that_the_script_makes() -> None:
    assert {path.name: path.read_bytes() for path in VECTORS} == vectors_rpc.files()
