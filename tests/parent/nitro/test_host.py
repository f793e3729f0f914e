"""Setting a host up: the plan is pure, names what cannot be, and is empty on a host that is as wanted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from parent.nitro.cli import RunningEnclave
from parent.nitro.errors import ALLOCATOR_FILE, ALLOCATOR_UNIT, NitroError
from parent.nitro.host import NITRO_CLI, PACKAGES, PROGRAM, Command, HostState, Step, Wanted, WriteFile, apply, plan
from parent.nitro.host_commands import bootstrap
from parent.nitro.resources import EnclaveResources, Free, HugePages, Topology, node_for, parse_cpus
from parent.nitro.start import EnclaveRequest, lowest_memory_mib, require_possible
from parent.nitro.units import UNIT_FOLDER, Services
from tests.gguf_files import tiny_model
from tests.nitro_hosts import REPOSITORY, NitroHost, program, ran

SERVICES = Services(
    "/opt/strongroom/bin/strongroom",
    16,
    "127.0.0.1:8080",
    "/var/lib/strongroom/model.gguf",
    ("kms.eu-central-1.amazonaws.com:443",),
)
WANTED = Wanted(4096, 4, "ec2-user", SERVICES)
UNITS = ["strongroom-proxy.service", "strongroom-model-store.service", "strongroom-egress.service"]


@pytest.fixture
def amazon_linux(host: NitroHost) -> NitroHost:
    """With nothing installed."""
    host.write("etc/os-release", 'NAME="Amazon Linux"\nID="amzn"\nVERSION_ID="2023"\n')
    host.write("etc/group", "root:x:0:\nec2-user:x:1000:\n")
    return host


def live(host: NitroHost, wanted: Wanted = WANTED) -> HostState:
    """The same tree, as if it were this host's own."""
    return replace(HostState.read(wanted, host.root), live=True)


def words(steps: list[Step]) -> list[str]:
    return [str(step) for step in steps]


# --- From nothing ---------------------------------------------------------------------------------------------------


def test_every_step_of_a_new_host(amazon_linux: NitroHost) -> None:
    amazon_linux.lay_out({0: range(8)}, pool="", free_mib={})
    state = replace(live(amazon_linux), resources=None)
    assert words(plan(WANTED, state)) == [
        "run dnf install --assumeyes aws-nitro-enclaves-cli aws-nitro-enclaves-cli-devel docker",
        "run usermod --append --groups ne ec2-user",
        "run usermod --append --groups docker ec2-user",
        "run modprobe nitro_enclaves",
        f"write {ALLOCATOR_FILE}",
        *(f"write {UNIT_FOLDER}/{name}" for name in UNITS),
        "run systemctl daemon-reload",
        f"run systemctl enable docker.service {ALLOCATOR_UNIT} {' '.join(UNITS)}",
        "run systemctl start docker.service",
        f"run systemctl restart {ALLOCATOR_UNIT}",
        *(f"run systemctl restart {name}" for name in UNITS),
    ]


def finished(state: HostState, wanted: Wanted = WANTED) -> HostState:
    """After every step."""
    return replace(
        state,
        present=frozenset(PACKAGES),
        members={"ne": frozenset(("ec2-user",)), "docker": frozenset(("ec2-user",))},
        files=wanted.files(),
        enabled=frozenset(("docker.service", ALLOCATOR_UNIT, *UNITS)),
        running=frozenset(("docker.service", *UNITS)),
    )


def test_a_host_that_is_as_wanted_needs_nothing(amazon_linux: NitroHost) -> None:
    assert plan(WANTED, finished(live(amazon_linux))) == []


