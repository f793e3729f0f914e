"""The EC2 instance that is a parent: enclaves on, metadata of version 2 alone, no public address, an encrypted disk.

Nothing is launched unless it is asked for by name; else EC2 is asked whether it would (its own dry run). Launching
twice under one name launches once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

from attestation.errors import StrongroomError
from parent.image.instance_types import INSTANCE_TYPES, PARENT_CPUS, PARENT_MEMORY
from parent.nitro.resources import MIB

T = TypeVar("T")

TAG: Final = "strongroom:parent"
"""Of an instance: the name under which it was launched."""
ALIVE: Final = ("pending", "running", "stopping", "stopped")
AMAZON_LINUX: Final = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-{}"
"""The public parameter that names Amazon Linux 2023's newest image, by architecture."""
ARCHITECTURES: Final = ("x86_64", "arm64")
ROOT_DEVICE: Final = "/dev/xvda"
"""Of Amazon Linux."""
SOURCE_FOLDER: Final = "/opt/strongroom/source"
MAX_USER_DATA: Final = 16_384
"""Bytes before base64: EC2's limit."""
CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 30
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
_SOURCE = re.compile(r"(https|ssh)://[A-Za-z0-9._~:/@%+-]+", re.ASCII)


class Ec2Error(StrongroomError):
    """EC2 does not do what it was asked for. Codes: ``ec2_refused``, ``ec2_unavailable`` (4), ``bad_parent`` and
    ``unsupported_instance_type`` (2).
    """

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return 2 if self.code in ("bad_parent", "unsupported_instance_type") else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """One instance as it is wanted. Raises Ec2Error ``bad_parent``."""

    name: str
    instance_type: str
    memory_mib: int
    """Of its enclaves together."""
    cpus: int
    subnet: str | None = None
    """None: EC2's default one."""
    security_groups: tuple[str, ...] = ()
    instance_profile: str | None = None
    """The name of an IAM instance profile: its role is what KMS sees."""
    key_name: str | None = None
    """An SSH key pair. None: reach it by Session Manager."""
    volume_gib: int = 40
    hop_limit: int = 1
    """Of metadata answers: 1 is this host alone, 2 reaches its containers."""
    public_address: bool = False
    source: str | None = None
    """A git URL of this repository, from which the instance sets itself up."""
    revision: str | None = None
    """The full commit of ``source``."""

    def __post_init__(self) -> None:
        checks = (
            ("name", _NAME.fullmatch(self.name), _NAME.pattern, self.name),
            ("--enclave-memory-mib and --enclave-cpus", min(self.memory_mib, self.cpus) > 0, "at least 1", None),
            ("--source", self.source is None or _SOURCE.fullmatch(self.source), _SOURCE.pattern, self.source),
            (
                "--revision",
                (self.source is None) == (self.revision is None)
                and (self.revision is None or _REVISION.fullmatch(self.revision)),
                "a full commit, with --source",
                self.revision,
            ),
        )
        for what, sound, expected, got in checks:
            if not sound:
                raise Ec2Error("bad_parent", f"{what} is not as it has to be", expected=expected, got=ascii(got))

    def user_data(self) -> str | None:
        """The script that the instance runs as root at its first boot; None without a source. It holds no secret: what
        is in it, every process of the instance may read.
        """
        if self.source is None or self.revision is None:
            return None
        folder = shlex.quote(SOURCE_FOLDER)
        text = (
            "#!/bin/bash\n# Written by `strongroom nitro launch`.\nset -euo pipefail\n"
            "dnf install --assumeyes git\n"
            f"[ -d {folder} ] || git clone --no-checkout -- {shlex.quote(self.source)} {folder}\n"
            f"git -C {folder} checkout --detach {shlex.quote(self.revision)}\n"
            f"{folder}/scripts/bootstrap-parent --memory-mib {self.memory_mib} --cpus {self.cpus} --user ec2-user\n"
        )
        if len(text.encode()) > MAX_USER_DATA:
            raise Ec2Error("bad_parent", "the user data are too long", expected=f"<= {MAX_USER_DATA} bytes")
        return text

    def request(self, image: str) -> dict[str, Any]:
        """What RunInstances is asked for; ``image`` is an AMI. The token makes the same request twice one instance."""
        interface: dict[str, Any] = {"DeviceIndex": 0, "AssociatePublicIpAddress": self.public_address}
        interface |= {} if self.subnet is None else {"SubnetId": self.subnet}
        interface |= {"Groups": list(self.security_groups)} if self.security_groups else {}
        disk = {"Encrypted": True, "VolumeType": "gp3", "VolumeSize": self.volume_gib, "DeleteOnTermination": True}
        tags = [{"Key": "Name", "Value": self.name}, {"Key": TAG, "Value": self.name}]
        request: dict[str, Any] = {
            "ImageId": image,
            "InstanceType": self.instance_type,
            "MinCount": 1,
            "MaxCount": 1,
            "EnclaveOptions": {"Enabled": True},
            "MetadataOptions": {
                "HttpEndpoint": "enabled",
                "HttpTokens": "required",
                "HttpPutResponseHopLimit": self.hop_limit,
                "InstanceMetadataTags": "disabled",
            },
            "NetworkInterfaces": [interface],
            "BlockDeviceMappings": [{"DeviceName": ROOT_DEVICE, "Ebs": disk}],
            "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")],
        }
        if self.instance_profile is not None:
            request["IamInstanceProfile"] = {"Name": self.instance_profile}
        if self.key_name is not None:
            request["KeyName"] = self.key_name
        if (script := self.user_data()) is not None:
            request["UserData"] = base64.b64encode(script.encode()).decode()
        said = json.dumps([asdict(self), request], sort_keys=True).encode()
        return {**request, "ClientToken": hashlib.sha256(said).hexdigest()}


