"""Long runs: whole files or none, damage found, digests that tell what they are of."""

import functools
import os

import numpy as np
import pytest
import torch

from companion import runs

TENSORS = {"a": torch.arange(6.0, dtype=torch.float64).reshape(2, 3), "b": torch.tensor(1.5)}
HEADER = {"step": 3, "names": ["x", None], "text": "π"}


def test_what_is_written_comes_back(tmp_path):
    path = tmp_path / "new" / "run.safetensors"
    runs.write_tensors(path, TENSORS, HEADER)
    tensors, header = runs.read_tensors(path, "checkpoint")
    assert header == HEADER
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert os.listdir(path.parent) == [path.name]


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "run.safetensors"
    runs.write_tensors(path, TENSORS, HEADER)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            tensors, header = runs.read_tensors(path, "checkpoint")
        except ValueError:
            refused += 1
        else:  # white space of the header only
            assert header == HEADER
            assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert refused > 0.9 * len(whole)
    path.write_bytes(whole[:40])
    with pytest.raises(ValueError, match=r"checkpoint .*run.safetensors cannot be read .*; delete it"):
        runs.read_tensors(path, "checkpoint")


def test_a_write_that_dies_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    runs.write_tensors(path, TENSORS, HEADER)
    before = path.read_bytes()

    def die(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="no space"):
        runs.write_tensors(path, TENSORS, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_digests_see_values_shapes_dtypes_names_and_order():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    different = [
        x, x[:, None], x.float(), x.flip(0), x.expand(2, 2), x.bfloat16(), [x], [x, x], [x, 1],
        {"a": x}, {"b": x}, {"a": x, "b": x}, "a", ["a"], None,
    ]  # fmt: skip
    assert len({runs.digest(value) for value in different}) == len(different)
    assert runs.digest(x) == runs.digest(torch.stack([x, x], 1)[:, 0])
    assert runs.digest(iter([x, 1])) == runs.digest([x, 1])
    assert runs.digest({"a": x, "b": x}) == runs.digest(dict(reversed({"a": x, "b": x}.items())))


def test_counts_are_whole_and_large_enough(unchecked):
    assert runs.count("steps", np.int64(3), 0) == 3
    with pytest.raises(TypeError, match=r"steps is 2\.5; an integer is needed"):
        runs.count("steps", 2.5, 0)
    with pytest.raises(ValueError, match="steps is 0; an integer >= 1"):
        runs.count("steps", 0, 1)


def test_functions_of_one_name_are_told_apart():
    def make(c):
        return lambda x: c * x

    def observe(x):
        return x + 1

    first = runs.identity(observe)

    def observe(x):
        return x + 2

    functions = [make(1), make(2), make(torch.ones(2)), make(torch.zeros(2)), make(observe), lambda x: x, lambda x: -x]
    functions += [functools.partial(observe, x=1), functools.partial(observe, x=2), functools.partial(observe, 1), abs]
    known = [first, runs.identity(observe), *(runs.identity(f) for f in functions)]
    assert len({runs.digest(k) for k in known}) == len(known)
    assert runs.identity(make(1)) == runs.identity(make(1))
    assert runs.identity(torch.nn.Tanh())[0] == "torch.nn.modules.activation.Tanh"