Change = Callable[[HostState], HostState]


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (
            lambda state: replace(state, files={**state.files, ALLOCATOR_FILE: "---\nmemory_mib: 512\n"}),
            [f"write {ALLOCATOR_FILE}", f"run systemctl restart {ALLOCATOR_UNIT}"],
        ),
        (
            lambda state: replace(state, files={**state.files, f"{UNIT_FOLDER}/{UNITS[0]}": ""}),
            [f"write {UNIT_FOLDER}/{UNITS[0]}", "run systemctl daemon-reload", f"run systemctl restart {UNITS[0]}"],
        ),
        (
            lambda state: replace(state, running=frozenset(("docker.service", *UNITS[1:]))),
            [f"run systemctl restart {UNITS[0]}"],
        ),
        (
            lambda state: replace(state, running=frozenset(UNITS)),
            ["run systemctl start docker.service"],
        ),
        (
            lambda state: replace(state, members={**state.members, "ne": frozenset(("other",))}),
            ["run usermod --append --groups ne ec2-user"],
        ),
        (
            lambda state: replace(state, enabled=state.enabled - {ALLOCATOR_UNIT}),
            [f"run systemctl enable {ALLOCATOR_UNIT}"],
        ),
    ],
)
def test_what_is_missing_is_done_and_nothing_else(amazon_linux: NitroHost, change: Change, steps: list[str]) -> None:
    assert words(plan(WANTED, change(finished(live(amazon_linux))))) == steps


@pytest.mark.parametrize("reserved", [HugePages(0, 0), HugePages(4094, 4094)])
def test_what_is_written_and_not_reserved_is_reserved(amazon_linux: NitroHost, reserved: HugePages) -> None:
    state = finished(live(amazon_linux))
    assert state.resources is not None
    resources = replace(state.resources, hugepages={0: reserved})
    assert words(plan(WANTED, replace(state, resources=resources))) == [f"run systemctl restart {ALLOCATOR_UNIT}"]


def test_the_allocators_file_is_one_that_its_shell_reader_takes() -> None:
    """It begins behind ``---``, and an empty line ends it with an error."""
    text = Wanted(4096, 4).allocator()
    assert text.startswith("---\n")
    assert "" not in text.splitlines()
    assert text.splitlines()[-2:] == ["memory_mib: 4096", "cpu_count: 4"]


# --- What cannot be -------------------------------------------------------------------------------------------------


def refused(wanted: Wanted, state: HostState) -> NitroError:
    with pytest.raises(NitroError) as caught:
        plan(wanted, state)
    return caught.value


def test_another_distribution_brings_nitro_cli_itself(amazon_linux: NitroHost) -> None:
    debian = replace(live(amazon_linux), distribution="debian", version="12")
    error = refused(WANTED, debian)
    assert (error.code, error.got) == ("unsupported_host", "debian 12")
    assert words(plan(WANTED, replace(finished(debian), present=frozenset(PACKAGES)))) == []
    assert NITRO_CLI in str(error.expected)


@pytest.mark.parametrize(
    ("wanted", "code", "got"),
    [
        (Wanted(4096, 3), "bad_cpus", "3"),
        (Wanted(4096, 8), "cpus_missing", "6 on node 0"),
        (Wanted(40_000, 4), "hugepages_missing", "32256 MiB on node 0"),
    ],
)
def test_more_than_the_machine_has_is_said_in_numbers(
    amazon_linux: NitroHost, wanted: Wanted, code: str, got: str
) -> None:
    error = refused(wanted, live(amazon_linux, wanted))
    assert (error.code, error.got) == (code, got)


def test_cpus_and_memory_are_of_one_node(amazon_linux: NitroHost) -> None:
    nodes = {0: [0, 1, 8, 9], 1: [2, 3, 4, 5, 10, 11, 12, 13], 2: [6, 7, 14, 15]}
    amazon_linux.lay_out(nodes, pool="", free_mib={})
    wanted = Wanted(4096, 10)
    assert refused(wanted, live(amazon_linux, wanted)).got == "2 on node 0, 8 on node 1, 4 on node 2"
    assert plan(Wanted(4096, 8), live(amazon_linux, Wanted(4096, 8)))


def test_a_step_that_fails_ends_the_rest() -> None:
    done: list[list[str]] = []

    def run(given: object) -> int:
        assert isinstance(given, tuple)
        done.append(list(given))
        return 1 if given[0] == "second" else 0

    steps: list[Step] = [Command(("first",)), Command(("second",), "look there"), Command(("third",))]
    with pytest.raises(NitroError) as caught:
        apply(steps, run=run)
    assert done == [["first"], ["second"]]
    assert caught.value.code == "step_failed"
    assert "look there" in caught.value.message


