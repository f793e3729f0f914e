"""What nitro-cli writes to its two outputs, and the kernel's lists of CPUs."""

from __future__ import annotations

import json

from parent.nitro.cli import MAX_CID, parse_enclaves
from parent.nitro.errors import MAX_SHOWN, CliFailure, NitroError, explain
from parent.nitro.resources import MAX_CPU, parse_cpus


def one_input(data: bytes) -> None:
    try:
        for enclave in parse_enclaves(data):
            assert enclave.id.isprintable()
            assert 0 < enclave.cid <= MAX_CID
            assert all(cpu >= 0 for cpu in enclave.cpu_ids)
            assert all(text.isprintable() for pair in enclave.measurements.items() for text in pair)
    except NitroError as error:
        json.dumps(error.as_json())
    text = data.decode("utf-8", "backslashreplace")
    failure = CliFailure.parse(text, 1)
    assert all(len(each) <= MAX_SHOWN and each.isprintable() for each in (failure.text, failure.file, *failure.causes))
    json.dumps(explain(failure, asked="512 MiB").as_json())
    try:
        cpus = parse_cpus(text)
    except ValueError:
        return
    assert list(cpus) == sorted(set(cpus))
    assert all(0 <= cpu < MAX_CPU for cpu in cpus)


def seeds() -> list[bytes]:
    enclave = {
        "EnclaveName": "demo",
        "EnclaveID": "i-05f6ed443aEXAMPLE-enc173dfe3eEXAMPLE",
        "ProcessID": 7077,
        "EnclaveCID": 16,
        "NumberOfCPUs": 2,
        "CPUIDs": [1, 3],
        "MemoryMiB": 512,
        "State": "RUNNING",
        "Flags": "NONE",
        "Measurements": {"HashAlgorithm": "Sha384 { ... }", "PCR0": "ab" * 48},
    }
    failure = (
        "Start allocating memory...\n[ E19 ] File operation failure.\nFile: '/dev/nitro_enclaves', failing operation: "
        "'Open'.\n\nBacktrace:\n  Action: Run Enclave\n  Subactions:\n    Failed to open device file: Os { code: 13 }\n"
        "  Root error file: src/x.rs\nFailed connections: 1\n[ E39 ] Enclave process connection failure.\n"
    )
    refusal = "[ E26 ] Insufficient memory. the minimum memory should be 1296 MB\n"
    return [json.dumps([enclave]).encode(), b"[]", failure.encode(), refusal.encode(), b"1-3,5,7-9\n"]
