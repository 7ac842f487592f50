"""Real and synthetic data, and the checks on them.

Inputs ``X`` are ``(N, d)``, one sample a row; targets ``Y`` are ``(N, K)``, also for one output. Everything is float64
unless the caller casts it; the loaders are offline.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.arguments import checked

_BLOCK_BYTES = 32 * 2**20  # temporaries above this size cost more in page faults than in arithmetic


class Degeneracies(NamedTuple):
    """Rows at which a bias-free ReLU network's kernel becomes singular, found in floating point.

    Args:
        zero_rows: indices i with ``x_i = 0``.
        parallel_pairs: pairs ``i < j`` with ``x_j = c x_i``, ``c > 0``.
        antipodal_pairs: pairs ``i < j`` with ``x_j = -c x_i``, ``c > 0``.
        antipodal_dependent: whether the lines of the antipodal pairs are linearly dependent.
    """

    zero_rows: list[int]
    parallel_pairs: list[tuple[int, int]]
    antipodal_pairs: list[tuple[int, int]]
    antipodal_dependent: bool


@checked
def check(X: Float[Tensor, "N d"], Y: Float[Tensor, "N K"] | None = None, *, geometry: bool = True) -> None:
    """Refuse data on which the theorems are silent or the formulas would silently broadcast.

    Args:
        X: inputs ``(N, d)``.
        Y: targets ``(N, K)``, or None.
        geometry: also refuse rows that make the ReLU kernel singular (see `degeneracies`).

    Raises:
        TypeError: not a tensor, or a dtype other than float32 and float64.
        ValueError: a wrong shape, no rows, unequal N, dtype or device, NaN or infinity; with `geometry` also zero rows,
            positively parallel rows and linearly dependent antipodal pairs, named by their indices.
    """
    if Y is not None and (X.dtype != Y.dtype or X.device != Y.device):
        raise ValueError(f"X is {X.dtype} on {X.device}, Y is {Y.dtype} on {Y.device}; make them equal")
    if not geometry:
        return
    zero, parallel, antipodal, dependent = degeneracies(X)
    if zero:
        raise ValueError(f"X has zero rows {_some(zero)}; every row must be nonzero, as a zero row has zero features")
    if parallel:
        raise ValueError(
            f"X has positively parallel rows {_some(parallel)}; no two rows may point the same way, as their features "
            "are multiples of each other at every width"
        )
    if dependent:
        raise ValueError(
            f"X has linearly dependent antipodal pairs {_some(antipodal)}; the lines of rows pointing opposite ways "
            "must be linearly independent"
        )


def check_matrix(name: str, A: Tensor, shape: str, *, stacks: bool = False) -> None:
    """Refuse what is not a matrix of finite numbers.

    Args:
        name: what the caller's argument is called.
        A: what was given for it.
        shape: the shape that is needed, in words.
        stacks: also allow a stack of matrices.

    Raises:
        TypeError: not a tensor, or a dtype other than float32 and float64.
        ValueError: a wrong shape, no entries, NaN or infinity.
    """
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} is {type(A).__name__}; a torch tensor is needed")
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} has dtype {A.dtype}; torch.float32 or torch.float64 is needed")
    if A.ndim != 2 and not (stacks and A.ndim == 3):
        hint = f"; write {name}[:, None]" if A.ndim == 1 else ""
        raise ValueError(f"{name} has shape {tuple(A.shape)}; {shape} is needed{hint}")
    if A.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(A.shape)}; at least one row and one column are needed")
    bad = (~torch.isfinite(A)).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise ValueError(f"{name}{place} is {A[tuple(place)].item()}; finite numbers are needed")


def _some(items: list, most: int = 5) -> str:
    return ", ".join(str(i) for i in items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


@checked
def equal_inputs(X: Float[Tensor, "N ..."]) -> Int[Tensor, " N"]:
    """Number the distinct samples: ``group_i = group_j`` exactly if ``x_i = x_j`` (0 and -0 are equal).

    Args:
        X: samples ``(N, ...)``, finite.

    Returns:
        The group of each sample, 0 to (number of distinct samples - 1), on the CPU.
    """
    rows = X.detach().cpu().reshape(len(X), -1) + 0.0
    return torch.unique(rows, dim=0, return_inverse=True)[1]


@checked
def equal_pairs(groups: Int[Tensor, " N"]) -> list[tuple[int, int]]:
    """List ``(i, j)``, the first sample i of each group with every later one j.

    Args:
        groups: what `equal_inputs` returned.

    Returns:
        The pairs, ``i < j``; empty exactly if all samples are distinct.
    """
    first: dict[int, int] = {}
    found = []
    for i, group in enumerate(groups.tolist()):
        if first.setdefault(group, i) != i:
            found.append((first[group], i))
    return found


@checked
def degeneracies(X: Float[Tensor, "N d"]) -> Degeneracies:
    """Find the rows that make ``K_ij = E[relu(w.x_i) relu(w.x_j)]``, ``w ~ N(0, I)``, singular.

    ``K`` is positive definite iff no row is zero, no two rows are positively parallel, and the lines of the antipodal
    pairs are linearly independent (derived in lesson 1). The test is in floating point: two rows count as parallel if
    the angle between them is within the rounding of the stored numbers, and only then; angles come from
    ``2 atan2(|u - v|, |u + v|)``, since arccos loses everything below 1e-8.

    Args:
        X: inputs ``(N, d)``, finite.

    Returns:
        The offending rows; `O(N^2 d)` time in blocks of bounded memory.
    """
    norms = row_norms(X)
    zero_rows = (norms == 0).nonzero()[:, 0].tolist()
    keep = (norms > 0).nonzero()[:, 0]
    if not len(keep):
        return Degeneracies(zero_rows, [], [], False)
    U = unit_rows(X[keep])
    N, d = U.shape
    tol = 4 * torch.finfo(X.dtype).eps + (d + 16) * torch.finfo(torch.float64).eps
    pairs: dict[int, list[tuple[int, int]]] = {1: [], -1: []}
    rows = max(1, _BLOCK_BYTES // (8 * max(N, 1)))
    for a in range(0, N, rows):
        cosine = U[a : a + rows] @ U.T
        # The Gram entry only picks candidates (angles below 1e-4); the angle itself decides.
        i, j = (cosine.abs() > 1 - 5e-9 - 2 * tol).nonzero(as_tuple=True)
        i = i + a
        i, j = i[i < j], j[i < j]
        for sign in (1, -1):
            small, large = (torch.linalg.vector_norm(U[i] - s * U[j], dim=1) for s in (sign, -sign))
            hit = 2 * torch.atan2(small, large) <= tol
            pairs[sign] += zip(keep[i[hit]].tolist(), keep[j[hit]].tolist(), strict=True)
    # One row for each line: a row parallel or antipodal to an earlier one lies on a line already counted.
    repeated = {j for _, j in pairs[1] + pairs[-1]}
    lines = sorted({i for i, _ in pairs[-1]} - repeated)
    dependent = False
    if lines:
        V = unit_rows(X[lines])
        s = torch.linalg.svdvals(V)
        dependent = len(lines) > d or bool(s[-1] <= s[0] * max(V.shape) * tol)
    return Degeneracies(zero_rows, pairs[1], pairs[-1], dependent)


@checked
def row_norms(X: Float[Tensor, "N d"]) -> Float[Tensor, " N"]:
    """Euclidean norms of the rows in float64, safe from overflow and underflow."""
    X = X.double()
    scale = X.abs().amax(dim=1)
    safe = torch.where(scale > 0, scale, 1.0)
    return torch.linalg.vector_norm(X / safe[:, None], dim=1) * scale


@checked
def unit_rows(X: Float[Tensor, "N d"]) -> Float[Tensor, "N d"]:
    """Scale every row to norm 1 in float64, safe from overflow and underflow; zero rows stay zero."""
    X = X.double()
    scale = X.abs().amax(dim=1, keepdim=True)
    X = X / torch.where(scale > 0, scale, 1.0)
    norm = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    return X / torch.where(norm > 0, norm, 1.0)


@checked
def sphere(
    N: int, d: int, generator: torch.Generator, *, radius: float = 1.0, S: int | None = None
) -> Float[Tensor, "... N d"]:
    """Draw N points uniformly on the sphere of the given radius in R^d: normalized Gaussian rows.

    Args:
        N: number of points.
        d: dimension.
        generator: CPU generator.
        radius: norm of every row.
        S: with S, a stack of S independent data sets ``(S, N, d)``.

    Returns:
        ``X``, ``(N, d)`` or ``(S, N, d)``, float64.
    """
    if N < 1 or d < 1 or (S is not None and S < 1):
        raise ValueError(f"N, d, S are {N}, {d}, {S}; positive numbers are needed")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius is {radius}; a positive finite number is needed")
    G = torch.randn((N, d) if S is None else (S, N, d), generator=generator, dtype=torch.float64)
    return G.mul_(radius / torch.linalg.vector_norm(G, dim=-1, keepdim=True))


@checked
def signs(N: int, generator: torch.Generator, K: int = 1) -> Float[Tensor, "N K"]:
    """Draw independent uniform labels +1 or -1.

    Args:
        N: number of samples.
        generator: CPU generator.
        K: number of outputs.

    Returns:
        ``Y``, ``(N, K)``, float64.
    """
    if N < 1 or K < 1:
        raise ValueError(f"N, K are {N}, {K}; positive numbers are needed")
    return torch.randint(0, 2, (N, K), generator=generator).double().mul_(2).sub_(1)


class Digits(NamedTuple):
    """Images and targets, split into training and test part.

    Args:
        X: training inputs ``(n, 64)``.
        Y: training targets ``(n, K)``.
        labels: training labels ``(n,)``, the digit itself.
        X_test: test inputs ``(test, 64)``.
        Y_test: test targets ``(test, K)``.
        labels_test: test labels ``(test,)``.
    """

    X: Float[Tensor, "n d"]
    Y: Float[Tensor, "n K"]
    labels: Int[Tensor, " n"]
    X_test: Float[Tensor, "n_test d"]
    Y_test: Float[Tensor, "n_test K"]
    labels_test: Int[Tensor, " n_test"]


@checked
def digits(
    classes: Sequence[int] | None = None,
    *,
    n: int | None = None,
    centre: bool = True,
    normalize: bool = True,
    targets: str = "onehot",
    test: int = 0,
    generator: torch.Generator | None = None,
    centre_on: str = "all",
) -> Digits:
    """Load scikit-learn's 1,797 real handwritten digits, 8 x 8 pixels scaled to [0, 1], offline.

    The images keep the data set's own order, or the order of a random permutation if a generator is given. The split:
    the first `n` images are the training set, the next `test` images are the test set, the rest is left out.

    Args:
        classes: which digits, None for all ten.
        n: number of training images, None for all but the last `test`.
        centre: subtract the mean image, see `centre_on`.
        normalize: then scale every row to norm 1.
        targets: ``"onehot"``, a column for each class in the order of `classes`, or ``"signs"``, one column, +1 for the
            first and -1 for the second of two classes.
        test: number of test images.
        generator: CPU generator that shuffles the images; None keeps their order.
        centre_on: ``"all"``, the mean over every image of the chosen classes (training, test and rest), or ``"rest"``,
            the mean over those in neither the training nor the test set, so that it is independent of both.

    Returns:
        Training and test part, float64.

    Raises:
        ValueError: an unknown class, option or a size that the data set does not have.
    """
    from sklearn.datasets import load_digits

    classes = list(range(10)) if classes is None else [int(c) for c in classes]
    if not classes or len(set(classes)) != len(classes) or not set(classes) <= set(range(10)):
        raise ValueError(f"classes is {classes}; different digits from 0 to 9 are needed")
    if targets not in ("onehot", "signs") or (targets == "signs" and len(classes) != 2):
        raise ValueError(f"targets is {targets!r} with {len(classes)} classes; 'onehot', or 'signs' with 2, is needed")
    if centre_on not in ("all", "rest"):
        raise ValueError(f"centre_on is {centre_on!r}; 'all' or 'rest' is needed")
    pixels, names = load_digits(return_X_y=True)
    X, labels = torch.from_numpy(pixels).double() / 16, torch.from_numpy(names).long()
    chosen = torch.isin(labels, torch.tensor(classes))
    X, labels = X[chosen], labels[chosen]
    if generator is not None:
        order = torch.randperm(len(X), generator=generator)
        X, labels = X[order], labels[order]
    n = len(X) - test if n is None else n
    if n < 1 or test < 0 or n + test > len(X):
        raise ValueError(f"n is {n} and test is {test}; 1 <= n and n + test <= {len(X)} are needed for these classes")
    if centre:
        rest = X if centre_on == "all" else X[n + test :]
        if not len(rest):
            raise ValueError(f"centre_on is 'rest' but n + test is all {len(X)} images; leave some out")
        X = X - rest.mean(dim=0)
    if normalize:
        X = unit_rows(X)
    Y = (labels[:, None] == torch.tensor(classes)).double()
    if targets == "signs":
        Y = Y[:, :1] - Y[:, 1:]
    train, held_out = slice(0, n), slice(n, n + test)
    return Digits(X[train], Y[train], labels[train], X[held_out], Y[held_out], labels[held_out])


class Images(NamedTuple):
    """Images of an IDX folder: pixels in [0, 1] as rows, labels 0 to 9.

    Args:
        X: training inputs ``(N, rows * columns)``, float64.
        labels: training labels ``(N,)``.
        X_test: test inputs.
        labels_test: test labels.
    """

    X: Float[Tensor, "N d"]
    labels: Int[Tensor, " N"]
    X_test: Float[Tensor, "N_test d"]
    labels_test: Int[Tensor, " N_test"]


@checked
def load_idx(folder: str | Path) -> Images:
    """Load a user's own folder of four IDX files under MNIST's names (MNIST, Fashion-MNIST, KMNIST and their kin).

    The names are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte``, each also with ``.idx`` for ``-idx`` and each also gzipped with the suffix ``.gz``.

    Args:
        folder: the folder that holds the files.

    Returns:
        Training and test part.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a wrong magic number, a length other than the header says, no images, labels above 9, or different
            numbers of images and labels.
    """
    folder = Path(folder)
    parts = []
    for part in ("train", "t10k"):
        images = _read_idx(_find_idx(folder, f"{part}-images-idx3-ubyte"), 2051)
        labels = _read_idx(_find_idx(folder, f"{part}-labels-idx1-ubyte"), 2049)
        if len(images) != len(labels):
            raise ValueError(
                f"{folder}: {part} has {len(images)} images but {len(labels)} labels; one for each is needed"
            )
        if images.size == 0:
            raise ValueError(f"{folder}: {part} has shape {images.shape}; at least one image is needed")
        if labels.max() > 9:
            raise ValueError(f"{folder}: {part} has a label {labels.max()}; labels 0 to 9 are needed")
        parts.append(torch.from_numpy(images.reshape(len(images), -1).astype(np.float64) / 255))
        parts.append(torch.from_numpy(labels.astype(np.int64)))
    if parts[0].shape[1] != parts[2].shape[1]:
        raise ValueError(f"{folder}: training images have {parts[0].shape[1]} pixels, test images {parts[2].shape[1]}")
    return Images(*parts)


def _find_idx(folder: Path, name: str) -> Path:
    names = [n + suffix for n in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise FileNotFoundError(f"folder {folder} has none of {', '.join(names)}; put MNIST-like files there")


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Read one IDX file: big-endian magic number, one 32-bit size for each axis, then unsigned bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    axes = magic & 0xFF
    if len(raw) < 4 * (axes + 1):
        raise ValueError(f"{path} has {len(raw)} bytes; an IDX header of {4 * (axes + 1)} bytes is needed")
    found, *shape = struct.unpack(f">{axes + 1}I", raw[: 4 * (axes + 1)])
    if found != magic:
        raise ValueError(f"{path} begins with the number {found}; {magic} is needed")
    if len(raw) - 4 * (axes + 1) != math.prod(shape):
        raise ValueError(
            f"{path} holds {len(raw) - 4 * (axes + 1)} bytes; {math.prod(shape)} needed for {tuple(shape)}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=4 * (axes + 1)).reshape(shape)
