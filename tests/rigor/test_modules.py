"""The walker: whole networks against ball arithmetic, and everything that it must refuse by name."""

import copy
import itertools
import math
import re
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion import networks
from companion.beyond_ntk import vision
from companion.rigor import balls, modules
from companion.rigor.modules import NoEnclosure

try:
    import flint
except ImportError:  # the extra `certify`
    flint = None

needs_flint = pytest.mark.skipif(flint is None, reason="python-flint is not installed")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- The same networks in ball arithmetic -----------------------------------------------------------------------------


def true_max(values):
    best = values[0]
    for v in values[1:]:
        best = v if v >= best else best
    return best


def true_layer(module, x):
    """One layer in ball arithmetic: x is a list of numbers, or of channels, each a list of rows."""
    arb = flint.arb
    if isinstance(module, nn.Sequential):
        for part in module:
            x = true_layer(part, x)
        return x
    if isinstance(module, networks.Residual):
        return zipped(lambda a, b: a + b, true_layer(module.body, x), true_layer(module.shortcut, x))
    if isinstance(module, nn.Linear):
        bias = [0.0] * module.out_features if module.bias is None else module.bias.tolist()
        rows = zip(module.weight.tolist(), bias, strict=True)
        return [sum((arb(w) * v for w, v in zip(row, x, strict=True)), arb(b)) for row, b in rows]
    if isinstance(module, nn.Conv2d):
        return true_convolution(module, x)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        stored = (module.running_mean, module.running_var, module.weight, module.bias)
        columns = zip(x, *(t.tolist() for t in stored), strict=True)
        root = {v: (arb(v) + arb(module.eps)).sqrt() for v in module.running_var.tolist()}
        return [
            mapped(lambda y, m=m, v=v, g=g, b=b: arb(g) * (y - arb(m)) / root[v] + arb(b), c)
            for c, m, v, g, b in columns
        ]
    if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        flat = [[v for row in channel for v in row] for channel in x]  # every pool here takes the whole image
        return [[[sum(c[1:], c[0]) / len(c)]] for c in flat]
    if isinstance(module, nn.MaxPool2d):
        return [[[true_max([v for row in channel for v in row])]] for channel in x]
    if isinstance(module, nn.Flatten):
        return [v for channel in x for row in channel for v in row]
    if isinstance(module, nn.Unflatten):
        C, H, W = module.unflattened_size
        return [[[x[(c * H + i) * W + j] for j in range(W)] for i in range(H)] for c in range(C)]
    pointwise = {
        nn.ReLU: lambda v: true_max([v, arb(0)]),
        nn.Tanh: lambda v: v.tanh(),
        nn.Sigmoid: lambda v: 1 / (1 + (-v).exp()),
        networks.Softplus: lambda v: (1 + (arb(module.beta) * v).exp()).log() / arb(module.beta),
        nn.Identity: lambda v: v,
        nn.Dropout: lambda v: v,
    }
    return mapped(pointwise[type(module)], x)


def mapped(f, x):
    return [mapped(f, v) for v in x] if isinstance(x, list) else f(x)


def zipped(f, x, y):
    return [zipped(f, a, b) for a, b in zip(x, y, strict=True)] if isinstance(x, list) else f(x, y)


def true_convolution(module, x):
    (H, W), stride, padding = (len(x[0]), len(x[0][0])), module.stride[0], module.padding[0]
    weight = module.weight.tolist()
    size = len(weight[0][0])
    bias = [0.0] * len(weight) if module.bias is None else module.bias.tolist()
    out = []
    for kernel, b in zip(weight, bias, strict=True):
        rows, columns = ((n + 2 * padding - size) // stride + 1 for n in (H, W))
        channel = [[flint.arb(b)] * columns for _ in range(rows)]
        for i, j in itertools.product(range(rows), range(columns)):
            for c, p, q in itertools.product(range(len(x)), range(size), range(size)):
                a, e = i * stride - padding + p, j * stride - padding + q
                if 0 <= a < H and 0 <= e < W:
                    channel[i][j] += flint.arb(kernel[c][p][q]) * x[c][a][e]
        out.append(channel)
    return out


def mlp(g, seed):
    """A random perceptron; the seed chooses depth, widths, activation, BatchNorm, and a hostile scaling."""
    widths = [int(n) for n in torch.randint(1, 5, (2 + seed % 3,), generator=g)]
    widths = [widths[0]] * len(widths) if seed % 7 == 0 else widths
    activation = (nn.ReLU, nn.Tanh, nn.Sigmoid, networks.Softplus, lambda: networks.Softplus(10.0))[seed // 4 % 5]
    parts = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b, bias=seed % 5 > 0), activation()]
        if seed % 3 == 0:
            parts.insert(-1, nn.BatchNorm1d(b))
        if seed % 7 == 0:
            parts = [*parts[:-2], networks.Residual(nn.Sequential(*parts[-2:]), nn.Identity())]
    return nn.Sequential(*parts, nn.Dropout(), nn.Linear(widths[-1], 2)), (widths[0],)


