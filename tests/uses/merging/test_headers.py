"""Headers: what safetensors writes is read, and what does not add up is one line, whatever the bytes."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.uses.merging.checkpoints import raw

from bayesrule.uses.merging.headers import DTYPES, Average, Constant, Entry, Room, Scaled, read_header


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    given = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items() if name != "BOOL"}
    given |= {"BOOL": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    save_file(given, tmp_path / "a", {"who": "we"})
    found, metadata = read_header(tmp_path / "a")
    assert found.keys() == given.keys() and metadata == {"who": "we"}
    for name, t in given.items():
        assert (found[name].dtype, found[name].shape) == (t.dtype, tuple(t.shape))
        assert found[name].read(0, t.numel(), Room()).equal(t.flatten())
    assert found["I32"].read(2, 5, Room()).tolist() == [2, 3, 4]


HOSTILE = {
    "empty": (b"", "would have 0 bytes, and the file has 0"),
    "three bytes": (b"\x01\x00\x00", "would have"),
    "shorter than its header": ((100).to_bytes(8, "little") + b"{}", "would have 100 bytes, and the file has 10"),
    "a header of exabytes": ((2**63).to_bytes(8, "little") + b"{}", "would have 9,223,372,036,854,775,808 bytes"),
    "no JSON": ({"header": b"{no"}, "its header is no JSON"),
    "no text": ({"header": b"\xff\xfe{}"}, "its header is no JSON"),
    "deep": ({"header": b'{"a":' + b"[" * 100_000}, "its header is no JSON"),
    "a long number": ({"header": b'{"a":' + b"9" * 5000 + b"}"}, "its header is no JSON"),
    "a list": ({"header": b"[]"}, "its header is no JSON object"),
    "metadata of numbers": ({"header": {"__metadata__": {"a": 1}}}, "its metadata are not words"),
    "twice": ({"header": b'{"a":1,"a":2}'}, "its header names 'a' twice"),
    "no shape": ({"header": {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "body": bytes(4)}, "'a' has no dtype, shape and"),
    "a number": ({"header": {"a": 4}}, "'a' has no dtype, shape and"),
    "negative shape": ({"header": {"a": entry(0, 4, [-1])}, "body": bytes(4)}, "'a' has no dtype, shape and"),
    "half a row": ({"header": {"a": entry(0, 4, [1.0])}, "body": bytes(4)}, "'a' has no dtype, shape and"),
    "true": ({"header": {"a": entry(0, 4, [True])}, "body": bytes(4)}, "'a' has no dtype, shape and"),
    "unknown dtype": (
        {"header": {"a": entry(0, 4, [4], "F8_E4M3")}, "body": bytes(4)},
        "in the dtype 'F8_E4M3', which is none of F64",
    ),
    "dtype of a list": ({"header": {"a": entry(0, 4, [1], ["F32"])}, "body": bytes(4)}, "'a' has no dtype"),
    "too few bytes": ({"header": {"a": entry(0, 4, [2])}, "body": bytes(4)}, "'a' of shape [2] in F32 has 4 bytes"),
    "backwards": ({"header": {"a": entry(4, 0, [1])}, "body": bytes(4)}, "'a' of shape [1] in F32 has -4 bytes"),
    "overlap": ({"header": {"a": entry(0, 8, [2]), "b": entry(4, 8)}, "body": bytes(8)}, "where another tensor lies"),
    "twice the same bytes": ({"header": {"a": entry(0, 4), "b": entry(0, 4)}, "body": bytes(4)}, "where another tensor lies"),
    "gap": ({"header": {"a": entry(4, 8)}, "body": bytes(8)}, "'a' begins at byte 4, where a gap ends"),
    "beyond the end": ({"header": {"a": entry(0, 8, [2])}, "body": bytes(4)}, "its tensors take 8 bytes, and it holds 4"),
    "more than it says": ({"header": {"a": entry(0, 4)}, "body": bytes(9)}, "its tensors take 4 bytes, and it holds 9"),
    "exabytes": ({"header": {"a": entry(0, 2**62, [2**60])}, "body": bytes(4)}, "its tensors take"),
}


@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_one_line(tmp_path, content, words):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else raw(path, **content)
    with pytest.raises(ValueError) as caught:
        read_header(path)
    said = str(caught.value)
    assert words in said and "a.safetensors" in said and "\n" not in said and len(said) < 400


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_read_beyond_the_file(tmp_path_factory, data):
    """Whatever a byte is changed to: a refusal, or tensors that lie in the file."""
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    text = json.dumps({"a": entry(0, 8, [2]), "b": entry(8, 12, [2, 1], "I16")}).encode()
    whole = bytearray(len(text).to_bytes(8, "little") + text + bytes(12))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        found, _ = read_header(path)
    except ValueError:
        return
    for each in found.values():
        assert each.read(0, torch.Size(each.shape).numel(), Room()).numel() * each.dtype.itemsize + each.offset <= len(whole)


def test_a_file_that_shrinks_is_noticed(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "a")
    found = read_header(tmp_path / "a")[0]["a"]
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-8])
    with pytest.raises(ValueError, match="became shorter while it was read"):
        found.read(0, 100, Room())


def test_a_room_is_used_again(tmp_path):
    save_file({"a": torch.arange(10.0)}, tmp_path / "a")
    found, room = read_header(tmp_path / "a")[0]["a"], Room()
    first = found.read(0, 6, room)
    second = found.read(6, 10, room)
    assert first.data_ptr() == second.data_ptr() and second.tolist() == [6, 7, 8, 9]


def test_numbers_products_and_means_are_read_as_tensors(tmp_path):
    save_file({"a": torch.arange(4.0)}, tmp_path / "a")
    found = read_header(tmp_path / "a")[0]["a"]
    assert isinstance(found, Entry) and load_file(tmp_path / "a")["a"].shape == found.shape
    assert Scaled(found, 3.0).read(1, 3, Room()).tolist() == [3, 6]
    assert Average((found, Constant((4,), 1.0))).read(0, 4, Room()).tolist() == [0.5, 1, 1.5, 2]
