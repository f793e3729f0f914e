"""nitro-cli as a program: its answers read strictly, its failures turned into what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import parent.nitro.cli
from attestation.measure import read_image
from parent.nitro.cli import NitroCli
from parent.nitro.errors import MAX_SHOWN, CliFailure, NitroError, explain
from parent.nitro.start import EnclaveRequest, start_enclave
from tests.nitro_hosts import STAND_INS, NitroHost


@pytest.fixture
def cli(host: NitroHost, monkeypatch: pytest.MonkeyPatch) -> NitroCli:
    return host.cli(monkeypatch)


def request(eif: Path, *, memory_mib: int = 512, cpus: int = 2, cid: int | None = 16) -> EnclaveRequest:
    return EnclaveRequest(eif, "demo", memory_mib, cpus, cid)


async def start(cli: NitroCli, wanted: EnclaveRequest) -> None:
    await start_enclave(cli, wanted, read_image(wanted.image).measurements)


# --- What it answers ------------------------------------------------------------------------------------------------


async def test_an_enclave_from_its_start_to_its_end(cli: NitroCli, host: NitroHost, eif: Path) -> None:
    assert await cli.describe() == []
    enclave = await start_enclave(cli, request(eif), read_image(eif).measurements)
    assert (enclave.name, enclave.cid, enclave.cpu_ids, enclave.memory_mib) == ("demo", 16, (2, 3), 512)
    assert enclave.measurements["PCR0"] == read_image(eif).measurements.pcr0.hex()
    assert not enclave.debug
    assert await cli.describe() == [enclave]
    await cli.terminate(enclave.id)
    assert await cli.describe() == []
    assert host.calls[1] == [
        "run-enclave", "--eif-path", str(eif), "--enclave-name", "demo", "--memory", "512", "--cpu-count", "2",
        "--enclave-cid", "16",
    ]  # fmt: skip


async def test_its_version(cli: NitroCli) -> None:
    assert await cli.version() == "Nitro CLI 1.4.2"


ENCLAVE = {
    "EnclaveID": "i-1-enc2",
    "ProcessID": 7,
    "EnclaveCID": 16,
    "NumberOfCPUs": 2,
    "CPUIDs": [1, 3],
    "MemoryMiB": 512,
}


async def test_of_an_older_version_what_is_missing_is_left_open(cli: NitroCli, host: NitroHost) -> None:
    host.know(faults={"describe-enclaves": f"says:{json.dumps([ENCLAVE])}"})
    (enclave,) = await cli.describe()
    assert (enclave.name, enclave.state, enclave.debug, enclave.measurements) == (None, "RUNNING", False, {})


@pytest.mark.parametrize("flags", ["DEBUG_MODE", "SOMETHING_NEW", 1])
async def test_flags_that_nobody_knows_count_as_debug(cli: NitroCli, host: NitroHost, flags: object) -> None:
    host.know(faults={"describe-enclaves": f"says:{json.dumps([{**ENCLAVE, 'Flags': flags}])}"})
    assert (await cli.describe())[0].debug


CHANGES: list[dict[str, object]] = [
    {"EnclaveID": 1},
    {"EnclaveID": ""},
    {"EnclaveID": "x" * 300},
    {"EnclaveID": "\x1b[2J"},
    {"EnclaveCID": 0},
    {"EnclaveCID": True},
    {"EnclaveCID": 1 << 32},
    {"EnclaveCID": "16"},
    {"CPUIDs": "1,3"},
    {"CPUIDs": ["1"]},
    {"MemoryMiB": -1},
    {"ProcessID": None},
    {"EnclaveName": 3},
    {"State": []},
    {"Measurements": []},
]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "{}",
        "[1]",
        "[[]]",
        "[" * 50 + "]" * 50,
        '[{"EnclaveID":"x","EnclaveID":"y"}]',
        json.dumps([ENCLAVE] * 65),
        *(json.dumps([{**ENCLAVE, **change}]) for change in CHANGES),
    ],
)
async def test_an_answer_of_another_shape_is_refused(cli: NitroCli, host: NitroHost, text: str) -> None:
    host.know(faults={"describe-enclaves": f"says:{text}"})
    with pytest.raises(NitroError) as caught:
        await cli.describe()
    assert caught.value.code == "bad_nitro_cli_output"


async def test_texts_of_it_drive_no_terminal(cli: NitroCli, host: NitroHost) -> None:
    said = {**ENCLAVE, "EnclaveName": "\x1b[31m", "State": "\x07", "Measurements": {"PCR0": "\x00", "X": "y"}}
    host.know(faults={"describe-enclaves": f"says:{json.dumps([said])}"})
    (enclave,) = await cli.describe()
    assert (enclave.name, enclave.state, dict(enclave.measurements)) == ("\\x1b[31m", "\\x07", {"PCR0": "\\x00"})


async def test_an_answer_without_an_end_is_not_collected(cli: NitroCli, host: NitroHost) -> None:
    host.know(faults={"describe-enclaves": "says:" + " " * (parent.nitro.cli.MAX_OUTPUT + 1)})
    with pytest.raises(NitroError) as caught:
        await cli.describe()
    assert caught.value.code == "bad_nitro_cli_output"


async def test_one_that_hangs_is_ended(cli: NitroCli, host: NitroHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent.nitro.cli, "ANSWER_SECONDS", 0.2)
    host.know(faults={"describe-enclaves": "hangs"})
    with pytest.raises(NitroError) as caught:
        await cli.describe()
    assert caught.value.code == "nitro_cli_timeout"


async def test_a_host_without_it_says_so() -> None:
    with pytest.raises(NitroError) as caught:
        await NitroCli("/nonexistent/nitro-cli").describe()
    assert caught.value.code == "nitro_cli_missing"
    assert caught.value.exit_code == 4


async def test_an_end_that_it_does_not_confirm_is_no_end(cli: NitroCli, host: NitroHost) -> None:
    host.know(faults={"terminate-enclave": 'says:{"EnclaveID": "i-1-enc2", "Terminated": false}'})
    with pytest.raises(NitroError) as caught:
        await cli.terminate("i-1-enc2")
    assert caught.value.code == "bad_nitro_cli_output"


async def test_the_end_of_one_that_is_gone(cli: NitroCli) -> None:
    with pytest.raises(NitroError) as caught:
        await cli.terminate("i-1-enc2")
    assert caught.value.code == "no_such_enclave"


# --- What goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("no-driver", "driver_missing", ["modprobe nitro_enclaves", "Enabled=true"]),
        ("no-device", "driver_missing", ["/dev/nitro_enclaves"]),
        ("not-in-group", "not_in_group", ["usermod -aG ne"]),
        ("no-log", "not_in_group", ["/var/log/nitro_enclaves/nitro_enclaves.log"]),
        ("not-set-up", "not_set_up", ["strongroom nitro bootstrap"]),
        ("cid-in-use", "start_refused", ["CID", "CID 16"]),
        ("not-huge", "hugepages_missing", ["memory_mib", "/etc/nitro_enclaves/allocator.yaml", "512 MiB"]),
        ("other-node", "numa_split", ["one NUMA node"]),
        ("half-a-core", "bad_cpus", ["whole cores"]),
        ("bad-eif", "bad_image", ["strongroom image verify"]),
        ("unreadable-eif", "bad_image", ["strongroom image verify"]),
        ("no-heartbeat", "boot_failed", ["VsockTimeoutError"]),
        ("another-start", "another_start", ["issue 516"]),
        ("later-version", "nitro_cli_failed", ["E77", "An error of a later version."]),
        ("silent", "nitro_cli_failed", ["exit code 101"]),
        ("says:{}", "bad_nitro_cli_output", ["EnclaveID"]),
    ],
)
async def test_each_failure_says_what_to_do(
    cli: NitroCli, host: NitroHost, eif: Path, fault: str, code: str, words: Sequence[str]
) -> None:
    host.know(faults={"run-enclave": fault})
    with pytest.raises(NitroError) as caught:
        await start(cli, request(eif))
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)
    assert host.enclaves == []


@pytest.mark.parametrize(
    ("memory_mib", "cpus", "code", "words"),
    [
        (4, 2, "memory_too_small", ["at least 8 MiB", "4 MiB, 2 CPUs"]),
        (8192, 2, "hugepages_missing", ["8192 MiB, 2 CPUs", "memory_mib"]),
        (512, 6, "cpus_missing", ["512 MiB, 6 CPUs", "cpu_count"]),
    ],
)
async def test_what_the_host_lacks_is_said_in_numbers(
    cli: NitroCli, eif: Path, memory_mib: int, cpus: int, code: str, words: Sequence[str]
) -> None:
    """By nitro-cli itself: what was free a moment ago may be taken."""
    with pytest.raises(NitroError) as caught:
        await start(cli, request(eif, memory_mib=memory_mib, cpus=cpus))
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


async def test_an_image_that_changes_while_it_is_loaded_does_not_stay(
    cli: NitroCli, host: NitroHost, eif: Path
) -> None:
    host.know(measurements={"PCR0": "00" * 48, "PCR1": "11" * 48, "PCR2": "22" * 48})
    with pytest.raises(NitroError) as caught:
        await start(cli, request(eif))
    assert caught.value.code == "measurements_differ"
    assert caught.value.exit_code == 3
    assert host.enclaves == []


async def test_an_enclave_that_ends_at_once_is_no_enclave(cli: NitroCli, host: NitroHost, eif: Path) -> None:
    host.know(ends_at_once=True)
    with pytest.raises(NitroError) as caught:
        await start(cli, request(eif))
    assert caught.value.code == "boot_failed"


async def test_an_end_that_fails_does_not_hide_why(cli: NitroCli, host: NitroHost, eif: Path) -> None:
    host.know(faults={"describe-enclaves": "not-set-up"})
    with pytest.raises(NitroError) as caught:
        await start(cli, request(eif))
    assert caught.value.code == "not_set_up"


# --- Its words ------------------------------------------------------------------------------------------------------


async def test_the_cause_is_what_failed_first_and_underneath(host: NitroHost, eif: Path) -> None:
    host.know(faults={"run-enclave": "no-heartbeat"})
    environment = {"BACKTRACE": "1", "STAND_IN": str(host.folder)}
    arguments = request(eif).arguments()
    status, _, stderr = await parent.nitro.cli.run_program(
        [str(host.folder / "bin/nitro-cli"), *arguments], seconds=30, environment=environment
    )
    failure = CliFailure.parse(stderr.decode(), status)
    assert status == 39
    assert failure.code == "E36"
    assert failure.causes[0] == "Failed to execute command `Run`"
    assert failure.root == "Waiting on enclave to boot failed with error VsockTimeoutError"


def test_a_failure_that_only_follows_is_told_when_there_is_no_other() -> None:
    failure = CliFailure.parse("Failed connections: 1\n[ E39 ] Enclave process connection failure.\n", 39)
    assert failure.code == "E39"
    assert explain(failure).code == "enclave_unanswering"


@given(st.text(max_size=3000), st.integers(1, 255))
def test_any_text_is_a_failure(text: str, status: int) -> None:
    said = explain(CliFailure.parse(text, status), asked="512 MiB")
    assert isinstance(said, NitroError)
    assert said.message.isprintable()


@given(st.from_regex(r"\[ E[0-9]{2} \] .*", fullmatch=True), st.lists(st.text(max_size=700), max_size=5))
def test_any_code_is_a_failure(line: str, causes: list[str]) -> None:
    text = f"{line}\n\nBacktrace:\n  Action: Run\n  Subactions:" + "".join(f"\n    {cause}" for cause in causes)
    failure = CliFailure.parse(text, 1)
    assert len(failure.text) <= MAX_SHOWN
    assert all(len(cause) <= MAX_SHOWN for cause in failure.causes)
    assert isinstance(explain(failure), NitroError)


def test_the_stand_in_is_a_program() -> None:
    assert os.access(STAND_INS / "nitro-cli", os.X_OK)
