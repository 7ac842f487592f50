"""Data sets, their reproducibility, and the checks that refuse what the theorems do not cover."""

import gzip
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion import data


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rows(*entries):
    return torch.tensor(entries, dtype=torch.float64)


GOOD = rows([1.0, 0.0], [0.0, 1.0], [1.0, 1.0])
ONE = torch.ones(3, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("X", "Y", "error", "message"),
    [
        ([[1.0]], None, TypeError, "X is a list; a torch tensor"),
        (GOOD.numpy(), None, TypeError, "X is an ndarray; .* write torch.from_numpy"),
        (GOOD.long(), None, TypeError, "X has dtype torch.int64"),
        (GOOD.half(), None, TypeError, "X has dtype torch.float16"),
        (GOOD[0], None, ValueError, r"X has shape \(2,\); \(N, d\) is needed"),
        (GOOD[None], None, ValueError, r"X has shape \(1, 3, 2\)"),
        (GOOD[:0], None, ValueError, r"X has shape \(0, 2\); at least one"),
        (rows([1.0, math.nan]), None, ValueError, r"X\[0, 1\] is nan"),
        (rows([1.0, 2.0], [-math.inf, 1.0]), None, ValueError, r"X\[1, 0\] is -inf"),
        (GOOD, ONE[:, 0], ValueError, r"Y has shape \(3,\); \(N, K\) is needed; write Y\[:, None\]"),
        (GOOD, ONE.bool(), TypeError, "Y has dtype torch.bool"),
        (GOOD, ONE[:2], ValueError, "with N = 3, as in X"),
        (GOOD, ONE.float(), ValueError, "make them equal"),
        (GOOD, ONE * math.nan, ValueError, r"Y\[0, 0\] is nan"),
        (rows([1.0, 0.0], [0.0, 0.0]), None, ValueError, r"X has zero rows 1;"),
        (rows([1.0, 2.0], [0.0, 1.0], [2.0, 4.0]), None, ValueError, r"X has positively parallel rows \(0, 2\)"),
        (torch.cat([GOOD, -2 * GOOD]), None, ValueError, r"dependent antipodal pairs \(0, 3\), \(1, 4\), \(2, 5\)"),
    ],
)
def test_bad_data(unchecked, X, Y, error, message):
    with pytest.raises(error, match=message):
        data.check(X, Y)


def test_good_data_pass():
    data.check(GOOD, ONE)
    data.check(GOOD.float(), ONE.float())
    data.check(torch.cat([GOOD[:2], -GOOD[:2]]))  # independent antipodal pairs
    data.check(torch.cat([GOOD, GOOD]), geometry=False)
    with pytest.raises(ValueError, match="and 3 more"):
        data.check(torch.zeros(8, 2, dtype=torch.float64))


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 6), st.floats(1e-200, 1e200), st.booleans())
def test_planted_degeneracies_are_found_and_nothing_else(seed, N, d, c, single):
    generator = seeded(seed)
    X = data.sphere(N + 3, d, generator)
    i, j, k, m, z = torch.randperm(N + 3, generator=generator)[:5].tolist()
    if single:
        c = math.exp(math.remainder(math.log(c), 60))  # float32 holds no 1e200
    X[j], X[m], X[z] = c * X[i], -c * X[k], 0
    found = data.degeneracies(X.float() if single else X)
    assert found.zero_rows == [z]
    assert found.parallel_pairs == [tuple(sorted((i, j)))]
    assert found.antipodal_pairs == [tuple(sorted((k, m)))]
    assert not found.antipodal_dependent


def test_near_duplicates_are_not_called_parallel():
    X = rows([1.0, 0.0], [1.0, 1e-9], [-1.0, 1e-9])
    found = data.degeneracies(X)
    assert found.parallel_pairs == found.antipodal_pairs == []
    X[1, 1] = 1e-17
    assert data.degeneracies(X).parallel_pairs == [(0, 1)]


def test_antipodal_lines_are_counted_once():
    V = data.sphere(3, 5, seeded(0))
    found = data.degeneracies(torch.cat([V, -V, 2 * V]))
    assert len(found.parallel_pairs) == 3
    assert len(found.antipodal_pairs) == 6
    assert not found.antipodal_dependent
    V[2] = V[0] + V[1]
    assert data.degeneracies(torch.cat([V, -V])).antipodal_dependent
    V = data.sphere(4, 3, seeded(1))  # more lines than dimensions
    assert data.degeneracies(torch.cat([V, -V])).antipodal_dependent


