"""Expressivity: the sort that tells points apart, the theorem's edges, and every reason for silence."""

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from making import gaussian, seeded
from torch import nn

from companion import data, networks
from companion import rigor as verified
from companion.beyond_ntk import expressivity, vision
from companion.beyond_ntk.expressivity import certify_expressivity, separation
from companion.networks.reading import head
from companion.rigor import modules as enclosures


def softplus():
    return networks.Softplus(10.0)


def mlp(widths, seed=0, **options):
    return vision.mlp(widths, generator=torch.Generator().manual_seed(seed), **options)


def sequential(*widths, activation=nn.Tanh, bias=True, last_bias=True):
    parts = []
    for n_in, n_out in itertools.pairwise(widths[:-1]):
        parts += [nn.Linear(n_in, n_out, bias=bias), activation()]
    return nn.Sequential(*parts, nn.Linear(widths[-2], widths[-1], bias=last_bias)).double()


# --- Separation -------------------------------------------------------------------------------------------------------


def touching(xi, D):
    """All pairs whose boxes meet, in exact arithmetic."""
    exact = [[(Fraction(v) - Fraction(r), Fraction(v) + Fraction(r)) for v, r in zip(x, d, strict=True)]
             for x, d in zip(xi.tolist(), D.tolist(), strict=True)]  # fmt: skip
    return {
        (i, j)
        for i, j in itertools.combinations(range(len(exact)), 2)
        if all(a[0] <= b[1] and b[0] <= a[1] for a, b in zip(exact[i], exact[j], strict=True))
    }


@given(st.integers(0, 10**6))
def test_separation_against_all_pairs(seed):
    g = torch.Generator().manual_seed(seed)
    N, p = (int(n) for n in torch.randint(1, 9, (2,), generator=g))
    xi = torch.randint(0, 4, (N, p), generator=g).double() * 10.0 ** float(torch.randint(-9, 9, (), generator=g))
    D = (
        torch.rand(N, p, dtype=torch.float64, generator=g)
        * xi.abs().amax()
        * 10.0 ** -float(torch.randint(0, 9, (), generator=g))
    )
    if seed % 3 == 0:
        D = torch.zeros_like(D)
    truth, found = touching(xi, D), separation(xi, D, seed=seed)
    assert found.unresolved == len(found.pairs)
    assert truth <= set(found.pairs)  # never a false proof
    if not D.any():
        assert truth == set(found.pairs)  # and exact for exact points
    assert found.unresolved <= found.inspected <= N * (N - 1) // 2


