"""The rehearsal moves what another processor may round otherwise, nothing else, and refuses what then differs."""

import notebooks
import numpy as np
import pytest
import rehearsal
import rounding
import torch
from execution import Broken, run_cells
from nbformat.v4 import new_code_cell, new_output

ULP = 2.0**-52


def _matrix(n=12, m=9, dtype=torch.float64):
    return torch.randn(n, m, dtype=dtype, generator=torch.Generator().manual_seed(0))


A = _matrix()
S = A @ A.T + torch.eye(12, dtype=torch.float64)
MOVED = {
    "matmul": lambda: A @ A.T,
    "batched": lambda: torch.stack([A, A]) @ A.T,
    "einsum": lambda: torch.einsum("ij,kj->ik", A, A),
    "convolution": lambda: torch.nn.functional.conv1d(A[None], A[None, :, :3]),
    "sum": lambda: A.sum(1),
    "mean": lambda: A.mean(1),
    "norm": lambda: A.norm(),
    "exp": lambda: A.exp(),
    "in place": lambda: A.clone().tanh_(),
    "out": lambda: torch.exp(A, out=torch.empty_like(A)),
    "power": lambda: A.abs() ** 1.7,
    "fused": lambda: torch.add(A, A.flip(0), alpha=0.3),
    "softmax": lambda: A.softmax(1),
    "randn": lambda: torch.randn(12, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "uniform elsewhere": lambda: A.clone().uniform_(-0.3, 0.7, generator=torch.Generator().manual_seed(1)),
    "cholesky": lambda: torch.linalg.cholesky(S),
    "eigenvalues": lambda: torch.linalg.eigvalsh(S),
    "solve": lambda: torch.linalg.solve(S, A),
    "svd": lambda: torch.linalg.svdvals(A),
    "qr": lambda: torch.linalg.qr(A).R,
    "strided": lambda: torch.exp(A, out=torch.empty(9, 24, dtype=torch.float64)[:, ::2].T),
    "vmap": lambda: torch.func.vmap(lambda a: A @ a)(A),
}
ALONE = {
    "+": lambda: A + A.flip(0),
    "fused with a power of two": lambda: torch.add(A, A.flip(0), alpha=0.25),
    "-": lambda: A - 0.1,
    "*": lambda: A * A.flip(0),
    "/": lambda: A / 3,
    "sqrt": lambda: A.abs().sqrt(),
    "square": lambda: A**2,
    "root": lambda: A.abs() ** 0.5,
    "comparison": lambda: A > 0,
    "largest": lambda: A.max(),
    "moving": lambda: torch.cat([A.T.reshape(12, 9), A])[3:].flip(0).contiguous(),
    "relu": lambda: A.relu(),
    "whole": lambda: (1000 * A).round() @ (1000 * A).round().T,
    "residues": lambda: ((1000 * A).round() @ (1000 * A).round().T).remainder(9973),
    "counts": lambda: (A > 0).double().mean(0) * 12 + (A > 0).double().sum(0),
    "halves": lambda: (8 * A).round() / 8 @ ((8 * A).round() / 8).T,
    "integers": lambda: torch.arange(9) @ torch.arange(9),
    "one product": lambda: A[:, :1] @ A[:1],
    "two terms": lambda: A[:, :2].sum(1),
    "certain": lambda: torch.tensor([0.0, torch.inf, -torch.inf], dtype=torch.float64).exp(),
    "saturated": lambda: torch.tensor([0.0, 800.0, torch.nan], dtype=torch.float64).sigmoid(),
    "uniform": lambda: torch.rand(9, generator=torch.Generator().manual_seed(1)),
    "uniform in place": lambda: A.clone().uniform_(generator=torch.Generator().manual_seed(1)),
}


def _under(seed, function):
    with rounding.Rounding(seed):
        return function()


@pytest.mark.parametrize("name", MOVED)
def test_some_last_bits_are_moved_the_same_ones_each_time(name):
    function = MOVED[name]
    plain, one, again, two = function(), _under(1, function), _under(1, function), _under(2, function)
    assert torch.equal(one, again)
    assert not torch.equal(one, plain)
    assert not torch.equal(one, two)
    composed = name in (
        "matmul",
        "batched",
        "sum",
        "mean",
        "vmap",
        "solve",
        "cholesky",
        "eigenvalues",
        "svd",
        "qr",
        "einsum",
    )
    torch.testing.assert_close(one, plain, rtol=1e-10 if composed else 2 * ULP, atol=1e-12 if composed else 0.0)


@pytest.mark.parametrize("name", ALONE)
def test_what_every_processor_rounds_alike_is_left_alone(name):
    function = ALONE[name]
    plain, noisy = function(), _under(1, function)
    assert torch.equal(plain.nan_to_num(7.0), noisy.nan_to_num(7.0))


def test_the_noise_depends_on_the_number_and_not_on_its_place():
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    one, two = _under(3, lambda: x.exp()), _under(3, lambda: x.flip(0).repeat(2, 1).exp())
    assert torch.equal(two, one.flip(0).repeat(2, 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_step_is_one_or_two_last_places(dtype):
    values = np.random.default_rng(0).standard_normal(10_000).astype(dtype)
    moved = values.copy()
    assert rounding.move(moved, 12345, each=True) >= 9_900
    steps = (moved - values) / np.spacing(np.abs(values))
    share = [np.mean(steps == k) for k in (-2, -1, 1, 2)]
    assert min(share) > 0.22, share


CANCELLING = torch.cat([A.flatten(), -A.T.flatten()])
SUMS = {
    "sum": lambda x: x.sum(),
    "sum over axes": lambda x: x.view(8, 3, 9).sum((0, 2)).sum(0),
    "mean": lambda x: x.mean() * len(x),
    "dot": lambda x: x @ torch.ones_like(x),
    "mv": lambda x: (x[None] @ torch.ones_like(x))[0],
    "mm": lambda x: (x[None] @ torch.ones_like(x)[:, None])[0, 0],
    "bmm": lambda x: torch.bmm(x[None, None], torch.ones_like(x)[None, :, None])[0, 0, 0],
    "addmm": lambda x: torch.addmm(x.new_zeros(1), x[None], torch.ones_like(x)[:, None])[0, 0],
    "baddbmm": lambda x: torch.baddbmm(x.new_zeros(1), x[None, None], torch.ones_like(x)[None, :, None])[0, 0, 0],
    "addmv": lambda x: torch.addmv(x.new_zeros(1), x[None], torch.ones_like(x))[0],
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_that_cancels_moves_as_a_whole(name):
    # the terms as they stand, and moved on by one: at some place the order of the sum shows
    sums = [CANCELLING.roll(k) for k in range(8)]
    plain = [float(SUMS[name](x)) for x in sums]
    with rounding.Rounding(1):
        noisy = [float(SUMS[name](x)) for x in sums]
    assert max(map(abs, plain + noisy)) < 1e-13
    assert any(abs(a - b) > 1e-3 * abs(a) for a, b in zip(plain, noisy, strict=True))


def test_numbers_at_the_ends_are_left_alone():
    values = np.array([0.0, -0.0, 5e-324, 1e-310, np.inf, -np.inf, np.nan, np.finfo(float).max, 1.1])
    moved = values.copy()
    assert rounding.move(moved, 99, each=False) == 1
    np.testing.assert_array_equal(moved[:-1], values[:-1])


def test_the_backward_pass_is_moved_too():
    def gradient():
        x = A.clone().requires_grad_()
        return torch.autograd.grad((torch.relu(x @ A.T) * S).sum(), x)[0]

    assert not torch.equal(gradient(), _under(1, gradient))


def test_no_name_of_an_operation_is_misspelt():
    names = rounding.PRODUCTS | rounding.REDUCTIONS | rounding.FACTORIZATIONS | rounding.FUNCTIONS
    assert [name for name in sorted(names) if not hasattr(torch.ops.aten, name)] == []


# --- lessons ----------------------------------------------------------------------------------------------------------

SET_UP = "import torch\nx = torch.linspace(0.1, 1, 1000, dtype=torch.float64)"
ROBUST = 'print(f"{float(x.exp().sum()):.3g}")'
NOISE = '# the logarithm undoes exp, all but rounding\nprint(f"{float((x.exp().log() - x).abs().max()):.2g}")'


@pytest.mark.pipeline  # it starts five kernels
def test_a_digit_of_rounding_noise_is_refused_and_its_cell_named(capsys):
    first = run_cells([SET_UP, ROBUST, NOISE], "toy")
    assert "e-1" in first[2].outputs[0].text
    with pytest.raises(Broken) as refusal:
        rehearsal.rehearse({"noise": first, "robust": first[:2]}, seeds=(1, 2))
    message = str(refusal.value)
    assert "noise.md, code cell 2, '# the logarithm undoes exp, all but rounding', seed 1:\n    - " in message
    assert f"\n    - {first[2].outputs[0].text}    + " in message
    assert message.count("code cell") == 2
    assert message.count("seed 2:") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["rehearsed noise", "rehearsed robust"]
    assert [line.endswith("0 outputs moved") for line in lines] == [False, True]


def test_everything_but_pictures_is_compared():
    def cell(text, **data):
        outputs = [new_output("stream", text=text), new_output("display_data", data={"image/png": "AAAA", **data})]
        return new_code_cell("plot()", outputs=outputs)

    before = cell("1\n2\n", **{"text/html": "<b>7</b>", "application/json": {"a": 1, "b": "≥"}})
    same = cell("1\n2\n", **{"text/html": "<b>7</b>", "application/json": {"b": "≥", "a": 1}})
    same.outputs[0:1] = [new_output("stream", text="1\n"), new_output("stream", text="2\n")]
    same.outputs[-1].data["image/png"] = "BBBB"
    assert rehearsal.moved("toy", [before], [same], 1) == []
    for change in ({"text/html": "<b>8</b>"}, {"application/json": {"a": 2}}, {"text/markdown": "more"}):
        other = cell("1\n2\n", **({"text/html": "<b>7</b>", "application/json": {"a": 1, "b": "≥"}} | change))
        assert len(rehearsal.moved("toy", [before], [other], 1)) == 1, change
    failed = new_code_cell("plot()", outputs=[new_output("error", ename="ValueError", evalue="no", traceback=[])])
    assert "+ ValueError: no" in rehearsal.moved("toy", [before], [failed], 1)[0]


def test_a_long_line_is_shown_where_it_differs():
    before = [new_code_cell("f()", outputs=[new_output("stream", text="a" * 5000 + "1" + "b" * 5000)])]
    after = [new_code_cell("f()", outputs=[new_output("stream", text="a" * 5000 + "2" + "b" * 5000)])]
    (message,) = rehearsal.moved("toy", before, after, 1)
    assert "a1b" in message
    assert "a2b" in message
    assert len(message) < 600


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """What `notebooks.run` stores of two lessons that print their name; nothing is run, built or written."""
    monkeypatch.setattr(notebooks, "BUILD", tmp_path)
    monkeypatch.setattr(notebooks, "execute", lambda name: [new_code_cell(f"print({name!r})")])
    names = []
    monkeypatch.setattr(notebooks, "text", lambda lessons, fresh: names.extend(lessons))
    return names


def _refuse_one(outputs):
    if "one" in outputs:
        raise Broken("a digit moves")


def test_what_is_refused_is_not_stored(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "rehearse", _refuse_one)
    with pytest.raises(Broken, match=r"a digit moves\nlessons/one.ipynb was left as it is"):
        notebooks.run(["one", "two"])
    assert stored == ["two"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two.ipynb"]


def test_the_rehearsal_can_be_left_out(stored, monkeypatch):
    monkeypatch.setattr(rehearsal, "rehearse", _refuse_one)
    notebooks.run(["one", "two"], rehearse=False)
    assert stored == ["one", "two"]