def test_a_program_that_is_not_there_is_a_step_that_failed() -> None:
    with pytest.raises(NitroError) as caught:
        apply([Command(("/nonexistent/usermod",))])
    assert (caught.value.code, caught.value.got) == ("step_failed", "127")


def test_a_file_is_written_whole_and_readable(tmp_path: Path) -> None:
    apply([WriteFile("/etc/x/y.conf", "text\n")], root=tmp_path)
    file = tmp_path / "etc/x/y.conf"
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("text\n", 0o644)
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("wanted", [(0, 2, None), (512, 0, None), (512, 2, "Root"), (512, 2, "-x")])
def test_a_wish_that_cannot_be_meant(wanted: tuple[int, int, str | None]) -> None:
    with pytest.raises(NitroError) as caught:
        Wanted(*wanted)
    assert caught.value.code == "bad_request"


# --- The units ------------------------------------------------------------------------------------------------------


def test_each_unit_has_as_little_as_it_needs() -> None:
    units = SERVICES.units()
    assert list(units) == UNITS
    for text in units.values():
        for line in ("DynamicUser=yes", "NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet=\n"):
            assert line in text
        assert "Restart=always" in text
    store, egress = units["strongroom-model-store.service"], units["strongroom-egress.service"]
    assert "RestrictAddressFamilies=AF_VSOCK AF_UNIX\n" in store
    assert "IPAddressDeny=any" in store
    assert "--listen vsock:any:5007 --enclave-cid 16 --credentials imds" in egress
    assert "--allow kms.eu-central-1.amazonaws.com:443" in egress
    assert "proxy --enclave vsock:16:5005 --listen 127.0.0.1:8080" in units["strongroom-proxy.service"]


def test_without_model_and_kms_there_is_the_proxy_alone() -> None:
    assert list(Services("/opt/s", 16, "127.0.0.1:8080").units()) == ["strongroom-proxy.service"]


def test_words_of_a_command_line_stay_what_they_are() -> None:
    units = Services("/opt/s", 16, "127.0.0.1:8080", '/srv/a "b" 100% $HOME\\x').units()
    assert '--model "/srv/a \\"b\\" 100%% $$HOME\\\\x"\n' in units["strongroom-model-store.service"]


@pytest.mark.parametrize(
    ("program_path", "model"),
    [("/home/me/strongroom", None), ("strongroom", None), ("/opt/s", "/root/model.gguf"), ("/opt/s", "model.gguf")],
)
def test_what_no_service_could_read_is_refused(program_path: str, model: str | None) -> None:
    with pytest.raises(NitroError) as caught:
        Services(program_path, 16, "127.0.0.1:8080", model)
    assert caught.value.code == "bad_request"


def test_a_line_end_is_no_word() -> None:
    with pytest.raises(NitroError):
        Services("/opt/s", 16, "127.0.0.1:8080", "/srv/a\nExecStartPre=/bin/sh").units()


