"""``cpu_features.py compile_commands.json``: which features of a CPU the compiled code may use, one a line, by their
names in /proc/cpuinfo.

Asked of the compiler, with the options that each file was compiled with, whatever named them.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Set
from pathlib import Path

# The macro by which GCC and Clang announce a feature, and the kernel's name of it. Left out: what every CPU of the
# architecture has, and what no compiled code uses by itself (clearing caches, saving registers, random numbers).
NAMES = {
    # x86_64: gcc/config/i386/i386-c.cc; arch/x86/include/asm/cpufeatures.h
    "__SSE3__": "pni",
    "__SSSE3__": "ssse3",
    "__SSE4_1__": "sse4_1",
    "__SSE4_2__": "sse4_2",
    "__SSE4A__": "sse4a",
    "__POPCNT__": "popcnt",
    "__LZCNT__": "abm",
    "__MOVBE__": "movbe",
    "__ADX__": "adx",
    "__AES__": "aes",
    "__PCLMUL__": "pclmulqdq",
    "__SHA__": "sha_ni",
    "__AVX__": "avx",
    "__F16C__": "f16c",
    "__FMA__": "fma",
    "__BMI__": "bmi1",
    "__BMI2__": "bmi2",
    "__AVX2__": "avx2",
    "__GFNI__": "gfni",
    "__VAES__": "vaes",
    "__VPCLMULQDQ__": "vpclmulqdq",
    "__AVXVNNI__": "avx_vnni",
    "__AVX512F__": "avx512f",
    "__AVX512BW__": "avx512bw",
    "__AVX512CD__": "avx512cd",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512IFMA__": "avx512ifma",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512_vbmi2",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512BITALG__": "avx512_bitalg",
    "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq",
    "__AVX512VP2INTERSECT__": "avx512_vp2intersect",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16",
    "__AMX_TILE__": "amx_tile",
    "__AMX_INT8__": "amx_int8",
    "__AMX_BF16__": "amx_bf16",
    # aarch64: gcc/config/aarch64/aarch64-c.cc; arch/arm64/kernel/cpuinfo.c
    "__ARM_FEATURE_ATOMICS": "atomics",
    "__ARM_FEATURE_CRC32": "crc32",
    "__ARM_FEATURE_QRDMX": "asimdrdm",
    "__ARM_FEATURE_FP16_SCALAR_ARITHMETIC": "fphp",
    "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC": "asimdhp",
    "__ARM_FEATURE_DOTPROD": "asimddp",
    "__ARM_FEATURE_FP16_FML": "asimdfhm",
    "__ARM_FEATURE_AES": "aes",
    "__ARM_FEATURE_SHA2": "sha2",
    "__ARM_FEATURE_MATMUL_INT8": "i8mm",
    "__ARM_FEATURE_BF16": "bf16",
    "__ARM_FEATURE_SVE": "sve",
    "__ARM_FEATURE_SVE2": "sve2",
    "__ARM_FEATURE_SVE_MATMUL_INT8": "svei8mm",
    "__ARM_FEATURE_SVE_BF16": "svebf16",
}


def features(commands: Path) -> list[str]:
    """The features of all files that CMake's ``compile_commands.json`` names."""
    targets = set()
    for entry in json.loads(commands.read_text()):
        compiler, *options = shlex.split(entry["command"])
        targets.add((compiler, *(option for option in options if option.startswith("-m"))))
    return features_for(targets)


def features_for(targets: Iterable[tuple[str, ...]]) -> list[str]:
    """The features, sorted, that a compiler takes for granted under options."""
    macros = {macro for target in targets for macro in _announced(target)}
    return sorted(NAMES[macro] for macro in macros & NAMES.keys())


def _announced(target: tuple[str, ...]) -> Set[str]:
    answer = subprocess.run([*target, "-dM", "-E", "-x", "c", "/dev/null"], capture_output=True, check=True, text=True)
    return {line.split()[1] for line in answer.stdout.splitlines()}


if __name__ == "__main__":
    print(*features(Path(sys.argv[1])), sep="\n")
