"""Containers in OCI layouts and archives: which one is taken, that every byte is held to its digest, and what the
layers come to.
"""

from __future__ import annotations

import gzip
import json
import sys
import tarfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from attestation.eif import Architecture
from parent.image import layers
from parent.image.archive import read_archive
from parent.image.container import Wanted
from parent.image.oci import read_layout
from parent.image.source import Source, tree_digest
from parent.image.spool import Spool
from parent.image.tree import Device, Directory, File, ImageBuildError, Symlink
from tests.parent.image.containers import (
    INDEX,
    LAYER,
    Container,
    Content,
    Layout,
    docker_archive,
    hard_link,
    layout,
    member,
    sha256,
    symlink,
    tar,
)

HELLO = Container([tar({"bin/": None, "bin/hello": b"hello"})])
OTHER = Container([tar({"bin/": None, "bin/other": b"other"})])
ARM = Container([tar({"bin/hello": b"arm"})], architecture="arm64")

Read = Callable[..., Source]


def quiet(what: str, done: int, total: int) -> None:
    assert done >= 0
    assert what


def read_folder_of(made: Layout, folder: Path, **wanted: Any) -> Source:
    (folder / "spool").mkdir()
    return read_layout(made.write(folder / "layout"), Wanted(**wanted), Spool(folder / "spool", quiet))


def read_bytes(data: bytes, folder: Path, **wanted: Any) -> Source:
    (folder / "spool").mkdir()
    (folder / "archive").write_bytes(data)
    return read_archive(folder / "archive", Wanted(**wanted), Spool(folder / "spool", quiet))


def contents(source: Source) -> dict[str, Any]:
    """What stands at each path: bytes, a link's target in a list, device numbers, or None for a directory."""
    found: dict[str, Any] = {}
    for path, entry in source.tree.items():
        match entry:
            case File():
                found[path] = b"".join(entry.pieces())
            case Symlink():
                found[path] = [entry.target]
            case Device():
                found[path] = (entry.kind, entry.major, entry.minor)
            case Directory():
                found[path] = None
    return found


def refused(code: str, read: Callable[[], Source]) -> ImageBuildError:
    with pytest.raises(ImageBuildError) as caught:
        read()
    assert caught.value.code == code
    assert str(caught.value).isprintable()
    return caught.value


# --- Formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_a_layout_in_a_folder(tmp_path: Path, packed: bool) -> None:
    runs = {"Entrypoint": ["/bin/hello"], "Cmd": ["world"], "Env": ["A=1", "B="], "User": "app", "WorkingDir": "/srv"}
    made = Layout()
    manifest = made.add(Container(HELLO.layers, runs, packed=packed))
    source = read_folder_of(made, tmp_path)
    assert contents(source) == {"bin": None, "bin/hello": b"hello"}
    assert source.command == ("/bin/hello", "world")
    assert (source.env, source.user, source.working_dir) == (("A=1", "B="), "app", "/srv")
    assert source.digest == manifest["digest"]
    assert [dict(each.digest) for each in source.materials] == [{"sha256": manifest["digest"][7:]}]
    assert source.docker_info == {"Architecture": "amd64", "Os": "linux", "Config": runs}


@pytest.mark.parametrize("packed", [True, False])
def test_a_layout_in_an_archive(tmp_path: Path, packed: bool) -> None:
    data = tar(layout(HELLO).all())
    source = read_bytes(gzip.compress(data) if packed else data, tmp_path)
    assert contents(source) == {"bin": None, "bin/hello": b"hello"}
    assert [each.name for each in source.materials] == ["archive", "container"]


def test_an_archive_of_docker(tmp_path: Path) -> None:
    source = read_bytes(docker_archive((HELLO, ["hello:1"])), tmp_path)
    assert contents(source) == {"bin": None, "bin/hello": b"hello"}
    assert source.command == ("/bin/hello",)
    assert source.digest == sha256(HELLO.config)


def test_an_archive_of_docker_names_one_of_several_by_tag(tmp_path: Path) -> None:
    data = docker_archive((HELLO, ["hello:1", "hello:latest"]), (OTHER, ["other:1"]))
    assert "hello:1, hello:latest, other:1" in str(refused("ambiguous_container", lambda: read_bytes(data, tmp_path)))
    for number, (tag, path) in enumerate({"hello:latest": "bin/hello", "other:1": "bin/other"}.items()):
        (tmp_path / str(number)).mkdir()
        assert path in read_bytes(data, tmp_path / str(number), tag=tag).tree
    (tmp_path / "none").mkdir()
    refused("no_such_container", lambda: read_bytes(data, tmp_path / "none", tag="hello:2"))


