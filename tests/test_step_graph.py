"""Forward and backward of a training step as one CUDA graph."""

import logging
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
    expected = plain.model.state_dict()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_where_nothing_can_be_recorded_training_goes_on(folder, monkeypatch, caplog):
    def fail(compute):
        compute()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step_graph, "record", fail)
    with caplog.at_level(logging.WARNING):
        measures = steps(with_graph(make_trainer(folder, **PHASES)), 6)
    assert measures == steps(make_trainer(folder, **PHASES), 6)
    (told,) = [r.message for r in caplog.records]  # once, though there are two shapes
    assert "no CUDA graph" in told and "stream is capturing" in told


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
        run._add_gradients(batch)
    monkeypatch.setattr("cmamba_ref.model._in_graph", lambda x: True)
    with HostWork() as captured:
        run._add_gradients(batch)
    run.close()
    read = str(aten._local_scalar_dense.default)
    assert plain.found == [read, read]  # whether qualities, and images, are in range
    assert captured.found == [read]  # images are looked at only on a CPU


def test_a_graph_needs_one_gpu(folder, caplog):
    with caplog.at_level(logging.WARNING):
        run = make_trainer(folder, cuda_graph=True)
    assert run.graph is None
    assert "one process on a GPU, and here are 1 on cpu" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_with_a_graph_as_without(folder):
    from cmamba_ref.training.data import find_images
    from cmamba_ref.training.distributed import Group
    from tests.training_helpers import settings

    def on_gpu(**changes):
        images = find_images(folder / "photos", 64, held_out=1)
        chosen = settings(folder, device="cuda", **PHASES, **changes)
        return Trainer(chosen, images, Group(torch.device("cuda", 0)))

    run = on_gpu(cuda_graph=True)
    measures = steps(run, 6)
    assert run.graph is not None and not run.graph._failed
    for found, expected in zip(measures, steps(on_gpu(), 6), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
