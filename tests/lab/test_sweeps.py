"""Sweeps: the same bits from every executor, only what is missing is computed, failures and kills lose nothing."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.lab import sweeps as sw
from companion.lab.sweeps import grid, stored, sweep

calls = []


def train(seed, width):
    """A small piece of real work whose bits matter."""
    calls.append((seed, width))
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(width, width, generator=g, dtype=torch.float64)
    return {"singular": torch.linalg.svdvals(A @ A.T), "trace": float(A.trace()), "width": width, "name": f"{seed}"}


def fails_at_three(n):
    if n == 3:
        raise ArithmeticError("three is not allowed")
    return {"n": n}


def dies_at_three(n):
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return {"n": n}


CONFIGURATIONS = grid(seed=[0, 1, 2], width=[3, 8])


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert list(x) == list(y)
        for name in x:
            if isinstance(x[name], torch.Tensor):
                assert x[name].dtype == y[name].dtype
                assert torch.equal(x[name], y[name])
            else:
                assert x[name] == y[name]


@pytest.fixture(scope="module")
def serial():
    return sweep(train, CONFIGURATIONS)


def spawned(workers=2):
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=sw.one_thread)


def test_serial_results_come_in_order(serial):
    assert [(r["name"], r["width"]) for r in serial] == [(str(c["seed"]), c["width"]) for c in CONFIGURATIONS]


def test_threads_give_the_same_bits(serial):
    with ThreadPoolExecutor(3) as pool:
        same(serial, sweep(train, CONFIGURATIONS, executor=pool))


def test_processes_give_the_same_bits_also_through_the_store(serial, tmp_path):
    with spawned() as pool:
        same(serial, sweep(train, CONFIGURATIONS, executor=pool, store=tmp_path))
    calls.clear()
    same(serial, sweep(train, CONFIGURATIONS, store=tmp_path))
    assert not calls


def test_a_dask_cluster_gives_the_same_bits(serial, tmp_path):
    """In a process of its own: dask's event loops warn when they are torn down, and warnings are errors here."""
    pytest.importorskip("distributed")
    program = f"""
        import sys, torch
        sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parent)!r}]
        torch.set_num_threads(1)
        from distributed import Client, LocalCluster
        from companion.lab.sweeps import one_thread, sweep
        import sweep_work

        if __name__ == "__main__":
            with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
                with Client(cluster) as client:
                    client.run(one_thread)
                    sweep(sweep_work.train, {CONFIGURATIONS!r}, executor=client.get_executor(), store={str(tmp_path)!r})
    """
    # the workers import the function by name: the same source as above, in a module of its own
    work = tmp_path / "code"
    work.mkdir()
    source = "import torch\ncalls = []\n" + __import__("inspect").getsource(train)
    (work / "sweep_work.py").write_text(source)
    script = work / "run.py"
    script.write_text(textwrap.dedent(program))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(work), str(Path(__file__).parents[2])])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(c["seed"], c["width"]): r for c, r in stored(tmp_path)}
    same(serial, [found[c["seed"], c["width"]] for c in CONFIGURATIONS])


def test_a_second_run_computes_only_what_is_missing(tmp_path, serial):
    sweep(train, CONFIGURATIONS[:4], store=tmp_path)
    calls.clear()
    same(serial, sweep(train, CONFIGURATIONS, store=tmp_path))
    assert calls == [(c["seed"], c["width"]) for c in CONFIGURATIONS[4:]]
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    assert not list(tmp_path.glob("*.tmp"))


def test_another_function_or_configuration_has_another_file():
    def other(seed, width):
        return {}

    assert sw._keys(train, CONFIGURATIONS[:1]) != sw._keys(other, CONFIGURATIONS[:1])
    assert sw._keys(train, [{"seed": 1, "width": 2}]) == sw._keys(train, [{"width": 2, "seed": 1}])
    assert sw._keys(train, [{"seed": 1, "width": 2}]) != sw._keys(train, [{"seed": 1, "width": 2.0}])
    half = functools.partial(train, width=3)
    assert sw._keys(half, [{"seed": 1}]) != sw._keys(functools.partial(train, width=4), [{"seed": 1}])


def test_failures_name_their_configuration_and_lose_nothing(tmp_path):
    configurations = grid(n=[1, 2, 3, 4])
    with pytest.raises(
        sw.SweepFailed, match=r"1 of 4 configurations failed: configuration 2 {'n': 3}: Arithm"
    ) as caught:
        sweep(fails_at_three, configurations, store=tmp_path)
    (failure,) = caught.value.failures
    assert failure.configuration == {"n": 3}
    assert isinstance(failure.error, ArithmeticError)
    assert caught.value.results == [{"n": 1}, {"n": 2}, None, {"n": 4}]
    assert len(stored(tmp_path)) == 3
    assert sweep(fails_at_three, configurations, on_failure="keep")[2] is None


def test_a_killed_worker_breaks_the_pool_but_not_the_store(tmp_path):
    configurations = grid(n=list(range(8)))
    with spawned(1) as pool, pytest.raises(sw.SweepFailed) as caught:
        sweep(dies_at_three, configurations, executor=pool, store=tmp_path)
    done = [c["n"] for c, _ in stored(tmp_path)]
    assert 3 not in done
    assert len(done) + len(caught.value.failures) == 8
    rest = [c for c in configurations if c["n"] != 3]
    assert [r["n"] for r in sweep(dies_at_three, rest, store=tmp_path)] == [c["n"] for c in rest]


def test_a_damaged_file_is_named(tmp_path):
    sweep(train, CONFIGURATIONS[:1], store=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{file.name} cannot be read"):
        sweep(train, CONFIGURATIONS[:1], store=tmp_path)


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.one_of(st.integers(), st.booleans(), st.none(), st.text())))
@settings(max_examples=15)
def test_plain_results_survive_the_store(tmp_path_factory, result):
    file = tmp_path_factory.mktemp("store") / "x.safetensors"
    sw._write(file, sw._checked(result, {}), {})
    assert sw._read(file) == ({}, result)


def test_the_grid_is_the_product_of_its_axes():
    assert grid(a=[1, 2], b="xy") == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    with pytest.raises(ValueError, match="axis 'b' is empty"):
        grid(a=[1], b=[])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((train, [{"seed": 1, "width": 2}] * 2), {}, ValueError, "0 and 1 are equal"),
        ((train, [{"seed": torch.ones(1)}]), {}, TypeError, "configuration 0 is not plain"),
        ((train, [{"seed": float("nan")}]), {}, TypeError, "configuration 0 is not plain"),
        ((train, [3]), {}, TypeError, "configuration 0 is int"),
        (("train", []), {}, TypeError, "function is str"),
        ((train, []), {"on_failure": "ignore"}, ValueError, "on_failure is 'ignore'"),
    ],
)
def test_bad_arguments_get_one_clear_sentence(unchecked, arguments, options, error, words):
    with pytest.raises(error, match=words):
        sweep(*arguments, **options)


def test_results_that_cannot_be_stored_are_failures(unchecked):
    with pytest.raises(sw.SweepFailed, match="TypeError: function returned int"):
        sweep(lambda n: n, [{"n": 1}])
    with pytest.raises(sw.SweepFailed, match="result 'f' is complex"):
        sweep(lambda n: {"f": 1j}, [{"n": 1}])
