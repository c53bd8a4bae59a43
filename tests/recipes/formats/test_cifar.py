"""The binary CIFAR files."""

import numpy as np
import pytest
import torch

from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.sources import ANY, TEST, TRAIN


def records(labels, coarse=False):
    rows = [bytes([9] * coarse + [label]) + bytes([i]) * 1024 + bytes([i + 1]) * 2048 for i, label in enumerate(labels)]
    return b"".join(rows)


@pytest.mark.parametrize(
    ("files", "coarse", "parts"),
    [
        (["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"], False, [TRAIN, TRAIN, TEST]),
        (["data_batch_1.bin"], False, [ANY]),
        (["test.bin", "train.bin"], True, [TEST, TRAIN]),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_batches(tmp_path, files, coarse, parts, named):
    for name in files:
        (tmp_path / name).write_bytes(records([2, 0, 2], coarse))
    if named:
        (tmp_path / ("fine_label_names.txt" if coarse else "batches.meta.txt")).write_text("airplane\nbird\ncat\n\n")
    data = read(str(tmp_path))
    assert data.part.tolist() == [part for part in parts for _ in range(3)] and data.source.shape == (3, 32, 32)
    assert data.classes == (("airplane", "cat") if named else ("0", "2")) and data.labels.tolist() == [1, 0, 1] * len(parts)
    assert np.array_equal(data.source.read(torch.tensor([1]))[0, :, 0, 0], [1, 2, 2]) and data.source.name(1) == f"{files[0]}[1]"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"data_batch_1.bin": records([1])[:-1]},
            "data_batch_1.bin is cut off or no CIFAR file: 3,072 bytes are no multiple of 3,073",
        ),
        ({"data_batch_1.bin": b""}, "data_batch_1.bin is empty"),
        ({"data_batch_1.bin": records([1, 10])}, r"data_batch_1.bin\[1\] has label 10, but there are 10 classes"),
        ({"data_batch_1.bin": records([1]), "train.bin": records([1], True)}, "holds both data_batch_1.bin and train.bin"),
        ({"data_batch_1": b"\x80\x02}", "test_batch": b"\x80\x02}"}, "Python pickles.*take the binary version"),
        ({"train": b"\x80\x02}", "test": b"\x80\x02}", "meta": b"\x80\x02}"}, "Python pickles.*take the binary version"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path))
