"""The parent's CID: 3, unless the kernel's command line says otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave.config import EnclaveConfiguration
from enclave.parent import ParentError, find_parent, parent_cid
from vsockrpc.address import VsockAddress

MEASURED = "console=ttyS0 reboot=k panic=-1"
DEVICES = "virtio_mmio.device=512@0xfeb00e00:12"


def configuration(nsm: str = "vsock:3:5008", store: str = "vsock:3:5006") -> EnclaveConfiguration:
    text = f"""\
version = 1
[rpc]
listen = "vsock:any:5005"
[nsm]
address = "{nsm}"
entropy = "nsm-hwrng"
[model]
store = "{store}"
manifest = "sha384:{"00" * 48}"
[kms]
region = "us-east-1"
endpoint = "kms.us-east-1.amazonaws.com:443"
egress = "vsock:3:5007"
trust = "AMAZON"
"""
    return EnclaveConfiguration.parse(text.encode())


def cmdline(folder: Path, text: str) -> Path:
    path = folder / "cmdline"
    path.write_text(text + "\n")
    return path


@pytest.mark.parametrize(
    ("text", "cid"),
    [
        ("", 3),
        (MEASURED, 3),
        (f"{MEASURED} {DEVICES} {DEVICES}", 3),
        (f"{MEASURED} parent_cid=2\n", 2),
        (f"{MEASURED} parent_cid=2 {DEVICES}\n", 2),
        (f"{MEASURED} {DEVICES} parent_cid=4294967294", 4294967294),
        (f"{MEASURED} grandparent_cid=2", 3),
    ],
)
def test_the_kernels_command_line_names_the_parent(text: str, cid: int) -> None:
    assert parent_cid(text) == cid


@pytest.mark.parametrize(
    "value", ["", "0", "1", "4294967295", "02", "+2", "0x2", "2,3", "two", "²", "99999999999", "2 parent_cid=2"]
)
def test_what_is_no_cid_is_refused(value: str) -> None:
    with pytest.raises(ParentError) as raised:
        parent_cid(f"{MEASURED} parent_cid={value}")
    assert raised.value.code == "bad_parent_cid"


@given(st.text())
def test_any_command_line_has_a_parent_or_a_typed_error(text: str) -> None:
    try:
        assert 2 <= parent_cid(text) <= 4294967294
        assert 2 <= parent_cid(f"parent_cid={text}") <= 4294967294
    except ParentError:
        pass


def test_every_address_of_the_parent_is_where_the_parent_is(tmp_path: Path) -> None:
    written = configuration()
    found = find_parent(written, cmdline(tmp_path, f"{MEASURED} parent_cid=2"))
    assert found.model_store == VsockAddress(2, 5006)
    assert found.nsm == "vsock:2:5008"
    assert found.kms is not None
    assert found.kms.egress == VsockAddress(2, 5007)
    assert written.kms is not None
    rest = replace(found, model_store=written.model_store, nsm=written.nsm, kms=written.kms)
    assert rest == written, "nothing else changes, the digest that is committed to least of all"
    assert replace(found.kms, egress=written.kms.egress) == written.kms


def test_on_nitro_nothing_changes(tmp_path: Path) -> None:
    assert find_parent(configuration(), cmdline(tmp_path, MEASURED)) == configuration()


@pytest.mark.parametrize(
    ("nsm", "store"),
    [
        ("device:/dev/nsm", "unix:models.sock"),
        ("unix:nsm.sock", "vsock:4:5006"),
        ("tcp:127.0.0.1:3", "file:/opt/strongroom/model.gguf"),
    ],
)
def test_other_addresses_stay(tmp_path: Path, nsm: str, store: str) -> None:
    written = configuration(nsm, store)
    found = find_parent(written, cmdline(tmp_path, "parent_cid=2"))
    assert (found.nsm, found.model_store) == (written.nsm, written.model_store)


def test_without_an_address_of_the_parent_the_command_line_is_not_looked_at(tmp_path: Path) -> None:
    written = replace(configuration("unix:nsm.sock", "unix:models.sock"), kms=None)
    assert find_parent(written, tmp_path / "absent") is written
    with pytest.raises(FileNotFoundError):
        find_parent(configuration(), tmp_path / "absent")
