"""What goes into an enclave image is what is pinned, listed and measured; what the Dockerfile says of itself is so."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import botocore
import pytest
from botocore.loaders import Loader

import enclave.kms.client
from attestation.dependencies import APPLICATION_PACKAGES, ENCLAVE_DEPENDENCIES
from attestation.secret import Secret
from enclave.config import EnclaveConfiguration
from enclave.kms.client import KmsClient
from enclave.kms.https import Attempt, Credentials
from scripts.image import collect
from scripts.machine import wheels_digest
from strongroom.prepare import WEIGHTS_FOLDER
from vsockrpc.address import TcpAddress

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile.enclave").read_text()
SCRIPTS = ["eif", "machine/base", "machine/wheels", "image/buildah", "image/toolchain", "image/wheels"]
POSIX = [name for name in SCRIPTS if (ROOT / "scripts" / name).read_text().startswith("#!/bin/sh\n")]
"""What runs in the image's build, where no bash is; the others are checked with all that are bash's."""


def pins(lock: str) -> Mapping[str, list[tuple[str, frozenset[str]]]]:
    """By name: each version with its marker, and the hashes of its files."""
    found: dict[str, list[tuple[str, frozenset[str]]]] = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / "requirements" / lock).read_text()):
        if not entry.startswith("#"):
            head, *hashes = entry.split("\\\n")
            name, _, version = head.strip().partition("==")
            found.setdefault(name, []).append((version, frozenset(line.strip() for line in hashes)))
    return found


def test_the_image_s_lock_is_the_trusted_computing_base() -> None:
    assert pins("enclave.txt").keys() == ENCLAVE_DEPENDENCIES.keys()


def test_the_image_s_lock_pins_what_is_tested() -> None:
    tested = pins("all.txt")
    for name, entries in pins("enclave.txt").items():
        assert entries == tested[name]
        assert all(hashes for _, hashes in entries)


def test_the_locks_are_renewed_together() -> None:
    assert "enclave.in -o enclave.txt" in (ROOT / "requirements/lock.sh").read_text()


def test_the_base_is_named_by_digest() -> None:
    [base] = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert toolchain(base) is None


@pytest.mark.parametrize(
    "base",
    [
        "debian:bookworm-slim",
        "registry.example/amazonlinux:2023",
        "debian@sha256:1234",
        f"debian@sha256:{'g' * 64}",
        f"debian@sha256:{'0' * 64}:latest",
        f"@sha256:{'0' * 64}",
        f"x\ndebian@sha256:{'0' * 64}",
        "oci:base",
        "oci:/tmp/base",
        f"oci:base-{'0' * 15}g",
        f"oci:base-{'0' * 17}",
        f"oci:base@sha256:{'0' * 64}",
        f"dir:base@sha256:{'0' * 64}",
        "dir:/tmp/base",
        "",
    ],
)
def test_a_base_without_a_digest_is_refused(base: str) -> None:
    assert "must be named by the digest" in (toolchain(base) or "")


@pytest.mark.parametrize("base", [f"registry.example:5000/a/b:1@sha256:{'0' * 64}", "oci:base-0123456789abcdef"])
def test_a_base_with_one_is_taken(base: str) -> None:
    assert toolchain(base) is None


def test_scripts_eif_judges_the_base_before_all_else() -> None:
    command = [str(ROOT / "scripts/eif"), "--base", "debian:bookworm"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("toolchain: the base must be named by the digest")


def toolchain(base: str) -> str | None:
    """What the build says against a base; None where it goes on."""
    command = ["sh", str(ROOT / "scripts/image/toolchain"), base]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode in (0, 2)
    return ran.stderr if ran.returncode else None


def test_the_last_stage_is_empty_but_for_what_was_laid_out() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("FROM ") :].splitlines()
    assert [line for line in last if line] == [
        "FROM scratch",
        "COPY --from=root /image/ /",
        'CMD ["/usr/bin/python3", "-I", "-B", "-m", "enclave", "--config", "/etc/strongroom/enclave.toml", '
        '"--last-file", "/~last"]',
    ]


def test_the_build_s_own_settings_are_secrets() -> None:
    assert re.findall(r"type=secret,id=(\S+)", DOCKERFILE) == ["sources.list", "pip.conf", "ca.pem"]
    assert not re.search(r"https?://", DOCKERFILE)
    arguments = re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)
    assert set(arguments) == {"BASE", "PYTHON", "VARIANT", "CONFIG", "WEIGHTS"}


def test_the_context_has_what_the_build_reads_and_no_more() -> None:
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert {*APPLICATION_PACKAGES, "requirements", "scripts/image", "enclave.toml", "*.gguf"} == set(allowed)


def test_weights_lie_where_the_configuration_looks_for_them() -> None:
    assert f'"{WEIGHTS_FOLDER}/' in (ROOT / "scripts/image/collect.py").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable(name: str) -> None:
    assert (ROOT / "scripts" / name).stat().st_mode & 0o111


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is missing: apt-get install shellcheck")
@pytest.mark.parametrize("name", POSIX)
def test_shellcheck(name: str) -> None:
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", str(ROOT / "scripts" / name)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("name", ["eif", "machine/base", "machine/wheels"])
def test_help_is_there_and_does_nothing(name: str) -> None:
    ran = subprocess.run([str(ROOT / "scripts" / name), "--help"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0
    assert "usage:" in ran.stdout
    assert ran.stderr == ""


@pytest.mark.parametrize(
    "arguments", [["--variant", "fast"], ["--config"], ["--config", "/absent"], ["--colour"], ["--weights", "/absent"]]
)
def test_mistakes_of_usage_are_said_first(arguments: list[str]) -> None:
    ran = subprocess.run([str(ROOT / "scripts/eif"), *arguments], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.startswith("eif: ")
    assert ran.stdout == ""


# --- What scripts/eif hands on ------------------------------------------------------------------------------------


def write_wheel(path: Path, *, code: bytes, folder: str = "/tmp/a") -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("one/code.so", code)
        wheel.writestr("lib/pkgconfig/one.pc", f"prefix={folder}")
        wheel.writestr("one-1.dist-info/RECORD", folder)


def test_the_digest_of_wheels_is_that_of_what_was_compiled(tmp_path: Path) -> None:
    """Not of where. Worked out with other tools: a line of sha256sum for each file."""
    line = f"{hashlib.sha256(b'code').hexdigest()}  one.whl/one/code.so\n"
    for folder in ("/tmp/a", "/tmp/b"):
        write_wheel(tmp_path / "one.whl", code=b"code", folder=folder)
        assert wheels_digest.digest_of(tmp_path) == hashlib.sha256(line.encode()).hexdigest()
    write_wheel(tmp_path / "one.whl", code=b"other code")
    assert wheels_digest.digest_of(tmp_path) != hashlib.sha256(line.encode()).hexdigest()


class Stage:
    """``scripts/eif`` among stand-ins that print what they are asked to, in a checkout of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "repository"
        self.said = folder / "said"
        for name in ("scripts/eif", "scripts/image/toolchain", "Dockerfile.enclave", ".dockerignore"):
            self.put(name, (ROOT / name).read_text())
        for name in ("attestation", "enclave", "vsockrpc", "scripts/image", "requirements"):
            self.put(f"{name}/source", name)
        for name in ("requirements/build.txt", "requirements/enclave.txt", "enclave.toml"):
            self.put(name, name)
        made = folder / "made"
        for name in ("base", "wheels", "kernel", "init"):
            (made / name).mkdir(parents=True)
            self.put(f"scripts/machine/{name}", f"#!/bin/sh\necho {name} >>{self.said}\necho {made / name}\n")
        (made / "base/digest").write_text("sha256:" + "a" * 64 + "\n")
        (made / "base/packages").write_text("cmake 1\ng++-12 12.2\nlibc6 2\n")
        write_wheel(made / "wheels/one.whl", code=b"code")
        (made / "wheels/cpu-features").write_text("avx2")
        self.put("scripts/machine/wheels_digest.py", (ROOT / "scripts/machine/wheels_digest.py").read_text())
        (made / "init/cmdline").write_text("console=ttyS0 quiet")
        self.made = made
        tell = f'printf "%s\\n" "$0" "$@" >>{self.said}\n'
        self.put(
            "scripts/image/buildah",
            f'#!/bin/sh\n{tell}while [ $# -gt 0 ]; do case $1 in --iidfile) echo id >"$2"; esac; shift; done\n',
        )
        self.put(".venv/bin/strongroom", f"#!/bin/sh\n{tell}")
        self.put("tools/id", "#!/bin/sh\necho 0\n")
        subprocess.run(["git", "init", "-q", str(self.root)], check=True)
        (self.root / ".git/info/exclude").write_text(".venv\ntools\nbuild\n")
        self.git("add", ".")
        self.git("commit", "-qm", "all")

    def put(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ["git", *identity, "-C", str(self.root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def run(self, *arguments: str) -> list[str]:
        """What the stand-ins were given."""
        self.said.unlink(missing_ok=True)
        path = f"{self.root / 'tools'}:{os.environ['PATH']}"
        config = ["--config", str(self.root / "enclave.toml"), "--out", str(self.root / "build/e.eif")]
        command = [str(self.root / "scripts/eif"), *config, *arguments]
        ran = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        return self.said.read_text().splitlines()

    def annotations(self, *arguments: str) -> dict[str, str]:
        said = self.run(*arguments)
        given = (said[at + 1] for at, word in enumerate(said) if word == "--annotation")
        return dict(each.split("=", 1) for each in given)


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@needs_git
@pytest.mark.skipif(Path("/usr/share/nitro_enclaves/blobs/bzImage").exists(), reason="nitro-cli is installed")
def test_the_image_boots_from_what_the_scripts_have_just_printed(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    said = stage.run()
    own = [
        *("--kernel", str(stage.made / "kernel/bzImage"), "--init", str(stage.made / "init/init")),
        *("--cmdline", "console=ttyS0 quiet"),
    ]
    assert said[said.index("--kernel") :] == own
    for chosen in (["--blobs", "own"], ["--blobs=own"]):
        said = stage.run("--", *chosen)
        assert said[said.index("--kernel") :] == [*own, *chosen]
    for chosen in (["--blobs", "aws"], ["--blobs=/somewhere", "--cmdline-copy"]):
        said = stage.run("--", *chosen)
        assert not {"kernel", "init", "--kernel", "--init"} & set(said)
        assert said[-len(chosen) :] == chosen


@needs_git
def test_the_record_gets_all_that_went_in(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    clean = stage.annotations("--variant", "native")
    head = stage.git("rev-parse", "HEAD")
    assert clean["org.opencontainers.image.revision"] == head
    assert clean["org.opencontainers.image.base.digest"] == "sha256:" + "a" * 64
    packages = hashlib.sha256((stage.made / "base/packages").read_bytes()).hexdigest()
    assert clean["strongroom.input.base-packages"] == f"sha256:{packages}"
    assert clean["strongroom.input.wheels"] == f"sha256:{wheels_digest.digest_of(stage.made / 'wheels')}"
    assert clean["strongroom.input.cpu-features"] == f"sha256:{hashlib.sha256(b'avx2').hexdigest()}"
    assert clean["strongroom.said.compiler"] == "cmake 1, g++-12 12.2"
    assert clean["strongroom.said.variant"] == "native"
    stage.put("README", "not of the image")
    changed = stage.annotations()
    assert "org.opencontainers.image.revision" not in changed
    assert changed["strongroom.said.commit"] == f"{head}, with changes"
    assert changed["strongroom.input.source-files"] == clean["strongroom.input.source-files"]
    stage.put("enclave/source", "changed")
    assert stage.annotations()["strongroom.input.source-files"] != clean["strongroom.input.source-files"]


# --- What is laid out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("numpy/__init__.py", True),
        ("numpy/_core/tests/test_api.py", False),
        ("numpy/f2py/__init__.py", False),
        ("numpy/_core/lib/libnpymath.a", False),
        ("numpy/__init__.pyi", False),
        ("numpy.libs/libgfortran.so.5", True),
        ("botocore/data/kms/2014-11-01/service-2.json.gz", True),
        ("botocore/data/s3/2006-03-01/service-2.json.gz", False),
        ("botocore/data/endpoints.json", True),
        ("botocore/cacert.pem", False),
        ("llama_cpp/llama.py", True),
        ("llama_cpp/server/app.py", False),
        ("cryptography-50.0.2.dist-info/licenses/LICENSE", True),
        ("cryptography-50.0.2.dist-info/RECORD", False),
    ],
)
def test_what_is_taken_of_a_package(name: str, wanted: bool) -> None:
    assert collect._wanted(name) is wanted


def test_equal_libraries_become_links_to_the_one_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("libllama.so", "libllama.so.0", "libllama.so.0.5.0"):
        (tmp_path / name).write_bytes(b"\x7fELF llama")
    (tmp_path / "libggml.so").write_bytes(b"\x7fELF other")
    (tmp_path / "libggml.so.0").write_bytes(b"\x7fELF ggml")
    collect._link_equals(tmp_path)
    links = {path.name: path.readlink().name for path in tmp_path.iterdir() if path.is_symlink()}
    assert links == {"libllama.so": "libllama.so.0", "libllama.so.0.5.0": "libllama.so.0"}


def test_the_engine_s_user_is_the_one_of_the_configuration() -> None:
    smallest = '[rpc]\nlisten = "unix:r"\n[nsm]\naddress = "unix:n"\nentropy = "host"\n[model]\nstore = "unix:m"\n'
    parsed = EnclaveConfiguration.parse(f'version = 1\n{smallest}manifest = "sha384:{"00" * 48}"\n'.encode())
    assert parsed.engine.uid == collect.ENGINE_UID


def test_botocore_s_data_that_is_taken_is_enough_for_kms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Path(botocore.__file__).parents[1]
    for path in (site / "botocore" / "data").rglob("*"):
        name = path.relative_to(site)
        if path.is_file() and collect._wanted(str(name)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / name)
    loader = Loader([str(tmp_path / "botocore" / "data")], include_default_search_paths=False)
    monkeypatch.setattr(enclave.kms.client, "_LOADER", loader)
    pool = Answering()
    client = KmsClient("eu-west-1", TcpAddress("kms.eu-west-1.amazonaws.com", 443), pool)  # type: ignore[arg-type]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    attempt = Attempt(now, Credentials("AKIDEXAMPLE", Secret(b"secret"), None, None), seconds=60)
    assert client.call("generate_random", attempt, {"NumberOfBytes": 1})["Plaintext"] == b"\x00"
    assert pool.asked == [b'{"NumberOfBytes": 1}']


class Answering:
    """In the place of a connection."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        self.asked.append(body)
        return 200, {}, b'{"Plaintext": "AA=="}'