def resnet(g, seed):
    """A small convolutional residual network with BatchNorm, the kind that `vision.conv_resnet` makes."""
    activation = (nn.ReLU, nn.Tanh, networks.Softplus)[seed % 3]
    pool = (nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2), nn.AvgPool2d(2))[seed // 3 % 3]
    body = nn.Sequential(nn.Conv2d(2, 2, 2, stride=2, bias=False), nn.BatchNorm2d(2))
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 2, padding=1), activation(),
        networks.Residual(body, nn.Conv2d(2, 2, 1, stride=2)), activation(), pool, nn.Flatten(), nn.Linear(2, 2),
    ), (9,)  # fmt: skip


def randomize(model, g, seed):
    """Random parameters and statistics: of ordinary size, nearly cancelling, tiny or large."""
    model, scale = model.double() if seed % 2 else model.float(), (1.0, 1.0, 1e-8, 30.0, 1e-160)[seed % 5]
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.randn(t.shape, generator=g, dtype=torch.float64) * scale)
            if name.endswith("running_var"):
                t.abs_()
            elif t.ndim == 2 and t.shape[1] > 1 and seed % 4 == 1:
                t[:, 1] = -t[:, 0] * (1 + 1e-15)
    return model


def trials(make, seeds, samples):
    """Outputs outside their ball, with the computed radius and with radius zero, and the number of samples tried."""
    outside, outside_zero, count = 0, 0, 0
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        model, shape = make(g, seed)
        model = randomize(model, g, seed).train(seed % 2 == 0)
        X = torch.randn(samples, *shape, generator=g, dtype=torch.float64) * (1.0, 1e-3, 1e3)[seed % 3]
        if seed % 4 == 1 and shape[0] > 1:
            X[:, 1] = X[:, 0]  # now the first dense layer cancels
        X = X if seed % 2 else X.float()
        value, radius = modules.enclose(model, X)
        with flint.ctx.workprec(400):
            for x, q, D in zip(X.double().tolist(), value.tolist(), radius.tolist(), strict=True):
                exact = true_layer(model, [flint.arb(v) for v in x])
                errors = [abs(flint.arb(b) - t) for b, t in zip(q, exact, strict=True)]
                outside += not all(e <= flint.arb(r) for e, r in zip(errors, D, strict=True))
                outside_zero += any(e > 0 for e in errors)
                count += 1
    return outside, outside_zero, count


@pytest.mark.slow
@needs_flint
@pytest.mark.parametrize(("make", "networks", "samples"), [(mlp, 1120, 8), (resnet, 216, 5)])
def test_ten_thousand_random_trials(make, networks, samples):
    outside, outside_zero, count = trials(make, range(networks), samples)
    assert outside == 0
    assert count == networks * samples
    assert outside_zero > count / 3  # a radius of zero would be caught


def chain(layer, image=False):
    """A first layer that cancels, so that its radius matters, and then the layer in question."""

    def make(g, seed):
        first = nn.Linear(2, 4)
        parts = [nn.Unflatten(1, (1, 2, 2)), layer(), nn.Flatten()] if image else [layer()]
        return nn.Sequential(first, *parts), (2,)

    return make


