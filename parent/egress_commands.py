"""``strongroom egress``: the way out for an enclave that runs by itself on this host."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

import click

from parent.egress import Allowed
from parent.egress_service import (
    CREDENTIAL_SOURCES,
    FIRST_ENCLAVE_CID,
    EgressSettings,
    Listening,
    report_defect,
    serve_egress,
)
from vsockrpc.address import VMADDR_CID_ANY, VsockAddress, parse_address
from vsockrpc.errors import AddressError
from vsockrpc.http_server import parse_listen


@click.command()
@click.option(
    "--listen",
    "listening",
    required=True,
    metavar="ADDRESS",
    help="Where the enclave connects: vsock:any:PORT, unix:PATH or tcp:HOST:PORT.",
)
@click.option(
    "--allow",
    multiple=True,
    required=True,
    metavar="HOST:PORT[=ADDRESS:PORT]",
    help="A place that the enclave may reach, and where it really is: a VPC endpoint, say. Exact names only; repeat it "
    "for more.",
)
@click.option(
    "--credentials",
    type=click.Choice(CREDENTIAL_SOURCES),
    required=True,
    help="imds: those of this EC2 instance's role. boto3: those of your AWS configuration, for development.",
)
@click.option("--profile", metavar="NAME", help="Of your AWS configuration, with --credentials boto3.")
@click.option(
    "--enclave-cid",
    type=click.IntRange(FIRST_ENCLAVE_CID, VMADDR_CID_ANY - 1),
    metavar="N",
    help="With vsock: the CID of the enclave. Whoever else calls is refused.",
)
@click.option("--metrics", metavar="HOST:PORT", help="Where to serve /metrics; port 0 takes a free one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def egress(
    listening: str,
    allow: tuple[str, ...],
    credentials: str,
    profile: str | None,
    enclave_cid: int | None,
    metrics: str | None,
    as_json: bool,
) -> None:
    """Connect an enclave to KMS, and give it AWS credentials when it asks.

    For hosts where the enclave was started by other means; `strongroom start` brings its own. The enclave reaches what
    is allowed here and nothing else. It ends TLS itself: this host conveys bytes that it cannot read.

    Whoever can connect can ask for the credentials. At vsock that is every enclave and every process of this host,
    unless --enclave-cid names the one that is meant; at a Unix socket, whoever may open its file; at TCP, which has to
    be a loopback address unless --credentials is none, every process of this host. Give the role nothing but what an
    enclave may do.

    \b
    Example:
      strongroom egress --listen vsock:any:7000 --enclave-cid 16 --credentials imds \\
          --allow kms.us-east-1.amazonaws.com:443
      strongroom egress --listen unix:egress.sock --allow kms.us-east-1.amazonaws.com:443=127.0.0.1:8443 \\
          --credentials boto3 --profile dev --metrics 127.0.0.1:9100

    Exit codes: 0 stopped by a signal, 2 an option that cannot be meant, 4 an address cannot be listened at.
    """
    if profile is not None and credentials != "boto3":
        raise click.UsageError("--profile goes with --credentials boto3")
    try:
        address = parse_address(listening)
    except AddressError as error:
        raise click.BadParameter(str(error), param_hint="--listen") from error
    if enclave_cid is not None and not isinstance(address, VsockAddress):
        raise click.UsageError("--enclave-cid goes with --listen vsock:...: nobody has a CID elsewhere")
    shown = None if metrics is None else parse_listen(metrics)
    settings = EgressSettings([Allowed.parse(each) for each in allow], credentials, profile, shown, enclave_cid)

    def ready(at: Listening) -> None:
        if as_json:
            places = [str(each) for each in settings.allowed]
            metrics_at = str(at.metrics).removeprefix("tcp:") if at.metrics else None
            click.echo(json.dumps({"listening": str(at.egress), "allowed": places, "metrics": metrics_at}))
        else:
            metrics_text = f", metrics: http://{str(at.metrics).removeprefix('tcp:')}/metrics" if at.metrics else ""
            click.echo(f"egress: {at.egress}{metrics_text}")
        sys.stdout.flush()

    async def serve_until_told() -> None:
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopping.set)
        async with serve_egress(address, settings, on_error=report_defect) as at:
            ready(at)
            await stopping.wait()

    asyncio.run(serve_until_told())
