"""The boot: a table of phases, each with what it does and where it leads. Any error leads to HALTED.

    COLD -> ENTROPY -> CONFIGURED -> MODEL_COMMITTED -> KEYED -> SERVING

Each phase's name says what is true once it is reached. No channel key exists before both registers are locked, so no
channel Evidence can.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from attestation.commitment import Entropy
from attestation.envelope import EnvelopePurpose
from attestation.errors import StrongroomError
from attestation.reference import PCR_CONFIGURATION, PCR_MODEL, ZERO_PCR, once_extended
from attestation.secret import Secret
from enclave.config import EnclaveConfiguration, KmsSettings, WrappedKey
from enclave.cpu import check_cpu
from enclave.engine import Engine
from enclave.identity import Identity
from enclave.kms.release import EnvelopeKeys, GuardedKms, KeyService
from enclave.log import EventLog, Halted, KeyOffered, Phase, PhaseReached, WeightsReceived
from enclave.model import Progress, SealedModel, open_model, receive_model
from enclave.nsm import Nsm

RNG_CURRENT = Path("/sys/class/misc/hw_random/rng_current")
KERNEL_POOL = Path("/dev/urandom")
RNDRESEEDCRNG = 0x5207
"""``_IO('R', 0x07)`` of Linux's ``random.h``."""
RANDOM_SIZE = 32
"""Bytes that KMS adds to the kernel's pool."""
PROGRESS_STEPS = 50
"""Events at most for the weights' arrival."""


class BootError(StrongroomError):
    """The boot cannot go on."""


class KeyManagement(KeyService, Protocol):
    """KMS, as far as a boot uses it."""

    async def generate_random(self, count: int) -> Secret:
        """So many random bytes of KMS's. Raises KmsError."""
        ...

    async def close(self) -> None: ...