def nested():
    """One wide interval, a neighbour that a second coordinate tells apart from it, and three that nothing tells apart.

    Sorted by lower end the wide one comes first, and everyone's neighbour is distinct from it.
    """
    xi = torch.tensor([[0.0, 0.0], [-9.0, 1.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    D = torch.tensor([[10.0, 0.0], *[[0.1, 0.0]] * 4], dtype=torch.float64)
    return xi, D


def test_neighbours_alone_would_prove_a_falsehood():
    xi, D = nested()
    neighbours = itertools.pairwise(range(5))  # already sorted by the lower ends of the first coordinate
    assert all(bool(((xi[i] - xi[j]).abs() > D[i] + D[j]).any()) for i, j in neighbours)
    assert touching(xi, D) == {(0, 2), (0, 3), (0, 4)}
    for seed in range(20):
        found = separation(xi, D, seed=seed)
        assert set(found.pairs) == {(0, 2), (0, 3), (0, 4)}
        assert found.inspected >= 3


def test_partners_cut_to_the_next_one_are_caught(monkeypatch):
    honest = expressivity._pairs

    def next_only(many, total):
        many = many.clip(max=1)
        return honest(many, int(many.sum()))

    monkeypatch.setattr(expressivity, "_pairs", next_only)
    xi, D = nested()
    assert any(not touching(xi, D) <= set(separation(xi, D, seed=seed).pairs) for seed in range(20))


def test_balls_that_touch_are_not_apart():
    """Dyadic numbers, nothing rounds: a gap of exactly ``D_i + D_j`` may be no gap."""
    xi = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    half = torch.full_like(xi, 0.5)
    assert separation(xi, half).pairs == [(0, 1), (1, 2)]
    assert separation(xi, half * (1 - 1e-12)).unresolved == 0
    one_sided = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    assert separation(xi, one_sided).pairs == [(0, 1), (0, 2), (1, 2)]


def test_projections_are_rounded_outward():
    """With equal numbers the computed projections agree; the intervals must meet for every seed."""
    xi = gaussian(1, 7).expand(3, 7).contiguous()
    for seed in range(50):
        found = separation(xi, seed=seed)
        assert found.inspected == 3
        assert found.unresolved == 3


def test_separation_scales_and_subnormals():
    for scale in (1e-300, 5e-324, 1e200):
        xi = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64) * scale
        assert separation(xi).unresolved == 0
    ulp = torch.tensor([[1.0, 2.0], [1.0, math.nextafter(2.0, 3.0)], [1.0, 2.0]], dtype=torch.float64)
    assert separation(ulp).pairs == [(0, 2)]
    zeros = torch.tensor([[0.0], [-0.0]], dtype=torch.float64)
    assert separation(zeros).pairs == [(0, 1)]


def test_separation_of_many_points():
    xi = gaussian(20_000, 12)
    found = separation(xi, torch.full_like(xi, 1e-9))
    assert found.unresolved == 0
    assert 0 < found.inspected < 10_000
    xi[17], xi[19_000] = xi[3], xi[3] + 1e-9
    assert separation(xi, torch.full_like(xi, 1e-9)).pairs == [(3, 17), (3, 19_000), (17, 19_000)]


def test_separation_counts_what_it_did_not_inspect():
    xi = torch.ones(50, 2, dtype=torch.float64)
    found = separation(xi, limit=100)
    assert (found.inspected, found.unresolved, len(found.pairs)) == (100, 50 * 49 // 2, 100)
    many = separation(torch.ones(200, 1, dtype=torch.float64))
    assert many.unresolved == 200 * 199 // 2
    assert len(many.pairs) == 1000


def test_the_seed_does_not_matter():
    xi, D = gaussian(60, 5), torch.full((60, 5), 1e-3, dtype=torch.float64)
    assert len({separation(xi, D, seed=s).unresolved for s in range(10)}) == 1


def test_equal_inputs():
    X = torch.tensor([[1.0, 0.0], [2.0, 1.0], [1.0, -0.0], [2.0, 1.0 + 2.0**-52]], dtype=torch.float64)
    groups = data.equal_inputs(X)
    assert groups[0] == groups[2]
    assert len(groups.unique()) == 3
    assert data.equal_inputs(X.reshape(4, 1, 2, 1)).tolist() == groups.tolist()


@pytest.mark.parametrize(
    ("xi", "D", "error", "message"),
    [
        (torch.ones(2, 2), None, TypeError, "xi has dtype torch.float32; torch.float64 is needed"),
        (torch.ones(2, 2).double(), -torch.ones(2, 2).double(), ValueError, "no radius below 0"),
        (
            torch.ones(2, 2).double(),
            torch.ones(2, 1).double(),
            ValueError,
            r"D has shape \(2, 1\); .*p = 2",
        ),
        (torch.ones(2).double(), None, ValueError, r"xi has shape \(2,\); \(N, p\) is needed"),
        (torch.ones(2, 2).double() * math.nan, None, ValueError, "finite numbers are needed"),
        (torch.ones(2, 200).double() * 1e308, None, ValueError, "xi overflows in a projection; smaller numbers"),
    ],
)
def test_bad_points(unchecked, xi, D, error, message):
    with pytest.raises(error, match=message):
        separation(xi, D)


# --- The theorem's edges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [networks.Softplus, nn.Tanh])
def test_width_is_sharp(activation):
    """N = 60: m = 58 never, m = 59 always; the linear network never."""
    for seed in range(20):
        X = gaussian(60, 8, seed=seed)
        short, enough = (mlp((8, m, 1), seed=seed, activation=activation) for m in (58, 59))
        assert certify_expressivity(short, X).reason == "width: m = 58; at least 59 is needed for N = 60"
        certificate = certify_expressivity(enough, X)
        assert certificate.holds
        assert certificate.status == "exact"  # the first layer is the wide one: xi = x
        linear = sequential(8, 59, 1, activation=nn.Identity)
        assert certify_expressivity(linear, X).reason.startswith("activation: Identity")


@pytest.mark.parametrize("activation", [networks.Softplus, nn.Tanh])
def test_rank_agrees_with_exact_arithmetic(activation):
    """What the certificate says of almost every wide layer holds for a random one, checked in fractions."""
    for seed in range(5):
        X = gaussian(12, 3, seed=seed)
        model = mlp((3, 4, 11, 2), seed=seed, activation=activation)
        assert certify_expressivity(model, X).holds
        h = enclosures.enclose(model, X, before=model.last)[0]
        M = torch.cat([h, torch.ones(12, 1).double()], dim=1)
        assert verified.exact_sigma_min_exceeds(M, 0.0)


def test_without_last_bias_one_more_neuron_is_needed():
    X = gaussian(9, 2)
    assert certify_expressivity(sequential(2, 8, 1, last_bias=False), X).reason.startswith("width: m = 8; at least 9")
    assert certify_expressivity(sequential(2, 9, 1, last_bias=False), X).holds
    assert certify_expressivity(sequential(2, 8, 1), X).holds


def test_without_wide_bias_odd_activations_lose_rank():
    model = sequential(1, 8, 1, bias=False)
    X = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]], dtype=torch.float64)
    assert certify_expressivity(model, X).reason == "bias: the wide layer has none, and odd activations then lose rank"
    h = enclosures.enclose(model, X, before=model[-1])[0]
    M = torch.cat([h, torch.ones(4, 1).double()], dim=1)
    assert torch.linalg.matrix_rank(M) == 3  # the reason is true