def test_a_layer_that_is_there_twice_is_a_link_in_old_archives(tmp_path: Path) -> None:
    twice = Container([HELLO.layers[0], HELLO.layers[0]])
    name = f"{sha256(HELLO.layers[0])[7:]}/layer.tar"
    config = f"{sha256(twice.config)[7:]}.json"
    manifest = [{"Config": config, "RepoTags": None, "Layers": [name, "second/layer.tar"]}]
    members: dict[str, Content] = {
        config: twice.config,
        name: HELLO.layers[0],
        "second/layer.tar": symlink(f"../{name}"),
        "manifest.json": json.dumps(manifest).encode(),
    }
    assert contents(read_bytes(tar(members), tmp_path)) == {"bin": None, "bin/hello": b"hello"}
    members["second/layer.tar"] = symlink("../../etc/passwd")
    (tmp_path / "two").mkdir()
    refused("missing_blob", lambda: read_bytes(tar(members), tmp_path / "two"))


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"hello": b"x"}, "malformed_container"),
        ({"manifest.json": b"{}"}, "malformed_container"),
        ({"manifest.json": b"[1]"}, "malformed_container"),
        ({"manifest.json": b"[]"}, "no_such_container"),
        ({"manifest.json": b'[{"Config": "x.json"}]', "x.json": b"{}"}, "malformed_container"),
        ({"manifest.json": b'[{"Config": "x.json"}]'}, "missing_blob"),
        ({"manifest.json": b'[{"Config": "%s.json"}]' % (b"0" * 64), "0" * 64 + ".json": b"{}"}, "wrong_digest"),
        ({"manifest.json": symlink("manifest.json")}, "missing_blob"),
        ([("manifest.json", b"[]"), ("./manifest.json", b"[]")], "malformed_archive"),
    ],
)
def test_an_archive_that_is_no_container(tmp_path: Path, members: Any, code: str) -> None:
    refused(code, lambda: read_bytes(tar(members), tmp_path))


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    refused("malformed_archive", lambda: read_bytes(b"hello", tmp_path))
    for number, data in enumerate([b"\x1f\x8b", gzip.compress(b"hello" * 1000)[:-20], b"\x1f\x8bhello" * 9]):
        (tmp_path / str(number)).mkdir()
        refused("damaged_source", lambda data=data, number=number: read_bytes(data, tmp_path / str(number)))  # type: ignore[misc]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    spool = Spool(tmp_path, quiet)
    refused("unreadable_source", lambda: read_archive(tmp_path / "none", Wanted(), spool))
    refused("missing_blob", lambda: read_layout(tmp_path / "none", Wanted(), spool))


# --- Which container -----------------------------------------------------------------------------------------------


def test_the_container_of_the_architecture_is_taken(tmp_path: Path) -> None:
    made = Layout()
    made.add(HELLO, platform={"os": "linux", "architecture": "amd64"})
    made.add(ARM, platform={"os": "linux", "architecture": "arm64", "variant": "v8"})
    for architecture, content in {Architecture.X86_64: b"hello", Architecture.AARCH64: b"arm"}.items():
        folder = tmp_path / architecture
        folder.mkdir()
        assert contents(read_folder_of(made, folder, architecture=architecture))["bin/hello"] == content


def test_indexes_within_indexes_and_what_builders_put_beside(tmp_path: Path) -> None:
    made = Layout()
    inner = [
        {**made.manifest(HELLO), "platform": {"os": "linux", "architecture": "amd64"}},
        {
            **made.manifest(OTHER),
            "platform": {"os": "unknown", "architecture": "unknown"},
            "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
        },
    ]
    index = made.blob(json.dumps({"manifests": inner}).encode(), INDEX)
    made.manifests = [index, index, {**index, "mediaType": "application/vnd.other"}]
    assert "bin/hello" in read_folder_of(made, tmp_path).tree


