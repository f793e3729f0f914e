"""What an image's llama.cpp was compiled for, against what a CPU has."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import pytest

from enclave.cpu import CPUINFO, MAX_FEATURES_SIZE, CpuError, check_cpu, stated_features
from scripts.image.cpu_features import features_for

X86 = """\
processor	: 0
model name	: A CPU
flags		: fpu sse2 ssse3 avx avx2 fma f16c bmi2
bugs		: spectre_v1

processor	: 1
flags		: fpu sse2 ssse3 avx avx2 fma f16c bmi2 avx512f
"""
ARM = """\
processor	: 0
BogoMIPS	: 243.75
Features	: fp asimd crc32 atomics fphp asimdhp cpuid asimdrdm asimddp
CPU implementer	: 0x41
"""


def check(tmp_path: Path, features: str | bytes, cpuinfo: str = X86) -> None:
    stated, info = tmp_path / "cpu-features", tmp_path / "cpuinfo"
    stated.write_bytes(features if isinstance(features, bytes) else features.encode())
    info.write_text(cpuinfo)
    check_cpu(stated, info)


@pytest.mark.parametrize(
    ("features", "cpuinfo"),
    [("avx\navx2\nbmi2\nf16c\nfma\nssse3\n", X86), ("fpu\n", X86), ("asimddp\nasimdhp\natomics\ncrc32\n", ARM)],
)
def test_a_cpu_that_has_them_all(tmp_path: Path, features: str, cpuinfo: str) -> None:
    check(tmp_path, features, cpuinfo)


@pytest.mark.parametrize(
    ("features", "cpuinfo", "got"),
    [
        ("avx2\navx512bw\navx512vl\n", X86, "without avx512bw avx512vl"),
        ("avx512f\n", X86, "without avx512f"),  # one CPU of two has it
        ("avx\n", X86.replace("avx2", "").replace("avx ", ""), "without avx"),
        ("sve\n", ARM, "without sve"),
        ("avx2\n", ARM, "without avx2"),
        ("avx2\n", "", "without avx2"),
        ("avx2\n", "flagged: avx2\nmodel name: flags : avx2\n", "without avx2"),
    ],
)
def test_a_cpu_that_lacks_some(tmp_path: Path, features: str, cpuinfo: str, got: str) -> None:
    with pytest.raises(CpuError) as raised:
        check(tmp_path, features, cpuinfo)
    assert raised.value.code == "cpu_lacks_features"
    assert raised.value.expected == " ".join(features.split())
    assert raised.value.got == got


@pytest.mark.parametrize("features", [b"", b"avx2", b"AVX2\n", b"avx2\n\n", b"\xff\n", b"a\n" * MAX_FEATURES_SIZE])
def test_a_list_that_cannot_be_read_is_no_empty_list(tmp_path: Path, features: bytes) -> None:
    with pytest.raises(CpuError) as raised:
        check(tmp_path, features)
    assert raised.value.code == "bad_cpu_features"


def test_llama_cpp_of_this_machine_says_nothing_and_needs_no_check(tmp_path: Path) -> None:
    assert stated_features() is None
    check_cpu(None, tmp_path / "absent")


def test_the_list_is_found_beside_the_libraries_and_nothing_is_loaded_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "lib" / "cpu-features").write_text("avx2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    assert stated_features() == package / "lib" / "cpu-features"


def test_this_machine_has_what_its_own_compiler_says(tmp_path: Path) -> None:
    """The names of the build and those of the kernel are the same: what -march=native announces stands in
    /proc/cpuinfo."""
    names = features_of("-march=native")
    assert names
    # A hypervisor may hide what the compiler asks of the CPU itself; what is there has to go by this name.
    known = set(re.findall(r"\S+", CPUINFO.read_text()))
    assert known & set(names)
    (tmp_path / "features").write_text("".join(f"{name}\n" for name in names if name in known))
    check_cpu(tmp_path / "features")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86_64's options")
def test_options_name_features() -> None:
    assert {"avx", "avx2", "bmi2", "f16c", "fma"} <= set(features_of("-mavx2", "-mfma", "-mf16c", "-mbmi2"))
    assert features_of("-O2") == features_of()


def features_of(*options: str) -> list[str]:
    return features_for({("cc", *options)})