@pytest.mark.parametrize(
    "activation",
    [networks.Softplus, networks.Sine, nn.Tanh, nn.Sigmoid, nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU],
)
def test_analytic_activations(activation):
    assert certify_expressivity(sequential(3, 6, 2, activation=activation), gaussian(5, 3)).holds


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (nn.ReLU, "activation: ReLU (1) is not analytic; companion.networks.Softplus is"),
        (networks.Square, "activation: Square (1) is not listed"),
        (nn.Softplus, "activation: Softplus (1) is clipped, not analytic; use companion.networks.Softplus"),
        (nn.LeakyReLU, "activation: LeakyReLU (1) is not analytic; companion.networks.Softplus is"),
        (nn.Hardtanh, "activation: Hardtanh (1) is not listed"),
        (nn.Mish, "activation: Mish (1) is not listed"),
    ],
)
def test_other_activations_are_refused(activation, reason):
    model = nn.Sequential(nn.Linear(3, 6), activation(), nn.Linear(6, 2))
    certificate = certify_expressivity(model, gaussian(5, 3))
    assert not certificate.holds
    assert certificate.reason == reason


def test_a_sharpness_set_by_hand_is_looked_at():
    model = nn.Sequential(nn.Linear(3, 6), networks.Softplus(2.0), nn.Linear(6, 2)).double()
    assert certify_expressivity(model, gaussian(5, 3))
    for beta in (0.0, -1.0, math.inf, math.nan):
        model[1].beta = beta
        assert certify_expressivity(model, gaussian(5, 3)).reason.startswith("activation: Softplus (1) has beta = ")


def test_the_softplus_of_torch_gets_its_hint_as_a_function_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(F.softplus(self.wide(x)))

    words = "activation: softplus in Net is clipped, not analytic; use companion.networks.Softplus"
    assert certify_expressivity(Net(), gaussian(5, 3)).reason == words


def test_equal_means_over_two_axes_are_not_told_apart():
    """Two samples with the same rows in another order: pooled over both axes they are equal, and no more than rounding
    differs, which grows with all numbers of the window."""
    rows = torch.rand(3000, 2, generator=seeded(), dtype=torch.float64)
    X = torch.stack([rows, rows[torch.randperm(3000, generator=seeded())]])
    model = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    certificate = certify_expressivity(model.double(), X)
    assert not certificate.holds
    assert certificate.reason.startswith(("not_separated", "no_enclosure"))


