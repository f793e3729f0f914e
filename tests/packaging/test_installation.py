"""What an installation of the wheel brings: for verification two packages, and for each extra what its name says."""

from __future__ import annotations

import importlib.metadata
import json
import zipfile
from pathlib import Path

import pytest
from mypy import api as mypy
from packaging.utils import canonicalize_name

from enclave.kms.anchors import FINGERPRINTS
from strongroom.cli import COMMANDS, NEEDS
from strongroom.extras import EXTRAS
from tests.packaging.installation import REPOSITORY, Installation, build, install, required
from tests.packaging.readme import VERIFYING
from tests.pki import forge

ROOMS = ("attestation", "emulator", "enclave", "parent", "strongroom", "vsockrpc")
pytestmark = pytest.mark.wheel
FOREIGN = {"boto3", "click", "httpx2", "jinja2", "llama_cpp", "prometheus_client", "rich", "starlette", "uvicorn"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Without extras, beside good Evidence and the policy for it."""
    installation = install(wheel, tmp_path_factory.mktemp("bare"))
    (installation.folder / "evidence").write_bytes(forge.evidence())
    (installation.folder / "policy.toml").write_text(forge.POLICY)
    (installation.folder / "root.der").write_bytes(forge.ROOT_DER)
    return installation


# --- The wheel -------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(REPOSITORY)) for room in ROOMS for path in REPOSITORY.glob(f"{room}/**/*.py")}
    data = {"attestation/anchors/aws-nitro-root-g1.der", *(f"enclave/kms/anchors/{name}" for name in FINGERPRINTS)}
    typed = {f"{room}/py.typed" for room in ("attestation", "strongroom", "vsockrpc")}
    assert names == modules | data | typed


def test_verification_asks_for_two_packages(wheel: Path) -> None:
    assert {name for name, directly in required(wheel).items() if directly} == {"cbor2", "cryptography"}
    assert set(required(wheel)) == {"cbor2", "cryptography", "cffi", "pycparser"}


# --- Without extras --------------------------------------------------------------------------------------------------


def test_the_readmes_lines_give_a_verdict(bare: Installation) -> None:
    program = f"""
from pathlib import Path
evidence, nonce = Path("evidence").read_bytes(), bytes.fromhex("{forge.NONCE.hex()}")
{VERIFYING.replace("datetime.now(UTC)", f"datetime.fromisoformat({forge.NOW.isoformat()!r})")}
import sys
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    done = bare.run("python", "-I", "-c", program)
    assert done.returncode == 0, done.stderr
    verdict, loaded = done.stdout.splitlines()
    assert verdict == "one i-0123456789abcdef0-enc0123456789abcdef"
    assert not FOREIGN & set(loaded.split())
    assert {"cbor2", "cryptography", "attestation"} <= set(loaded.split())


def test_the_command_says_in_one_line_what_to_install(bare: Installation) -> None:
    for arguments in ([], ["--help"], ["verify", "--url", "http://127.0.0.1:8080"]):
        done = bare.run("strongroom", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "strongroom: the strongroom command lacks click, httpx2, rich: "
            "pip install 'strongroom[cli]' [missing_extra]\n"
        )
    done = bare.run("python", "-I", "-m", "strongroom", "verify", "--json")
    assert (done.returncode, done.stderr) == (2, "")
    assert json.loads(done.stdout)["error"]["code"] == "missing_extra"


def test_a_type_checker_sees_the_types(bare: Installation) -> None:
    consumer = bare.folder / "consumer.py"
    consumer.write_text(
        """\
from datetime import UTC, datetime

import attestation
from attestation import *
from attestation import AppraisalPolicy, AttestationResult, verify


def judge(evidence: bytes, nonce: bytes) -> str | None:
    policy = AppraisalPolicy.load("policy.toml")
    result = verify(evidence, policy=policy, nonce=nonce, at=datetime.now(UTC))
    reveal_type(result.claims.module_id)
    reveal_type(Label.EMULATED)
    return result.release


def wrong(result: AttestationResult) -> int:
    attestation.nothing
    verify(b"", policy="policy.toml", nonce=b"", at=datetime.now(UTC))
    return result.release
"""
    )
    cache = str(REPOSITORY / ".mypy_cache" / "consumer")
    options = ["--strict", "--config-file=", "--python-executable", bare.python, "--no-pretty", "--no-error-summary"]
    said, failed, code = mypy.run([*options, "--cache-dir", cache, str(consumer)])
    assert (failed, code) == ("", 1)
    assert [line.split(": ", 1)[1] for line in said.replace(str(consumer), "").splitlines()] == [
        'note: Revealed type is "str"',
        'note: Revealed type is "Literal[attestation.checks.Label.EMULATED]?"',
        'error: Module has no attribute "nothing"  [attr-defined]',
        'error: Argument "policy" to "verify" has incompatible type "str"; expected "AppraisalPolicy"  [arg-type]',
        'error: Incompatible return value type (got "str | None", expected "int")  [return-value]',
    ]


# --- Extras ----------------------------------------------------------------------------------------------------------


def test_the_front_door_knows_what_each_extra_brings(wheel: Path) -> None:
    modules: dict[str, set[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            modules.setdefault(str(canonicalize_name(distribution)), set()).add(module)
    for extra, names in EXTRAS.items():
        direct = {name for name, directly in required(wheel, extra).items() if directly} - {"cbor2", "cryptography"}
        assert len(names) == len(direct)
        assert set(names) <= {module for name in direct for module in modules[name]}
    assert set(NEEDS) <= set(COMMANDS)
    assert {extra for extras in NEEDS.values() for extra in extras} <= set(EXTRAS)


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        ("client", ["strongroom.session"]),
        ("cli", ["strongroom.session", *(COMMANDS[name] for name in COMMANDS if name not in NEEDS)]),
        ("serve", [COMMANDS[name] for name in COMMANDS if NEEDS.get(name) == ("serve",)]),
        ("parent", [COMMANDS[name] for name in COMMANDS if NEEDS.get(name) == ("parent",)]),
        ("enclave", ["enclave.__main__", "enclave.worker", "emulator.nsm"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_extra_is_enough(wheel: Path, tmp_path: Path, extra: str, modules: list[str]) -> None:
    installation = install(wheel, tmp_path, extra)
    imported = "; ".join(f"import {module.partition(':')[0]}" for module in modules)
    done = installation.run("python", "-I", "-c", imported)
    assert done.returncode == 0, done.stderr


def test_a_command_without_its_extra_is_listed_and_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    installation = install(wheel, tmp_path, "cli")
    listed = installation.run("strongroom", "--help")
    assert listed.returncode == 0, listed.stderr
    for name in COMMANDS:
        (line,) = (line for line in listed.stdout.splitlines() if line.split()[:1] == [name])
        assert ("(not installed: pip install" in line) is (name in NEEDS)
    for name, extras in NEEDS.items():
        done = installation.run("strongroom", name, "--help")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"strongroom: strongroom {name} lacks ")
        assert done.stderr.endswith(f": pip install 'strongroom[{','.join(extras)}]' [missing_extra]\n")
        assert done.stderr.count("\n") == 1
