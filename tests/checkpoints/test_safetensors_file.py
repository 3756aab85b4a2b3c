"""Our safetensors reader and writer against the library's, and damaged files."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_same_bits, load_safetensors

from olmoe_jax.checkpoints.safetensors_file import FileWriter, load, read_header, save
from olmoe_jax.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tensors():
    random = np.random.default_rng(0)
    return {
        "matrix": random.normal(size=(5, 3)).astype(np.float32),
        "half": random.normal(size=(2, 3, 4)).astype(BFLOAT16),
        "ids": random.integers(-(2**60), 2**60, (2, 7)),
        "small_ids": np.arange(3, dtype=np.int32),
        "loss": np.array(2.5, np.float32),
        "nothing": np.zeros((0, 4), np.float32),
        "view": random.normal(size=(4, 6)).astype(np.float32).T,
        "not_finite": np.array([np.nan, np.inf, -np.inf, -0.0], np.float32),
    }


def contiguous(arrays):
    return {name: np.array(value, order="C") for name, value in arrays.items()}


def test_the_library_reads_what_we_write(tmp_path):
    save(tmp_path / "a.safetensors", tensors())
    assert_same_bits(load_safetensors(tmp_path / "a.safetensors"), contiguous(tensors()))


def test_we_read_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(contiguous(tensors()), tmp_path / "a.safetensors", {"a": "b"})
    assert_same_bits(load(tmp_path / "a.safetensors"), contiguous(tensors()))


def test_we_read_what_we_write(tmp_path):
    save(tmp_path / "a.safetensors", tensors())
    assert_same_bits(load(tmp_path / "a.safetensors"), contiguous(tensors()))


def test_the_header_is_aligned(tmp_path):
    for name in ("a", "ab", "abcdefg"):
        save(tmp_path / "a.safetensors", {name: np.ones(3, np.float32)})
        (length,) = struct.unpack("<Q", (tmp_path / "a.safetensors").read_bytes()[:8])
        assert length % 8 == 0


def test_the_writer_refuses_what_was_not_announced(tmp_path):
    announced = {"a": (np.dtype(np.float32), (2,)), "b": (np.dtype(np.float32), (3,))}

    def writer():
        return FileWriter(tmp_path / "a.safetensors", announced)

    for name, value in [
        ("b", np.ones(2, np.float32)),
        ("a", np.ones(3, np.float32)),
        ("a", np.ones(2, np.float64)),
    ]:
        with pytest.raises(ValueError, match="expected a"):
            writer().write(name, value)
    incomplete = writer()
    incomplete.write("a", np.ones(2, np.float32))
    with pytest.raises(ValueError, match="b was never written"):
        incomplete.close()


def header_file(header) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 64


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\0\0",
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"\xff\xfe",
        header_file(["a", "list"]),
        header_file({"a": "not an entry"}),
        header_file({"a": {"dtype": "F32", "shape": [2]}}),
        header_file({"a": ENTRY | {"data_offsets": [0, 4]}}),
    ],
    ids=[
        *("empty", "no_length", "huge_length", "not_json", "not_utf8"),
        *("list", "entry", "no_offsets", "offsets_of_another_shape"),
    ],
)
def test_not_a_safetensors_file(tmp_path, content):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"a\.safetensors: (truncated or not a|header: |tensor a: )"
    ):
        read_header(file)


def test_other_damage(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"a\.safetensors: no such file"):
        read_header(file)
    save(file, tensors())
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    sizes = rf"truncated: {len(whole) - 1} bytes of {len(whole)}"
    with pytest.raises(UserError, match=rf"a\.safetensors: {sizes}"):
        read_header(file)
    file.write_bytes(whole[:40])
    with pytest.raises(UserError, match=r"a\.safetensors: truncated"):
        read_header(file)
    file.write_bytes(header_file({"a": ENTRY | {"dtype": "F4"}}))
    with pytest.raises(UserError, match=r"tensor a has unsupported dtype F4"):
        read_header(file)
