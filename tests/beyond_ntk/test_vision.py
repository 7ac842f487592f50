"""Networks for images: what they compute, how they start, and what they refuse."""

import math

import mpmath
import pytest
import torch
from making import seeded
from torch import nn

from companion import networks
from companion.beyond_ntk import vision


def test_softplus_is_the_function_of_the_theorems():
    x = torch.tensor([-80.0, -3.0, 0.0, 1e-3, 2.0, 19.9, 20.1, 300.0], dtype=torch.float64)
    for beta in (0.5, 1.0, 10.0):
        found = networks.Softplus(beta)(x)
        with mpmath.workdps(50):
            exact = [float(mpmath.log(1 + mpmath.exp(beta * mpmath.mpf(v))) / beta) for v in x.tolist()]
        torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=0)


def test_torchs_own_softplus_jumps_at_its_threshold():
    below = torch.tensor(20.0, dtype=torch.float64)
    above = torch.nextafter(below, torch.tensor(21.0, dtype=torch.float64))
    jump = nn.functional.softplus(below) - nn.functional.softplus(above)
    assert float(jump) == pytest.approx(2.06e-9, rel=5e-3)
    smooth = networks.Softplus()(below) - networks.Softplus()(above)
    assert abs(float(smooth)) < 1e-14


def test_softplus_has_the_logistic_derivative():
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    networks.Softplus(3.0)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.sigmoid(3 * x.detach()))


def test_mlp_is_its_formula():
    model = vision.mlp((3, 4, 7, 2), activation=lambda: networks.Softplus(2.0), generator=seeded())
    X = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)

    def s(z):
        return torch.log1p(torch.exp(2 * z)) / 2

    xi = s(X @ model.linear1.weight.T + model.linear1.bias)
    h = s(xi @ model.wide.weight.T + model.wide.bias)
    torch.testing.assert_close(model(X), h @ model.last.weight.T + model.last.bias)
    assert model[-1] is model.last
    assert model.wide.out_features == model.last.in_features == 7


def test_resnet_is_its_formula():
    model = vision.conv_resnet((1, 4, 4), (2, 2, 3), 9, 2, activation=nn.Tanh, generator=seeded()).eval()
    X = torch.randn(5, 16, generator=seeded(1), dtype=torch.float64)
    x = torch.tanh(model.stem[1](model.stem[0](X.reshape(5, 1, 4, 4))))
    for stage in (model.stage1, model.stage2):
        (block,) = stage
        body, shortcut = block[0].body, block[0].shortcut
        x = torch.tanh(body[4](body[3](torch.tanh(body[1](body[0](x))))) + shortcut(x))
    assert x.shape == (5, 3, 2, 2)
    h = torch.tanh(x.mean(dim=(2, 3)) @ model.wide.weight.T + model.wide.bias)
    torch.testing.assert_close(model(X), h @ model.last.weight.T + model.last.bias)


def test_resnet_of_eighteen_layers_has_the_usual_size():
    model = vision.conv_resnet(
        (3, 32, 32), (64, 64, 128, 256, 512), 10, 10, blocks=2, generator=seeded(), dtype=torch.float32
    )
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 17
    assert sum(m.weight.numel() for m in convolutions) == 10_987_200  # the known count without the 1 x 1 shortcuts
    assert model.pool.kernel_size == (4, 4)


@pytest.mark.parametrize("image", [(1, 1, 1), (2, 5, 3), (1, 8, 8)])
def test_resnet_takes_every_image(image):
    model = vision.conv_resnet(image, (3, 4, 5), 6, 2, blocks=2, generator=seeded()).eval()
    assert model(torch.zeros(4, math.prod(image), dtype=torch.float64)).shape == (4, 2)


def test_every_dtype_starts_from_the_same_numbers_and_nothing_global_moves():
    before = torch.get_rng_state()
    double, single = (
        vision.conv_resnet((1, 4, 4), (2, 3), 5, 2, generator=seeded(4), dtype=d)
        for d in (torch.float64, torch.float32)
    )
    for p, q in zip(double.parameters(), single.parameters(), strict=True):
        assert torch.equal(p.float(), q)
    # torch's constructors draw from the global generator; the builder must not leave a trace of that
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_scale():
    model = vision.mlp((400, 300, 20, 2), generator=seeded(2))
    model.requires_grad_(False)
    assert float(model.linear1.weight.std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert float(model.linear1.bias.abs().max()) <= 1 / 20
    assert float(model.linear1.bias.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.1)


def test_shift_moves_every_image_by_at_most_a_pixel():
    X = torch.zeros(64, 25, dtype=torch.float64)
    X[:, 12] = 1.0  # the middle of 5 x 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moved = vision.random_shift((1, 5, 5), 1)(X)
        still = vision.random_shift((1, 5, 5), 0)(X)
    assert torch.equal(still, X)
    assert torch.equal(moved.sum(1), torch.ones(64, dtype=torch.float64))
    places = {divmod(int(p), 5) for p in moved.argmax(1)}
    assert places == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: networks.Softplus(0.0), "beta is 0.0"),
        (lambda: networks.Softplus(math.nan), "beta is nan"),
        (lambda: vision.mlp((3, 2), generator=seeded()), "widths is"),
        (lambda: vision.mlp((3, 0, 2), generator=seeded()), "widths is"),
        (lambda: vision.conv_resnet((4, 4), (2, 3), 5, 2, generator=seeded()), "image is"),
        (lambda: vision.conv_resnet((1, 4, 4), (2,), 5, 2, generator=seeded()), "channels, wide"),
        (lambda: vision.conv_resnet((1, 4, 4), (2, 3), 0, 2, generator=seeded()), "channels, wide"),
        (lambda: vision.random_shift((1, 4, 4), -1), "pixels is -1"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