@needs_flint
@pytest.mark.parametrize(
    ("rule", "make"),
    [
        ("dense_ball", chain(lambda: nn.Linear(4, 1))),
        ("conv2d_ball", chain(lambda: nn.Conv2d(1, 1, 1), image=True)),
        ("batchnorm_ball", chain(lambda: nn.BatchNorm1d(4))),
        ("add_ball", chain(lambda: networks.Residual(nn.Identity(), nn.Identity()))),
        ("avgpool_ball", chain(lambda: nn.AdaptiveAvgPool2d(1), image=True)),
        ("maxpool_ball", chain(lambda: nn.MaxPool2d(2), image=True)),
        ("relu_ball", chain(nn.ReLU)),
        ("tanh_ball", chain(nn.Tanh)),
        ("sigmoid_ball", chain(nn.Sigmoid)),
        ("softplus_ball", chain(networks.Softplus)),
    ],
)
def test_a_layer_that_forgets_a_radius_is_caught(monkeypatch, rule, make):
    honest = getattr(balls, rule)
    seeds = range(1, 401, 4)  # of these the first layer cancels

    def forgetful(value, radius, *rest, **options):
        if rule == "add_ball":
            return honest(value, torch.zeros_like(radius), rest[0], torch.zeros_like(radius))
        return honest(value, torch.zeros_like(radius), *rest, **options)

    def mute(value, radius, *rest, **options):
        value, radius = honest(value, radius, *rest, **options)
        return value, torch.zeros_like(radius)

    assert trials(make, seeds, 2)[0] == 0
    monkeypatch.setattr(modules, "_check_against_forward", lambda *arguments: None)
    monkeypatch.setattr(balls, rule, forgetful)
    assert rule == "dense_ball" or trials(make, seeds, 2)[0] > 0  # the first layer is dense: no radius to forget
    monkeypatch.setattr(balls, rule, mute)
    assert trials(make, seeds, 2)[0] > 0


def test_trials_cover_every_layer():
    made = [make(torch.Generator(), seed)[0] for make in (mlp, resnet) for seed in range(400)]
    seen = {type(part) for model in made for part in model.modules()}
    untested = {nn.Softplus, nn.Dropout1d, nn.Dropout2d}  # below, and identities
    assert set(modules.MODULES) - seen == untested


# --- Networks of the user ---------------------------------------------------------------------------------------------


def resnet_of_digits(wide=40, activation=lambda: networks.Softplus(10.0)):
    g = torch.Generator().manual_seed(0)
    return vision.conv_resnet((1, 8, 8), (4, 4, 8), wide, 10, activation=activation, generator=g)


