"""Balls of layers against ball arithmetic."""

import itertools
import math

import pytest
import torch
from oracles import flushing, gaussian, matrix

from companion import rigor
from companion.rigor import balls, elementary
from companion.rigor.rounding import has_subnormal

try:
    import flint
except ImportError:  # the extra `certify`
    flint = None

GOOD = matrix([1.0, 2.0], [0.0, 1.0])
needs_flint = pytest.mark.skipif(flint is None, reason="python-flint is not installed")

# --- Balls ------------------------------------------------------------------------------------------------------------


def arb(value):
    """A float, exactly."""
    return flint.arb(value)


def hostile_numbers(shape, g, kind):
    """Numbers of moderate, tiny, huge, subnormal or mixed size, some of them zero."""
    scales = {"plain": (0, 1), "wide": (-12, 13), "tiny": (-320, -290), "huge": (60, 100), "mixed": (-160, 100)}
    low, high = scales[kind]
    size = torch.randint(low, high, shape, generator=g).double()
    numbers = torch.randn(*shape, dtype=torch.float64, generator=g) * 10.0 ** (size / 2) * 10.0 ** (size / 2)
    return numbers * (torch.rand(*shape, generator=g) > 0.1)


def hostile_ball(shape, g, kind):
    """A ball, and a point of it (as exact numbers): middle, corner, or in between."""
    value = hostile_numbers(shape, g, kind)
    relative = 10.0 ** torch.randint(-18, 2, shape, generator=g).double()
    radius = (value.abs() * relative) * (torch.rand(*shape, generator=g) > 0.3)
    where = torch.randint(-1, 2, shape, generator=g).double() * 2.0 ** -torch.randint(0, 3, shape, generator=g).double()

    def point(v, r, w):
        if isinstance(v, list):
            return [point(*each) for each in zip(v, r, w, strict=True)]
        return arb(v) + arb(r) * arb(w)

    return value, radius, point(value.tolist(), radius.tolist(), where.tolist())


def dense_case(g, kind):
    k, m = (int(torch.randint(1, 6, (), generator=g)) for _ in range(2))
    h, D, x = hostile_ball((1, k), g, kind)
    weight_kind = "plain" if kind == "huge" else "huge" if kind == "tiny" else kind
    W, b = hostile_numbers((m, k), g, weight_kind), hostile_numbers((m,), g, kind)
    if int(torch.randint(0, 3, (), generator=g)) == 0 and k > 1:  # cancellation
        W[:, 1] = W[:, 0] * (1 + 1e-15)
        h[:, 1], D[:, 1] = -h[:, 0], D[:, 0]
        x[0][1] = -x[0][0]
    exact = [
        sum((arb(w) * v for w, v in zip(row, x[0], strict=True)), arb(c))
        for row, c in zip(W.tolist(), b.tolist(), strict=True)
    ]
    return balls.dense_ball(h, D, W, b), exact