def test_several_containers_are_told_apart_by_tag(tmp_path: Path) -> None:
    made = Layout()
    made.add(HELLO, annotations={"org.opencontainers.image.ref.name": "1"})
    made.add(OTHER, annotations={"io.containerd.image.name": "registry.example/other:2"})
    assert "registry.example/other:2" in str(refused("ambiguous_container", lambda: read_folder_of(made, tmp_path)))
    for number, (tag, path) in enumerate({"1": "bin/hello", "registry.example/other:2": "bin/other"}.items()):
        (tmp_path / str(number)).mkdir()
        assert path in read_folder_of(made, tmp_path / str(number), tag=tag).tree


def test_no_container_of_the_platform(tmp_path: Path) -> None:
    made = Layout()
    made.add(ARM, platform={"os": "linux", "architecture": "arm64"})
    assert "linux/arm64" in str(refused("no_such_container", lambda: read_folder_of(made, tmp_path)))
    (tmp_path / "said").mkdir()
    refused("no_such_container", lambda: read_folder_of(layout(ARM), tmp_path / "said"))


def test_the_base_image_is_told_by_digest(tmp_path: Path) -> None:
    made = Layout()
    base = {
        "org.opencontainers.image.base.digest": "sha256:" + "1" * 64,
        "org.opencontainers.image.base.name": "debian",
    }
    made.manifests = [made.manifest(HELLO, annotations=base)]
    material = read_folder_of(made, tmp_path).materials[1]
    assert (material.name, dict(material.digest), material.annotations) == (
        "base image",
        {"sha256": "1" * 64},
        {"name": "debian"},
    )


def test_what_our_builder_says_of_its_inputs(tmp_path: Path) -> None:
    said = {
        "org.opencontainers.image.base.digest": "",
        "org.opencontainers.image.base.name": "localhost/tmp/base",
        "org.opencontainers.image.revision": "1" * 40,
        "strongroom.input.requirements/enclave.txt": "sha256:" + "2" * 64,
        "strongroom.input.Dockerfile": "sha256:" + "3" * 64,
        "strongroom.said.variant": "portable",
        "strongroom.said.kind": "of another kind",
    }
    made = Layout()
    made.manifests = [made.manifest(HELLO, annotations=said)]
    container, *others = read_folder_of(made, tmp_path).materials
    assert container.annotations == {"variant": "portable", "kind": "OCI image manifest"}
    told = [(each.name, dict(each.digest)) for each in others]
    assert told == [
        ("source", {"gitCommit": "1" * 40}),
        ("Dockerfile", {"sha256": "3" * 64}),
        ("requirements/enclave.txt", {"sha256": "2" * 64}),
    ]


@pytest.mark.parametrize(
    "said",
    [
        {"org.opencontainers.image.base.digest": "latest"},
        {"org.opencontainers.image.revision": "main"},
        {"strongroom.input.Dockerfile": "sha256:"},
    ],
)
def test_inputs_that_nobody_could_find(tmp_path: Path, said: dict[str, str]) -> None:
    made = Layout()
    made.manifests = [made.manifest(HELLO, annotations=said)]
    refused("malformed_container", lambda: read_folder_of(made, tmp_path))


# --- Broken ones ---------------------------------------------------------------------------------------------------


def digest_of(made: Layout, end: str) -> str:
    """The name of a blob whose content ends so."""
    [name] = [name for name, data in made.files.items() if data.endswith(end.encode())]
    return name


@pytest.mark.parametrize("packed", [True, False])
def test_every_byte_is_held_to_its_digest(tmp_path: Path, packed: bool) -> None:
    whole = layout(Container(HELLO.layers, packed=packed))
    for name in whole.files:
        if not name.startswith("blobs"):
            continue
        for change in ("flipped", "longer", "missing"):
            folder = tmp_path / f"{name[-8:]}{change}"
            folder.mkdir()
            made = layout(Container(HELLO.layers, packed=packed))
            data = made.files.pop(name)
            if change == "flipped":
                made.files[name] = data[:-1] + bytes([data[-1] ^ 1])
            elif change == "longer":
                made.files[name] = data + b" "
            with pytest.raises(ImageBuildError) as caught:
                read_folder_of(made, folder)
            assert caught.value.code in {"wrong_digest", "missing_blob", "damaged_source"}


