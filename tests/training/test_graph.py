"""The update as a CUDA graph, on a tape that keeps a graph's rules on the CPU.

A graph is a list of operations on fixed memory: recording runs none of them, and a replay runs no
Python. The tape does the same with torch's operations, so that a number that is not an input, a
tensor that moves, or a read of the device gives a wrong result or an error here as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from training_cases import QUIET, Noisy, make_data, make_vae, same, weights

from pyro_vae.compiling import Traced
from pyro_vae.objectives import ELBO, IWAE, BetaTC, Linear, Objective
from pyro_vae.training import State, fit, load_weights, step, trainer
from pyro_vae.training.graph import CapturedUpdate, Recorder
from pyro_vae.training.optimizers import make_optimizer, restore, why_no_graph
from pyro_vae.training.rows import TensorRows
from pyro_vae.vae import VAE

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Tape(TorchDispatchMode):
    """In place of a torch.cuda.CUDAGraph."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        if func._schema.is_mutable or func is torch.ops.aten.native_batch_norm.default:
            for part in tree_leaves((args, kwargs)):
                if isinstance(part, Tensor) and id(part) not in self.before:
                    self.before[id(part)] = part, part.clone()
        out = func(*args, **(kwargs or {}))
        memory = tree_map(lambda p: p.detach() if isinstance(p, Tensor) else p, (args, kwargs))
        self.calls.append((func, memory[0], memory[1] or {}, out))
        return out

    @contextmanager
    def recording(self) -> Iterator[None]:
        noise = torch.get_rng_state()
        try:
            with self:
                yield
        finally:
            torch.set_rng_state(noise)
            for part, value in reversed(self.before.values()):
                part.detach().copy_(value)

    def replay(self) -> None:
        Tape.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                new = func(*args, **kwargs)
                for mine, part in zip(tree_leaves(out), tree_leaves(new)):
                    if isinstance(mine, Tensor) and mine.data_ptr() != part.data_ptr():
                        mine.detach().copy_(part)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tapes for graphs, and reads for what waits."""
    modes: list[str] = ["default"]

    def set_mode(mode: str) -> None:
        if len(modes) == 1:  # as torch does
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        modes.append(mode)

    def record(graph: Tape, **_: Any) -> Any:
        return graph.recording()

    monkeypatch.setattr(Tape, "replays", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` treats the CPU as it treats a GPU; the traced step is not compiled."""

    class Distant(step.Watch):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.at_once = False

    monkeypatch.setattr(step, "compiled", Traced)
    monkeypatch.setattr(trainer, "Watch", Distant)
    monkeypatch.setattr(trainer, "has_graphs", lambda device: True)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Objective], dict[str, Any]]] = {
    "plain": (make_vae, ELBO, {}),
    "beta": (make_vae, lambda: ELBO(beta=Linear(length=13)), {}),
    "schedule": (
        make_vae,
        ELBO,
        {"schedule": {"class_path": "ExponentialLR", "init_args": {"gamma": 0.5}}},
    ),
    "clip": (make_vae, lambda: IWAE(3), {"clip_norm": 0.7}),
    "batch norm": (lambda: make(norm="batch"), ELBO, {}),
    "total correlation": (make_vae, lambda: BetaTC(beta=Linear(length=2, unit="epoch")), {}),
    "AdamW": (make_vae, ELBO, {"optimizer": "AdamW"}),
    "SGD": (
        make_vae,
        ELBO,
        {"optimizer": {"class_path": "SGD", "init_args": {"momentum": 0.9, "nesterov": True}}},
    ),
}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("case", CASES)
def test_replays_train_as_launches_do(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new_vae, new_objective, options = CASES[case]
    torch.manual_seed(3)
    first = new_vae()
    x = Noisy(make_data().clamp(0.1, 0.9))
    second, eager = new_vae(), new_vae()
    for other in (second, eager):
        other.load_state_dict(first.state_dict())
    options = {"epochs": 3, "batch_size": 11, "compile": True, **options, **QUIET}
    by_graph = fit(first, x, new_objective(), **options)
    assert Tape.replays == 3 * 4 - 4  # of the whole batches; two are checked, two are launched
    monkeypatch.setattr(Recorder, "__call__", lambda self, update, *batch: update(*batch))
    launched = fit(second, x, new_objective(), **options)
    for name, weight in weights(first).items():
        assert torch.equal(weight, second.state_dict()[name]), name
    fit(eager, x, new_objective(), **{**options, "compile": False})
    for name, weight in weights(first).items():
        torch.testing.assert_close(weight, eager.state_dict()[name], rtol=1e-4, atol=1e-5)
    for mine, other in zip(by_graph.rows, launched.rows):
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.usefixtures("on_gpu")
def test_a_run_goes_on_with_graphs(tmp_path: Path) -> None:
    x, vaes = make_data(), [make_vae(), make_vae()]
    options = {"batch_size": 11, "compile": True, **QUIET}
    fit(vaes[0], x, epochs=3, **options)
    fit(vaes[1], x, epochs=1, run=tmp_path, **options)
    history = fit(vaes[1], x, epochs=3, run=tmp_path, resume=True, **options)
    assert same(weights(vaes[0]), weights(vaes[1]))
    assert [row["step"] for row in history.rows] == [5, 10, 15]


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_a_run_with_graphs_goes_on_without(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, vae, unbroken = make_data(), make_vae(), make_vae()
    options = {"batch_size": 11, "optimizer": optimizer, **QUIET}
    fit(vae, x, epochs=1, run=tmp_path, compile=True, **options)
    monkeypatch.setattr(trainer, "has_graphs", lambda device: False)
    fit(vae, x, epochs=3, run=tmp_path, resume=True, **options)
    fit(unbroken, x, epochs=3, **options)
    for name, weight in weights(vae).items():
        torch.testing.assert_close(weight, unbroken.state_dict()[name])


class Spoilt:
    """Rows that are not numbers in one of the training's batches."""

    def __init__(self, x: Tensor, bad: int) -> None:
        self.x, self.bad, self.batches = x, bad, 0

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Tensor) -> tuple[Tensor, None]:
        self.batches += 1
        return self.x[index] * (torch.nan if self.batches - 1 == self.bad else 1), None

    def fixed(self, seed: int) -> Spoilt:
        return Spoilt(self.x, -1)

    def to(self, device: torch.device) -> Spoilt:
        return self


@pytest.mark.usefixtures("on_gpu")
def test_a_bad_step_in_a_graph_is_named() -> None:
    with pytest.raises(FloatingPointError, match="step 6: the log density of site 'x'"):
        fit(make_vae(), Spoilt(make_data(), 6), epochs=2, batch_size=11, compile=True, **QUIET)


@pytest.mark.usefixtures("on_gpu")
def test_a_bad_step_of_a_run_that_goes_on_is_named(tmp_path: Path) -> None:
    options = {"batch_size": 11, "compile": True, "run": tmp_path, **QUIET}
    fit(make_vae(), make_data(), epochs=1, **options)
    x = Spoilt(make_data(), 2)
    x.digest = TensorRows(make_data()).digest  # type: ignore[attr-defined]
    x.describe = TensorRows(make_data()).describe  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match="step 7: the log density of site 'x'"):
        fit(make_vae(), x, epochs=3, resume=True, **options)