def conv_case(g, kind):
    groups, stride, padding, dilation = (int(n) for n in torch.randint(1, 3, (4,), generator=g))
    h, D, x = hostile_ball((1, 2, 4, 3), g, kind)
    W = hostile_numbers((2, 2 // groups, 2, 2), g, "plain" if kind == "huge" else kind)
    b = hostile_numbers((2,), g, kind)
    ball = balls.conv2d_ball(h, D, W, b, stride=stride, padding=padding, dilation=dilation, groups=groups)
    rows, columns = ball[0].shape[2:]
    exact = []
    for out, i, j in itertools.product(range(2), range(rows), range(columns)):
        total = arb(float(b[out]))
        for c, p, q in itertools.product(range(2 // groups), range(2), range(2)):
            a, e = i * stride - padding + p * dilation, j * stride - padding + q * dilation
            if 0 <= a < 4 and 0 <= e < 3:
                total += arb(float(W[out, c, p, q])) * x[0][out // (2 // groups) * (2 // groups) + c][a][e]
        exact.append(total)
    return ball, exact


def batchnorm_case(g, kind):
    h, D, x = hostile_ball((1, 3), g, kind)
    mu, gain, b = (hostile_numbers((3,), g, kind) for _ in range(3))
    gain = gain if kind in ("plain", "tiny") else hostile_numbers((3,), g, "plain")
    mu = torch.where(torch.rand(3, generator=g) < 0.4, h[0] * (1 + 1e-15), mu)
    v, eps = hostile_numbers((3,), g, "wide").abs(), 10.0 ** -float(torch.randint(2, 12, (), generator=g))
    columns = zip(x[0], mu.tolist(), v.tolist(), gain.tolist(), b.tolist(), strict=True)
    exact = [arb(a) * (y - arb(m)) / (arb(w) + arb(eps)).sqrt() + arb(c) for y, m, w, a, c in columns]
    return balls.batchnorm_ball(h, D, mu, v, gain, b, eps), exact


def add_case(g, kind):
    (h, D, x), (k, E, y) = hostile_ball((1, 4), g, kind), hostile_ball((1, 4), g, kind)
    return balls.add_ball(h, D, k, E), [a + b for a, b in zip(x[0], y[0], strict=True)]


def avgpool_case(g, kind):
    h, D, x = hostile_ball((1, 1, 2, 3), g, kind)
    flat = [v for row in x[0][0] for v in row]
    return balls.avgpool_ball(h, D, torch.nn.AdaptiveAvgPool2d(1), 6), [sum(flat, arb(0.0)) / 6]


def pointwise_case(ball, exact):
    def case(g, kind):
        h, D, x = hostile_ball((1, 4), g, "wide" if kind in ("huge", "mixed") else kind)
        return ball(h, D), [exact(v) for v in x[0]]

    return case


def true_max(a, b):
    return a if a >= b else b


def maxpool_case(g, kind):
    h, D, x = hostile_ball((1, 1, 2, 2), g, kind)
    (a, b), (c, d) = x[0][0]
    return balls.maxpool_ball(h, D, torch.nn.MaxPool2d(2)), [true_max(true_max(a, b), true_max(c, d))]


def softplus_case(g, kind):
    beta = 10.0 ** float(torch.randint(-2, 3, (), generator=g))
    case = pointwise_case(
        lambda h, D: balls.softplus_ball(h, D, beta), lambda v: (1 + (arb(beta) * v).exp()).log() / arb(beta)
    )
    return case(g, "plain" if kind in ("wide", "mixed", "huge") else kind)


CASES = {
    "dense": dense_case,
    "conv2d": conv_case,
    "batchnorm": batchnorm_case,
    "add": add_case,
    "avgpool": avgpool_case,
    "maxpool": maxpool_case,
    "relu": pointwise_case(lambda h, D: balls.relu_ball(h, D), lambda v: true_max(v, arb(0.0))),
    "tanh": pointwise_case(lambda h, D: balls.tanh_ball(h, D), lambda v: v.tanh()),
    "sigmoid": pointwise_case(lambda h, D: balls.sigmoid_ball(h, D), lambda v: 1 / (1 + (-v).exp())),
    "softplus": softplus_case,
}
RULES = [name for name in dir(balls) if name.endswith("_ball") and name != "check_ball"]
EXACT_LAYERS = ("relu", "maxpool")  # no rounding: only the input's radius can be forgotten
KINDS = ("plain", "wide", "tiny", "huge", "mixed")


def violations(case, seeds, factor=1.0):
    """How many of the trials have an entry outside the ball with its radius multiplied by `factor`."""
    found = 0
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        kind = KINDS[seed % len(KINDS)]
        with flint.ctx.workprec(2400):  # 10^-320 beside 10^200 is still exact
            (value, radius), exact = case(g, kind)
            if not (torch.isfinite(value).all() and torch.isfinite(radius).all()):
                continue  # the next layer refuses it
            entries = zip(value.flatten().tolist(), radius.flatten().tolist(), exact, strict=True)
            found += not all(abs(arb(v) - e) <= arb(r) * arb(factor) for v, r, e in entries)
    return found


@needs_flint
@pytest.mark.parametrize("name", CASES)
def test_balls_enclose(name):
    assert violations(CASES[name], range(1200)) == 0


@needs_flint
@pytest.mark.parametrize("name", CASES)
def test_balls_enclose_where_small_numbers_are_flushed(monkeypatch, name):
    """The layer alone runs flushed: the oracle must not."""
    subnormal = []

    def flushed(honest):
        def layer(*args, **options):
            subnormal.append(any(has_subnormal(a) for a in args if isinstance(a, torch.Tensor)))
            with flushing():
                return honest(*args, **options)

        return layer

    for rule in RULES:
        monkeypatch.setattr(balls, rule, flushed(getattr(balls, rule)))
    assert violations(CASES[name], [*range(2, 1500, 5), *range(4, 1500, 5)]) == 0  # the kinds "tiny" and "mixed"
    assert sum(subnormal) > 50


@needs_flint
@pytest.mark.parametrize("name", CASES)
def test_a_radius_of_zero_is_caught(name):
    assert violations(CASES[name], range(100), factor=0.0) > 10


@needs_flint
@pytest.mark.parametrize("name", [n for n in CASES if n not in EXACT_LAYERS])
def test_a_ball_without_its_own_rounding_is_caught(monkeypatch, name):
    for constant in ("UNIT", "TINY"):
        monkeypatch.setattr(balls, constant, 0.0)
    monkeypatch.setattr(balls, "gamma", lambda k: 0.0)
    monkeypatch.setattr(elementary, "ERROR", dict.fromkeys(elementary.ERROR, 0.0))
    assert violations(CASES[name], range(200)) > 0


@needs_flint
@pytest.mark.parametrize("layer", ["dense", "batchnorm", "conv2d"])
def test_a_ball_without_underflow_is_caught(monkeypatch, layer):
    monkeypatch.setattr(balls, "TINY", 0.0)
    assert violations(CASES[layer], range(300)) > 0


def test_balls_are_not_far_larger_than_needed():
    h, W, b = gaussian(50, 30, 1), gaussian(20, 30, 2), gaussian(1, 20, 3)[0]
    D = torch.full_like(h, 1e-6)
    value, radius = balls.dense_ball(h, D, W, b)
    assert torch.equal(value, h @ W.T + b)
    assert (radius <= 1e-6 * W.abs().sum(dim=1) * (1 + 1e-5)).all()  # a corner of the box reaches it
    corner = (h[:, None, :] + D[0] * W.sign()) * W
    assert ((corner.sum(dim=2) + b - value) >= radius * (1 - 1e-5)).all()
    value, radius = balls.dense_ball(h, 0 * D, W)
    assert radius.max() < 33 * 2.0**-53 * (h.abs() @ W.abs().T).max()


U = 2.0**-53


def pool_of(A):
    return torch.nn.functional.avg_pool2d(A, (2, 3))


def formulas_of_radii(g):
    """Each layer's radius beside its formula, all terms of one size."""

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def ball(*shape):
        return draw(*shape), draw(*shape).abs() * 1e-15

    def gamma(k):
        return k * U / (1 - k * U)

    (h, D), W, b = ball(4, 5), draw(3, 5), 9 * draw(3)
    yield balls.dense_ball(h, D, W, b), D @ W.abs().T + gamma(7) * (h.abs() @ W.abs().T + b.abs())
    yield balls.dense_ball(h, D, W), D @ W.abs().T + gamma(7) * (h.abs() @ W.abs().T)
    (h, D), W, b = ball(2, 4, 5, 6), draw(6, 2, 3, 2), 9 * draw(6)
    conv = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    spread = D + gamma(14) * h.abs()
    yield (
        balls.conv2d_ball(h, D, W, b, **conv),
        torch.nn.functional.conv2d(spread, W.abs(), gamma(14) * b.abs(), **conv),
    )
    mean, var, gain, shift = (a[:, None] for a in (9 * draw(3), draw(3).abs(), draw(3), 9 * draw(3)))
    h, D = ball(4, 3, 2)
    rho = gain.abs() / (var + 0.1).sqrt()
    stored = (a[:, 0] for a in (mean, var, gain, shift))
    yield (
        balls.batchnorm_ball(h, D, *stored, 0.1),
        rho * D + 10 * U * (rho * (h.abs() + mean.abs()) + shift.abs()),
    )
    (h, D), (k, E) = ball(4, 5), ball(4, 5)
    yield balls.add_ball(h, D, k, E), D + E + U * (h + k).abs()
    yield balls.tanh_ball(h, D), D + 6.5 * U * h.tanh().abs()
    yield balls.sigmoid_ball(h, D), D / 4 + 5.25 * U * h.sigmoid()
    soft = torch.nn.functional.softplus(h, 3.0, 1e9)
    yield balls.softplus_ball(h, D, 3.0), D + U * (2 * h.abs() + 7.5 * soft)
    h, D = ball(2, 3, 4, 6)
    yield balls.avgpool_ball(h, D, pool_of, 6), pool_of(D) + gamma(8) * pool_of(h.abs())
    yield balls.relu_ball(h, D), D
    yield balls.maxpool_ball(h, D, torch.nn.MaxPool2d(2)), torch.nn.functional.max_pool2d(D, 2)


@pytest.mark.parametrize("seed", range(3))
def test_radii_are_the_formulas(seed):
    for (_, radius), formula in formulas_of_radii(torch.Generator().manual_seed(seed)):
        assert radius.shape == formula.shape
        assert ((radius - formula).abs() <= 1e-8 * formula).all()


def test_radii_next_to_zero_are_what_may_be_lost():
    zero, W = torch.zeros(1, 2, dtype=torch.float64), matrix([3.0, -4.0])
    image, one = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    kernel = torch.tensor([[[[1.0, -2.0], [3.0, 4.0]]]], dtype=torch.float64)
    found = [
        (balls.dense_ball(zero, zero, W), 7 + 4),
        (balls.conv2d_ball(image, image, kernel), 10 + 6),
        (balls.batchnorm_ball(image, image, 0 * one, one, 5 * one, eps=3.0), 2.5 + 1.5),
        (balls.add_ball(zero, zero, zero, zero), 1),
        (balls.avgpool_ball(image, image, torch.nn.AvgPool2d(2), 4), 1 + 6),
        (balls.tanh_ball(zero, zero), 4),
        (balls.relu_ball(zero, zero), 0),
        (balls.relu_ball(zero, zero + 5e-324), 1),
        (balls.relu_ball(zero - 5e-324, zero), 1),
    ]
    for (value, radius), lost in found:
        assert not value.any()
        assert radius / 2.0**-1020 == pytest.approx(torch.full_like(radius, lost), rel=1e-8)
    value, radius = balls.dense_ball(zero + 3.0, zero, matrix([5e-324, 0.0]))  # a subnormal weight counts as 0
    assert 3 * 2 * 2 * 2.0**-1020 < radius.item() < 3 * 6 * 2.0**-1020


def test_convolution_is_the_library_s():
    h, W = gaussian(3 * 4 * 7, 5, 1).reshape(3, 4, 7, 5), gaussian(6, 2 * 3 * 2, 2).reshape(6, 2, 3, 2)
    b, zero = gaussian(1, 6, 3)[0], torch.zeros_like(h)
    for options in ({}, {"stride": (2, 1), "padding": (1, 2)}, {"dilation": 2, "padding": 2}):
        value, radius = balls.conv2d_ball(h, zero, W, b, groups=2, **options)
        library = torch.nn.functional.conv2d(h, W, b, groups=2, **options)
        torch.testing.assert_close(value, library, rtol=1e-13, atol=1e-13)
        assert (radius < 1e-13).all()
        single = balls.conv2d_ball(h, zero, W.float(), b.float(), groups=2, **options)
        double = balls.conv2d_ball(h, zero, W.float().double(), b.float().double(), groups=2, **options)
        assert torch.equal(single[0], double[0])


@pytest.mark.parametrize("threshold", [20.0, 5.0, 0.0, -3.0])
def test_clipped_softplus_and_its_jump(threshold):
    x = torch.linspace(-80, 80, 4001, dtype=torch.float64)
    for beta in (0.5, 1.0, 10.0):
        value, radius = balls.softplus_ball(x, torch.zeros_like(x), beta, threshold)
        clipped = torch.nn.functional.softplus(x, beta, threshold)
        assert ((value - clipped).abs() <= radius).all()
        jump = math.log1p(math.exp(-threshold)) / beta
        assert radius.max() <= jump * (1 + 1e-6) + 1e-13
        analytic = balls.softplus_ball(x, torch.zeros_like(x), beta)[1]
        assert not ((value - clipped).abs() <= analytic).all()  # the jump is real
    if threshold == 20.0:
        assert math.log1p(math.exp(-20.0)) == pytest.approx(2.06e-9, rel=1e-3)


FOUR = torch.ones(1, 2, 2, 2, dtype=torch.float64)
LAYERS = (
    lambda h, D: balls.dense_ball(h, D, GOOD),
    lambda h, D: balls.batchnorm_ball(h, D, torch.zeros(2), torch.ones(2)),
    lambda h, D: balls.add_ball(h, D, GOOD, GOOD),
    lambda h, D: balls.add_ball(GOOD, GOOD, h, D),
    lambda h, D: balls.avgpool_ball(h, D, torch.nn.Identity(), 1),
    lambda h, D: balls.maxpool_ball(h, D, torch.nn.Identity()),
    balls.relu_ball,
    balls.tanh_ball,
    balls.sigmoid_ball,
    balls.softplus_ball,
)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("h", "D", "error", "message"),
    [
        ([1.0], GOOD, TypeError, "value is a list; a torch.Tensor is needed"),
        (GOOD, 0.0, TypeError, "radius is a float; a torch.Tensor is needed"),
        (GOOD.float(), GOOD, TypeError, "value is torch.float32 on cpu; enclosures need float64 on the CPU"),
        (GOOD, GOOD.to("meta"), TypeError, "radius is torch.float64 on meta; enclosures need float64 on the CPU"),
        (GOOD.to_sparse(), GOOD, TypeError, "value is torch.sparse_coo on cpu; a dense tensor with numbers is needed"),
        (GOOD[:0], GOOD[:0], ValueError, r"value has shape \(0, 2\)"),
        (GOOD, GOOD[:, :1], ValueError, r"radius has shape \(2, 1\)"),
        (GOOD * math.nan, GOOD, ValueError, "value lies between nan and nan; finite numbers are needed"),
        (GOOD, GOOD * math.inf, ValueError, "radius lies between"),
        (GOOD, -GOOD, ValueError, "radius lies between -2.0 and -?0.0; finite numbers are needed, no radius below 0"),
    ],
)
def test_bad_balls(unchecked, layer, h, D, error, message):
    with pytest.raises(error, match=message):
        layer(h, D)


def test_bad_layers(unchecked):
    zero = torch.zeros_like(GOOD)
    with pytest.raises(ValueError, match=r"weight is torch.int64 or holds NaN or infinity"):
        balls.dense_ball(GOOD, zero, GOOD.long())
    with pytest.raises(ValueError, match=r"bias is torch.float64 or holds NaN or infinity"):
        balls.dense_ball(GOOD, zero, GOOD, GOOD[0] * math.inf)
    with pytest.raises(TypeError, match=r"bias is a float; a torch.Tensor is needed"):
        balls.dense_ball(GOOD, zero, GOOD, 1.0)
    for weight, bias in ((GOOD[None], None), (GOOD[:, :1], None), (GOOD, GOOD[0, :1])):
        with pytest.raises(ValueError, match=r"weight has shape \(.*\), bias .*; \(m, 2\) and \(m,\), or no bias"):
            balls.dense_ball(GOOD, zero, weight, bias)
    with pytest.raises(ValueError, match=r"value has shape \(1, 2, 2, 2\); 2 axes"):
        balls.dense_ball(FOUR, 0 * FOUR, GOOD)
    with pytest.raises(ValueError, match=r"value has shape \(2, 2\); 4 axes"):
        balls.conv2d_ball(GOOD, zero, FOUR)
    with pytest.raises(ValueError, match=r"weight has shape \(1, 2, 2, 2\) with groups 2; value has 2 channels"):
        balls.conv2d_ball(FOUR, 0 * FOUR, FOUR, groups=2)
    with pytest.raises(ValueError, match=r"var \+ eps is -1.0 somewhere; a positive number is needed"):
        balls.batchnorm_ball(GOOD, zero, GOOD[0], torch.tensor([-1.0, 1.0]).double(), eps=0.0)
    with pytest.raises(ValueError, match=r"value has shape \(2, 2\), other \(2, 1\); equal shapes are needed"):
        balls.add_ball(GOOD, zero, GOOD[:, :1], zero[:, :1])
    with pytest.raises(ValueError, match="the layer sums 4194304 terms; fewer than 2\\^22 are needed"):
        balls.avgpool_ball(GOOD, zero, torch.nn.Identity(), 2**22)
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"beta is .*; a positive finite number is needed"):
            balls.softplus_ball(GOOD, zero, beta)


# --- Global settings --------------------------------------------------------------------------------------------------


DATA = gaussian(4, 5, 1), gaussian(3, 5, 2), gaussian(4, 5, 3).abs() * 1e-9


def answers():
    """Something of every file of rigor, for one and the same data."""
    h, W, D = DATA
    x = rigor.point(h)
    parts = [
        *balls.dense_ball(h, D, W),
        *balls.tanh_ball(h, D),
        *balls.softplus_ball(h, D, 2.0, 20.0),
        *balls.sigmoid_ball(h, D),
        *balls.batchnorm_ball(h, D, h[0], h[1].abs()),
        *balls.avgpool_ball(h, D, torch.nn.Identity(), 1),
    ]
    for f in (x.exp(), 1 / x, x**3, abs(x).log(), x.tanh(), x * 0.5, x + rigor.point(0.1), x.sum(1), x.maximum(0)):
        parts += [f.lo, f.hi]
    parts += [rigor.norm(h), rigor.spectral_norm(h), rigor.norm(x).hi]
    parts += [rigor.sigma_min_lower(h), rigor.spectral_norm_upper(h), rigor.product_error(h, W.T)]
    parts += [rigor.eig_min_lower(h @ h.T, 0 * h @ h.T), rigor.exact_rank(h), float(rigor.product_radius(h, W.T).sum())]
    return parts


def same(first, second):
    return all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype):
    expected, before = answers(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = answers()
    finally:
        torch.set_default_dtype(before)
    assert same(found, expected)


def test_the_default_device_does_not_matter():
    expected = answers()
    with torch.device("meta"):
        found = answers()
    assert same(found, expected)
