"""The memory of an engine: what was planned is what llama.cpp takes, and what cannot fit is refused before it takes
any.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

import enclave.model
from attestation.gguf import read_header
from attestation.model_memory import MIB, EngineMemory, KvType, ModelShape, Part, Work, engine_memory
from enclave.config import EngineSettings
from enclave.engine import LlamaEngine, require_memory
from enclave.generation import EngineRefused
from tests.enclave.conftest import sealed
from tests.gguf_files import CHAT_TEMPLATE, U32, Gguf, grouped, tiny_model, with_entry, without

PROBE = """
import ctypes, json, re, sys
import llama_cpp
import enclave.worker.llama
from attestation.model_memory import KvType
from enclave.config import EngineSettings
from enclave.worker.scheduler import Row
from vsockrpc.chat import ChatMessage, ChatRequest
path, work = sys.argv[1], json.loads(sys.argv[2])
said = []
@llama_cpp.llama_log_callback
def hear(level, text, data):
    said.append(text.decode(errors="replace"))
enclave.worker.llama._say_nothing = hear
work["cells"] = work["cells"] or work["context"] * work["parallel"]
work["kv_type"] = KvType(work["kv_type"])
budgets = dict(prompt_tokens=0, answer_tokens=0, reasoning_tokens=0)
settings = EngineSettings(**work, **budgets, prefill=16, threads=1, queue=1, uid=1)
def status():
    return open("/proc/self/status").read()
def mib(pattern, text):
    return sum(float(each) for each in re.findall(pattern, text))
llama = enclave.worker.llama.Llama(path, settings, threads=1)
llama.warm_up()
length = min(settings.context, 2 * settings.batch)
for slot in range(settings.parallel if settings.cells >= settings.parallel * length else 1):
    for start in range(0, length, settings.batch):
        tokens = [1] * min(settings.batch, length - start)
        logits = llama.decode((), [Row(0, slot, start, tokens, samples=start + len(tokens) == length)])
