"""The systemd units of a parent: proxy, egress and model store, each a user of its own with as little as it needs.

None of them is trusted with anything: a unit that is broken into reads ciphertext, public weights, and, in the egress's
case, the credentials of the instance's role. The limits keep it from the rest of the host. AF_VSOCK has no namespace,
so the model store needs no network at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from parent.nitro.errors import NitroError

RPC_PORT: Final = 5005
STORE_PORT: Final = 5006
EGRESS_PORT: Final = 5007
UNIT_FOLDER: Final = "/etc/systemd/system"
HIDDEN_FOLDERS: Final = ("/home/", "/root/", "/run/user/")
"""What a unit with ProtectHome does not see."""

_HARDENING: Final = """\
DynamicUser=yes
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
PrivateDevices=yes
PrivateTmp=yes
PrivateUsers=yes
ProtectSystem=strict
ProtectHome=yes
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
LimitCORE=0
"""


@dataclass(frozen=True, slots=True)
class Services:
    """What a parent runs for its enclave."""

    program: str
    """The path of ``strongroom``, which every user may run."""
    cid: int
    """Of the enclave."""
    listen: str
    """``HOST:PORT`` of the proxy."""
    model: str | None = None
    """The path of the model's file. None: no model store."""
    allow: tuple[str, ...] = ()
    """What the enclave may reach, as ``strongroom egress`` takes it. None: no egress."""

    def __post_init__(self) -> None:
        """Raises NitroError ``bad_request`` for a path that no unit would see."""
        for what, path in (("strongroom", self.program), ("the model", self.model)):
            if path is not None and (not path.startswith("/") or path.startswith(HIDDEN_FOLDERS)):
                raise NitroError(
                    "bad_request",
                    f"no service can read {what} there: home folders are closed to them",
                    expected="a path elsewhere, such as /opt/strongroom or /var/lib/strongroom",
                    got=path,
                )

    def units(self) -> dict[str, str]:
        """The text of each unit, by its name."""
        units = {
            "strongroom-proxy.service": _unit(
                "Strongroom: HTTP in front of the enclave",
                [self.program, "proxy", "--enclave", f"vsock:{self.cid}:{RPC_PORT}", "--listen", self.listen],
                families="AF_VSOCK AF_UNIX AF_INET AF_INET6",
            )
        }
        if self.model is not None:
            listen = f"vsock:any:{STORE_PORT}"
            units["strongroom-model-store.service"] = _unit(
                "Strongroom: the model's file for the enclave",
                [self.program, "model-store", "--listen", listen, "--model", self.model],
                families="AF_VSOCK AF_UNIX",
                more=("IPAddressDeny=any",),
            )
        if self.allow:
            allowed = [word for each in self.allow for word in ("--allow", each)]
            listen = f"vsock:any:{EGRESS_PORT}"
            command = [self.program, "egress", "--listen", listen, "--enclave-cid", str(self.cid)]
            units["strongroom-egress.service"] = _unit(
                "Strongroom: the enclave's way to KMS",
                [*command, "--credentials", "imds", *allowed],
                families="AF_VSOCK AF_UNIX AF_INET AF_INET6 AF_NETLINK",
            )
        return units


def _unit(description: str, command: Sequence[str], *, families: str, more: Sequence[str] = ()) -> str:
    service = "".join(f"{line}\n" for line in (*more, f"RestrictAddressFamilies={families}"))
    return (
        "# Written by `strongroom nitro bootstrap`, which writes it anew.\n"
        f"[Unit]\nDescription={description}\nAfter=network-online.target\nWants=network-online.target\n"
        "StartLimitIntervalSec=0\n\n"
        f"[Service]\nType=exec\nExecStart={' '.join(_word(word) for word in command)}\n"
        "Restart=always\nRestartSec=2\n"
        f"{_HARDENING}{service}\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )


def _word(text: str) -> str:
    """One argument in a unit file: systemd expands ``%``, and ``$`` behind the first word. Raises NitroError."""
    if not text.isprintable() or not text:
        raise NitroError("bad_request", "a unit's command line has printable words only", got=ascii(text))
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return (
        escaped
        if escaped.isascii() and all(each.isalnum() or each in "/._-:=,[]+@" for each in escaped)
        else f'"{escaped}"'
    )
