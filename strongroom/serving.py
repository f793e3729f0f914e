"""``serve``: the gateway as a command."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path

import click

from attestation.secret import Secret
from strongroom.gateway import Gateway, PromptCache
from strongroom.options import err, load_policy, session_options
from strongroom.render import verdict_line, warn_of_labels
from strongroom.session import Session
from vsockrpc.http import is_loopback
from vsockrpc.http_server import listen_on, parse_listen, serve_http

EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - compared with, and served only to who has the token
HTTP_PORT = 80
"""Clients leave it out of their Host header."""


@click.command()
@session_options
@click.option(
    "--listen", default="127.0.0.1:11434", show_default=True, metavar="HOST:PORT", help="Where OpenAI clients connect."
)
@click.option(
    "--token-file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file with the bearer token that clients must send. Required to listen beyond loopback.",
)  # fmt: skip
@click.option(
    "--no-prompt-cache", is_flag=True,
    help="Let the enclave keep nothing of a prompt for the next one that begins alike. Turns take longer to begin, and "
    "requests with a prompt_cache_key are refused.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def serve(url: str, policy: Path, listen: str, token_file: Path | None, no_prompt_cache: bool, as_json: bool) -> None:
    """A local OpenAI endpoint; behind it every prompt is sealed to a verified enclave.

    It verifies first and does not start on a negative verdict. Before each later verification it reads the policy anew,
    with the release history that it may name. Any OpenAI client works with base_url http://127.0.0.1:11434/v1.
    What it may ask for is in docs/openai.md.

    \b
    Example:
      strongroom serve --policy policy.toml &
      curl http://127.0.0.1:11434/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    address = parse_listen(listen)
    token = Secret(token_file.read_bytes().strip()) if token_file else None
    if token is not None and not len(token):
        raise click.BadParameter(f"{token_file} is empty", param_hint="--token-file")
    if token is None and not is_loopback(address.host):
        raise click.UsageError(f"{address.host} is not loopback: name a --token-file that clients must know")

    async def run() -> None:
        async with Session(url, load_policy(policy), reread=partial(load_policy, policy)) as session:
            result = await session.verify()
            if not as_json:
                err.print(verdict_line(result))
                warn_of_labels(err, result)
            listener = listen_on(address)
            host, port = listener.getsockname()[:2]
            cache = None if no_prompt_cache else PromptCache()
            gateway = Gateway(session, hosts=_names_of(address.host, port), token=token, cache=cache)

            def ready() -> None:
                if as_json:
                    click.echo(json.dumps({"listening": f"{host}:{port}", "labels": sorted(result.labels)}))
                else:
                    err.print(f"OpenAI endpoint: http://{host}:{port}/v1")

            await serve_http(gateway.application(), listener, ready=ready)

    asyncio.run(run())


def _names_of(host: str, port: int) -> frozenset[str] | None:
    """What a client may call this server in its Host header, None for anything, where it listens on every address.

    A name that somebody else's DNS could point here is not among them.
    """
    if host in EVERY_ADDRESS:
        return None
    names = {host, "localhost", "127.0.0.1", "::1"} if is_loopback(host) else {host}
    bracketed = {f"[{name}]" if ":" in name else name for name in names}
    without_port = bracketed if port == HTTP_PORT else frozenset[str]()
    return frozenset(name.lower() for name in (*without_port, *(f"{name}:{port}" for name in bracketed)))