request = ChatRequest((ChatMessage("user", ""),), temperature=0.7, top_logprobs=5, frequency_penalty=0.5)
sampler = llama.sampler(request, [1])
sampler.logprobs(logits[0], llama.sample(sampler, logits[0], is_constrained=False))
log, now = "".join(said), status()
print(json.dumps({
    **{name: mib(pattern + " buffer size = *([0-9.]+) MiB", log) for name, pattern in {
        "repacked weights": "CPU_REPACK model", "key-value cache": "CPU KV", "compute": "CPU compute",
        "output": "CPU  output"}.items()},
    "flash": re.search("Flash Attention enabled|flash_attn *= enabled", log) is not None,
    "allocated": mib("RssAnon:\\\\s+([0-9]+) kB", now) / 1024,
    "peak": mib("VmHWM:\\\\s+([0-9]+) kB", now) / 1024,
}))
"""
"""What llama.cpp says that it allocates, and what the process then has, for an engine that has worked."""


def ask_llama_cpp(path: Path, work: Work) -> dict[str, float]:
    """MiB."""
    command = [sys.executable, "-c", PROBE, str(path), json.dumps(asdict(work))]
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def planned_for(path: Path, work: Work) -> EngineMemory:
    with path.open("rb") as file:
        return engine_memory(ModelShape.of(read_header(file)), work)


def mib(memory: EngineMemory) -> Mapping[str, float]:
    return {part.name: part.size / MIB for part in memory.parts}


def repacks() -> bool:
    return " avx2 " in Path("/proc/cpuinfo").read_text()


# --- What llama.cpp takes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("Q4_K", Work(512, 1)),
        ("Q4_K", Work(512, 4, repack=False)),
        ("Q4_K", Work(1024, 3, cells=1100)),
        ("Q4_0", Work(768, 3, kv_type=KvType.Q8_0, batch=64)),
        ("Q6_K", Work(300, 2, kv_type=KvType.Q4_0)),  # 300 tokens take 512 cells
        ("Q4_K", Work(512, 64, batch=64)),  # the logits decide
        ("Q4_K", Work(64, 1, batch=4096)),
    ],
)
def test_llama_cpp_allocates_what_was_planned(tmp_path: Path, kind: str, work: Work) -> None:
    (tmp_path / "model.gguf").write_bytes(grouped(kind=kind).encode())
    planned, got = mib(planned_for(tmp_path / "model.gguf", work)), ask_llama_cpp(tmp_path / "model.gguf", work)
    assert got["flash"]
    assert got["key-value cache"] == pytest.approx(planned["key-value cache"], abs=0.01)
    if repacks():
        assert got["repacked weights"] == pytest.approx(planned["repacked weights"], abs=0.01)
    assert got["compute"] + got["output"] <= planned["compute"] + 0.02
    assert got["allocated"] <= sum(planned.values()) - planned["weights"] - planned["server"]


@pytest.mark.model
@pytest.mark.parametrize(
    "work", [Work(2048), Work(2048, cells=2048), Work(2048, kv_type=KvType.Q8_0), Work(1024, 1, batch=256)]
)
def test_smollm2_takes_no_more_than_was_planned(smollm2: Path, work: Work) -> None:
    memory, got = planned_for(smollm2, work), ask_llama_cpp(smollm2, work)
    planned = mib(memory)
    assert got["key-value cache"] == pytest.approx(planned["key-value cache"], abs=0.01)
    assert got["repacked weights"] == planned["repacked weights"] == 0
    assert 0.8 * planned["compute"] <= got["compute"] + got["output"] <= planned["compute"]
    assert got["allocated"] <= memory.allocated / MIB
    assert got["peak"] <= memory.resident / MIB


# --- What cannot fit --------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> EngineMemory:
    parts = Part("repacked weights", 0, ""), Part("key-value cache", 5 * MIB + 1, ""), Part("compute", MIB, "")
    return EngineMemory(Part("weights", 100 * MIB, ""), parts, Part("server", 50 * MIB, ""))


def test_what_fits_to_the_byte_fits(memory: EngineMemory) -> None:
    require_memory(memory, 6 * MIB + 1)
    with pytest.raises(EngineRefused) as caught:
        require_memory(memory, 6 * MIB)
    error = caught.value
    assert (error.code, error.expected, error.got) == ("not_enough_memory", "7 MiB", "6 MiB available")
    assert error.message.endswith("MiB beside the weights: key-value cache 6, compute 1")


def with_available(mebibytes: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {mebibytes * 1024} kB\n")
    monkeypatch.setattr(enclave.model, "MEMINFO", folder / "meminfo")


class Launched(Exception):
    """A process would be started."""


async def started(model: Gguf, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    async def launch(*_: object) -> None:
        raise Launched

    monkeypatch.setattr("enclave.engine.EngineProcess.launch", launch)
    settings = EngineSettings(
        work.context,
        work.parallel,
        work.context * work.parallel,
        work.kv_type,
        work.repack,
        work.batch,
        prefill=32,
        prompt_tokens=0,
        answer_tokens=0,
        reasoning_tokens=0,
        threads=1,
        queue=1,
        uid=64001,
    )
    descriptor = sealed(model.encode())
    engine = LlamaEngine(descriptor, CHAT_TEMPLATE, settings)
    try:
        await engine.start()
    finally:
        await engine.close()
        os.close(descriptor)


async def test_an_engine_that_cannot_fit_is_refused_before_llama_cpp_sees_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grouped()
    (tmp_path / "model.gguf").write_bytes(model.encode())
    needed = -(-planned_for(tmp_path / "model.gguf", Work(2048)).allocated // MIB)
    with_available(needed, tmp_path, monkeypatch)
    with pytest.raises(Launched):
        await started(model, Work(2048), monkeypatch)
    with_available(needed - 1, tmp_path, monkeypatch)
    with pytest.raises(EngineRefused) as caught:
        await started(model, Work(2048), monkeypatch)
    assert caught.value.code == "not_enough_memory"
    assert (caught.value.expected, caught.value.got) == (f"{needed} MiB", f"{needed - 1} MiB available")
    parts = dict(re.findall(r"([a-z- ]+) (\d+)(?:,|$)", caught.value.message.partition("weights: ")[2]))
    assert sum(map(int, parts.values())) >= needed
    with pytest.raises(Launched):
        await started(model, Work(2048, kv_type=KvType.Q4_0), monkeypatch)


async def test_a_context_beyond_the_models_is_refused_as_early(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineRefused) as caught:
        await started(tiny_model(context=1024), Work(1025), monkeypatch)
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("context_exceeded", "<= 1024", "1025")


@pytest.mark.parametrize(
    "model", [without(grouped(), "llama.block_count"), with_entry(grouped(), "llama.block_count", U32, 3)]
)
async def test_a_model_that_cannot_be_sized_is_left_to_llama_cpp(
    model: Gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_available(1, tmp_path, monkeypatch)
    with pytest.raises(Launched):
        await started(model, Work(2048), monkeypatch)