class Own(nn.Module):
    """A module of the user's own, with functions, a skip and a view."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        x = x + torch.tanh(x)
        x = F.adaptive_avg_pool2d(F.avg_pool2d(x, 1), (2, 2)).relu()
        return self.last(x.view(x.size(0), -1))


def seeded(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for t in model.state_dict().values():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape, generator=g, dtype=torch.float64))
    return model


def test_own_module_and_own_resnet():
    for model, X in ((seeded(Own()), gaussian(7, 1, 8, 8)), (resnet_of_digits(), gaussian(9, 64))):
        model = model.double()
        value, radius = modules.enclose(model, X)
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(X)
        assert ((value - expected).abs() <= 2 * radius).all()
        assert radius.max() < 1e-6 * (1 + value.abs().max())


def test_views_and_shapes():
    class Shapes(Own):
        def forward(self, x):
            x = F.adaptive_avg_pool2d(self.conv(x), 2)
            return self.last(x.reshape(x.shape[0], -1).flatten(1))

    class Method(Own):
        def forward(self, x):
            x = F.adaptive_avg_pool2d(F.dropout(self.conv(x), 0.9, training=self.training), output_size=2)
            return self.last(torch.flatten(F.sigmoid(torch.sigmoid(x.add(x).tanh()).sigmoid()), 1))

    for model in (Shapes(), Method()):
        model, X = seeded(model).double().eval(), gaussian(3, 1, 8, 8)
        value, radius = modules.enclose(model, X)
        assert ((value - model(X).detach()).abs() <= 2 * radius).all()
        assert radius.max() < 1e-12 * value.abs().max()


def test_before_and_blocks():
    model, X = resnet_of_digits(), gaussian(11, 64)
    whole = modules.enclose(model, X, before=model.wide)
    parts = list(modules.blocks(model, X, before=model.wide, batch=4))
    assert [len(v) for v, _ in parts] == [4, 4, 3]
    assert whole[0].shape == (11, 8)
    torch.testing.assert_close(torch.cat([v for v, _ in parts]), whole[0], rtol=1e-12, atol=1e-12)
    xi = nn.Sequential(*list(model.eval())[:-3])(X).detach()
    assert ((whole[0] - xi).abs() <= 2 * whole[1]).all()
    again = modules.enclose(modules.read(model), X, before=model.wide)
    assert torch.equal(again[0], whole[0])


def test_the_first_layer_sees_exact_inputs():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    value, radius = modules.enclose(model, gaussian(5, 2, 2), before=model[1])
    assert torch.equal(value, gaussian(5, 2, 2).flatten(1))
    assert not radius.any()


def test_nothing_of_the_user_changes():
    model = resnet_of_digits().float().train()
    before, X = copy.deepcopy(model.state_dict()), gaussian(6, 64).float()
    state, kept = torch.get_rng_state(), X.clone()
    modules.enclose(model, X)
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert all(part.training for part in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(X, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_parameters_are_cast_exactly():
    model, X = vision.mlp((3, 4, 5, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float32), gaussian(4, 3)
    double = copy.deepcopy(model).double()
    assert torch.equal(modules.enclose(model, X.float())[0], modules.enclose(double, X.float().double())[0])


def test_clipped_softplus_carries_its_jump():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Softplus(threshold=5.0)).double()
    nn.init.ones_(model[0].weight)
    X = torch.linspace(-8, 8, 400, dtype=torch.float64)[:, None]
    value, radius = modules.enclose(model, X)
    assert ((value - model(X).detach()).abs() <= radius).all()
    assert radius.min() >= math.log1p(math.exp(-5.0))


# --- What has no enclosure --------------------------------------------------------------------------------------------


def refusal(model, X=None, **options):
    with pytest.raises(NoEnclosure) as caught:
        modules.enclose(model, gaussian(4, 1, 8, 8) if X is None else X, **options)
    return str(caught.value)


def own(forward):
    """A module of the user's own with this forward."""
    return seeded(type("Mine", (Own,), {"forward": forward})())


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.GELU(), "GELU"),
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.GroupNorm(2, 4), "GroupNorm"),
        (nn.LeakyReLU(), "LeakyReLU"),
        (nn.Softmax(dim=1), "Softmax"),
        (networks.Square(), "Square"),
        (networks.Sine(), "Sine"),
        (nn.BatchNorm1d(4, track_running_stats=False), "BatchNorm1d without stored statistics"),
        (nn.Linear(4, 4, dtype=torch.complex64), "complex parameters"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear|linear in"),
        (type("MyLinear", (nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight)})(4, 4), "MyLinear"),
        (type("MyReLU", (nn.ReLU,), {"forward": lambda self, x: x.clamp(min=-1)})(), "clamp in MyReLU"),
    ],
)
def test_a_layer_without_enclosure_is_named(layer, name):
    message = refusal(nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1)), gaussian(5, 3))
    assert re.search(name, message), message
    assert message.startswith("no enclosure for ")


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda self, x: self.last(torch.sin(self.conv(x)).flatten(1)[:, :16]), "sin in Mine"),
        (lambda self, x: self.last((self.conv(x) + 1.0).flatten(1)), "a sum with a constant"),
        (lambda self, x: self.last(self.conv(x) * 2), "mul in Mine"),
        (lambda self, x: torch.relu(self.conv(x)[0]), "an index, at getitem in Mine"),
        (lambda self, x: torch.relu(x.shape), "no enclosure for relu in Mine"),
        (lambda self, x: x.shape, "it is no tensor"),
        (lambda self, x: F.dropout(self.conv(x)), "dropout in training mode, at dropout in Mine"),
        (lambda self, x: self.last(x.reshape(-1, 16)), "mixes samples"),
        (lambda self, x: self.last(x.flatten()), "mixes samples"),
        (lambda self, x: self.last(torch.zeros(4, 16)), "_tensor_constant0 outside a layer"),
        (lambda self, x: self.last(self.conv(x) if x.sum() > 0 else x), "Mine: it cannot be traced"),
        (lambda self, x: self.last(F.linear(x, self.last.weight)), "last.weight outside a layer|linear in Mine"),
        (lambda self, x: (x, x), "its output is not one tensor"),
        (lambda self, x: self.conv(x) + self.conv(x).flatten(1), "equal shapes are needed"),
        (lambda self, x: torch.relu(x).T, "getattr in Mine|the attribute T"),
    ],
)
def test_a_function_without_enclosure_is_named(unchecked, forward, name):
    class Mine(Own):
        pass

    Mine.forward = forward
    network = modules.read(seeded(Mine())) if "traced" not in name else None
    if network is None:
        message = refusal(seeded(Mine()))
    else:  # the walk alone, so that a forward that fails on these shapes is no excuse
        with pytest.raises(NoEnclosure) as caught:
            modules._run(network, gaussian(4, 1, 8, 8), modules._output(network))
        message = str(caught.value)
    assert re.search(name, message), message


