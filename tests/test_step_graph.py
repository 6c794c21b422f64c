"""Forward and backward of a training step as one CUDA graph."""

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmamba_ref.training import step_graph
from cmamba_ref.training.step_graph import StepGraph
from cmamba_ref.training.trainer import Trainer
from tests.training_helpers import make_run_folder, make_trainer

PHASES = {"crop": [64, 128], "batch": [4, 2], "until": [0.5], "steps": 6}

aten = torch.ops.aten


@pytest.fixture
def folder(tmp_path):
    return make_run_folder(tmp_path)


class Recorder:
    """Stands in for a GPU: what was recorded runs again, into the tensors of the first time."""

    def __init__(self, run: Trainer) -> None:
        self.run, self.recorded = run, 0

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        compute()  # warms up, as it does there
        self.recorded += 1
        parameters = self.run.parameters
        measures = compute()
        gradients = [p.grad for p in parameters]

        def replay() -> None:
            measures.copy_(compute())
            for parameter, gradient in zip(parameters, gradients, strict=True):
                assert parameter.grad is not None and gradient is not None
                gradient.copy_(parameter.grad)

        return replay, measures


def with_graph(run: Trainer) -> Trainer:
    """The trainer with a graph, on a CPU."""
    run.graph = StepGraph(run._add_gradients, run.parameters, run.group.device)
    return run


def no_lap(part: str) -> None:
    """Measure no times."""


def steps(run: Trainer, count: int) -> list[tuple[float, ...]]:
    measures = [tuple(float(v) for v in run.train_step().values()) for _ in range(count)]
    run.close()
    return measures


@pytest.mark.parametrize(
    "changes", [{"optimiser": "soap"}, {"accumulate": 2}, {"optimiser": "adamw", "clip": 0.1}]
)
def test_a_run_with_a_graph_is_the_run_without(folder, monkeypatch, changes):
    run = with_graph(make_trainer(folder, **PHASES, **changes))
    recorder = Recorder(run)
    monkeypatch.setattr(step_graph, "record", recorder.record)
    measures = steps(run, 6)
    plain = make_trainer(folder, **PHASES, **changes)
    assert measures == steps(plain, 6)
    assert recorder.recorded == 2, "one graph for each shape of the batch"
    assert run.report()["cuda_graph"]
    expected = plain.model.state_dict()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_where_nothing_can_be_recorded_training_goes_on(folder, monkeypatch, caplog):
    def fail(compute):
        try:
            compute()
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:  # as the end of a capture that has failed
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(step_graph, "record", fail)
    with caplog.at_level(logging.WARNING):
        run = with_graph(make_trainer(folder, **PHASES))
        measures = steps(run, 6)
    assert not run.report()["cuda_graph"] and run.clock.seconds["forward"] > 0
    assert measures == steps(make_trainer(folder, **PHASES), 6)
    (told,) = [r.message for r in caplog.records]  # once, though there are two shapes
    assert "no CUDA graph" in told and "stream is capturing" in told and "previous" not in told


class HostWork(TorchDispatchMode):
    """Notes what a CUDA graph cannot hold: values that the host reads, or brings along."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = func in (aten._local_scalar_dense.default, aten.nonzero.default)
        if reads or func is aten.lift_fresh.default:  # torch.tensor(...)
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"lrp": False, "bypass": True}])
def test_nothing_in_the_graph_depends_on_the_host(folder, monkeypatch, changes):
    run = make_trainer(folder, log_loss=True, model=changes)
    batch = run.next_batch()
    with HostWork() as plain:
        run._add_gradients(batch, no_lap)
    monkeypatch.setattr("cmamba_ref.model._in_graph", lambda x: True)
    with HostWork() as captured:
        run._add_gradients(batch, no_lap)
    with HostWork() as others:
        run._train_quantiles()
    run.close()
    read = str(aten._local_scalar_dense.default)
    assert plain.found == [read, read]  # whether qualities, and images, are in range
    assert captured.found == [read]  # images are looked at only on a CPU
    assert others.found == []


def test_a_graph_needs_one_gpu(folder, caplog):
    with caplog.at_level(logging.WARNING):
        run = make_trainer(folder, cuda_graph=True)
    assert run.graph is None
    assert "one process on a GPU, and here are 1 on cpu" in caplog.text


def on_gpu(folder, **changes) -> Trainer:
    return make_trainer(folder, device="cuda", **{**PHASES, **changes})


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "changes",
    [{"optimiser": "soap"}, {"precision": "bf16"}, {"accumulate": 2}, {"compile": True}],
)
def test_a_gpu_trains_with_a_graph_as_without(folder, changes):
    run = on_gpu(folder, cuda_graph=True, **changes)
    measures = steps(run, 6)
    assert run.report()["cuda_graph"]
    expected = steps(on_gpu(folder, **changes), 6)
    # The first step differs by rounding; training amplifies that.
    assert measures[0] == pytest.approx(expected[0], rel=1e-2 if "precision" in changes else 1e-4)
    for found, without in zip(measures, expected, strict=True):
        assert found[0] == pytest.approx(without[0], rel=0.05)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_trains_on_after_a_graph_has_failed(folder, monkeypatch, caplog):
    run = on_gpu(folder, cuda_graph=True)
    compute = run.graph._compute
    monkeypatch.setattr(run.graph, "_compute", lambda *a: compute(*a) * float(compute(*a)[0] > 0))
    with caplog.at_level(logging.WARNING):
        measures = steps(run, 3)
    assert "no CUDA graph" in caplog.text and not run.report()["cuda_graph"]
    assert all(map(math.isfinite, measures[-1]))
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
def test_the_host_waits_for_nothing_while_a_graph_is_used(folder):
    run = on_gpu(folder, cuda_graph=True, crop=[64], batch=[4], until=[])
    run.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.close()
