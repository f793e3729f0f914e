"""The EC2 instance of a parent, over moto in this process."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from moto import mock_aws

from parent.nitro.commands import nitro
from parent.nitro.ec2 import TAG, Ec2, Ec2Error, Parent
from tests.terminal import AS_FROM_THE_FRONT_DOOR

AMI = "ami-12c6146b"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIATEST",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        yield


def parent(**options: Any) -> Parent:
    return Parent(**{"name": "p", "instance_type": "m6i.2xlarge", "memory_mib": 4096, "cpus": 2, **options})


def instances() -> list[dict[str, Any]]:
    found = Ec2()._ec2.describe_instances()
    return [each for one in found["Reservations"] for each in one["Instances"]]


# --- What is asked for ----------------------------------------------------------------------------------------------


def test_the_request_has_enclaves_and_as_little_else_as_may_be() -> None:
    request = parent(instance_profile="role", security_groups=("sg-1",), subnet="subnet-1").request(AMI)
    assert request["EnclaveOptions"] == {"Enabled": True}
    assert request["MetadataOptions"] == {
        "HttpEndpoint": "enabled",
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
        "InstanceMetadataTags": "disabled",
    }
    (interface,) = request["NetworkInterfaces"]
    assert interface["AssociatePublicIpAddress"] is False
    assert (interface["SubnetId"], interface["Groups"]) == ("subnet-1", ["sg-1"])
    assert request["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
    assert request["IamInstanceProfile"] == {"Name": "role"}
    assert not {"KeyName", "UserData"} & request.keys()
    assert request["MinCount"] == request["MaxCount"] == 1


def test_the_same_request_is_one_instance_and_another_is_another() -> None:
    tokens = {
        each.request(AMI)["ClientToken"]
        for each in (parent(), parent(), parent(volume_gib=80), parent(public_address=True))
    }
    assert len(tokens) == 3
    assert all(len(token) == 64 for token in tokens)


def test_the_instance_sets_itself_up_from_one_commit() -> None:
    wanted = parent(source="https://example.org/strongroom.git", revision=REVISION)
    script = base64.b64decode(wanted.request(AMI)["UserData"]).decode()
    assert script == wanted.user_data()
    assert script.startswith("#!/bin/bash\n")
    assert f"checkout --detach {REVISION}" in script
    assert "scripts/bootstrap-parent --memory-mib 4096 --cpus 2 --user ec2-user\n" in script


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "x" * 80},
        {"memory_mib": 0},
        {"cpus": 0},
        {"source": "https://example.org/x.git"},
        {"revision": REVISION},
        {"source": "https://example.org/x.git", "revision": "main"},
        {"source": "file:///x", "revision": REVISION},
        {"source": "https://example.org/x.git; reboot", "revision": REVISION},
        {"source": "https://example.org/$(reboot)", "revision": REVISION},
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(Ec2Error) as caught:
        parent(**options)
    assert caught.value.code == "bad_parent"
    assert caught.value.exit_code == 2


# --- What EC2 says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "architecture"), [("m6i.2xlarge", "x86_64"), ("m7g.2xlarge", "arm64")])
def test_types_with_enclaves(aws: None, name: str, architecture: str) -> None:
    assert Ec2().require_enclaves(parent(instance_type=name)) == architecture


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"instance_type": "t3.2xlarge"}, "unsupported_instance_type", ["no enclaves", "would do"]),
        ({"instance_type": "m6i.xlarge", "cpus": 4}, "unsupported_instance_type", ["4 + 2 vCPUs", "4 vCPUs"]),
        ({"memory_mib": 31_000}, "unsupported_instance_type", ["31000 + 2048 MiB", "32768 MiB"]),
        ({"instance_type": "m6i.huge"}, "ec2_refused", ["InvalidInstanceType"]),
    ],
)
def test_types_that_do_not_fit(aws: None, options: dict[str, Any], code: str, words: list[str]) -> None:
    with pytest.raises(Ec2Error) as caught:
        Ec2().require_enclaves(parent(**options))
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


def test_without_a_region_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(Ec2Error) as caught:
        Ec2()
    assert (caught.value.code, caught.value.exit_code) == ("ec2_unavailable", 4)
    assert "--region NAME" in str(caught.value)


def test_without_credentials_it_says_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Ec2Error) as caught:
        Ec2("eu-central-1").find("parent")
    assert caught.value.code == "ec2_unavailable"
    assert "--profile NAME" in str(caught.value)


def test_a_dry_run_is_one_of_ec2s_own(aws: None) -> None:
    Ec2().would_launch(parent().request(AMI))
    assert instances() == []


def test_a_dry_run_that_is_refused_says_so(aws: None) -> None:
    ec2 = Ec2()
    with pytest.raises(Ec2Error) as caught:
        ec2.would_launch({**parent().request(AMI), "ClientToken": 7})
    assert caught.value.code == "ec2_unavailable"

    def launched(**request: Any) -> dict[str, Any]:
        return {}

    ec2._ec2.run_instances = launched
    with pytest.raises(Ec2Error) as caught:
        ec2.would_launch(parent().request(AMI))
    assert caught.value.code == "ec2_refused"


# --- The command ----------------------------------------------------------------------------------------------------

OPTIONS = ["launch", "--name", "p", "--instance-type", "m6i.2xlarge"]
OPTIONS += ["--enclave-memory-mib", "4096", "--enclave-cpus", "2"]


def run(*options: str) -> str:
    result = CliRunner().invoke(nitro, [*OPTIONS, *options], catch_exceptions=False, **AS_FROM_THE_FRONT_DOOR)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_nothing_is_launched_unless_it_is_asked_for(aws: None) -> None:
    said = run()
    assert '"EnclaveOptions": {' in said
    assert said.endswith("EC2 would launch this in eu-central-1; --apply does it\n")
    assert json.loads(run("--json"))["launched"] is False
    assert instances() == []


def test_launching_twice_launches_once(aws: None) -> None:
    first = json.loads(run("--apply", "--json"))
    again = json.loads(run("--apply", "--json"))
    assert (first["launched"], again["launched"]) == (True, False)
    assert first["instance"] == again["instance"]
    (instance,) = instances()
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert {"Key": TAG, "Value": "p"} in instance["Tags"]
    assert instance.get("PublicIpAddress") is None
    assert first["request"]["ImageId"] == instance["ImageId"]
    assert run("--apply").startswith(f"p is there already: {first['instance']}")


def test_one_that_is_terminated_is_not_there(aws: None) -> None:
    first = json.loads(run("--apply", "--json"))["instance"]
    Ec2()._ec2.terminate_instances(InstanceIds=[first])
    assert Ec2().find("p") is None


def test_the_user_data_are_shown(aws: None) -> None:
    said = run("--source", "https://example.org/strongroom.git", "--revision", REVISION)
    assert "user data:\n    #!/bin/bash\n" in said
    assert "launched i-" in run("--apply")