class Steep(VAE):
    """A VAE whose gradient is infinite from some step on, and its loss is not."""

    steps = 0

    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.steps += self.training
        weight = next(self.posterior.parameters())
        bad = (0 * weight).abs().sum().sqrt() if self.steps > 6 else 0.0
        return super().guide(x + bad, y)


@pytest.mark.usefixtures("on_gpu")
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    made = make_vae()
    vae = Steep(made.prior, made.likelihood, made.posterior)
    with pytest.raises(FloatingPointError, match="step 7: weights are not finite"):
        fit(vae, make_data(), epochs=3, batch_size=11, run=tmp_path, checkpoint_every=1, **QUIET)
    assert all(weight.isfinite().all() for weight in load_weights(tmp_path).values())


@pytest.mark.usefixtures("on_gpu")
def test_weights_that_a_callback_moves_are_trained_where_they_are() -> None:
    def move(state: State) -> None:
        for parameter in state.vae.parameters():
            parameter.data = parameter.data.clone()

    first, second, x = make_vae(), make_vae(), make_data()
    options = {"epochs": 4, "batch_size": 11, "compile": True, **QUIET}
    fit(first, x, callbacks=[move], **options)
    fit(second, x, **options)
    assert same(weights(first), weights(second))


@pytest.mark.usefixtures("on_gpu")
def test_an_optimiser_that_counts_on_the_host_is_launched() -> None:
    first, second, x = make_vae(), make_vae(), make_data()
    options = {"epochs": 3, "batch_size": 11, "optimizer": "Adagrad", **QUIET}
    with pytest.warns(UserWarning, match="no CUDA graph .* Adagrad is not made with capt") as said:
        fit(first, x, compile=True, **options)
    assert len(said) == 1
    assert Tape.replays == 0
    fit(second, x, **options)
    for name, weight in weights(first).items():
        torch.testing.assert_close(weight, second.state_dict()[name])