def test_the_unpacked_layer_is_held_to_the_configuration(tmp_path: Path) -> None:
    other = gzip.compress(OTHER.layers[0], mtime=0)
    made = Layout()
    config = made.blob(HELLO.config, "application/vnd.oci.image.config.v1+json")
    value = {"config": config, "layers": [made.blob(other, f"{LAYER}+gzip")]}
    made.manifests = [made.blob(json.dumps(value).encode(), "application/vnd.oci.image.manifest.v1+json")]
    assert refused("wrong_digest", lambda: read_folder_of(made, tmp_path)).expected == sha256(HELLO.layers[0])[7:]


def config_of(**changes: Any) -> bytes:
    return json.dumps({**json.loads(HELLO.config), **changes}).encode()


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (b"[]", "malformed_container"),
        (b"{", "malformed_container"),
        (b'{"os": "linux", "os": "linux"}', "malformed_container"),
        (b"[" * 100, "malformed_container"),
        (config_of(os=1), "malformed_container"),
        (config_of(os="windows"), "no_such_container"),
        (config_of(rootfs=None), "malformed_container"),
        (config_of(rootfs={"diff_ids": []}), "malformed_container"),
        (config_of(rootfs={"diff_ids": [1]}), "malformed_container"),
        (config_of(rootfs={"diff_ids": ["md5:0"]}), "malformed_container"),
        (config_of(rootfs={"diff_ids": "sha256"}), "malformed_container"),
        (config_of(config=[]), "malformed_container"),
        (config_of(config={"Cmd": "/bin/sh"}), "malformed_container"),
        (config_of(config={"Env": [1]}), "malformed_container"),
        (config_of(config={"User": 1}), "malformed_container"),
    ],
)
def test_a_configuration_that_no_tool_writes(tmp_path: Path, config: bytes, code: str) -> None:
    made = Layout()
    layers = [made.blob(HELLO.layers[0], LAYER)]
    value = {"config": made.blob(config, "application/vnd.oci.image.config.v1+json"), "layers": layers}
    made.manifests = [made.blob(json.dumps(value).encode(), "application/vnd.oci.image.manifest.v1+json")]
    refused(code, lambda: read_folder_of(made, tmp_path))


def descriptor(**changes: Any) -> dict[str, Any]:
    return {"mediaType": INDEX, "digest": "sha256:" + "0" * 64, "size": 2, **changes}


@pytest.mark.parametrize(
    ("manifests", "code"),
    [
        ([], "no_such_container"),
        ({}, "malformed_container"),
        ([1], "malformed_container"),
        ([descriptor(digest="sha256:../../etc")], "malformed_container"),
        ([descriptor(digest="sha256:" + "A" * 64)], "malformed_container"),
        ([descriptor(size=-1)], "malformed_container"),
        ([descriptor(size=True)], "malformed_container"),
        ([descriptor(size=1 << 40)], "malformed_container"),
        ([descriptor(annotations={"a": 1})], "malformed_container"),
        ([descriptor()], "missing_blob"),
        ([descriptor()] * 100, "missing_blob"),
    ],
)
def test_an_index_that_no_tool_writes(tmp_path: Path, manifests: Any, code: str) -> None:
    made = Layout()
    made.manifests = manifests
    refused(code, lambda: read_folder_of(made, tmp_path))


def test_indexes_are_bounded(tmp_path: Path) -> None:
    made = Layout()
    made.manifests = [made.blob(json.dumps({"manifests": [], "n": n}).encode(), INDEX) for n in range(65)]
    assert "too many indexes" in str(refused("malformed_container", lambda: read_folder_of(made, tmp_path)))


def test_another_version_of_layouts(tmp_path: Path) -> None:
    made = layout(HELLO)
    made.files["oci-layout"] = b'{"imageLayoutVersion": "2.0.0"}'
    refused("malformed_container", lambda: read_folder_of(made, tmp_path))


def test_json_that_is_too_large(tmp_path: Path) -> None:
    made = layout(HELLO)
    made.files["oci-layout"] = b" " * (4 << 20) + b"{}"
    refused("malformed_container", lambda: read_folder_of(made, tmp_path))


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", "unsupported_container"),
        ("application/vnd.in-toto+json", "unsupported_container"),
    ],
)
def test_a_layer_of_another_kind(tmp_path: Path, kind: str, code: str) -> None:
    made = Layout()
    config = made.blob(HELLO.config, "application/vnd.oci.image.config.v1+json")
    value = {"config": config, "layers": [made.blob(HELLO.layers[0], kind)]}
    made.manifests = [made.blob(json.dumps(value).encode(), "application/vnd.oci.image.manifest.v1+json")]
    refused(code, lambda: read_folder_of(made, tmp_path))