def test_hooks_and_replaced_forwards_are_refused():
    X = gaussian(4, 3)
    for change in ("hook", "pre", "forward", "norm"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
        if change == "hook":
            model[1].register_forward_hook(lambda module, args, out: 2 * out)
        elif change == "pre":
            model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        elif change == "forward":
            model[1].forward = lambda x: 2 * x
        else:
            model[0].weight = nn.Parameter(model[0].weight.detach())
            model.register_forward_pre_hook(lambda module, args: None)
        assert "it has forward hooks or a replaced forward" in refusal(model, X)


def test_overwritten_numbers_are_refused():
    """An in-place layer whose input someone else reads computes another function than the drawing says."""

    def twice(self, x):
        h = self.conv(x)
        return F.relu(h, inplace=True) + h

    def view(self, x):
        h = self.conv(x)
        return self.last(F.relu(h.flatten(1), True)) + h

    def alias(self, x):
        h = self.conv(x)
        before = h
        h += torch.tanh(h)
        return h + before

    def harmless(self, x):
        h = torch.relu(self.conv(x))
        h += torch.tanh(self.conv(x))
        return h

    assert "it overwrites what another operation reads" in refusal(own(twice))
    network = modules.read(own(view))
    with pytest.raises(NoEnclosure, match="overwrites"):
        modules._run(network, gaussian(4, 1, 8, 8), modules._output(network))
    assert "its forward computes something else" in refusal(own(alias))
    model = own(harmless).double()
    value, radius = modules.enclose(model, gaussian(4, 1, 8, 8))
    assert ((value - model(gaussian(4, 1, 8, 8)).detach()).abs() <= 2 * radius).all()
    chain = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.Linear(3, 1))
    modules.enclose(chain, gaussian(4, 3))
    shared = nn.ReLU(inplace=True)
    skip = nn.Sequential(nn.Linear(3, 3), networks.Residual(shared, nn.Identity()), nn.Linear(3, 1))
    assert "overwrites" in refusal(skip, gaussian(4, 3))