def test_what_stands_against_a_graph() -> None:
    layer = nn.Linear(3, 2)
    for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Rprop", "ASGD", "SGD"):
        for fused in (True, False):
            made = make_optimizer(name, layer, 0.1, fused=fused, capturable=True)
            assert why_no_graph(made, 1) is None
    assert "2 processes" in (why_no_graph(made, 2) or "")
    assert "Adam is" in (why_no_graph(make_optimizer("Adam", layer, 0.1), 1) or "")
    chosen = {"class_path": "Adam", "init_args": {"capturable": False}}
    assert why_no_graph(make_optimizer(chosen, layer, 0.1, capturable=True), 1) is not None


def test_a_state_is_taken_as_it_is_and_the_way_of_the_step_is_kept() -> None:
    layer = nn.Linear(3, 2)
    there = make_optimizer("Adam", layer, 0.5, capturable=True)
    layer(torch.ones(1, 3)).sum().backward()
    there.step()
    here = make_optimizer("Adam", layer, 0.1)
    restore(here, there.state_dict())
    (group,) = here.param_groups
    assert (group["capturable"], group["fused"], group["lr"]) == (False, True, 0.5)
    for p in layer.parameters():
        assert torch.equal(here.state[p]["exp_avg"], there.state[p]["exp_avg"])


def test_an_update_that_waits_is_launched() -> None:
    total = torch.zeros(3)

    def update(x: Tensor) -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        warnings.warn("something else", stacklevel=2)
        total.add_(x)

    recorder, x = Recorder(), torch.ones(3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recorder(update, x)
        said.clear()
        recorder(update, x)
        assert [str(w.message) for w in said] == [
            "something else",
            "compile: no CUDA graph holds the step, for it waits for the GPU",
        ]
        recorder(update, x)
    assert Tape.replays == 0
    assert total.tolist() == [3, 3, 3]


def test_recording_changes_nothing_and_a_replay_takes_its_own_batch() -> None:
    total, rate = torch.zeros(3), {"lr": 2.0}

    def update(x: Tensor) -> None:
        total.add_(x * rate["lr"])

    x = torch.ones(3)
    captured = CapturedUpdate(update, x)
    assert total.tolist() == [0, 0, 0]
    x += 4  # the batch of the recording is the graph's own
    rate["lr"] = 3.0  # no tensor: as it was
    captured(torch.tensor([1.0, 2.0, 3.0]))
    assert total.tolist() == [2, 4, 6]
    assert x.tolist() == [5, 5, 5]


def test_what_cannot_be_recorded_says_what_to_do() -> None:
    with pytest.raises(
        RuntimeError, match=r"\(operation not .* capturing\): train without compile"
    ):
        CapturedUpdate(lambda x: print(x.item()), torch.ones(()))