def test_systemd_reads_them(tmp_path: Path) -> None:
    """As far as the one that is here knows them."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    for name, text in Services("/bin/true", 16, "127.0.0.1:8080", "/m.gguf", SERVICES.allow).units().items():
        (tmp_path / name).write_text(text)
        said = subprocess.run([analyze, "verify", str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert name not in said.stderr, said.stderr


# --- What a host has ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", ()), ("\n", ()), ("3\n", (3,)), ("2,4-6\n", (2, 4, 5, 6)), ("6-7,2", (2, 6, 7)), ("0-0", (0,))],
)
def test_lists_of_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", [",", "1,", "1,,2", "3-2", "a", "-1", "1-2-3", "99999", "0-9000", "١"])
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(ValueError, match="no list of CPUs"):
        parse_cpus(text)


def test_what_is_reserved_for_enclaves(host: NitroHost) -> None:
    found = EnclaveResources.read(host.root)
    assert found.pool == (2, 3, 6, 7)
    assert (found.nodes, found.threads_per_core) == ((0,), 2)
    assert found.hugepages == {0: HugePages(4096, 4096)}


def test_a_machine_without_numa_has_one_node(host: NitroHost) -> None:
    shutil.rmtree(host.root / "sys/devices/system/node")
    for folder in (host.root / "sys/devices/system/cpu").glob("cpu*/node0"):
        shutil.rmtree(folder)
    host.write("proc/meminfo", "MemTotal:       16777216 kB\n")
    host.write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "256\n")
    host.write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "128\n")
    topology = Topology.read(host.root)
    assert (list(topology.cores), topology.memory) == ([0], {0: 16_384})
    assert EnclaveResources.read(host.root).hugepages == {0: HugePages(512, 256)}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("sys/module/nitro_enclaves/parameters/ne_cpus", "not_set_up"),
        ("sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "not_set_up"),
        ("sys/devices/system/cpu/cpu0/topology/thread_siblings_list", "not_set_up"),
    ],
)
def test_what_cannot_be_read_is_said_so(host: NitroHost, path: str, code: str) -> None:
    host.write(path, "nonsense")
    with pytest.raises(NitroError) as caught:
        EnclaveResources.read(host.root)
    assert caught.value.code == code


def running(*cpus: int) -> RunningEnclave:
    return RunningEnclave("i-1-enc1", 16, cpus, 512, 7)


def test_what_is_free_is_what_those_that_run_leave(host: NitroHost) -> None:
    host.lay_out({0: range(4), 1: range(4, 8)}, pool="2-3,6-7", free_mib={0: 4096, 1: 512})
    resources = EnclaveResources.read(host.root)
    nodes = HugePages(4096, 4096), HugePages(512, 512)
    assert resources.free([]) == {0: Free((2, 3), nodes[0]), 1: Free((6, 7), nodes[1])}
    left = resources.free([running(2), running(3, 7, 99)])
    assert left == {0: Free((), nodes[0]), 1: Free((6,), nodes[1])}
    assert [node_for(left, cpus) for cpus in (0, 1, 2)] == [0, 1, None]
    unpaged = EnclaveResources((2,), {2: 7}, {0: nodes[0]}, 2)
    assert unpaged.free([]) == {0: Free((), nodes[0]), 7: Free((2,), HugePages(0, 0))}
    assert node_for({}, 0) is None


def request(memory_mib: int, cpus: int) -> EnclaveRequest:
    return EnclaveRequest(Path("x.eif"), "x", memory_mib, cpus)


def test_an_enclave_is_on_one_node(host: NitroHost) -> None:
    host.lay_out({0: [0, 1, 2, 6, 7, 8], 1: [3, 4, 5, 9, 10, 11]}, pool="1,7,3-4,9-10", free_mib={0: 4096, 1: 512})
    resources = EnclaveResources.read(host.root)
    require_possible(request(4096, 2), 1 << 20, resources, [])
    require_possible(request(512, 4), 1 << 20, resources, [])
    with pytest.raises(NitroError) as caught:
        require_possible(request(512, 6), 1 << 20, resources, [])
    assert (caught.value.code, caught.value.got) == ("numa_split", "node 0: 1,7; node 1: 3,4,9,10")
    with pytest.raises(NitroError) as caught:
        require_possible(request(1024, 4), 1 << 20, resources, [])
    assert caught.value.code == "hugepages_missing"
    assert "4096 MiB are free on other nodes" in caught.value.message


@pytest.mark.parametrize(("size", "lowest"), [(1, 64), (16 << 20, 64), ((16 << 20) + 1, 65), (300 << 20, 1200)])
def test_the_least_memory(size: int, lowest: int) -> None:
    assert lowest_memory_mib(size) == lowest
    assert lowest << 20 >= 4 * size


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", ["command", "script"])
async def test_a_file_tree_is_set_up_once(amazon_linux: NitroHost, front: str) -> None:
    host = amazon_linux
    model = host.folder / "model.gguf"
    model.write_bytes(tiny_model().encode())
    options = ["--root", str(host.root), "--memory-mib", "4096", "--cpus", "4", "--user", "ec2-user"]
    options += ["--program", "/opt/strongroom/bin/strongroom", "--model", str(model)]
    options += ["--allow", "kms.example:443"]
    dry = await host.run(front, "bootstrap", *options, "--dry-run")
    assert dry.status == 0, dry.err
    assert host.calls == []
    assert not (host.root / ALLOCATOR_FILE.lstrip("/")).exists()
    first = await host.run(front, "bootstrap", *options)
    assert first.status == 0, first.err
    assert first.out.splitlines()[0] == (
        f"run dnf install --assumeyes --installroot {host.root} "
        "aws-nitro-enclaves-cli aws-nitro-enclaves-cli-devel docker"
    )
    done = len(host.calls)
    assert [call[0] for call in host.calls] == ["dnf", "usermod", "usermod", "systemctl"]
    assert (host.root / ALLOCATOR_FILE.lstrip("/")).read_text() == Wanted(4096, 4).allocator()
    for name in UNITS:
        assert (host.root / f"{UNIT_FOLDER}/{name}".lstrip("/")).exists()
    again = await host.run(front, "bootstrap", *options, "--json")
    assert again.status == 0, again.err
    assert again.json["steps"] == []
    assert len(host.calls) == done


async def test_the_program_is_on_the_path(amazon_linux: NitroHost) -> None:
    host, link = amazon_linux, amazon_linux.root / PROGRAM.lstrip("/")
    options = ["--root", str(host.root), *SIZE, "--no-services", "--user", "ec2-user"]
    for target in ("/opt/one/bin/strongroom", "/opt/other/bin/strongroom"):
        said = await host.run("command", "bootstrap", *options, "--program", target)
        assert f"link {PROGRAM} to {target}" in said.out.splitlines()
        assert os.readlink(link) == target
        again = await host.run("command", "bootstrap", *options, "--program", target, "--json")
        assert [each for each in again.json["steps"] if "link" in each] == []
    link.unlink()
    link.write_text("somebody's")
    for target in ("/opt/other/bin/strongroom", PROGRAM, "/root/bin/strongroom"):
        said = await host.run("command", "bootstrap", *options, "--program", target)
        assert (said.status, "link" in said.out) == (0, False)
    assert link.read_text() == "somebody's"


async def test_image_and_model_say_how_much(amazon_linux: NitroHost, eif: Path) -> None:
    model = amazon_linux.folder / "model.gguf"
    model.write_bytes(tiny_model().encode())
    options = ["--root", str(amazon_linux.root), "--image", str(eif), "--model", str(model)]
    options += ["--no-services"]
    said = await amazon_linux.run("command", "bootstrap", *options, "--context", "64", "--dry-run", "--json")
    assert said.status == 0, said.err
    assert said.json["memory_mib"] > 64
    assert said.json["cpus"] % 2 == 0
    assert said.json["memory_mib"] % 2 == 0
    more = await amazon_linux.run("command", "bootstrap", *options, "--parallel", "64", "--dry-run", "--json")
    assert more.json["memory_mib"] > said.json["memory_mib"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "--memory-mib and --cpus"),
        (["--memory-mib", "512"], "--cpus"),
        (["--memory-mib", "0", "--cpus", "2"], "x>=1"),
    ],
)
async def test_sizes_are_named(host: NitroHost, options: list[str], word: str) -> None:
    said = await host.run("command", "bootstrap", *options)
    assert said.status == 2
    assert word in said.err


# --- The script, on a host that has nothing -------------------------------------------------------------------------

SCRIPT = str(REPOSITORY / "scripts/bootstrap-parent")
SIZE = ["--memory-mib", "512", "--cpus", "2"]
PYTHON = """#!/bin/bash
echo "$*" >>"$STAND_IN/python"
case "$*" in
  "-I -m venv "*) mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python" ;;
  *--force-reinstall*)
    strongroom=$(dirname "$0")/strongroom
    printf '#!/bin/bash\\necho "$0" "$@"\\n' >"$strongroom"; chmod 755 "$strongroom" ;;
