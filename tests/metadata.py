"""An EC2 instance's metadata service as far as it gives credentials: version 2 alone, on a port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

CREDENTIALS_PATH = "/latest/meta-data/iam/security-credentials/"
TTL_HEADER = "x-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER = "x-aws-ec2-metadata-token"
ACCESS_KEY, SECRET_KEY, SESSION_TOKEN = "ASIACANARYACCESS", "canary-secret-key", "canary-session-token"


@dataclass
class MetadataService:
    """One role's credentials; ``role`` is None where none is attached."""

    role: str | None = "enclave-role"
    lasts: timedelta = timedelta(hours=6)
    enabled: bool = True
    body: str | None = None
    """In place of the credentials' document."""
    held: asyncio.Event | None = None
    """Answers wait for it."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path."""
    issued: int = 0
    url: str = ""
    _tokens: set[str] = field(default_factory=set)

    def document(self) -> str:
        expires = datetime.now(UTC) + self.lasts
        return json.dumps(
            {
                "Code": "Success",
                "Type": "AWS-HMAC",
                "AccessKeyId": ACCESS_KEY,
                "SecretAccessKey": f"{SECRET_KEY}-{self.issued}",
                "Token": SESSION_TOKEN,
                "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """Status and body."""
        if not self.enabled:
            return 403, ""
        if (method, path) == ("PUT", "/latest/api/token"):
            ttl = headers.get(TTL_HEADER, "")
            if not ttl.isdecimal() or not 1 <= int(ttl) <= 21_600:
                return 400, ""
            if "x-forwarded-for" in headers:
                return 403, ""
            self._tokens.add(token := secrets.token_urlsafe(40))
            return 200, token
        if headers.get(TOKEN_HEADER) not in self._tokens:
            return 401, ""
        if method != "GET" or self.role is None:
            return 404, ""
        if path == CREDENTIALS_PATH:
            return 200, self.role
        if path == CREDENTIALS_PATH + self.role:
            self.issued += 1
            return 200, self.document() if self.body is None else self.body
        return 404, ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            line, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = line.split()
            headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}
            self.requests.append((method, path))
            if self.held is not None:
                await self.held.wait()
            status, body = self.answer(method, path, headers)
            head = f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write((head + body).encode())
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def metadata_service() -> AsyncIterator[MetadataService]:
    service = MetadataService()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server:
        yield service