def test_many_rows_in_blocks(monkeypatch):
    monkeypatch.setattr(data, "_BLOCK_BYTES", 8 * 40 * 3)  # three rows at a time
    X = data.sphere(40, 3, seeded(2))
    X[31], X[39] = 3 * X[7], -X[2]
    found = data.degeneracies(X)
    assert found.parallel_pairs == [(7, 31)]
    assert found.antipodal_pairs == [(2, 39)]


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_norms_and_unit_rows(scale):
    X = scale * rows([3.0, 4.0], [0.0, 0.0], [-1.0, 0.0])
    assert data.row_norms(X).tolist() == pytest.approx([5 * scale, 0, scale], rel=1e-15)
    assert torch.allclose(data.unit_rows(X), rows([0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]), rtol=1e-15)


def test_sphere():
    X = data.sphere(2000, 5, seeded(3), radius=2.5)
    assert X.dtype == torch.float64
    assert torch.allclose(X.norm(dim=1), torch.full((2000,), 2.5, dtype=torch.float64), rtol=1e-14)
    assert X.mean(dim=0).abs().max() < 4 * 2.5 / math.sqrt(5 * 2000)
    assert (X.T @ X / 2000 - 2.5**2 / 5 * torch.eye(5, dtype=torch.float64)).abs().max() < 0.12
    assert torch.equal(X, data.sphere(2000, 5, seeded(3), radius=2.5))
    assert data.sphere(4, 3, seeded(0), S=2).shape == (2, 4, 3)
    for bad in ({"N": 0}, {"d": 0}, {"S": 0}):
        with pytest.raises(ValueError, match="positive numbers"):
            data.sphere(**({"N": 2, "d": 2, "generator": seeded(0)} | bad))
    for radius in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="radius is"):
            data.sphere(2, 2, seeded(0), radius=radius)


def test_signs():
    Y = data.signs(5000, seeded(4), K=2)
    assert Y.shape == (5000, 2)
    assert Y.dtype == torch.float64
    assert torch.equal(Y.abs(), torch.ones_like(Y))
    assert Y.mean(dim=0).abs().max() < 4 / math.sqrt(5000)
    with pytest.raises(ValueError, match="N, K are 0, 1"):
        data.signs(0, seeded(0))


def test_digits_are_complete_and_reproducible():
    from sklearn.datasets import load_digits

    d = data.digits(centre=False, normalize=False)
    images, labels = load_digits(return_X_y=True)
    assert d.X.dtype == torch.float64
    assert torch.equal(16 * d.X, torch.from_numpy(images))
    assert torch.equal(d.labels, torch.from_numpy(labels))
    assert torch.equal(d.Y.argmax(dim=1), d.labels)
    assert torch.equal(d.Y.sum(dim=1), torch.ones(1797, dtype=torch.float64))
    assert d.X_test.shape == (0, 64)
    centred = data.digits(normalize=False).X
    assert centred.mean(dim=0).abs().max() < 1e-15
    unit = data.digits().X
    assert torch.allclose(unit.norm(dim=1), torch.ones(1797, dtype=torch.float64), rtol=1e-14)
    assert torch.allclose(unit, centred / centred.norm(dim=1, keepdim=True))
    data.check(unit)


def test_digits_split_and_targets():
    every = data.digits((3, 8), normalize=False, centre=False)
    assert set(every.labels.tolist()) == {3, 8}
    d = data.digits((3, 8), n=100, test=40, targets="signs", normalize=False, centre=False)
    assert torch.equal(torch.cat([d.X, d.X_test]), every.X[:140])
    assert torch.equal(d.Y[:, 0], torch.where(d.labels == 3, 1.0, -1.0).double())
    assert d.Y_test.shape == (40, 1)
    shuffled = data.digits((3, 8), n=100, test=40, generator=seeded(0))
    again = data.digits((3, 8), n=100, test=40, generator=seeded(0))
    assert torch.equal(shuffled.X, again.X)
    assert not torch.equal(shuffled.labels, d.labels)
    last = data.digits((8, 3), test=50)
    assert len(last.X) == len(every.X) - 50
    assert torch.equal(last.labels_test, every.labels[-50:])
    assert torch.equal(last.Y[:, 0], (last.labels == 8).double())