esac
"""
"""Stands for Python with venv and pip: the last of what it installs is strongroom, which says how it was called."""


@pytest.fixture
def bare(host: NitroHost, tmp_path: Path) -> dict[str, str]:
    """The environment of a host without strongroom, whose user is root."""
    environment = {name: value for name, value in host.environment.items() if name != "STRONGROOM"}
    for name, text in (("python3.13", PYTHON), ("id", "#!/bin/sh\necho 0\n")):
        (host.folder / "bin" / name).write_text(text)
        (host.folder / "bin" / name).chmod(0o755)
    return {**environment, "STRONGROOM_PREFIX": str(tmp_path / "opt"), "TMPDIR": str(tmp_path)}


async def test_a_dry_run_says_what_a_run_does(bare: dict[str, str], tmp_path: Path) -> None:
    said = await ran([SCRIPT, "--dry-run", *SIZE, "--user=a b"], bare, tmp_path)
    assert said.status == 0, said.err
    lines = said.out.splitlines()
    assert lines[0] == f"run python3.13 -I -m venv {tmp_path}/opt"
    assert any(
        "--require-hashes --only-binary :all: -r" in line and "requirements/parent.txt" in line for line in lines
    )
    assert lines[-1] == f"run {tmp_path}/opt/bin/strongroom nitro bootstrap --memory-mib 512 --cpus 2 --user=a b"
    assert "setup" not in said.out
    assert not (tmp_path / "opt").exists()


async def test_strongroom_is_installed_once_and_goes_on(host: NitroHost, bare: dict[str, str], tmp_path: Path) -> None:
    first = await ran([SCRIPT, *SIZE], bare, tmp_path)
    calls = (host.folder / "python").read_text().splitlines()
    again = await ran([SCRIPT, *SIZE], bare, tmp_path)
    assert (first.status, again.status) == (0, 0), first.err + again.err
    assert first.out == again.out == f"{tmp_path}/opt/bin/strongroom nitro bootstrap --memory-mib 512 --cpus 2\n"
    assert len((host.folder / "python").read_text().splitlines()) == len(calls)


@pytest.mark.parametrize("root", ["--root={}", "--root {}"])
async def test_a_file_tree_installs_nothing_here(bare: dict[str, str], tmp_path: Path, root: str) -> None:
    (tmp_path / "tree").mkdir()
    options = root.format(tmp_path / "tree").split()
    said = await ran([SCRIPT, *SIZE, *options, "--dry-run"], {**bare, "STRONGROOM": "/bin/echo"}, tmp_path)
    assert said.out == f"nitro bootstrap {' '.join([*SIZE, *options])} --dry-run\n"
    said = await ran([SCRIPT, *SIZE, *options, "--dry-run"], bare, tmp_path)
    assert "venv" not in said.out
    assert not (tmp_path / "opt").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "--memory-mib and --cpus, or --image and --model"),
        (["--memory-mib", "512"], "--memory-mib and --cpus"),
        (["--memory-mib", "512", "--image", SCRIPT, "--model", SCRIPT], "--memory-mib and --cpus"),
        (["--image", SCRIPT], "--image and --model"),
        ([*SIZE, "--modle", "x"], "unknown argument: --modle"),
        ([*SIZE, "x"], "unknown argument: x"),
        (["--memory-mib=4G", "--cpus=2"], "--memory-mib wants a number, not '4G'"),
        (["--cpus", "2", "--memory-mib"], "--memory-mib wants a number, not ''"),
        ([*SIZE, "--model", "/nonexistent"], "--model: there is no file '/nonexistent'"),
        ([*SIZE, "--image=/nonexistent"], "--image: there is no file '/nonexistent'"),
        ([*SIZE, "--root=/nonexistent"], "--root: there is no folder '/nonexistent'"),
        ([*SIZE, "--user"], "--user wants a value"),
    ],
)
async def test_mistakes_are_said_before_anything_is_installed(
    host: NitroHost, bare: dict[str, str], tmp_path: Path, options: list[str], word: str
) -> None:
    said = await ran([SCRIPT, *options], bare, tmp_path)
    assert (said.status, said.out) == (2, "")
    assert word in said.err
    assert not (tmp_path / "opt").exists()
    assert not (host.folder / "python").exists()


def test_the_script_knows_every_option_of_the_command() -> None:
    reader = Path(SCRIPT).read_text().partition("read_words() {")[2].partition("\n}\n")[0]
    known = set(re.findall(r"--[a-z-]+", reader))
    options = {name for each in bootstrap.params for name in (*each.opts, *each.secondary_opts)}
    assert options == known


def test_the_program_of_these_tests_is_there() -> None:
    assert Path(program()).exists()