def with_zstd() -> Layout:
    """A layer that says so; its bytes are not packed, as the reader of the test does not care."""
    made = Layout()
    config = made.blob(HELLO.config, "application/vnd.oci.image.config.v1+json")
    value = {"config": config, "layers": [made.blob(HELLO.layers[0], f"{LAYER}+zstd")]}
    made.manifests = [made.blob(json.dumps(value).encode(), "application/vnd.oci.image.manifest.v1+json")]
    return made


def test_zstd_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    said = str(refused("unsupported_compression", lambda: read_folder_of(with_zstd(), tmp_path)))
    assert "gzip" in said


def test_zstd_is_read_where_python_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("compression.zstd")
    module.ZstdFile = lambda file: file  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compression", types.ModuleType("compression"))
    monkeypatch.setitem(sys.modules, "compression.zstd", module)
    assert "bin/hello" in read_folder_of(with_zstd(), tmp_path).tree


def test_what_is_unpacked_is_bounded(tmp_path: Path) -> None:
    bomb = Container([tar({"zeros": bytes(1 << 20)})])
    made = layout(bomb).write(tmp_path / "layout")
    (tmp_path / "spool").mkdir()
    refused("too_large", lambda: read_layout(made, Wanted(), Spool(tmp_path / "spool", quiet, most=1 << 19)))


# --- Layers --------------------------------------------------------------------------------------------------------


def flattened(folder: Path, *made: Mapping[str, Content] | list[tuple[str, Content]]) -> Source:
    return read_folder_of(layout(Container([tar(layer) for layer in made])), folder)


def test_a_layer_replaces_adds_and_removes(tmp_path: Path) -> None:
    source = flattened(
        tmp_path,
        {"a": b"1", "b": b"1", "d/": None, "d/x": b"1", "d/y": b"1", "e/": None, "e/x": b"1", "f": b"1"},
        {"a": b"2", ".wh.b": b"", "d/.wh.x": b"", "e/.wh..wh..opq": b"", "e/new": b"2", "c": b"2", ".wh.none": b""},
    )
    assert contents(source) == {
        "a": b"2", "c": b"2", "d": None, "d/y": b"1", "e": None, "e/new": b"2", "f": b"1",
    }  # fmt: skip


def test_a_whiteout_takes_a_whole_directory_and_not_its_own_layer(tmp_path: Path) -> None:
    source = flattened(tmp_path, {"d/a/b/c": b"1", "dd": b"1"}, {"d/new": b"2", ".wh.d": b""})
    assert contents(source) == {"d": None, "d/new": b"2", "dd": b"1"}


def test_the_root_may_be_made_anew(tmp_path: Path) -> None:
    assert contents(flattened(tmp_path, {"a": b"1", "d/x": b"1"}, {".wh..wh..opq": b"", "b": b"2"})) == {"b": b"2"}


def test_kinds_take_each_others_place(tmp_path: Path) -> None:
    source = flattened(
        tmp_path,
        {"d/": None, "d/x": b"1", "f": b"1", "l": symlink("d")},
        {"d": b"now a file", "f/": None, "f/x": b"2", "l/": None, "l/x": b"2"},
    )
    assert contents(source) == {"d": b"now a file", "f": None, "f/x": b"2", "l": None, "l/x": b"2"}


def test_a_directory_keeps_what_it_holds_when_its_mode_changes(tmp_path: Path) -> None:
    changed = member(tarfile.DIRTYPE, mode=0o700, uid=7)
    source = flattened(tmp_path, {"d/": None, "d/x": b"1"}, {"d": changed})
    assert contents(source) == {"d": None, "d/x": b"1"}
    assert (source.tree["d"].mode, source.tree["d"].uid) == (0o700, 7)


def test_hard_links_are_files_of_the_same_content(tmp_path: Path) -> None:
    source = flattened(
        tmp_path,
        {"a": b"1", "b": hard_link("a")},
        {"a": b"2", "c": hard_link("b"), "d": hard_link("c"), "e": hard_link("a")},
    )
    assert contents(source) == {"a": b"2", "b": b"1", "c": b"1", "d": b"1", "e": b"2"}


