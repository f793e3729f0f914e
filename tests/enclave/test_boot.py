"""The boot's table: its order, what each phase leaves behind in the NSM, and that any failure is the end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import pytest

import enclave.boot
from attestation.commitment import Entropy
from attestation.envelope import encryption_context
from attestation.errors import StrongroomError
from attestation.manifest import ModelManifest
from attestation.reference import ZERO_PCR, once_extended
from emulator.nsm import SoftwareNsm, boot_registers, new_module_id
from emulator.pki import DevelopmentRoot
from enclave.boot import PHASES, PROGRESS_STEPS, RANDOM_SIZE, Enclave, KeyManagement
from enclave.config import ChannelSettings, EnclaveConfiguration, KmsSettings
from enclave.engine import Engine
from enclave.generation import EngineRefused
from enclave.identity import Identity
from enclave.kms.errors import KmsError
from enclave.log import EventLog, Phase
from enclave.model import SealedModel
from enclave.nsm import Nsm, NsmError, NsmUnavailable
from parent.modelstore import ModelStore
from tests.attested import IMAGE, InProcess
from tests.engines import EchoEngine
from tests.gguf_files import TEXT, Gguf
from tests.sealing import CONTEXT, FLOOR, MODEL, MODEL_KEY, PROMPTS_KEY, LocalKms, Sealing, kms_toml, split_records
from vsockrpc.address import UnixAddress
from vsockrpc.sealed import ChannelKey
from vsockrpc.transport import serve

ORDER = [Phase.COLD, Phase.ENTROPY, Phase.CONFIGURED, Phase.MODEL_COMMITTED, Phase.KEYED, Phase.SERVING]


@dataclass
class Recorded:
    """The NSM's transport, which keeps the requests that pass and may answer some of them otherwise."""

    behind: InProcess
    requests: list[tuple[str, int | None]] = field(default_factory=list)
    """Each request's name, and the register that it is about."""
    instead: Callable[[str, int | None], bytes | None] = lambda name, index: None

    def exchange(self, request: bytes) -> bytes:
        value = cbor2.loads(request)
        [(name, fields)] = value.items() if isinstance(value, dict) else [(value, {})]
        self.requests.append((name, fields.get("index")))
        return self.instead(name, fields.get("index")) or self.behind.exchange(request)

    def close(self) -> None:
        pass

    def changes(self) -> list[tuple[str, int | None]]:
        return [request for request in self.requests if request[0] in ("ExtendPCR", "LockPCR", "LockPCRs")]


class Scene:
    """Everything that an enclave boots with, each part of which a test may spoil before :meth:`boot`."""

    def __init__(self, directory: Path, root: DevelopmentRoot) -> None:
        self.model = directory / "tiny.gguf"
        self.model.write_bytes(Gguf([("tokenizer.chat_template", TEXT, "{{ messages }}")]).encode())
        self.manifest = ModelManifest.from_gguf(self.model)
        self.store_address = UnixAddress(str(directory / "models.sock"))
        self.rng_current = directory / "rng_current"
        self.rng_current.write_text("nsm-hwrng\n")
        self.pool = directory / "urandom"
        self.pool.touch()
        self.reseeded: list[bytes] = []
        """What the pool held, each time that the kernel's generator was seeded anew."""
        self.may_reseed = True
        self.transport = Recorded(InProcess(SoftwareNsm(root, boot_registers(IMAGE), module_id=new_module_id())))
        self.nsm = Nsm(self.transport)
        self.engine: Engine = EchoEngine()
        self.log = EventLog()
        self.make_kms: Callable[[KmsSettings, Nsm], KeyManagement] | None = None
        self.encrypted = False
        self.cpu_features: Path | None = None
        self.toml = f"""\
version = 1
[rpc]
listen = "unix:rpc.sock"
[nsm]
address = "unix:nsm.sock"
entropy = "nsm-hwrng"
[model]
store = "{self.store_address}"
manifest = "sha384:{self.manifest.digest().hex()}"
"""
        self.configuration = EnclaveConfiguration.parse(self.toml.encode())

    @contextlib.asynccontextmanager
    async def boot(self) -> AsyncIterator[Enclave]:
        def make_engine(_: EnclaveConfiguration, model: SealedModel, __: EventLog) -> Engine:
            assert os.fstat(model.fd).st_size == self.manifest.files[0].size
            return self.engine

        def fail(error: BaseException) -> None:
            raise error

        enclave = Enclave(
            self.configuration,
            self.nsm,
            make_engine,
            self.log,
            make_kms=self.make_kms,
            rng_current=self.rng_current,
            cpu_features=self.cpu_features,
        )
        store = ModelStore(self.manifest, self.model, self.encrypted)
        async with serve(self.store_address, store.handlers, on_error=fail):
            await enclave.boot()
        try:
            yield enclave
        finally:
            await enclave.close()

    def reseed(self, pool: int) -> None:
        if not self.may_reseed:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        self.reseeded.append(self.pool.read_bytes())

    async def halt(self) -> dict[str, Any]:
        """Boots, to HALTED, and returns the event that says why."""
        async with self.boot() as enclave:
            assert enclave.phase is Phase.HALTED
        events = await self.events()
        assert [event["event"] for event in events].count("halted") == 1
        return events[-1]

    async def events(self) -> list[dict[str, Any]]:
        self.log.close()
        return [json.loads(line) async for line in self.log.follow()]

    async def phases(self) -> list[str]:
        return [event["phase"] for event in await self.events() if event["event"] == "phase"]