def test_digits_centring():
    raw = data.digits((0, 1), normalize=False, centre=False).X
    d = data.digits((0, 1), n=20, test=100, normalize=False, centre_on="rest")
    assert torch.allclose(d.X, raw[:20] - raw[120:].mean(dim=0), atol=1e-15)
    assert torch.allclose(d.X_test, raw[20:120] - raw[120:].mean(dim=0), atol=1e-15)
    everything = data.digits((0, 1), n=20, normalize=False)
    assert torch.allclose(everything.X, raw[:20] - raw.mean(dim=0), atol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (3, 10)}, r"classes is \[3, 10\]"),
        ({"classes": (3, 3)}, "different digits"),
        ({"classes": ()}, r"classes is \[\]"),
        ({"targets": "signs"}, "'signs' with 2"),
        ({"targets": "hinge"}, "targets is 'hinge'"),
        ({"centre_on": "train"}, "centre_on is 'train'"),
        ({"n": 1800}, "n is 1800 and test is 0"),
        ({"n": 0}, "n is 0"),
        ({"test": -1}, "test is -1"),
        ({"n": 1000, "test": 798}, r"n \+ test <= 1797"),
        ({"centre_on": "rest"}, "leave some out"),
    ],
)
def test_bad_digits(options, message):
    with pytest.raises(ValueError, match=message):
        data.digits(**options)


def write_idx(folder, name, magic, shape, values, gz=False):
    raw = struct.pack(f">{1 + len(shape)}I", magic, *shape) + bytes(values)
    (folder / (name + (".gz" if gz else ""))).write_bytes(gzip.compress(raw) if gz else raw)


def write_all(folder, gz=False, dot=False):
    for part, n in (("train", 3), ("t10k", 2)):
        image, label = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
        if dot:
            image, label = image.replace("-idx", ".idx"), label.replace("-idx", ".idx")
        write_idx(folder, image, 2051, (n, 2, 4), range(8 * n), gz)
        write_idx(folder, label, 2049, (n,), range(9, 9 - n, -1), gz)


@pytest.mark.parametrize(("gz", "dot"), [(False, False), (True, False), (False, True), (True, True)])
def test_load_idx(tmp_path, gz, dot):
    write_all(tmp_path, gz, dot)
    images = data.load_idx(tmp_path)
    assert torch.equal(images.X, torch.arange(24, dtype=torch.float64).reshape(3, 8) / 255)
    assert images.labels.tolist() == [9, 8, 7]
    assert images.X_test.shape == (2, 8)
    assert images.labels_test.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "magic", "shape", "values", "message"),
    [
        ("train-images-idx3-ubyte", 2049, (3, 2, 4), range(24), "begins with the number 2049; 2051 is needed"),
        ("train-images-idx3-ubyte", 0x03080000, (3, 2, 4), range(24), "2051 is needed"),  # little-endian
        ("train-images-idx3-ubyte", 2051, (3, 2, 4), range(23), "holds 23 bytes; 24 needed"),
        ("train-images-idx3-ubyte", 2051, (3, 2, 4), range(25), "holds 25 bytes; 24 needed"),
        ("train-images-idx3-ubyte", 2051, (4, 2, 3), range(24), "train has 4 images but 3 labels"),
        ("t10k-images-idx3-ubyte", 2051, (2, 2, 2), range(8), "training images have 8 pixels, test images 4"),
        ("t10k-labels-idx1-ubyte", 2049, (2,), [1, 10], "t10k has a label 10"),
        ("t10k-labels-idx1-ubyte", 2049, (), [], r"IDX header of 8 bytes"),
    ],
)
def test_bad_idx(tmp_path, name, magic, shape, values, message):
    write_all(tmp_path)
    write_idx(tmp_path, name, magic, shape, values)
    with pytest.raises(ValueError, match=message):
        data.load_idx(tmp_path)


def test_idx_missing_empty_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="none of train-images-idx3-ubyte, train-images"):
        data.load_idx(tmp_path)
    write_all(tmp_path, gz=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="cannot be read"):
        data.load_idx(tmp_path)
    write_all(tmp_path)
    write_idx(tmp_path, "train-images-idx3-ubyte", 2051, (0, 2, 4), [])
    write_idx(tmp_path, "train-labels-idx1-ubyte", 2049, (0,), [])
    with pytest.raises(ValueError, match="at least one image"):
        data.load_idx(tmp_path)