def test_owners_modes_links_and_devices(tmp_path: Path) -> None:
    source = flattened(
        tmp_path,
        {
            "s": member(tarfile.REGTYPE, mode=0o4755, uid=1, gid=2),
            "l": symlink("/anywhere", mode=0o644),
            "c": member(tarfile.CHRTYPE, devmajor=1, devminor=3),
            "b": member(tarfile.BLKTYPE, devmajor=8, devminor=0),
            "p": member(tarfile.FIFOTYPE),
        },
    )
    assert contents(source) == {
        "s": b"", "l": ["/anywhere"], "c": ("char", 1, 3), "b": ("block", 8, 0), "p": ("fifo", 0, 0),
    }  # fmt: skip
    entry = source.tree["s"]
    assert (entry.mode, entry.uid, entry.gid, source.tree["l"].mode) == (0o4755, 1, 2, 0o777)


def test_bytecode_and_extended_attributes_are_left_out_and_told(tmp_path: Path) -> None:
    capable = member(tarfile.REGTYPE, pax_headers={"SCHILY.xattr.security.capability": "x"})
    source = flattened(
        tmp_path,
        {"a.py": b"", "__pycache__/a.cpython-311.pyc": b"x", "b.pyc": b"x", "ping": capable, "gone": capable},
        {".wh.gone": b"", "c.pyc/": None},
    )
    assert list(source.tree) == ["a.py", "c.pyc", "ping"]
    assert source.notes == (
        "2 Python bytecode caches were left out",
        "extended attributes of 1 files were left out: an enclave's root has none (security.capability)",
    )


def test_a_file_that_replaces_one_with_attributes_has_its_own(tmp_path: Path) -> None:
    capable = member(tarfile.REGTYPE, pax_headers={"SCHILY.xattr.security.capability": "x"})
    assert flattened(tmp_path, {"ping": capable}, {"ping": b""}).notes == ()


@pytest.mark.parametrize(("bound", "value"), [("MAX_MEMBERS", 3), ("MAX_NAMES_SIZE", 7)])
def test_all_layers_together_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(layers, bound, value)
    flattened(tmp_path, {"aa": b"", "bb": b""}, {"ccc": b""})
    (tmp_path / "more").mkdir()
    refused("malformed_layer", lambda: flattened(tmp_path / "more", {"aa": b"", "bb": b""}, {"cc": b"", "dd": b""}))


def test_the_same_files_have_the_same_digest_however_they_are_layered(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = flattened(tmp_path / "one", {"d/": None, "d/a": b"1", "b": b"2"})
    two = flattened(tmp_path / "two", {"b": b"1", "d/": None}, {"b": b"2", "d/a": b"1"})
    assert tree_digest(one.tree) == tree_digest(two.tree)


@pytest.mark.parametrize(
    ("layers", "code"),
    [
        ([[("a", b"1"), ("a", b"2")]], "malformed_layer"),
        ([[("a/", None), ("a", b"2")]], "malformed_layer"),
        ([[("a", hard_link("b")), ("b", b"1")]], "malformed_layer"),
        ([[("d/", None), ("a", hard_link("d"))]], "malformed_layer"),
        ([[("a", b"1")], [(".wh.a", b""), ("b", hard_link("a"))]], "malformed_layer"),
        ([[(".wh.a", b"x")]], "malformed_layer"),
        ([[(".wh.a", None)]], "malformed_layer"),
        ([[(".wh.", b"")]], "malformed_layer"),
        ([[(".wh...", b"")]], "malformed_layer"),
        ([[(".wh..wh.plnk", b"")]], "malformed_layer"),
        ([[("./", symlink("x"))]], "malformed_layer"),
        ([[("l", symlink("/etc")), ("l/passwd", b"x")]], "not_a_directory"),
        ([[("l", symlink("/etc"))], [("l/passwd", b"x")]], "not_a_directory"),
        ([[("a" * 300, b"x")]], "bad_path"),
        ([[("a", member(tarfile.CHRTYPE, devmajor=5000))]], "bad_entry"),
        ([[("a", member(tarfile.REGTYPE, uid=1 << 40))]], "bad_entry"),
    ],
)
def test_layers_that_no_tool_writes(tmp_path: Path, layers: Any, code: str) -> None:
    refused(code, lambda: flattened(tmp_path, *layers))


def test_a_directory_may_be_named_twice(tmp_path: Path) -> None:
    assert contents(flattened(tmp_path, [("d/", None), ("d/x", b"1"), ("d/", None)])) == {"d": None, "d/x": b"1"}
