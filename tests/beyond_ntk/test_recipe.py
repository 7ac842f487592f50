"""The recipe: what it freezes, what it repeats, and what it refuses."""

import math

import pytest
import torch
from making import seeded
from torch import nn

from companion.beyond_ntk import last_layer, vision
from companion.beyond_ntk import recipe as two_phase
from companion.beyond_ntk.recipe import relative_noise


def images(N=40, K=3, dtype=torch.float32):
    X = torch.randn(N, 16, generator=seeded(1), dtype=torch.float32).to(dtype)
    return X, torch.arange(N) % K


def resnet(seed=0, dropout=0.3, dtype=torch.float32):
    return vision.conv_resnet((1, 4, 4), (3, 4), 45, 3, dropout=dropout, generator=seeded(seed), dtype=dtype)


def sgd(params):
    return torch.optim.SGD(params, 0.05, momentum=0.9)


def run(model, tau=2, X=None, y=None, optimizer=sgd, seed=7, **options):
    X0, y0 = images()
    options = {"batch": 16, "augment": vision.random_shift((1, 4, 4), 1)} | options
    return two_phase.two_phase(
        model,
        model.last,
        X0 if X is None else X,
        y0 if y is None else y,
        optimizer,
        tau,
        generator=seeded(seed),
        **options,
    )


# --- phase 1 is the plain algorithm -----------------------------------------------------------------------------------


def test_without_phase_two_it_is_the_plain_run():
    model, plain = resnet(), resnet()
    result = run(model, tau=3, noise=None, phase2=None)
    X, y = images()
    seed = int(torch.randint(2**62, (), generator=seeded(7)))
    shift = vision.random_shift((1, 4, 4), 1)
    rule = sgd(plain.parameters())
    plain.train()
    means = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(3):
            total = 0.0
            for part in torch.randperm(40, generator=torch.Generator().manual_seed(seed + epoch)).split(16):
                rule.zero_grad()
                loss = last_layer.pointwise(plain(shift(X[part])), y[part], "cross_entropy").mean()
                loss.backward()
                rule.step()
                total += float(loss.detach()) * len(part)
            means.append(total / 40)
    for (name, p), (_, q) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(p, q), name
    assert result.phase1.tolist() == means
    assert result.phase2 is None
    assert result.loss == result.noisy == pytest.approx(result.before, rel=1e-6)  # single precision


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    run(resnet())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "make",
    [
        sgd,
        lambda p: torch.optim.Adam(p, 1e-2),
        lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, 1e-4),
        lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    ],
)
def test_every_optimizer_lowers_the_loss(make):
    result = run(resnet(dropout=0.0), tau=12, optimizer=make, augment=None, batch=40)
    assert float(result.phase1[-1]) < float(result.phase1[0])
    assert result.loss < result.noisy