def test_functions_as_activations():
    class Own(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.low, self.wide, self.last, self.act = nn.Linear(3, 2), nn.Linear(2, 6), nn.Linear(6, 2), act

        def forward(self, x):
            return self.last(self.act(self.wide(torch.relu(self.low(x)))))

    X = gaussian(5, 3)
    for act in (torch.sin, torch.erf, torch.tanh, torch.sigmoid, F.silu, F.gelu, lambda x: x.tanh(), lambda x: x.erf()):
        certificate = certify_expressivity(Own(act).double(), X)
        assert certificate.holds or certificate.reason.startswith("not_separated"), certificate
    for act in (torch.relu, F.softplus, torch.square, lambda x: x * x, lambda x: torch.tanh(x) + x):
        assert certify_expressivity(Own(act).double(), X).reason.startswith(("activation", "architecture"))


def test_digits_and_a_copied_image():
    X = data.digits(normalize=False).X[:300].clone()
    g = torch.Generator().manual_seed(0)
    model = vision.conv_resnet((1, 8, 8), (4, 4, 8), 300, 10, activation=softplus, generator=g)
    certificate = certify_expressivity(model, X)
    assert certificate.holds
    assert certificate.status == "certified"
    assert certificate.quantities["rank"] == 300
    assert certificate.quantities["width_needed"] == 299
    assert 0 < certificate.quantities["largest_radius"] < 1e-8
    assert certificate.status == "certified"
    assert not any(a.status == "assumed" for a in certificate.assumptions)
    X[250] = X[3]
    assert certify_expressivity(model, X).reason.startswith("equal_inputs: samples (3, 250) are equal")


def test_lower_layers_that_forget_are_named():
    """Two inputs that the first layer cannot tell apart, and two that it can, but not provably."""
    model = mlp((2, 3, 8, 1))
    with torch.no_grad():
        model[0].weight[:, 1] = 0
    X = gaussian(5, 2)
    X[4, 0] = X[1, 0]
    certificate = certify_expressivity(model, X)
    assert certificate.reason.startswith("not_separated: the lower features of samples (1, 4), known up to ")
    assert [a.measured for a in certificate.assumptions if a.name.startswith("pairs")] == [1]
    X[4, 0] = math.nextafter(float(X[1, 0]), math.inf)
    assert certify_expressivity(model, X).reason.startswith("not_separated")
    X[4, 0] += 1e-9
    assert certify_expressivity(model, X).holds


def test_relu_and_pools_below_are_allowed():
    lower = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(*lower, nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 2))
    torch.manual_seed(0)
    X = gaussian(20, 16)
    certificate = certify_expressivity(model, X)
    assert certificate.holds or certificate.reason.startswith("not_separated")


def test_batchnorm_in_training_mode_is_that_of_evaluation():
    g = torch.Generator().manual_seed(1)
    model = vision.conv_resnet((1, 4, 4), (2, 2, 4), 20, 3, activation=softplus, generator=g)
    X = gaussian(15, 16)
    training, evaluating = model.train(), copy.deepcopy(model).eval()
    assert certify_expressivity(training, X).to_dict() == certify_expressivity(evaluating, X).to_dict()
    assert model.training


def test_float32_networks_and_inputs():
    model = mlp((3, 4, 12, 2), dtype=torch.float32)
    X = gaussian(10, 3).float()
    assert certify_expressivity(model, X).holds
    assert (
        certify_expressivity(model, X).to_dict()
        == certify_expressivity(copy.deepcopy(model).double(), X.double()).to_dict()
    )


def test_seed_and_batch_do_not_change_the_verdict():
    model, X = mlp((3, 4, 40, 2)), gaussian(30, 3)
    verdicts = {certify_expressivity(model, X, seed=s, batch=b).holds for s in range(3) for b in (1, 7, 256)}
    assert verdicts == {True}


def test_one_sample():
    assert certify_expressivity(mlp((3, 1, 2)), gaussian(1, 3)).holds


# --- The end of a network ---------------------------------------------------------------------------------------------