class Enclave:
    """One boot of one enclave: what each phase has established so far."""

    def __init__(
        self,
        configuration: EnclaveConfiguration,
        nsm: Nsm,
        make_engine: Callable[[EnclaveConfiguration, SealedModel, EventLog], Engine],
        log: EventLog,
        *,
        make_kms: Callable[[KmsSettings, Nsm], KeyManagement] | None = None,
        rng_current: Path = RNG_CURRENT,
        cpu_features: Path | None = None,
    ) -> None:
        """``cpu_features``: what the engine's llama.cpp was compiled for (:mod:`enclave.cpu`), where its image says
        so."""
        self.configuration = configuration
        self.nsm = nsm
        self.log = log
        self.phase = Phase.COLD
        self._make_engine = make_engine
        self._make_kms = make_kms or _kms_over_the_tunnel
        self._rng_current = rng_current
        self._cpu_features = cpu_features
        self._kms: KeyManagement | None = None
        self._anybodys_kms: GuardedKms | None = None
        """The same, for prompts."""
        self._model: SealedModel | None = None
        self._identity: Identity | None = None
        self._engine: Engine | None = None

    @property
    def model(self) -> SealedModel:
        assert self._model is not None, "the model exists from MODEL_COMMITTED"
        return self._model

    @property
    def identity(self) -> Identity:
        assert self._identity is not None, "the identity exists from KEYED"
        return self._identity

    @property
    def prompt_keys(self) -> EnvelopeKeys | None:
        """What opens the envelopes of prompts; None where the configuration names no key for them."""
        settings = self.configuration.kms
        if settings is None or settings.prompts is None:
            return None
        assert self._anybodys_kms is not None, "KMS is open before the model is there"
        model = self.model.manifest.digest()
        return self._envelope_keys(self._anybodys_kms, EnvelopePurpose.PROMPT, settings.prompts, model)

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "the engine exists from SERVING"
        return self._engine

    async def boot(self) -> None:
        """Runs the table to SERVING or HALTED. It returns either way; :attr:`phase` and the events say which."""
        while (step := PHASES.get(self.phase)) is not None:
            try:
                await step.does(self)
            except Exception as error:  # whatever went wrong, the boot halts and says so
                self.log.write(_halted(step.leads_to, error))
                self.phase = Phase.HALTED
                return
            self.phase = step.leads_to
            self.log.write(PhaseReached(self.phase))

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()
        if self._model is not None:
            self._model.close()
        if self._kms is not None:
            await self._kms.close()

    # --- What the phases do ------------------------------------------------------------------------------------

    async def check_entropy(self) -> None:
        """No key is made before the kernel's generator is fed by the NSM (aws-nitro-enclaves-sdk-c#41), unless the
        configuration says ``host``."""
        if self.configuration.entropy is Entropy.NSM_HWRNG:
            current = self._rng_current.read_text().strip()
            if current != "nsm-hwrng":
                raise BootError(
                    "entropy_missing", "the kernel is not seeded by the NSM", expected="nsm-hwrng", got=current
                )
        self._mix(await asyncio.to_thread(self.nsm.get_random))

    def _mix(self, random: bytes) -> None:
        """Adds to the kernel's pool: what its generator gives afterwards is at least as hard to guess as before. Keys
        are made from that (:class:`~vsockrpc.sealed.ChannelKey`), and not from a generator that was seeded earlier.
        """
        with KERNEL_POOL.open("wb", buffering=0) as pool:
            pool.write(random)
            try:
                reseed(pool.fileno())
            except OSError as error:
                # Only root may; an emulated enclave need not be, and its host chose the randomness anyway.
                if self.configuration.entropy is not Entropy.HOST:
                    raise BootError(
                        "entropy_missing", "the kernel's generator was not seeded anew", got=error.strerror
                    ) from error

    async def commit_configuration(self) -> None:
        await self._commit(PCR_CONFIGURATION, self.configuration.digest)

    async def commit_model(self) -> None:
        check_cpu(self._cpu_features)  # before weights come for an engine that could not run
        reported = 0

        def progress(received: int, total: int) -> None:
            nonlocal reported
            if received == total or received - reported >= total / PROGRESS_STEPS:
                reported = received
                self.log.write(WeightsReceived(received, total))

        configuration = self.configuration
        keys = None
        if configuration.kms is not None:
            kms = await self._open_kms(configuration.kms)
            if configuration.kms.model is not None:
                wrapped = configuration.kms.model
                keys = self._envelope_keys(kms, EnvelopePurpose.MODEL, wrapped, configuration.manifest)
        store, manifest, most = configuration.model_store, configuration.manifest, configuration.max_model_bytes
        if isinstance(store, Path):
            self._model = await asyncio.to_thread(
                open_model, store, manifest, max_bytes=most, progress=_on_loop(progress)
            )
        else:
            self._model = await receive_model(store, manifest, max_bytes=most, progress=progress, keys=keys)
        await self._commit(PCR_MODEL, self._model.manifest.digest())

    async def _open_kms(self, settings: KmsSettings) -> KeyManagement:
        """The recipient key is made here, behind the check of entropy; and KMS's randomness is mixed with the pool's
        before any other key is made."""
        self._kms = await asyncio.to_thread(self._make_kms, settings, self.nsm)
        self._anybodys_kms = GuardedKms(self._kms)
        self._mix((await self._kms.generate_random(RANDOM_SIZE)).expose())
        return self._kms

    def _envelope_keys(
        self, kms: KeyService, purpose: EnvelopePurpose, wrapped: WrappedKey, model: bytes
    ) -> EnvelopeKeys:
        return EnvelopeKeys(kms, purpose, wrapped, model=model, configuration=self.configuration.digest)

    async def make_identity(self) -> None:
        self._identity = Identity(
            model=self.model.manifest.digest(),
            configuration=self.configuration.digest,
            entropy=self.configuration.entropy,
            settings=self.configuration.channel,
            on_offer=lambda key_id: self.log.write(KeyOffered(key_id.hex())),
        )

    async def start_engine(self) -> None:
        self._engine = self._make_engine(self.configuration, self.model, self.log)
        await self._engine.start()

    async def _commit(self, index: int, digest: bytes) -> None:
        """Exactly one extend from zero, then the lock: what the register holds afterwards is what ``digest`` says
        and nothing else."""

        def commit() -> None:
            before = self.nsm.describe_pcr(index)
            if before.lock or before.data != ZERO_PCR:
                raise BootError(
                    "register_in_use", f"PCR{index} was used before this boot's commitment", expected="zero, unlocked"
                )
            after = self.nsm.extend_pcr(index, digest)
            if after != once_extended(digest):
                raise BootError(
                    "register_wrong",
                    f"PCR{index} is not what one extend gives",
                    expected=once_extended(digest).hex(),
                    got=after.hex(),
                )
            self.nsm.lock_pcr(index)

        await asyncio.to_thread(commit)


def _on_loop(progress: Progress) -> Progress:
    """For a thread that works for this loop."""
    loop = asyncio.get_running_loop()

    def forward(done: int, total: int) -> None:
        loop.call_soon_threadsafe(progress, done, total)

    return forward


def reseed(pool: int) -> None:
    """Has the kernel's generator take what its pool holds now: by itself it does so a minute later at times."""
    fcntl.ioctl(pool, RNDRESEEDCRNG)


def _kms_over_the_tunnel(settings: KmsSettings, nsm: Nsm) -> KeyManagement:
    from enclave.kms.service import (
        Kms,  # an SDK: half of what the server would import, and only some configurations need it
    )

    return Kms(settings, nsm)


@dataclass(frozen=True, slots=True)
class Step:
    does: Callable[[Enclave], Awaitable[None]]
    leads_to: Phase


PHASES: Mapping[Phase, Step] = {
    Phase.COLD: Step(Enclave.check_entropy, Phase.ENTROPY),
    Phase.ENTROPY: Step(Enclave.commit_configuration, Phase.CONFIGURED),
    Phase.CONFIGURED: Step(Enclave.commit_model, Phase.MODEL_COMMITTED),
    Phase.MODEL_COMMITTED: Step(Enclave.make_identity, Phase.KEYED),
    Phase.KEYED: Step(Enclave.start_engine, Phase.SERVING),
}


def _halted(phase: Phase, error: Exception) -> Halted:
    match error:
        case StrongroomError():
            return Halted(phase, error.code, error.message, error.expected, error.got)
        case OSError():
            return Halted(phase, "system_error", type(error).__name__, None, error.strerror)
        case _:
            return Halted(phase, "internal", type(error).__name__, None, None)
