"""Runs inside the machine as its image's command: carries requests from the host to ``/dev/nsm`` through our client of
the device, and its answers back.

One request a connection: ``u32 length || request``; the answer, of the same form, is CBOR: ``{"response": bytes}`` or,
where the client raised its error, ``{"code": text, "message": text}``.
"""

import socket
import sys

import cbor2

from enclave.nsm import DeviceTransport, NsmError


def exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = connection.recv(count - len(received))
        if not piece:
            raise EOFError
        received += piece
    return received


def answer(device: DeviceTransport, request: bytes) -> dict[str, object]:
    try:
        return {"response": device.exchange(request)}
    except NsmError as error:
        return {"code": error.code, "message": error.message}


def main() -> None:
    device = DeviceTransport("/dev/nsm")
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, int(sys.argv[1])))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                try:
                    request = exactly(connection, int.from_bytes(exactly(connection, 4), "big"))
                    reply = cbor2.dumps(answer(device, request))
                    connection.sendall(len(reply).to_bytes(4, "big") + reply)
                except (EOFError, OSError):
                    continue  # whoever asked has left


if __name__ == "__main__":
    main()