def reason(model, X=None, **options):
    certificate = certify_expressivity(model, gaussian(5, 3) if X is None else X, **options)
    assert not certificate.holds
    return certificate.reason


def test_architectures_that_are_refused():
    wide, last = nn.Linear(3, 6), nn.Linear(6, 2)
    assert "must be a plain nn.Linear" in reason(nn.Sequential(wide, nn.Tanh(), last, nn.LogSoftmax(dim=1)))
    assert "BatchNorm1d (2) before the last layer" in reason(nn.Sequential(wide, nn.Tanh(), nn.BatchNorm1d(6), last))
    assert "Tanh (2) before the last layer" in reason(nn.Sequential(wide, nn.BatchNorm1d(6), nn.Tanh(), last))
    assert "nothing before the last layer" not in reason(nn.Sequential(nn.Tanh(), last), gaussian(5, 6))
    assert "not an activation after a dense layer" in reason(nn.Sequential(nn.Flatten(), nn.Linear(3, 6)))
    same = nn.Linear(6, 6)
    assert "used twice" in reason(nn.Sequential(same, nn.Tanh(), same), gaussian(5, 6))
    lower = nn.Linear(6, 6)
    assert "the wide layer is used twice" in reason(
        nn.Sequential(lower, nn.Tanh(), lower, nn.Tanh(), last), gaussian(5, 6)
    )
    tied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    tied[2].weight = tied[0].weight
    assert "the wide layer is used twice or shares its parameters" in reason(tied, gaussian(5, 6))
    tied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    tied[4].weight = tied[0].weight
    assert "the last layer is used twice or shares its parameters" in reason(tied, gaussian(5, 6))
    tokens = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    assert reason(tokens, gaussian(5, 2, 3)).startswith("no_enclosure: the wide layer's input has shape (2, 3)")


def test_the_skip_around_the_wide_layer_is_refused():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(torch.tanh(self.wide(x)) + x)

    assert "add in Skip before the last layer" in reason(Skip(), gaussian(5, 6))


def test_layers_without_enclosure_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    assert reason(model) == "no_enclosure: no enclosure for GELU (1)"
    model[1].register_forward_hook(lambda module, args, out: out)
    assert reason(model).startswith("no_enclosure: no enclosure for GELU (1): it has forward hooks")


def test_last_is_found_or_given():
    model, X = mlp((3, 4, 12, 2)), gaussian(10, 3)
    assert head(model).last.in_features == 12
    assert certify_expressivity(model, X, last=model.last).holds
    assert "must be a plain nn.Linear whose result is the model's output" in reason(model, X, last=model.wide)


def test_bad_arguments(unchecked):
    model, X = mlp((3, 4, 12, 2)), gaussian(10, 3)
    with pytest.raises(TypeError, match=r"last is a Tanh; a torch.nn.Linear is needed"):
        certify_expressivity(model, X, last=nn.Tanh())
    with pytest.raises(ValueError, match="Linear is not a part of the model"):
        certify_expressivity(model, X, last=nn.Linear(12, 2))
    with pytest.raises(ValueError, match=r"model calls no torch.nn.Linear as its last layer; one is needed"):
        certify_expressivity(nn.Sequential(nn.Tanh(), nn.Flatten()), X)
    with pytest.raises(ValueError, match=r"model is 3; a torch.nn.Module is needed"):
        certify_expressivity(3, X)
    for bad, error, message in (
        (X.long(), TypeError, "X has dtype torch.int64"),
        (X[:0], ValueError, r"X has shape \(0, 3\)"),
        (X * math.nan, ValueError, r"X\[0, 0\] is nan"),
        (X / 0, ValueError, r"X\[0, 0\] is -?inf"),
        (gaussian(10, 4), ValueError, "on which the model fails"),
    ):
        with pytest.raises(error, match=message):
            certify_expressivity(model, bad)
    with pytest.raises(ValueError, match="batch is 0"):
        certify_expressivity(model, X, batch=0)


def test_certificates_print():
    text = str(certify_expressivity(mlp((3, 4, 12, 2)), gaussian(10, 3)))
    assert "certified" in text
    assert "width m" in text
    assert "rank = 10" in text
