"""The recipe: what it freezes, what it repeats, and what it refuses."""

import math

import pytest
import torch
from making import images, resnet, seeded, sgd
from making import run_two_phase as run
from torch import nn

from companion.beyond_ntk import last_layer, vision
from companion.beyond_ntk import recipe as two_phase
from companion.beyond_ntk.recipe import relative_noise

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


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"X": torch.ones(40, 16, dtype=torch.int64)}, TypeError, "X has dtype torch.int64"),
        ({"X": torch.full((40, 16), math.nan)}, ValueError, r"X\[0, 0\] is nan"),
        ({"X": torch.ones(0, 16), "y": torch.ones(0, dtype=torch.int64)}, ValueError, "X has shape"),
        ({"y": torch.zeros(40, dtype=torch.int64)}, ValueError, "one class only"),
        ({"y": torch.arange(40)}, ValueError, "labels 0 to 39"),
        ({"y": torch.zeros(39, dtype=torch.int64)}, ValueError, r"\(N,\) with N = 40"),
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
        (model.stem[0], ValueError, "last is a Conv2d"),
    ):
        with pytest.raises(error, match=words):
            two_phase.two_phase(model, last, X, y, sgd, 1, generator=seeded())
    alone = nn.Sequential(nn.Linear(16, 3))
    with pytest.raises(ValueError, match="no linear layer before last"):
        two_phase.hidden_parameters(alone, alone[0], "wide")


# --- what belongs together, and what is left alone --------------------------------------------------------------------


class Centring(nn.Module):
    """A forward that changes the rows that it is given."""

    def __init__(self):
        super().__init__()
        self.wide, self.last = nn.Linear(16, 60), nn.Linear(60, 3)

    def forward(self, x):
        x -= 0.5
        return self.last(torch.tanh(self.wide(x)))


@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3)])
def test_a_forward_that_works_in_place_leaves_the_data_alone(make):
    X, y = images()
    kept, model = X.clone(), Centring()
    result = run(model, X=X, optimizer=make, augment=None, options={"steps": 300})
    assert torch.equal(X, kept)
    with torch.no_grad():
        assert result.loss == pytest.approx(float(nn.functional.cross_entropy(model(kept.double()), y)), rel=1e-9)
    features = two_phase.last_layer_features(model, model.last, X.double())
    assert torch.equal(X, kept)
    torch.testing.assert_close(features, torch.tanh(model.wide(kept.double() - 0.5)).detach())


def test_a_last_layer_that_shares_its_numbers_is_refused(unchecked):
    def tied():
        model = nn.Sequential(nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        model[4].weight = model[2].weight
        return model

    def viewed():
        model = tied()
        model[4].weight = nn.Parameter(model[2].weight.detach().T)
        return model

    X, y = images()
    for model in (tied(), viewed()):
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="last shares its parameters with another layer"):
            two_phase.two_phase(model, model[4], X, y, sgd, 1, generator=seeded())
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_one_sample_left_over_is_no_mini_batch_of_its_own():
    model = resnet()  # it has BatchNorm
    X, y = images(33)
    assert run(model, X=X, y=y, augment=None).loss < math.log(3)


class Answer(nn.Module):
    """A network whose answer is something else than the outputs of its last layer."""

    def __init__(self, answer):
        super().__init__()
        self.wide, self.last, self.answer = nn.Linear(16, 60), nn.Linear(60, 3), answer

    def forward(self, x):
        return self.answer(self.last(torch.tanh(self.wide(x))))


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda q: {"logits": q}, TypeError, "the model returns a dict; one tensor of outputs is needed"),
        (lambda q: (q, q), TypeError, "the model returns a tuple"),
        (lambda q: torch.log_softmax(q, 1), ValueError, "last is not the model's output"),
        (lambda q: q[:, None], ValueError, r"the model's outputs for 2 rows have shape \(2, 1, 3\)"),
        (lambda q: q * torch.tensor(math.nan), ValueError, "last is not the model's output"),
        (lambda q: q.undefined, ValueError, "the model fails on X, torch.float32 \\(2, 16\\): .*undefined"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_anything_is_changed(answer, error, words, unchecked):
    model = Answer(answer)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=words):
        run(model, augment=None)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"X": images()[0][:, :9]}, r"the model fails on X, torch.float32 \(2, 9\)"),
        ({"X": images()[0].double()}, r"the model fails on X, torch.float64 \(2, 16\)"),
        ({"optimizer": sgd(resnet().parameters())}, "optimizer holds parameters that are not the model's"),
        ({"where": "wide", "wide": nn.Linear(4, 45)}, "wide is no hidden layer of model"),
    ],
)
def test_things_that_do_not_belong_together(options, words, unchecked):
    model = resnet()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        run(model, augment=None, **options)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_one_sample_cannot_train_batchnorm(unchecked):
    model = nn.Sequential(nn.Linear(16, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 3)).double()
    with pytest.raises(ValueError, match=r"the model fails on X.*more than 1 value per channel"):
        two_phase.two_phase(
            model, model[3], torch.ones(1, 16).double(), torch.ones(1, 3).double(), sgd, 1, loss="squared",
            generator=seeded(),
        )  # fmt: skip


def test_frozen_parameters_get_no_noise(unchecked):
    model = resnet()
    model.stem.requires_grad_(False)
    before = [p.clone() for p in model.stem.parameters()]
    moved = model.wide.weight.clone()
    run(model, tau=0, phase2=None, noise=0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.stem.parameters(), before, strict=True))
    assert not torch.equal(model.wide.weight, moved)
    model.requires_grad_(False)
    model.last.requires_grad_(True)
    with pytest.raises(ValueError, match="no trainable parameter for the noise"):
        run(model, tau=0, phase2=None)


def test_small_integers_are_labels_too():
    _, y = images()
    assert run(resnet(), y=y.to(torch.int32)).loss == run(resnet()).loss


def test_inference_mode_is_left_for_the_run():
    X, y = images()
    model = resnet()
    with torch.inference_mode():
        result = two_phase.two_phase(model, model.last, X.clone(), y.clone(), sgd, 1, batch=16, generator=seeded())
    assert math.isfinite(result.loss)


def test_the_loss_is_the_model_s_own():
    X, y = images()
    model = resnet()
    result = run(model, options={"steps": 50})
    with torch.no_grad():
        assert result.loss == pytest.approx(float(nn.functional.cross_entropy(model(X.double()), y)), rel=1e-12)
    assert result.loss == pytest.approx(float(result.phase2.losses[-1]), rel=1e-9)
    assert result.loss < result.noisy
