"""Records: what is written comes back, with its origin, and nothing is half written."""

import json
import os

import numpy
import pytest
import torch

from companion.lab import records


def test_what_is_written_comes_back(tmp_path):
    results = {"V": torch.tensor([[1.5, 2.0]], dtype=torch.float64), "worst": float("nan")}
    path = records.write(tmp_path / "new" / "run.json", results, settings={"m": 8, "steps": (1, 2)})
    record = json.loads(path.read_text(encoding="utf8"))
    assert record["results"] == {"V": [[1.5, 2.0]], "worst": "nan"}
    assert record["settings"] == {"m": 8, "steps": [1, 2]}
    # the torch of a build for CUDA calls itself 2.13.0+cu130, and its distribution is 2.13.0
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert record["versions"]["numpy"] == numpy.__version__
    assert record["machine"]["device"] == "cpu"
    assert record["date"][:2] == "20"
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = records.write(tmp_path / "run.json", {"a": 1}, settings={})

    def die(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="no space"):
        records.write(path, {"a": 2}, settings={})
    assert json.loads(path.read_text(encoding="utf8"))["results"] == {"a": 1}


def test_every_stored_record_opens_and_says_where_it_is_from():
    assert records.names()
    for name in records.names():
        record = records.read(name)
        assert record["results"]
        assert record["settings"]
        assert {"processor", "threads", "device"} <= set(record["machine"])
        assert {"python", "torch", "numpy"} <= set(record["versions"])


def test_records_are_read_by_name_only(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"name is '\.\./secret'; one of"):
        records.read("../secret")
    monkeypatch.setattr(records, "_FOLDER", tmp_path / "none")
    assert records.names() == []
    with pytest.raises(ValueError, match="no record is stored"):
        records.read("minimum-norm-figure-1")


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path is .*run.txt'; a file that ends in .json is needed"):
        records.write(tmp_path / "run.txt", {}, settings={})
