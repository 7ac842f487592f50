"""Blocks against automatic differentiation of their defining function, and constants against random search."""

import math

import mpmath
import pytest
import torch
from making import gaussian

from companion.mean_field.blocks import (
    HYPOTHESES,
    RBF,
    BallBump,
    Bias,
    Block,
    Custom,
    GaussBump,
    Linear,
    ReluMLP,
    Squares,
    TanhMLP,
)
from companion.rigor import point


def bump(z, theta):
    return theta[..., :2] * torch.cos(z - theta[..., 2:])


ALL = [BallBump(1), BallBump(2), BallBump(3, R=0.7), GaussBump(1.5), RBF(1), RBF(2), TanhMLP(2), ReluMLP(3)]
ALL += [Linear(), Linear(2), Bias(2), Squares(2), Custom(bump, 2, 4)]
SMOOTH = [b for b in ALL if not isinstance(b, ReluMLP | Custom)]
S, n, M = 2, 3, 5


def example(block, seed=0, n=n):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w = torch.rand(M, generator=g, dtype=torch.float64)
    return randn(S, n, block.d), randn(S, M, block.k), w / w.sum(), randn(S, n, block.d)


def named(block):
    return f"{block.name}-{block.d}"


@pytest.mark.parametrize("block", ALL, ids=named)
def test_products_equal_autograd(block):
    z, theta, w, p = example(block)
    slow = Block.mean_field(block, z, theta, w)
    torch.testing.assert_close(block.mean_field(z, theta, w), slow, rtol=1e-13, atol=1e-13)
    back, grads = block.pull(z, theta, w, p)
    slow_back, slow_grads = Block.pull(block, z, theta, w, p)
    torch.testing.assert_close(back, slow_back, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, slow_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", ALL, ids=named)
def test_rows_sum_to_the_gradient(block):
    z, theta, w, p = example(block, 1)
    rows = block.rows(z, theta, p)
    assert rows.shape == (S, n, M, block.k)
    torch.testing.assert_close(rows.sum(1), Block.pull(block, z, theta, w, p)[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows, Block.rows(block, z, theta, p), rtol=1e-12, atol=1e-12)
    assert not z.requires_grad
    assert not theta.requires_grad


@pytest.mark.parametrize("block", ALL, ids=named)
def test_pull_has_no_gap_without_samples_or_weights(block):
    """Weights of zero leave the state alone, but not the gradient with respect to the law."""
    z, theta, w, p = example(block, 2)
    back, grads = block.pull(z, theta, 0 * w, p)
    assert back.abs().max() == 0
    torch.testing.assert_close(grads, block.pull(z, theta, w, p)[1])


def derivatives(block, z, theta):
    """First and second derivatives of f at one point by automatic differentiation."""
    joint = torch.cat([z, theta])

    def f(x):
        return block.f(x[: block.d], x[block.d :])

    J = torch.autograd.functional.jacobian(f, joint)
    H = torch.stack([torch.autograd.functional.hessian(lambda x, j=j: f(x)[j], joint) for j in range(block.d)])
    return f(joint), J, H


def form_norm(H, tries=20, seed=0):
    """A lower bound of the norm of a bilinear form with values in R^d: alternating maximization."""
    g = torch.Generator().manual_seed(seed)
    best = 0.0
    for _ in range(3):
        y = torch.randn(H.shape[2], generator=g, dtype=torch.float64)
        for _ in range(tries):
            x = torch.linalg.svd(torch.einsum("jab,b->ja", H, y / y.norm()))[2][0]
            y = torch.linalg.svd(torch.einsum("jab,a->jb", H, x))[2][0]
        best = max(best, float(torch.einsum("jab,a,b->j", H, x, y).norm()))
    return best


@pytest.mark.parametrize("block", SMOOTH, ids=named)
def test_constants_bound_the_derivatives(block):
    g = torch.Generator().manual_seed(3)
    d = block.d
    for i in range(60):
        theta0 = torch.randn(block.k, generator=g, dtype=torch.float64) * (0.3 + i % 3)
        moved = torch.randn(block.k, generator=g, dtype=torch.float64)
        theta = theta0 + 0.5 * moved / moved.norm()
        z = torch.randn(d, generator=g, dtype=torch.float64) * (0.5 + i % 2)
        c = block.constants(theta0[None], 0.5, float(z.norm())).spread(theta0[None])
        f, J, H = derivatives(block, z, theta)
        found = {
            "F": f.norm(),
            "A": torch.linalg.matrix_norm(J[:, :d], 2),
            "A_F": torch.linalg.matrix_norm(J[:, :d]),
            "B": torch.linalg.matrix_norm(J[:, d:], 2),
            "H_zz": form_norm(H[:, :d, :d]),
            "H_ztheta": form_norm(H[:, :d, d:]),
            "H_thetatheta": form_norm(H[:, d:, d:]),
        }
        for name, value in found.items():
            assert getattr(c, name).shape == (1,)
            assert float(value) <= float(getattr(c, name)) * (1 + 1e-10) + 1e-14, (name, i)


def test_ball_bump_constants_are_nearly_attained():
    block, U = BallBump(2), 1.7
    c = block.constants(None, U)
    theta = torch.tensor([U, 300.0, 0, 0, 0], dtype=torch.float64)  # |b| = 1, centre at the origin
    z = torch.tensor([0.0, 0], dtype=torch.float64)
    f, _, H = derivatives(block, z, theta)
    _, J, _ = derivatives(block, z + torch.tensor([1.0, 0], dtype=torch.float64), theta)
    assert float(f.norm()) > 0.997 * c.F
    assert float(torch.linalg.matrix_norm(J[:, :2], 2)) > 0.997 * c.A
    assert form_norm(H[:, :2, :2]) > 0.997 * c.H_zz


def transcribed(block, v, a, radius, reach):
    """The constants as lesson 2 writes them, in high precision; v and a are the norms of a particle's two parts."""
    mp, sqrt, e = mpmath.mpf, mpmath.sqrt, mpmath.e
    U, W, z, th = mp(v) + mp(radius), mp(a) + mp(radius), mp(reach), mp(1) / sqrt(mpmath.e)
    lift, bend = sqrt(1 + z * z), 4 / (3 * sqrt(mp(3)))
    if isinstance(block, BallBump):
        R = mp(block.R)
        beta = R**2 * mpmath.exp(1 / R**2 - 1) if R >= 1 else mp(1)
        H = (R**2 + sqrt(R**4 + 4 * R**2 / e)) / 2 + 3 * sqrt(mp(1) / 5) * (mp(4) / 5) ** 2 * sqrt(beta)
        H_tt = (U * H + sqrt(U**2 * H**2 + 4 * beta)) / 2
        return U, U * th, U * th, sqrt(1 + U**2 * beta), U, sqrt(1 / e + U**2 * (1 / e + R**2)), H_tt
    if isinstance(block, GaussBump):
        s2 = 3 - sqrt(mp(6))
        H = mp(block.alpha) * sqrt(s2) * (3 - s2) * mpmath.exp((1 - s2) / 2)
        return mp(block.alpha), *[mp(block.alpha) / th] * 3, H, H, H
    if isinstance(block, RBF):
        return U, U * th, U * th, sqrt(1 + U**2 / e), U, sqrt(1 / e + U**2), (U + sqrt(U**2 + 4 / e)) / 2
    if isinstance(block, TanhMLP):
        c = bend * U * lift**2
        H_zt = sqrt(W**2 + (U * (bend * W * lift + 1)) ** 2)
        return U, U * W, U * W, sqrt(1 + U**2 * lift**2), bend * U * W**2, H_zt, (c + sqrt(c**2 + 4 * lift**2)) / 2
    if isinstance(block, Squares):
        return U**2 * lift**2, *[2 * U**2 * lift] * 2, 2 * U * lift**2, 2 * U**2, 4 * U * lift, 2 * lift**2
    if isinstance(block, Linear):
        return U * z, U, U * sqrt(mp(block.d)), z, 0, 1, 0
    return U, 0, 0, 1, 0, 0, 0  # Bias


def two_norms(block, theta):
    """The norms of the parts of a particle on which the constants depend."""
    first = {BallBump: 1, RBF: block.d, TanhMLP: block.d}.get(type(block), block.k)
    return float(theta[:first].norm()), float(theta[first : 2 * first].norm())


@pytest.mark.parametrize("block", [*SMOOTH, BallBump(2, R=1.0), BallBump(1, R=8.0)], ids=str)
def test_constants_are_those_of_the_lesson_and_certified_ones_contain_them(block):
    mpmath.mp.prec = 200
    theta = gaussian(6, block.k, seed=4) * torch.logspace(-3, 2, 6, dtype=torch.float64)[:, None]
    for radius, reach in ((0.0, 0.7), (0.3, 5.0)):
        measured = block.constants(theta, radius, reach).spread(theta)
        certified = block.constants(point(theta), radius, reach).spread(point(theta))
        for m, particle in enumerate(theta):
            exact = transcribed(block, *two_norms(block, particle), radius, reach)
            for name, value in zip(vars(measured), exact, strict=True):
                assert float(getattr(measured, name)[m]) == pytest.approx(float(value), rel=1e-12), name
                part = getattr(certified, name)
                low, high = (mpmath.mpf(float(end[m])) for end in (part.lo, part.hi))
                # the norms that went into `value` are rounded themselves
                assert low * (1 - mpmath.mpf(2) ** -50) <= value <= high * (1 + mpmath.mpf(2) ** -50), name
                assert high - low <= mpmath.mpf(10) ** -11 * (1 + abs(value)), name


def test_maxima_of_scalar_functions_in_the_constants():
    s = torch.linspace(-5, 5, 200_001, dtype=torch.float64)
    slope = (3 * s - s**3) * torch.exp(0.5 - s * s / 2)
    assert float(slope.abs().max()) == pytest.approx(float(GaussBump(1.0).constants().H_zz), rel=1e-8)
    h = torch.tanh(s)
    bend = TanhMLP(1).constants(torch.ones(1, 3, dtype=torch.float64), 0.0, 0.0).H_zz[0]
    assert float((2 * h * (1 - h * h)).abs().max()) == pytest.approx(float(bend), rel=1e-8)


def test_mixed_derivative_of_a_perceptron_is_attained_where_the_inner_weights_vanish():
    theta = torch.tensor([1.7, 0, 0, 0, 0], dtype=torch.float64)
    _, _, H = derivatives(TanhMLP(2), torch.zeros(2, dtype=torch.float64), theta)
    bound = TanhMLP(2).constants(theta[None], 0.0, 0.0).H_ztheta
    assert form_norm(H[:, :2, 2:]) == pytest.approx(float(bound), rel=1e-12) == pytest.approx(1.7)


def test_chart_second_derivative_bound():
    g = torch.Generator().manual_seed(0)
    worst, bound = 0.0, 3 * math.sqrt(0.2) * 0.8**2

    def zeta(x, j):
        return (x / (1 + x @ x).sqrt())[j]

    for _ in range(40):
        omega = torch.randn(4, generator=g, dtype=torch.float64)
        H = torch.stack([torch.autograd.functional.hessian(lambda x, j=j: zeta(x, j), omega) for j in range(4)])
        worst = max(worst, form_norm(H))
    omega = torch.tensor([0.5, 0, 0, 0], dtype=torch.float64)  # |zeta|^2 = 0.2
    H = torch.stack([torch.autograd.functional.hessian(lambda x, j=j: zeta(x, j), omega) for j in range(4)])
    assert worst <= bound * (1 + 1e-12)
    assert form_norm(H) == pytest.approx(bound, rel=1e-9)


def test_constants_without_particles():
    assert RBF(2).constants(None, 2.0).F == 2.0
    assert TanhMLP(2).constants(None, 2.0, 1.0).A == 4.0
    assert ReluMLP(2).constants(None, 1.0, 1.0).H_zz == math.inf
    assert Linear().constants(None, 1.0, 3.0).B == 3.0
    assert Bias().constants(None, 1.0).A == 0
    assert Squares().constants(None, 1.0, 0.0).H_thetatheta == 2.0
    assert not Custom(bump, 2, 4).constants().finite()
    assert GaussBump().constants().finite()
    theta = torch.zeros(3, 5, dtype=torch.float64)
    assert ReluMLP(2).constants(theta, 1.0, 1.0).spread(theta).H_zz.tolist() == [math.inf] * 3


def test_constants_of_the_usual_perceptron_bound_its_first_derivatives():
    block, theta, z = ReluMLP(2), gaussian(200, 5, seed=5), gaussian(200, 2, seed=6)
    c = block.constants(theta, 0.0, float(z.norm(dim=1).max())).spread(theta)
    for m in range(200):
        J = torch.autograd.functional.jacobian(lambda x: block.f(x[:2], x[2:]), torch.cat([z[m], theta[m]]))
        assert float(block.f(z[m], theta[m]).norm()) <= float(c.F[m])
        assert float(torch.linalg.matrix_norm(J[:, :2], 2)) <= float(c.A[m]) * (1 + 1e-12)
        assert float(torch.linalg.matrix_norm(J[:, 2:], 2)) <= float(c.B[m])


def test_initial_laws():
    g = torch.Generator().manual_seed(0)
    theta = BallBump(2).draw((4, 500), g)
    assert theta.shape == (4, 500, 5)
    assert theta[..., 0].abs().max() == 0
    assert theta[..., 1:].std() == pytest.approx(1, abs=0.05)
    bumps = GaussBump().draw((20_000,), g)
    assert bumps.abs().max() < 3
    assert bumps.square().mean() == pytest.approx(9 / 7, rel=0.03)  # the second moment of the density
    cells = torch.linspace(-3, 3, 601, dtype=torch.float64)
    assert torch.trapezoid(GaussBump.density(cells), cells) == pytest.approx(1, abs=1e-8)
    below = (bumps < 1).double().mean()
    mass = torch.trapezoid(GaussBump.density(cells[:401]), cells[:401])
    assert below == pytest.approx(float(mass), abs=0.01)
    assert Squares().draw((1000,), g).std() == pytest.approx(0.25, rel=0.1)
    assert RBF(2).draw((3,), g).shape == (3, 4)


@pytest.mark.parametrize("block", ALL, ids=named)
def test_audit_is_complete(block):
    rows = block.hypotheses()
    assert tuple(r.name for r in rows) == HYPOTHESES
    assert all(r.answer in ("yes", "no", "not checkable") and r.why for r in rows)


def test_a_subclass_inherits_no_proof():
    class Wide(BallBump):
        def draw(self, shape, generator):
            return 100 * torch.randn(*shape, self.k, generator=generator, dtype=torch.float64)

    assert {r.answer for r in Wide(2).hypotheses()} == {"not checkable"}


def test_only_the_ball_bump_passes_the_audit():
    assert [type(b) for b in ALL if all(r.answer == "yes" for r in b.hypotheses())] == [BallBump] * 3


def test_squares_is_nonnegative_and_homogeneous():
    z, theta, _, _ = example(Squares(2))
    f = Squares(2).f(z[:, :, None], theta[:, None])
    assert f.min() >= 0
    torch.testing.assert_close(Squares(2).f(z[:, :, None], -3 * theta[:, None]), 9 * f)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BallBump(0), ValueError, "d is 0; an integer >= 1 is needed"),
        (lambda: BallBump(2.0), TypeError, "d is 2.0; an integer is needed"),
        (lambda: BallBump(2, R=-1.0), ValueError, "R is -1.0; a positive finite number is needed"),
        (lambda: GaussBump(math.nan), ValueError, "alpha is nan; a positive finite number is needed"),
        (lambda: RBF(0), ValueError, "d is 0"),
        (lambda: TanhMLP(0), ValueError, "d is 0"),
        (lambda: ReluMLP(0), ValueError, "d is 0"),
        (lambda: Linear(0), ValueError, "d is 0"),
        (lambda: Bias(0), ValueError, "d is 0"),
        (lambda: Squares(0), ValueError, "d is 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
