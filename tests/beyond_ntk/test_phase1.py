"""Phase 1: mini-batches, and files that survive being killed and belong to one run."""

import signal

import pytest
import torch
from making import resnet, sgd
from making import run_two_phase as run

from companion.beyond_ntk import vision
from companion.beyond_ntk.phase1 import batches


class Stop(Exception):
    pass


class Counter:
    """The usual augmentation, which counts its calls and does something at one of them."""

    def __init__(self, stop, act=None):
        self.shift, self.state, self.act = vision.random_shift((1, 4, 4), 1), {"done": 0, "stop": stop}, act

    def __call__(self, batch):
        self.state["done"] += 1
        if self.state["done"] > self.state["stop"]:
            self.state["stop"] = 100
            self.act() if self.act else self.halt()
        return self.shift(batch)

    def halt(self):
        raise Stop


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
    counter = Counter(stop=after)
    with pytest.raises(Stop):
        run(resnet(), checkpoint=tmp_path, checkpoint_every=1, **options, augment=counter)
    counter.state["done"] = 0
    model = resnet()
    again = run(model, checkpoint=tmp_path, checkpoint_every=1, **options, augment=counter)
    assert counter.state["done"] == 9 - after  # three epochs of three mini-batches, none twice
    for (name, p), q in zip(model.state_dict().items(), whole_model.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert torch.equal(again.phase1, whole.phase1)
    assert torch.equal(again.observed["norm"], whole.observed["norm"])
    assert torch.equal(again.snapshots[1]["last.bias"], whole.snapshots[1]["last.bias"])
    assert again.loss == whole.loss
    # and once more from the finished phases
    assert run(resnet(), checkpoint=tmp_path, **options, augment=counter).loss == whole.loss


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
    counter = Counter(3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(resnet(), checkpoint=tmp_path, phase2=None, augment=counter)
    model, whole = resnet(), resnet()
    run(model, checkpoint=tmp_path, phase2=None, augment=counter)
    run(whole, phase2=None)
    assert torch.equal(model.wide.weight, whole.wide.weight)


def kept(tmp_path, **options):
    """A finished run, and one that is resumed from its file with other options."""
    defaults = {"tau": 3, "phase2": None, "checkpoint": tmp_path}
    run(resnet(), **defaults)
    return run(resnet(), **defaults | options)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"scheduler": lambda r: torch.optim.lr_scheduler.StepLR(r, 2)}, "scheduler"),
        ({"augment": None}, "augmentation"),
        ({"augment": vision.random_shift((1, 4, 4), 2)}, "augmentation"),
        ({"augment": lambda x: x}, "augmentation"),
        ({"observe": {"norm": lambda m: m.last.weight.norm()}}, "observables"),
        ({"tau": 2}, "tau"),
    ],
)
def test_a_run_with_other_functions_is_refused(tmp_path, options, what):
    with pytest.raises(ValueError, match=f"another .*{what}"):
        kept(tmp_path, **options)


def test_observables_of_one_name_are_told_apart(tmp_path):
    options = {"tau": 1, "phase2": None, "checkpoint": tmp_path}
    run(resnet(), observe={"n": lambda m: m.last.weight.norm()}, **options)
    with pytest.raises(ValueError, match="another observables"):
        run(resnet(), observe={"n": lambda m: m.wide.weight.norm()}, **options)


def test_flipped_bits_are_refused(tmp_path):
    run(resnet(), tau=1, phase2=None, checkpoint=tmp_path)
    path = tmp_path / "phase1.safetensors"
    whole = path.read_bytes()
    for place in range(9, len(whole), len(whole) // 12):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"cannot be read|another"):
            run(resnet(), tau=1, phase2=None, checkpoint=tmp_path)


@pytest.mark.parametrize(("N", "sizes"), [(65, [16, 16, 16, 17]), (66, [16, 16, 16, 16, 2]), (64, [16] * 4), (1, [1])])
def test_no_mini_batch_of_one(N, sizes):
    parts = batches(torch.arange(N), 16)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), torch.arange(N))


def test_numbers_that_are_observed_keep_their_digits():
    found = run(resnet(), tau=1, phase2=None, observe={"tenth": lambda m: 0.1}).observed["tenth"]
    assert found.tolist() == [0.1, 0.1]