@pytest.fixture(scope="module")
def root() -> DevelopmentRoot:
    return DevelopmentRoot.generate(datetime.now(UTC))


@pytest.fixture
def scene(tmp_path: Path, root: DevelopmentRoot, monkeypatch: pytest.MonkeyPatch) -> Scene:
    scene = Scene(tmp_path, root)
    monkeypatch.setattr(enclave.boot, "KERNEL_POOL", scene.pool)
    monkeypatch.setattr(enclave.boot, "reseed", scene.reseed)
    return scene


# --- The table ----------------------------------------------------------------------------------------------------


def test_the_table_is_one_way_from_cold_to_serving() -> None:
    assert list(PHASES) == ORDER[:-1]
    assert [step.leads_to for step in PHASES.values()] == ORDER[1:]


async def test_a_good_boot_goes_through_every_phase_in_order(scene: Scene) -> None:
    async with scene.boot() as enclave:
        assert enclave.phase is Phase.SERVING
        assert enclave.model.manifest == scene.manifest
        assert enclave.identity.model == scene.manifest.digest()
        assert enclave.engine is scene.engine
    assert await scene.phases() == [phase.value for phase in ORDER[1:]]


async def test_each_register_gets_one_extend_and_its_lock_in_the_order_of_the_phases(scene: Scene) -> None:
    async with scene.boot():
        pass
    assert scene.transport.changes() == [("ExtendPCR", 17), ("LockPCR", 17), ("ExtendPCR", 16), ("LockPCR", 16)]
    for index, digest in ((16, scene.manifest.digest()), (17, scene.configuration.digest)):
        register = scene.nsm.describe_pcr(index)
        assert register.lock
        assert register.data == once_extended(digest)
    assert all(scene.nsm.describe_pcr(index).data == ZERO_PCR for index in range(18, 32))


async def test_no_document_is_asked_for_while_booting(scene: Scene) -> None:
    async with scene.boot():
        assert "Attestation" not in {name for name, _ in scene.transport.requests}


async def test_weights_in_the_image_take_the_place_of_the_store(scene: Scene) -> None:
    scene.configuration = EnclaveConfiguration.parse(
        scene.toml.replace(str(scene.store_address), f"file:{scene.model}").encode()
    )
    scene.store_address = UnixAddress(f"{scene.store_address.path}.unused")
    async with scene.boot() as enclave:
        assert enclave.phase is Phase.SERVING
        assert enclave.model.manifest == scene.manifest
    assert ("LockPCR", 16) in scene.transport.changes()
    assert "weights" in {event["event"] for event in await scene.events()}


async def test_another_model_in_the_image_halts_the_boot(scene: Scene) -> None:
    scene.configuration = EnclaveConfiguration.parse(
        scene.toml.replace(str(scene.store_address), f"file:{scene.model}").encode()
    )
    scene.model.write_bytes(scene.model.read_bytes() + b"more")
    assert (await scene.halt())["code"] == "wrong_manifest"


async def test_a_cpu_without_what_the_engine_needs_halts_the_boot_before_weights_come(scene: Scene) -> None:
    scene.cpu_features = scene.model.with_name("cpu-features")
    scene.cpu_features.write_text("avx1024\n")
    halted = await scene.halt()
    assert (halted["code"], halted["expected"], halted["got"]) == ("cpu_lacks_features", "avx1024", "without avx1024")
    assert "weights" not in {event["event"] for event in await scene.events()}
    assert ("ExtendPCR", 16) not in scene.transport.changes()