class Ec2:
    """EC2 in one region, asked with botocore's chain of credentials."""

    def __init__(self, region: str | None = None, profile: str | None = None) -> None:
        """None: what botocore is configured for. Raises Ec2Error ``ec2_unavailable``."""
        from botocore.config import Config  # 0.1 s that other commands need not wait for
        from botocore.session import Session

        config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries={"total_max_attempts": 3})

        def made() -> tuple[Any, Any]:
            session = Session(profile=profile)
            ec2, ssm = (session.create_client(name, region_name=region, config=config) for name in ("ec2", "ssm"))
            return ec2, ssm

        self._ec2, self._ssm = _asked(made)

    @property
    def region(self) -> str:
        return str(self._ec2.meta.region_name)

    def require_enclaves(self, parent: Parent) -> str:
        """The architecture of an instance type that has enclaves, and room for these. Raises Ec2Error
        ``unsupported_instance_type``.
        """
        found = _asked(lambda: self._ec2.describe_instance_types(InstanceTypes=[parent.instance_type]))
        facts = found["InstanceTypes"][0]
        cpus, memory = facts["VCpuInfo"]["DefaultVCpus"], facts["MemoryInfo"]["SizeInMiB"]
        wanted = f"{parent.cpus} + {PARENT_CPUS} vCPUs, {parent.memory_mib} + {PARENT_MEMORY // MIB} MiB"
        architecture = next(
            (each for each in facts["ProcessorInfo"]["SupportedArchitectures"] if each in ARCHITECTURES), ""
        )
        if facts.get("NitroEnclavesSupport") != "supported" or not architecture:
            raise _unsupported(parent, "this instance type has no enclaves", "NitroEnclavesSupport: supported", "none")
        if cpus < parent.cpus + PARENT_CPUS or memory < parent.memory_mib + PARENT_MEMORY // MIB:
            raise _unsupported(parent, "it is too small for them and itself", wanted, f"{cpus} vCPUs, {memory} MiB")
        return str(architecture)

    def newest_amazon_linux(self, architecture: str) -> str:
        """The AMI of Amazon Linux 2023. Raises Ec2Error."""
        name = AMAZON_LINUX.format(architecture)
        return str(_asked(lambda: self._ssm.get_parameter(Name=name))["Parameter"]["Value"])

    def find(self, name: str) -> str | None:
        """The instance that was launched under ``name`` and is not terminated. Raises Ec2Error."""
        filters = [
            {"Name": f"tag:{TAG}", "Values": [name]},
            {"Name": "instance-state-name", "Values": list(ALIVE)},
        ]
        found = _asked(lambda: self._ec2.describe_instances(Filters=filters))
        instances = [str(each["InstanceId"]) for one in found["Reservations"] for each in one["Instances"]]
        return min(instances, default=None)

    def launch(self, request: dict[str, Any]) -> str:
        """The instance's ID. Raises Ec2Error."""
        found = _asked(lambda: self._ec2.run_instances(**request))
        return str(found["Instances"][0]["InstanceId"])

    def would_launch(self, request: dict[str, Any]) -> None:
        """EC2's own dry run: it checks the request and the permissions and launches nothing. Raises Ec2Error."""
        from botocore.exceptions import ClientError

        try:
            _asked(lambda: self._ec2.run_instances(**request, DryRun=True))
        except Ec2Error as error:
            cause = error.__cause__
            if not isinstance(cause, ClientError) or cause.response["Error"]["Code"] != "DryRunOperation":
                raise
        else:
            raise Ec2Error("ec2_refused", "EC2 did not answer a dry run as one", expected="DryRunOperation")


def _asked(ask: Callable[[], T]) -> T:
    """What AWS answers. Raises Ec2Error."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

    try:
        return ask()
    except NoRegionError as error:
        raise Ec2Error(
            "ec2_unavailable",
            "AWS cannot be asked: in which region is it to be?",
            expected="--region NAME, or a region in your AWS configuration (`aws configure set region NAME`)",
            got="none",
        ) from error
    except NoCredentialsError as error:
        raise Ec2Error(
            "ec2_unavailable",
            "AWS cannot be asked: there are no credentials",
            expected="--profile NAME, or what `aws configure` or `aws sso login` sets up",
            got="none",
        ) from error
    except ClientError as error:
        body = error.response.get("Error", {})
        code, message = str(body.get("Code", "?"))[:100], str(body.get("Message", ""))[:500]
        raise Ec2Error("ec2_refused", f"AWS refused {error.operation_name}: {message}", got=code) from error
    except (BotoCoreError, ValueError) as error:
        raise Ec2Error("ec2_unavailable", f"AWS cannot be asked: {str(error)[:500]}") from error


def _unsupported(parent: Parent, message: str, expected: str, got: str) -> Ec2Error:
    fitting = [
        each.name
        for each in sorted(INSTANCE_TYPES)
        if each.cpus >= parent.cpus + PARENT_CPUS and each.memory >= parent.memory_mib + PARENT_MEMORY // MIB
    ][:3]
    advice = f"; {', '.join(fitting)} would do" if fitting else ""
    return Ec2Error(
        "unsupported_instance_type", f"{parent.instance_type}: {message}{advice}", expected=expected, got=got
    )