def test_an_optimizer_that_exists_is_used():
    model = resnet()
    rule = torch.optim.SGD(model.parameters(), 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    run(model, optimizer=rule, noise=None, phase2=None)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_squared_loss_with_targets():
    _, y = images()
    Y = nn.functional.one_hot(y).float()
    result = run(resnet(), y=Y, loss="squared", phase2="least_squares", tau=1)
    assert result.loss < 1e-15  # 45 features and a constant for 40 samples
    assert result.M.shape == (40, 46)


# --- phase 2 freezes what it must -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(two_phase.METHODS))
def test_phase_two_changes_only_the_last_layer(method, monkeypatch):
    frozen = {}
    inner = two_phase.METHODS[method]
    model = resnet()

    def watch(M, V, Y, **options):
        frozen.update({k: v.clone() for k, v in model.state_dict().items()})
        return inner(M, V, Y, **options)

    monkeypatch.setitem(two_phase.METHODS, method, watch)
    options = {} if method in ("least_squares", "momentum_sgd") else {"steps": 30}
    result = run(model, phase2=method, options=options)
    for name, value in model.state_dict().items():
        same = torch.equal(value, frozen[name])
        assert same != name.startswith("last."), name
    assert not model.training
    assert all(p.dtype == torch.float64 for p in model.parameters())
    # the numbers in the result are the model's
    X, y = images(dtype=torch.float64)
    torch.testing.assert_close(two_phase.with_constant(two_phase.last_layer_features(model, model.last, X)), result.M)
    assert float(nn.functional.cross_entropy(model(X), y).detach()) == pytest.approx(result.loss, rel=1e-9)
    torch.testing.assert_close(two_phase.last_weights(model.last), result.phase2.V)


def test_noise_comes_before_phase_two_and_only_where_it_is_asked_for():
    quiet, everywhere, wide = resnet(), resnet(), resnet()
    run(quiet, noise=None, phase2=None)
    run(everywhere, phase2=None)
    run(wide, phase2=None, where="wide")
    names = [n for n, _ in quiet.named_parameters()]
    states = [m.state_dict() for m in (quiet, everywhere, wide)]
    for name in states[0]:
        a, b, c = (s[name] for s in states)
        assert torch.equal(a, b) == (name not in names or name.startswith("last."))
        assert torch.equal(a, c) == (not name.startswith("wide."))


def test_casting_is_exact():
    single, double = resnet(), resnet()
    run(single, noise=None, phase2=None)
    run(double, noise=None, phase2="gd", options={"steps": 1})
    for name, p in single.named_parameters():
        if not name.startswith("last."):
            assert torch.equal(p.double(), dict(double.named_parameters())[name])


def test_momentum_goes_on_where_the_base_was():
    # with nothing hidden, phase 2 by momentum SGD is the plain run, shuffles aside; both see each sample equally often
    model = nn.Sequential(nn.Linear(16, 3)).double()
    vision.initialize(model, seeded())
    X, y = images(dtype=torch.float64)
    seen = {}
    inner = two_phase.METHODS["momentum_sgd"]

    def watch(M, V, Y, **options):
        seen.update(options)
        return inner(M, V, Y, **options)

    two_phase.METHODS["momentum_sgd"] = watch
    try:
        two_phase.two_phase(
            model, model[0], X, y, sgd, 2, phase2="momentum_sgd", noise=None, batch=40, generator=seeded(),
            options={"epochs": 3},
        )  # fmt: skip
    finally:
        two_phase.METHODS["momentum_sgd"] = inner
    plain = nn.Sequential(nn.Linear(16, 3)).double()
    vision.initialize(plain, seeded())
    rule = sgd(plain.parameters())
    for _ in range(5):
        rule.zero_grad()
        nn.functional.cross_entropy(plain(X), y).backward()
        rule.step()
    assert (seen["step"], seen["momentum"], seen["batch"]) == (0.05, 0.9, 40)
    torch.testing.assert_close(model[0].weight, plain[0].weight)
    torch.testing.assert_close(model[0].bias, plain[0].bias)


def test_no_bias_no_constant_column():
    model = nn.Sequential(nn.Linear(16, 50), nn.Tanh(), nn.Linear(50, 3, bias=False)).double()
    vision.initialize(model, seeded())
    X, y = images(dtype=torch.float64)
    result = two_phase.two_phase(
        model, model[2], X, y, sgd, 1, phase2="nesterov", options={"steps": 20}, generator=seeded()
    )
    assert result.M.shape == (40, 50)
    assert result.loss < result.noisy


# --- features ---------------------------------------------------------------------------------------------------------


def test_features_are_the_inputs_of_the_last_layer_in_eval_mode():
    model = resnet(dtype=torch.float64).train()
    model.stem.eval()
    X, _ = images(dtype=torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    h = two_phase.last_layer_features(model, model.last, X, batch=7)
    assert model.training
    assert not model.stem.training  # every part is back in its own mode
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(h, model.eval()[:-1](X).detach(), rtol=1e-12, atol=1e-12)
    assert not h.requires_grad


def test_features_of_other_layouts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(16, 16)

        def forward(self, x):
            return self.last(self.last(x))

    class After(Twice):
        def forward(self, x):
            return torch.relu(self.last(x))

    X, _ = images()
    with pytest.raises(ValueError, match="ran 2 times"):
        two_phase.last_layer_features(m := Twice(), m.last, X)
    with pytest.raises(ValueError, match="not the model's output"):
        two_phase.last_layer_features(m := After(), m.last, X)


def test_exploded_features_are_named():
    model = resnet()
    with torch.no_grad():
        model.wide.bias[0] = math.inf
    with pytest.raises(ValueError, match="features hold NaN"):
        two_phase.last_layer_features(model, model.last, images()[0])


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_has_the_size_of_the_root_mean_square():
    p = torch.full((200, 200), 3.0, dtype=torch.float64)  # standard deviation 0
    moved = relative_noise([p], 1e-2, generator=seeded())
    assert float((p - 3).std()) == pytest.approx(0.03, rel=0.01)
    assert moved == pytest.approx(1e-2, rel=0.01)


def test_noise_reaches_zeros_and_single_numbers():
    zeros, one = torch.zeros(50, 50), torch.ones(1)
    relative_noise([zeros, one], 1e-3, 1e-4, generator=seeded())
    assert float(zeros.std()) == pytest.approx(1e-4, rel=0.05)
    assert math.isfinite(float(one))
    assert float(one) != 1.0


def test_noise_is_the_same_in_both_dtypes():
    a, b = torch.ones(5), torch.ones(5, dtype=torch.float64)
    relative_noise([a], 1e-2, generator=seeded(3))
    relative_noise([b], 1e-2, generator=seeded(3))
    torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)


def test_wide_layer_is_found_or_named():
    model = resnet()
    found = two_phase.hidden_parameters(model, model.last, "wide")
    assert [id(p) for p in found] == [id(p) for p in model.wide.parameters()]
    named = two_phase.hidden_parameters(model, model.last, "wide", model.stem[0])
    assert [id(p) for p in named] == [id(model.stem[0].weight)]
    everything = two_phase.hidden_parameters(model, model.last)
    assert len(everything) == len(list(model.parameters())) - 2


# --- recording --------------------------------------------------------------------------------------------------------


def test_observables_and_snapshots():
    model = resnet()
    result = run(
        model, tau=3, observe={"bias": lambda m: m.last.bias.mean()}, snapshots=(0, 3), noise=None, phase2=None
    )
    assert result.observed["bias"].shape == (4,)
    assert float(result.observed["bias"][0]) == pytest.approx(float(resnet().last.bias.detach().mean()))
    assert torch.equal(result.snapshots[0]["wide.weight"], resnet().wide.weight)
    assert torch.equal(result.snapshots[3]["wide.weight"], model.wide.weight)
    assert result.before > 0


def test_scheduler_steps_after_every_epoch():
    model = resnet()
    rule = sgd(model.parameters())
    run(model, tau=3, optimizer=rule, scheduler=lambda r: torch.optim.lr_scheduler.StepLR(r, 1, 0.5), phase2=None)
    assert rule.param_groups[0]["lr"] == pytest.approx(0.05 / 8)


# --- resuming ---------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "make", [sgd, lambda p: torch.optim.Adam(p, 1e-2), lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3)]
)
@pytest.mark.parametrize("after", [2, 4, 7])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, make, after):
    options = {
        "tau": 3,
        "optimizer": make,
        "observe": {"norm": lambda m: m.wide.weight.norm()},
        "snapshots": (1,),
        "scheduler": lambda r: torch.optim.lr_scheduler.CosineAnnealingLR(r, 3),
        "phase2": "nesterov",
        "options": {"steps": 10},
    }
    whole_model = resnet()
    whole = run(whole_model, **options)
    shift, calls = vision.random_shift((1, 4, 4), 1), []

    def killer(batch):
        calls.append(1)
        if len(calls) > after:
            raise Stop
        return shift(batch)

    with pytest.raises(Stop):
        run(resnet(), checkpoint=tmp_path, checkpoint_every=1, **options, augment=killer)
    model = resnet()
    done = []

    def counter(batch):
        done.append(1)
        return shift(batch)

    again = run(model, checkpoint=tmp_path, checkpoint_every=1, **options, augment=counter)
    assert len(done) == 9 - after  # three epochs of three mini-batches, none twice
    for (name, p), q in zip(model.state_dict().items(), whole_model.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert torch.equal(again.phase1, whole.phase1)
    assert torch.equal(again.observed["norm"], whole.observed["norm"])
    assert torch.equal(again.snapshots[1]["last.bias"], whole.snapshots[1]["last.bias"])
    assert again.loss == whole.loss
    # and once more from the finished phases
    assert run(resnet(), checkpoint=tmp_path, **options).loss == whole.loss


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    run(resnet(), checkpoint=tmp_path, phase2=None)
    with pytest.raises(ValueError, match="another batch"):
        run(resnet(), checkpoint=tmp_path, phase2=None, batch=8)
    with pytest.raises(ValueError, match="another model"):
        run(resnet(5), checkpoint=tmp_path, phase2=None)
    with pytest.raises(ValueError, match="another optimizer"):
        run(resnet(), checkpoint=tmp_path, phase2=None, optimizer=lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))
    (tmp_path / "phase1.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        run(resnet(), checkpoint=tmp_path, phase2=None)


def test_an_interrupt_saves_first(tmp_path):
    import signal

    shift, calls = vision.random_shift((1, 4, 4), 1), []

    def interrupter(batch):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return shift(batch)

    with pytest.raises(KeyboardInterrupt):
        run(resnet(), checkpoint=tmp_path, phase2=None, augment=interrupter)
    model, whole = resnet(), resnet()
    run(model, checkpoint=tmp_path, phase2=None)
    run(whole, phase2=None)
    assert torch.equal(model.wide.weight, whole.wide.weight)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"X": torch.ones(40, 16, dtype=torch.int64)}, TypeError, "X has dtype torch.int64"),
        ({"X": torch.full((40, 16), math.nan)}, ValueError, "X holds NaN"),
        ({"X": torch.ones(0, 16), "y": torch.ones(0, dtype=torch.int64)}, ValueError, "X has shape"),
        ({"y": torch.zeros(40, dtype=torch.int64)}, ValueError, "one class only"),
        ({"y": torch.arange(40)}, ValueError, "labels 0 to 39"),
        ({"y": torch.zeros(39, dtype=torch.int64)}, ValueError, "y has 39"),
        ({"loss": "hinge"}, ValueError, "loss is 'hinge'"),
        ({"phase2": "adam"}, ValueError, "phase2 is 'adam'"),
        ({"tau": -1}, ValueError, "tau is -1"),
        ({"batch": 0}, ValueError, "batch is 0"),
        ({"snapshots": (5,)}, ValueError, "snapshots is"),
        ({"noise": -1.0}, ValueError, "rel is -1.0"),
        ({"floor": 0.0}, ValueError, "floor is 0.0"),
        ({"where": "nowhere"}, ValueError, "where is 'nowhere'"),
        ({"optimizer": lambda p: "adam"}, TypeError, "optimizer made str"),
        ({"optimizer": lambda p: torch.optim.SGD(p, 1e30)}, ValueError, "smaller learning rate"),
    ],
)
def test_bad_input_is_named(options, error, words, unchecked):
    with pytest.raises(error, match=words):
        run(resnet(), **options)


def test_a_foreign_last_layer_is_refused(unchecked):
    X, y = images()
    model = resnet()
    for last, error, words in (
        (nn.Linear(45, 3), ValueError, "no part of model"),
        (model.stem[0], TypeError, "last is Conv2d"),
    ):
        with pytest.raises(error, match=words):
            two_phase.two_phase(model, last, X, y, sgd, 1, generator=seeded())
    alone = nn.Sequential(nn.Linear(16, 3))
    with pytest.raises(ValueError, match="no linear layer before last"):
        two_phase.hidden_parameters(alone, alone[0], "wide")
