"""Checksums: whatever happens to a listed file shows."""

import os
import shutil
import time

import pytest
from helpers import message_of

from convert import to_hf
from olmoe_jax.checkpoints import checksums
from olmoe_jax.checkpoints.opening import open_source
from olmoe_jax.checkpoints.overrides import OverriddenSource
from olmoe_jax.checkpoints.peft import read_adapter


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A directory with checksums; its larger file has several pieces."""
    monkeypatch.setattr(checksums, "_PIECE", 4096)
    monkeypatch.setattr(checksums, "_BLOCK", 1024)
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "large").write_bytes(os.urandom(10_000))
    (tmp_path / "small").write_bytes(b"x")
    (tmp_path / "empty").touch()
    checksums.write(tmp_path)
    assert checksums.damage(tmp_path) is None
    return tmp_path


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("bit", [0, 4096 * 8 - 1, 4096 * 8, 79_999])
def test_a_bit(listed, bit):
    flip(listed / "state" / "d" / "large", bit)
    assert checksums.damage(listed) == f"{listed}/state/d/large: damaged, its checksum differs"
    assert checksums.damage(listed, lambda name: name == "small") is None
    assert "; convert again" in message_of(checksums.check, listed, "convert again")
    flip(listed / "state" / "d" / "large", bit)
    assert checksums.damage(listed) is None


@pytest.mark.parametrize("bit", range(0, 800, 31))
def test_a_bit_of_the_list(listed, bit):
    """A file that the list would no longer name is missing from it under its own name."""
    original = (listed / checksums.FILE).read_bytes()
    flip(listed / checksums.FILE, bit)
    if checksums.damage(listed) is None:
        flipped = (listed / checksums.FILE).read_bytes()
        assert flipped.split() == original.split()


def make_fifo(file):
    file.unlink()
    os.mkfifo(file)


def make_directory(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", ["small", "state/d/large", "empty", checksums.FILE])
@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(bytes(file.stat().st_size + 1)),
        lambda file: os.truncate(file, file.stat().st_size // 2 + (file.name == "empty") * 3),
        make_fifo,
        make_directory,
    ],
)
def test_a_file_that_is_another(listed, name, change):
    change(listed / name)
    assert (listed / name).name in (checksums.damage(listed) or "")


def test_an_unlisted_fifo(listed):
    os.mkfifo(listed / "other")
    assert "other: neither a file nor a directory" in (checksums.damage(listed) or "")


def test_shares(listed):
    """Each of two processes checks its files."""
    flip(listed / "small", 0)
    found = [checksums.damage(listed, share=slice(i, None, 2)) for i in range(2)]
    assert sorted(map(bool, found)) == [False, True]


def test_hashed_ahead(tmp_path, monkeypatch):
    """Files that are complete are hashed once; one that changes later is hashed again."""
    monkeypatch.setattr(checksums, "_PAUSE", 0.01)
    ahead = checksums.HashAhead(tmp_path / "run")
    (tmp_path / "run" / "d").mkdir(parents=True)
    for name in ("d/a", "d/b", "d/c.__lock"):
        (tmp_path / "run" / name).write_bytes(os.urandom(1000))
    wanted = {(tmp_path / "run" / name).stat().st_ino for name in ("d/a", "d/b")}
    while not wanted <= {stamp[2] for stamp, _ in list(checksums._hashed)}:
        time.sleep(0.01)
    (tmp_path / "run" / "d" / "a").write_bytes(b"later")
    ahead.end()
    checksums.write(tmp_path / "run")
    assert checksums.damage(tmp_path / "run") is None
    flip(tmp_path / "run" / "d" / "a", 3)
    assert checksums.damage(tmp_path / "run") is not None


@pytest.mark.filterwarnings("error")
def test_hashing_ahead_while_directories_move(tmp_path, monkeypatch):
    """Pytest reports an exception of the thread."""
    monkeypatch.setattr(checksums, "_PAUSE", 0.0001)
    ahead = checksums.HashAhead(tmp_path / "run")
    for number in range(300):
        (tmp_path / "run" / "old" / "d").mkdir(parents=True)
        (tmp_path / "run" / "old" / "d" / "file").write_bytes(b"x")
        (tmp_path / "run" / "old").rename(tmp_path / "run" / str(number))
    ahead.end()


def test_a_json_file_is_valid_at_any_moment(tmp_path):
    """Killed before the file is replaced, the old content is valid, and then the new one."""
    checksums.write_json(tmp_path / "config.json", 1)
    checksums.write_json(tmp_path / "config.json", 2)
    assert checksums.damage(tmp_path) is None
    (tmp_path / "config.json").write_text("1\n")
    assert checksums.damage(tmp_path) is None, "the list was written, the file not yet"
    (tmp_path / "config.json").write_text("3\n")
    assert "config.json: damaged" in (checksums.damage(tmp_path) or "")


def test_a_bit_of_an_export(tmp_path, tiny_model):
    """The weights are checked where an export is opened; its other files are the user's to edit."""
    path = tmp_path / "hf"
    to_hf.main(["--checkpoint", str(tiny_model), "--output", str(path)])
    weights = path / "model.safetensors"
    flip(weights, weights.stat().st_size * 8 - 1)
    message = f"{weights}: damaged, its checksum differs; export it again; if you changed the file"
    assert message in message_of(open_source, str(path))
    flip(weights, weights.stat().st_size * 8 - 1)
    (path / "config.json").write_text((path / "config.json").read_text() + "\n")
    open_source(str(path))
    (path / checksums.FILE).unlink()
    flip(weights, weights.stat().st_size * 8 - 1)
    open_source(str(path))


def test_a_bit_of_an_adapter(tmp_path, tiny_model):
    base = open_source(str(tiny_model))
    for file, opened in (
        ("adapter_model.safetensors", lambda path: read_adapter(path, base.config)),
        ("router.safetensors", lambda path: read_adapter(path, base.config)),
        ("trained.safetensors", lambda path: OverriddenSource(base, path)),
    ):
        path = tmp_path / file.partition(".")[0]
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")
        shutil.copy(tiny_model / "model.safetensors", path / file)
        checksums.write(path, "*.safetensors")
        flip(path / file, 8000)
        assert f"{path / file}: damaged, its checksum" in message_of(opened, path)