async def test_a_boot_happens_once(scene: Scene) -> None:
    async with scene.boot() as enclave:
        before = list(scene.transport.requests)
        await enclave.boot()
        assert enclave.phase is Phase.SERVING
        assert scene.transport.requests == before


async def test_a_halted_boot_stays_halted(scene: Scene) -> None:
    scene.rng_current.write_text("none")
    async with scene.boot() as enclave:
        scene.rng_current.write_text("nsm-hwrng")
        await enclave.boot()
        assert enclave.phase is Phase.HALTED
    assert await scene.phases() == []


async def test_closing_ends_the_engine_and_gives_the_memory_back(scene: Scene) -> None:
    async with scene.boot() as enclave:
        descriptor = enclave.model.fd
        os.fstat(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


async def test_the_arrival_of_the_weights_is_told_in_few_events(scene: Scene) -> None:
    async with scene.boot():
        pass
    weights = [event for event in await scene.events() if event["event"] == "weights"]
    assert 1 <= len(weights) <= PROGRESS_STEPS + 1
    assert weights[-1]["received"] == weights[-1]["total"] == scene.manifest.files[0].size


# --- Every phase may fail -----------------------------------------------------------------------------------------


class Refusing(EchoEngine):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    async def start(self) -> None:
        raise self._error


def no_entropy(scene: Scene) -> None:
    scene.rng_current.write_text("tpm-rng")


def configuration_committed_before(scene: Scene) -> None:
    scene.nsm.extend_pcr(17, b"something")


def another_model(scene: Scene) -> None:
    scene.configuration = replace(scene.configuration, max_model_bytes=1)


def no_engine(scene: Scene) -> None:
    scene.engine = Refusing(EngineRefused("model_refused", "llama.cpp does not load it"))


FAILURES: dict[Phase, tuple[Callable[[Scene], None], str]] = {
    Phase.ENTROPY: (no_entropy, "entropy_missing"),
    Phase.CONFIGURED: (configuration_committed_before, "register_in_use"),
    Phase.MODEL_COMMITTED: (another_model, "model_too_large"),
    Phase.SERVING: (no_engine, "model_refused"),
}


@pytest.mark.parametrize("phase", FAILURES)
async def test_a_phase_that_fails_halts_the_boot_and_nothing_later_runs(scene: Scene, phase: Phase) -> None:
    spoil, code = FAILURES[phase]
    spoil(scene)
    before = scene.transport.changes()
    halted = await scene.halt()
    assert (halted["phase"], halted["code"]) == (phase.value, code)
    assert await scene.phases() == [reached.value for reached in ORDER[1 : ORDER.index(phase)]]
    commits = [("ExtendPCR", 17), ("LockPCR", 17), ("ExtendPCR", 16), ("LockPCR", 16)]
    done = {Phase.ENTROPY: 0, Phase.CONFIGURED: 0, Phase.MODEL_COMMITTED: 2, Phase.SERVING: 4}[phase]
    assert scene.transport.changes() == before + commits[:done]


@pytest.mark.parametrize("phase", list(PHASES))
async def test_a_defect_in_any_phase_halts_and_says_only_its_kind(
    scene: Scene, phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Phase] = []

    async def explode(_: Enclave) -> None:
        raise ZeroDivisionError("text of a defect")

    def noting(which: Phase) -> enclave.boot.Step:
        step = PHASES[which]

        async def does(booting: Enclave) -> None:
            ran.append(which)
            await step.does(booting)

        return replace(step, does=does)

    steps = {which: noting(which) for which in PHASES}
    steps[phase] = replace(steps[phase], does=explode)
    monkeypatch.setattr(enclave.boot, "PHASES", steps)
    halted = await scene.halt()
    assert halted["phase"] == PHASES[phase].leads_to.value
    assert (halted["code"], halted["message"]) == ("internal", "ZeroDivisionError")
    assert "text of a defect" not in json.dumps(await scene.events())
    assert ran == ORDER[: ORDER.index(phase)]


async def test_a_cancelled_boot_is_not_a_halted_one(scene: Scene) -> None:
    begun = asyncio.Event()

    class Slow(EchoEngine):
        async def start(self) -> None:
            begun.set()
            await asyncio.Event().wait()

    scene.engine = Slow()

    async def boot() -> None:
        async with scene.boot():
            pass

    booting = asyncio.ensure_future(boot())
    await begun.wait()
    booting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await booting
    assert "halted" not in {event["event"] for event in await scene.events()}


# --- Entropy ------------------------------------------------------------------------------------------------------


async def test_the_kernels_pool_is_fed_by_the_nsm_before_any_key(scene: Scene) -> None:
    async with scene.boot():
        pass
    assert scene.transport.requests[0] == ("GetRandom", None)
    assert len(scene.pool.read_bytes()) == 256
    assert scene.reseeded == [scene.pool.read_bytes()]


async def test_an_emulated_enclave_says_so_instead_of_checking_the_kernel(scene: Scene) -> None:
    scene.configuration = replace(scene.configuration, entropy=Entropy.HOST)
    scene.rng_current.unlink()
    async with scene.boot() as enclave:
        assert enclave.phase is Phase.SERVING
        assert enclave.identity.current().commitment.entropy is Entropy.HOST
    assert len(scene.pool.read_bytes()) == 256


async def test_a_generator_that_is_not_seeded_anew_halts_unless_emulated(scene: Scene) -> None:
    scene.may_reseed = False
    emulated = replace(scene.configuration, entropy=Entropy.HOST)
    halted = await scene.halt()
    assert (halted["phase"], halted["code"]) == ("ENTROPY", "entropy_missing")
    scene.configuration = emulated
    async with scene.boot() as enclave:
        assert enclave.phase is Phase.SERVING


def test_keys_come_from_the_kernels_generator_of_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL's own was seeded once, perhaps before anything was mixed in."""
    monkeypatch.setattr("secrets.token_bytes", bytes)
    assert ChannelKey().public_bytes == ChannelKey().public_bytes
    first, second = (Identity(b"m", b"c", Entropy.HOST, ChannelSettings(1, 1, 1)) for _ in range(2))
    assert first.receipt_key.public_key() == second.receipt_key.public_key()


async def test_a_kernel_without_that_file_is_not_seeded(scene: Scene) -> None:
    scene.rng_current.unlink()
    halted = await scene.halt()
    assert (halted["phase"], halted["code"]) == ("ENTROPY", "system_error")


@pytest.mark.parametrize("current", ["", "none\n", "nsm-hwrng2\n", "NSM-HWRNG\n", "virtio_rng.0\nnsm-hwrng\n"])
async def test_the_kernels_generator_is_the_nsms_exactly(scene: Scene, current: str) -> None:
    scene.rng_current.write_text(current)
    halted = await scene.halt()
    assert (halted["code"], halted["expected"], halted["got"]) == ("entropy_missing", "nsm-hwrng", current.strip())
    assert scene.pool.read_bytes() == b""
    assert scene.transport.requests == []


# --- Registers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [16, 17])
@pytest.mark.parametrize("use", ["extended", "locked", "both"])
async def test_a_register_used_before_is_not_committed_to(scene: Scene, index: int, use: str) -> None:
    if use != "locked":
        scene.nsm.extend_pcr(index, b"someone else's")
    if use != "extended":
        scene.nsm.lock_pcr(index)
    before = scene.nsm.describe_pcr(index)
    halted = await scene.halt()
    assert halted["code"] == "register_in_use"
    assert halted["phase"] == {16: "MODEL_COMMITTED", 17: "CONFIGURED"}[index]
    assert scene.nsm.describe_pcr(index) == before


async def test_a_register_that_is_not_what_one_extend_gives_is_not_locked(scene: Scene) -> None:
    """As when something extended it between the look and the extend."""

    def instead(name: str, index: int | None) -> bytes | None:
        return cbor2.dumps({"ExtendPCR": {"data": bytes(48)}}) if name == "ExtendPCR" else None

    scene.transport.instead = instead
    halted = await scene.halt()
    assert (halted["code"], halted["got"]) == ("register_wrong", bytes(48).hex())
    assert halted["expected"] == once_extended(scene.configuration.digest).hex()
    assert ("LockPCR", 17) not in scene.transport.requests


@pytest.mark.parametrize("request_name", ["GetRandom", "DescribePCR", "ExtendPCR", "LockPCR"])
async def test_an_nsm_that_refuses_halts_the_boot(scene: Scene, request_name: str) -> None:
    def instead(name: str, index: int | None) -> bytes | None:
        return cbor2.dumps({"Error": "InternalError"}) if name == request_name else None

    scene.transport.instead = instead
    halted = await scene.halt()
    assert halted["code"] == "InternalError"
    assert halted["phase"] == ("ENTROPY" if request_name == "GetRandom" else "CONFIGURED")


async def test_an_nsm_that_goes_away_halts_the_boot(scene: Scene) -> None:
    def instead(name: str, index: int | None) -> bytes | None:
        if name == "LockPCR":
            raise NsmUnavailable("gone")
        return None

    scene.transport.instead = instead
    assert (await scene.halt())["code"] == "nsm_unavailable"
    assert not scene.nsm.describe_pcr(17).lock


async def test_the_registers_are_locked_for_good(scene: Scene) -> None:
    async with scene.boot() as enclave:
        for index in (16, 17):
            with pytest.raises(NsmError):
                enclave.nsm.extend_pcr(index, b"again")


async def test_two_enclaves_of_one_module_cannot_both_serve(scene: Scene) -> None:
    """A second boot on registers that are in use, as when a server died and its NSM did not."""
    async with scene.boot():
        second = Enclave(
            replace(scene.configuration, entropy=Entropy.HOST), scene.nsm, lambda *_: EchoEngine(), EventLog()
        )
        await second.boot()
        assert second.phase is Phase.HALTED


# --- KMS ----------------------------------------------------------------------------------------------------------


class WithKms:
    """A scene whose configuration names KMS, and what happens in the order in which it does."""

    def __init__(self, scene: Scene, *, model: bool = True, prompts: bool = True) -> None:
        self.scene = scene
        self.kms = LocalKms()
        self.order: list[str] = []
        self._weights = scene.model.read_bytes()
        model_key, prompts_key = MODEL_KEY if model else None, PROMPTS_KEY if prompts else None
        kms = kms_toml(UnixAddress("egress.sock"), model=model_key, prompts=prompts_key)
        scene.configuration = EnclaveConfiguration.parse((scene.toml + kms).encode())
        scene.make_kms = self.make
        scene.transport.instead = self.note
        if model:
            self.encrypt()

    @property
    def sealing(self) -> Sealing:
        manifest, configuration = self.scene.manifest.digest(), self.scene.configuration.digest
        return Sealing(self.kms.wrap, MODEL, MODEL_KEY, (manifest,), (configuration,))

    def encrypt(self, **changed: Any) -> None:
        self.scene.model.write_bytes(self.sealing.but(**changed).seal(self._weights))
        self.scene.encrypted = True

    def make(self, settings: KmsSettings, nsm: Nsm) -> KeyManagement:
        assert settings == self.scene.configuration.kms
        assert nsm is self.scene.nsm
        self.order.append("recipient key")
        assert len(self.scene.pool.read_bytes()) == 256, "the pool is fed by the NSM first"
        return Noting(self)

    def note(self, name: str, index: int | None) -> bytes | None:
        if name in ("ExtendPCR", "LockPCR", "GetRandom"):
            self.order.append(name if index is None else f"{name} {index}")
        return None


class Noting(LocalKms):
    """The scene's KMS, which writes down when it is asked."""

    def __init__(self, around: WithKms) -> None:
        self.__dict__ = around.kms.__dict__
        self._order = around.order

    async def decrypt(self, *arguments: Any, **named: Any) -> Any:
        self._order.append("model key")
        return await super().decrypt(*arguments, **named)

    async def generate_random(self, count: int) -> Any:
        self._order.append(f"random {count}")
        return await super().generate_random(count)


async def test_keys_come_in_their_order(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipient key behind the check of entropy; KMS's randomness in the pool before any key that it may be in;
    the model's key when the configuration is locked and the model's register still open.
    """
    with_kms = WithKms(scene)
    identities: list[bytes] = []

    def made(**arguments: Any) -> Identity:
        identities.append(scene.pool.read_bytes())
        return Identity(**arguments)

    monkeypatch.setattr(enclave.boot, "Identity", made)
    async with scene.boot() as booted:
        assert booted.phase is Phase.SERVING
        assert os.pread(booted.model.fd, 4, 0) == b"GGUF"
    assert with_kms.order == [
        "GetRandom",
        *("ExtendPCR 17", "LockPCR 17"),
        *("recipient key", f"random {RANDOM_SIZE}", "model key"),
        *("ExtendPCR 16", "LockPCR 16"),
    ]
    assert identities == [with_kms.kms.random]
    assert with_kms.kms.asked == [(MODEL_KEY, encryption_context(MODEL, CONTEXT, FLOOR))]
    assert with_kms.kms.closed


async def test_what_is_committed_is_the_plaintexts_digest(scene: Scene) -> None:
    WithKms(scene)
    async with scene.boot() as booted:
        assert booted.identity.model == scene.manifest.digest()
        assert scene.nsm.describe_pcr(16).data == once_extended(scene.manifest.digest())


async def test_a_configuration_for_prompts_alone_takes_the_model_in_plain(scene: Scene) -> None:
    with_kms = WithKms(scene, model=False)
    async with scene.boot() as booted:
        assert booted.phase is Phase.SERVING
        assert booted.prompt_keys is not None
    assert with_kms.kms.asked == []
    assert scene.pool.read_bytes() == with_kms.kms.random


@pytest.mark.parametrize("named", [False, True])
async def test_envelopes_of_prompts_are_opened_where_a_key_is_named(scene: Scene, named: bool) -> None:
    WithKms(scene, prompts=named)
    async with scene.boot() as booted:
        assert (booted.prompt_keys is not None) is named


async def test_without_kms_nobody_asks_it(scene: Scene) -> None:
    scene.make_kms = lambda *_: pytest.fail("KMS is asked")
    async with scene.boot() as booted:
        assert booted.phase is Phase.SERVING
        assert booted.prompt_keys is None


@pytest.mark.parametrize("current", ["", "none", "tpm-rng"])
async def test_no_recipient_key_without_entropy(scene: Scene, current: str) -> None:
    with_kms = WithKms(scene)
    scene.rng_current.write_text(current)
    assert (await scene.halt())["code"] == "entropy_missing"
    assert with_kms.order == []


async def test_no_recipient_key_before_the_configuration_is_locked(scene: Scene) -> None:
    with_kms = WithKms(scene)
    scene.nsm.lock_pcr(17)
    assert (await scene.halt())["code"] == "register_in_use"
    assert "recipient key" not in with_kms.order


def kms_away(with_kms: WithKms) -> None:
    with_kms.kms.error = KmsError("kms_unreachable", "the parent's egress does not answer", got="connection_lost")


def an_authority_that_is_none(with_kms: WithKms) -> None:
    def make(*_: object) -> KeyManagement:
        raise StrongroomError("bad_anchor", "an authority for TLS to KMS is no certificate (DER)")

    with_kms.scene.make_kms = make


def an_older_envelope(with_kms: WithKms) -> None:
    with_kms.encrypt(version=FLOOR - 1)


def an_envelope_of_another_configuration(with_kms: WithKms) -> None:
    with_kms.encrypt(configurations=(bytes(48),))


def a_changed_record(with_kms: WithKms) -> None:
    header, [*records] = split_records(with_kms.scene.model.read_bytes())
    with_kms.scene.model.write_bytes(header + b"".join([records[0][:-1] + b"\x00", *records[1:]]))


def a_wrapped_key_of_another_context(with_kms: WithKms) -> None:
    with_kms.encrypt(wrapped_under=encryption_context(MODEL, "production", FLOOR))


UNRELEASED: dict[str, tuple[Callable[[WithKms], None], str, str | None]] = {
    "KMS away": (kms_away, "kms_unreachable", None),
    "no authority": (an_authority_that_is_none, "bad_anchor", None),
    "an older envelope": (an_older_envelope, "rolled_back", f"version {FLOOR} or later"),
    "another configuration": (an_envelope_of_another_configuration, "wrong_configuration", "sha384:" + "00" * 48),
    "a changed record": (a_changed_record, "tampered_record", "record 0 as it was sealed"),
    "another context": (a_wrapped_key_of_another_context, "kms_wrong_context", None),
}


@pytest.mark.parametrize("trouble", UNRELEASED)
async def test_what_is_not_released_halts_the_boot_and_says_why(scene: Scene, trouble: str) -> None:
    spoil, code, expected = UNRELEASED[trouble]
    with_kms = WithKms(scene)
    spoil(with_kms)
    halted = await scene.halt()
    assert (halted["phase"], halted["code"], halted["expected"]) == ("MODEL_COMMITTED", code, expected)
    assert halted["message"]
    register = scene.nsm.describe_pcr(16)
    assert (register.data, register.lock) == (ZERO_PCR, False)
    assert with_kms.kms.closed or trouble == "no authority"
    assert await scene.phases() == ["ENTROPY", "CONFIGURED"]