def test_a_misread_network_is_refused(monkeypatch):
    """The second line of defence: a wrong rule is noticed on the first rows."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    monkeypatch.setitem(modules.MODULES, nn.Tanh, lambda module, h, D: (h, D))
    assert refusal(model, gaussian(4, 3)) == "no enclosure for Sequential: its forward computes something else"
    assert "its forward computes something else" in refusal(model, gaussian(4, 3), before=model[2])


def test_convolutions_and_pools_out_of_reach():
    assert "padding_mode 'reflect'" in refusal(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    with pytest.warns(UserWarning, match="even kernel lengths"):  # PyTorch's own
        assert "padding 'same' and an even window" in refusal(nn.Conv2d(1, 1, 2, padding="same"))
    assert "return_indices" in refusal(nn.Sequential(nn.MaxPool2d(2, return_indices=True)))


def test_conv_options_of_the_module():
    X = gaussian(3, 4, 9, 8)
    for options in ({"padding": "valid"}, {"padding": "same", "dilation": 2}, {"groups": 2, "stride": (2, 1)}):
        model = nn.Conv2d(4, 6, 3, **options).double()
        value, radius = modules.enclose(model, X)
        assert ((value - model(X).detach()).abs() <= 2 * radius).all()


def test_overflow_is_refused():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).double()
    for p in model.parameters():
        nn.init.constant_(p, 1e200)
    assert "overflow" in refusal(model, torch.ones(2, 1)) or "finite" in refusal(model, torch.ones(2, 1))
    assert "finite numbers are needed" in refusal(nn.Sequential(*model, nn.Tanh()), torch.ones(2, 1))


def test_called_twice():
    layer = nn.Linear(3, 3)
    assert "it is called 2 times, not once" in refusal(
        nn.Sequential(layer, nn.Tanh(), layer), gaussian(4, 3), before=layer
    )


# --- Bad input --------------------------------------------------------------------------------------------------------

LINE = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ([[1.0]], TypeError, "X is a list; a torch.Tensor is needed"),
        (torch.ones(2, 3).long(), TypeError, "X is torch.int64; torch.float32 or torch.float64 is needed"),
        (torch.ones(2, 3).half(), TypeError, "X is torch.float16; torch.float32 or torch.float64 is needed"),
        (torch.ones(0, 3), ValueError, r"X has shape \(0, 3\); \(N, ...\) with at least one sample and one feature"),
        (torch.ones(3), ValueError, r"X has shape \(3,\)"),
        (torch.ones(2, 3) * math.nan, ValueError, "X holds NaN or infinity; finite numbers are needed"),
        (torch.ones(2, 3) * math.inf, ValueError, "X holds NaN or infinity"),
        (torch.ones(2, 4), ValueError, r"X has shape \(4,\) a sample, on which the model fails"),
    ],
)
def test_bad_inputs(unchecked, X, error, message):
    with pytest.raises(error, match=message):
        modules.enclose(LINE, X)


def test_bad_arguments(unchecked):
    X = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"model is a function; a torch.nn.Module is needed"):
        modules.enclose(torch.relu if False else (lambda x: x), X)
    with pytest.raises(ValueError, match="batch is 0; an integer >= 1 is needed"):
        modules.enclose(LINE, X, batch=0)
    with pytest.raises(TypeError, match=r"batch is 2.5; an integer is needed"):
        modules.enclose(LINE, X, batch=2.5)
    with pytest.raises(ValueError, match="Linear is not a part of the model; one of its own modules is needed"):
        modules.enclose(LINE, X, before=nn.Linear(3, 2))


# --- Pools ------------------------------------------------------------------------------------------------------------


def pooled(X, size):
    """The means of an adaptive pool over the last two axes, in fractions."""

    def windows(n, m):
        return [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]

    rows, columns = (windows(n, m) for n, m in zip((len(X), len(X[0])), size, strict=True))
    return [
        sum((Fraction(X[a][b]) for a in r for b in c), Fraction(0)) / (len(r) * len(c)) for r in rows for c in columns
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("axes", [3, 4])
def test_adaptive_pools_of_three_and_four_axes(size, axes):
    x = torch.rand(2, 3000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = x if axes == 3 else x[:, None]
    value, radius = modules.enclose(nn.AdaptiveAvgPool2d(size), X)
    exact = [mean for sample in x.tolist() for mean in pooled(sample, size)]
    for v, r, mean in zip(value.flatten().tolist(), radius.flatten().tolist(), exact, strict=True):
        assert abs(Fraction(v) - mean) <= Fraction(r)
    assert float(radius.max()) < 1e-11


def test_rows_in_another_order_are_not_told_apart_by_a_pool():
    """Two inputs whose means are equal: a count of one axis for two once took them for different."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3000, 2, generator=g, dtype=torch.float64)
    X = torch.stack([x, x[torch.randperm(3000, generator=g)]])
    value, radius = modules.enclose(nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten()), X)
    assert bool(((value[0] - value[1]).abs() <= radius[0] + radius[1]).all())


class InPlace(nn.Module):
    """Moves its input, which is harmless for the batches of a loader."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        x += x
        return self.last(x)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), InPlace()])
def test_a_forward_that_works_in_place_leaves_the_inputs_alone(model):
    X = gaussian(5, 3)
    before = X.clone()
    value, radius = modules.enclose(model, X)
    assert torch.equal(X, before)
    again = model.double()(before.clone())
    assert bool(((value - again).abs() <= 4 * radius).all())
