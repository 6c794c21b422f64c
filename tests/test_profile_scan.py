"""The profiler times only correct candidates, reports the right figures and loses none."""

import json
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import profile_scan
import pytest
import resident
import torch
from profile_scan import BACKWARD, BOTH, FORWARD, Candidate, Shape

from cmamba_ref import CMamba, testing
from cmamba_ref.config import CONFIGS
from cmamba_ref.errors import BackendUnavailableError
from cmamba_ref.nn import ss2d
from cmamba_ref.ops import selective_scan, selective_scan_2d

TINY = "1x4x3x8x2x1"
CPU = torch.device("cpu")
H200 = profile_scan.KNOWN_GPUS["NVIDIA H200"]
SMALL_MAP = (2, 4, 5)  # the reference takes one position after another; few of them show the same


@pytest.fixture(autouse=True)
def _small_check(monkeypatch):
    asked = profile_scan.settings_of
    small = lambda args: replace(asked(args), checked_map=SMALL_MAP)  # noqa: E731
    monkeypatch.setattr(profile_scan, "settings_of", small)


def settings(dtype="fp32", modes=profile_scan.MODES, repeats=3, checked_map=SMALL_MAP):
    return profile_scan.Settings(CPU, dtype, modes, repeats, 0.5, checked_map)


def run(tmp_path, *arguments, status=0):
    """Rows that the command writes on the CPU."""
    path = tmp_path / "scan.json"
    assert profile_scan.main(["--device", "cpu", "--json", str(path), *arguments]) == status
    return json.loads(path.read_text())["results"]


def one_backend_replaced(monkeypatch, name, replacement):
    """`selective_scan_2d` as the tool sees it, with one backend replaced by a function."""

    def scan(*args, backend="auto", **kwargs):
        if backend == name:
            return replacement(*args, **kwargs)
        return selective_scan_2d(*args, backend=backend, **kwargs)

    monkeypatch.setattr(profile_scan, "selective_scan_2d", scan)


# ---------------------------------------------------------------- reports


def test_table_and_json_agree(tmp_path, capsys):
    path = tmp_path / "scan.json"
    arguments = ["--shape", TINY, "--shape", "2x3x5x4x1x2", "--backends", "reference", "chunked"]
    arguments += ["--repeats", "4", "--device", "cpu", "--json", str(path)]
    assert profile_scan.main(arguments) == 0

    report = json.loads(path.read_text())
    rows = report["results"]
    assert [(row["shape"], row["mode"], row["backend"]) for row in rows] == [
        (shape, mode, backend)
        for shape in (TINY, "2x3x5x4x1x2")
        for mode in ("forward", "backward", "both")
        for backend in ("reference", "chunked")
    ]
    elements, projections = 1 * 4 * 3 * 8, 4 * 1 * 4 * 3 * (1 + 2 * 2)
    least = {"forward": (2, 1), "backward": (3, 2), "both": (5, 3)}
    for row in rows[:6]:
        seconds = row["median_ms"] / 1e3
        maps, projected = least[row["mode"]]
        least_bytes = 4 * (maps * elements + projected * projections)
        assert row["gb_per_s"] == pytest.approx(least_bytes / seconds / 1e9)
        assert row["ns_per_elt"] == pytest.approx(seconds * 1e9 / (4 * elements * 2))
        passes = 2 if row["mode"] == "both" else 1
        assert row["gexp_per_s"] == pytest.approx(passes * 4 * elements * 2 / seconds / 1e9)
        assert row["status"] == "ok" and row["repeats"] == 4 and row["iqr_ms"] >= 0
        assert row["floor_ms"] is row["of_floor"] is None
    for key in ("command", "commit", "device", "machine", "threads", "versions", "notes"):
        assert report["meta"][key]
    assert report["meta"]["command"].startswith("python tools/profile_scan.py --shape")

    output = capsys.readouterr().out.splitlines()
    heading = next(line for line in output if line.startswith("backend"))
    table = [line for line in output if line.startswith(("reference ", "chunked "))]
    assert len(table) == len(rows)
    assert {len(line) for line in table} == {len(heading)}
    for line, row in zip(table, rows, strict=True):
        backend, mode, milliseconds, *_ = line.split()
        assert (backend, mode) == (row["backend"], row["mode"])
        assert float(milliseconds) == pytest.approx(row["median_ms"], rel=1e-3)


def test_figures_have_four_digits():
    figures = (0.06123456, 2.5, 12345.6, 1.23456e-6, 0.0, 20, -0.25, None)
    texts = [profile_scan.as_text(figure) for figure in figures]
    assert texts == ["0.06123", "2.500", "12346", "0.000001", "0", "20", "-0.2500", "-"]


def test_interruption_keeps_the_rows_so_far(monkeypatch, tmp_path, capsys):
    measure = profile_scan.measure
    modes = []

    def interrupted(candidates, outcomes, arguments, mode, *args):
        modes.append(mode)
        if len(modes) == 3:
            raise KeyboardInterrupt
        return measure(candidates, outcomes, arguments, mode, *args)

    monkeypatch.setattr(profile_scan, "measure", interrupted)
    arguments = ("--shape", TINY, "--backends", "chunked", "--repeats", "1")
    results = run(tmp_path, *arguments, status=130)
    assert [row["mode"] for row in results] == modes[:2] == [FORWARD, BACKWARD]
    assert "interrupted" in capsys.readouterr().err


# ---------------------------------------------------------------- floor


@pytest.mark.parametrize(
    ("size", "microseconds"),
    [
        ((1, 128, 128, 192), [(6, 10, 28), (7, 20, 49), (7, 34, 78), (8, 61, 136)]),
        ((8, 128, 128, 192), [(51, 81, 221), (54, 163, 394), (58, 272, 625), (65, 489, 1086)]),
        ((1, 256, 384, 128), [(26, 41, 109), (28, 81, 190), (31, 136, 302), (37, 244, 533)]),
        ((1, 256, 384, 384), [(75, 122, 423), (78, 244, 682), (80, 407, 1029), (86, 733, 1721)]),
    ],
    ids=str,
)
def test_floor_is_that_of_the_published_model(size, microseconds):
    cases = [case.shape for case in profile_scan.PRESETS["kernels"]]
    for states, expected in zip((1, 4, 8, 16), microseconds, strict=True):
        shape = Shape(*size, states, size[3] // 32)
        assert shape in cases
        seconds = [profile_scan.minimum_bytes(shape, FORWARD, 4) / H200.bandwidth]
        seconds += [profile_scan.floor_seconds(shape, mode, 4, H200) for mode in (FORWARD, BOTH)]
        assert [1e6 * value for value in seconds] == pytest.approx(expected, abs=0.55)
        backward = profile_scan.floor_seconds(shape, BACKWARD, 4, H200)
        assert seconds[2] - seconds[1] <= backward * (1 + 1e-9) and backward < seconds[2]


def test_fraction_of_the_floor():
    case = profile_scan.Case("kernels", Shape(1, 128, 128, 192, 16, 6))
    ours = Candidate("triton", selective_scan_2d)
    measurement = profile_scan.Measurement(ours, times=[122.2e-6] * 5, peak_bytes=3 * 2**20)
    arguments = (case, FORWARD, measurement)
    row = profile_scan.to_row(*arguments, settings(), H200)
    assert row["of_floor"] == pytest.approx(0.5, rel=1e-3)
    assert row["peak_mib"] == 3 and row["iqr_ms"] == 0
    assert profile_scan.to_row(*arguments, settings("fp64"), H200)["of_floor"] is None


def test_only_known_gpus_have_a_floor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert profile_scan.gpu_model(torch.device("cuda")) == H200
    assert profile_scan.gpu_model(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert profile_scan.gpu_model(torch.device("cuda")) is None


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("preset", "width", "height"), [("256", 256, 256), ("kodak", 768, 512), ("2k", 2048, 1080)]
)
def test_presets_are_the_scans_of_the_models(monkeypatch, preset, width, height):
    called = []

    def record(x, proj, A, dt_weight, dt_bias, D):
        called.append(Shape(*x.shape, A.shape[2], dt_weight.shape[2]))
        return selective_scan_2d(x, proj, A, dt_weight, dt_bias, D)

    monkeypatch.setattr(ss2d, "selective_scan_2d", record)
    cases = profile_scan.PRESETS[preset]
    names = ["tiny"] if preset != "256" else list(CONFIGS)
    for name in names:
        called.clear()
        with torch.device("meta"), torch.no_grad():
            model = CMamba(name).eval()
            model(torch.empty(1, 3, height, width), 1.0 if model.gain is not None else None)
        assert {case.shape for case in cases if case.label.startswith(name)} == set(called)


def test_quick_shapes_are_small():
    assert all(case.shape.elts < 2e6 for case in profile_scan.PRESETS["quick"])


# ---------------------------------------------------------------- the check


def slightly_off(*args, **kwargs):
    return selective_scan_2d(*args, **kwargs, backend="chunked") * (1 + 1e-5)


def off_without_skip(*args, D=None, **kwargs):
    y = selective_scan_2d(*args, D=D, **kwargs, backend="chunked")
    return y if D is not None else y + 1e-3


def wrong_gradient(*args, dt_bias, **kwargs):
    dt_bias = dt_bias + (dt_bias - dt_bias.detach()) * 1e-3  # the value stays
    return selective_scan_2d(*args, dt_bias=dt_bias, **kwargs, backend="chunked")


def not_a_number(x, **kwargs):
    return selective_scan_2d(x, **kwargs, backend="chunked") * torch.nan


def wrong_type(x, **kwargs):
    return selective_scan_2d(x, **kwargs, backend="chunked").double()


def reads_beyond_the_end(x, **kwargs):
    y = selective_scan_2d(x, **kwargs, backend="chunked")
    if not x.storage_offset():  # not when it is asked whether it is there
        return y
    return y + torch.as_strided(x.detach(), (), (), x.storage_offset() + x.numel())


def leaves_a_hole(x, **kwargs):
    y = selective_scan_2d(x, **kwargs, backend="chunked")
    written = torch.empty_like(y)
    written[:, 1:] = y[:, 1:]
    return written


def error_at_the_check(x, **kwargs):
    if x.shape[0] > 1:  # not when it is asked whether it is there
        raise ZeroDivisionError("no such\nluck")
    return x


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (slightly_off, "y: error"),
        (off_without_skip, "y: error"),
        (wrong_gradient, "grad of dt_bias: error"),
        (not_a_number, "y: error inf"),
        (wrong_type, "y is torch.float64 and not torch.float32"),
        (reads_beyond_the_end, "y: error inf"),
        (leaves_a_hole, "y: error inf"),
        (error_at_the_check, "ZeroDivisionError: no such"),
    ],
)
def test_a_wrong_candidate_is_not_timed(monkeypatch, tmp_path, capsys, broken, reason):
    sizes = []

    def recorded(x, **kwargs):
        sizes.append(x.shape[:3])
        return broken(x, **kwargs)

    one_backend_replaced(monkeypatch, "chunked", recorded)
    arguments = ("--shape", TINY, "--backends", "chunked", "vmamba-pipeline", "--repeats", "1")
    wrong, right = run(tmp_path, *arguments, "--mode", "both", status=1)
    assert wrong["status"] == "failed" and wrong["reason"].startswith(reason)
    assert wrong["median_ms"] is None and right["status"] == "ok"
    assert (1, 4, 3) not in sizes
    assert f"failed: {reason}" in capsys.readouterr().out


def test_gradients_are_checked_only_where_they_are_timed(monkeypatch):
    one_backend_replaced(monkeypatch, "chunked", wrong_gradient)
    arguments = ["--shape", TINY, "--backends", "chunked", "--device", "cpu", "--repeats", "1"]
    assert profile_scan.main([*arguments, "--mode", "forward"]) == 0
    assert profile_scan.main([*arguments, "--mode", "backward"]) == 1


@pytest.mark.parametrize("dtype", profile_scan.DTYPES)
def test_sound_candidates_pass_in_every_type(dtype):
    asked = profile_scan.Settings(CPU, dtype, profile_scan.MODES, 3, 0.5)
    for candidate in profile_scan.find_candidates(
        ["chunked", "reference", "vmamba-pipeline"], asked
    ):
        outcome = profile_scan.check_correctness(candidate, Shape(1, 64, 64, 24, 3, 2), asked)
        assert outcome == profile_scan.OK


def test_a_backend_that_lacks_a_size_is_not_called_wrong(monkeypatch, capsys):
    def scan(x, A, **kwargs):
        if A.shape[2] > 1:
            raise BackendUnavailableError("`backend` must be one that runs N = 2")
        return selective_scan_2d(x, A=A, **kwargs, backend="chunked")

    one_backend_replaced(monkeypatch, "triton", scan)
    arguments = ["--shape", TINY, "--backends", "triton", "--device", "cpu", "--mode", "forward"]
    assert profile_scan.main(arguments) == 0
    assert "cannot run: `backend` must be one that runs N = 2" in capsys.readouterr().out


# ---------------------------------------------------------------- measuring


class RecordingMeter(profile_scan.CpuMeter):
    """Time stands still except for the second candidate, which is slow."""

    def __init__(self):
        self.last, self.order = "", []

    def seconds(self, call):
        call()
        self.order.append(self.last)
        return 0.3 if self.last == "slow" else 0.0


def test_candidates_take_turns_until_they_have_enough():
    meter = RecordingMeter()

    def named(name):
        def scan(**arguments):
            meter.last = name
            return selective_scan_2d(**arguments)

        return Candidate(name, scan)

    asked = settings(repeats=6)
    arguments = profile_scan.draw_arguments(Shape(1, 2, 2, 3, 1, 1), asked)
    outcomes = dict.fromkeys(("fast", "slow"), profile_scan.OK)
    candidates = [named("fast"), named("slow")]
    results = profile_scan.measure(candidates, outcomes, arguments, BOTH, asked, meter)
    assert meter.order == ["fast", "slow"] * profile_scan.MIN_REPEATS + ["fast"] * 3
    assert [len(result.times) for result in results] == [6, 3]


def test_one_failure_does_not_end_the_run(monkeypatch, tmp_path, capsys):
    failures = {"chunked": torch.OutOfMemoryError("too much"), "triton": RuntimeError("grid")}

    def scan(x, backend="auto", **kwargs):
        if backend in failures and x.shape[1] == 9:
            raise failures[backend]
        return selective_scan_2d(x, **kwargs, backend="reference")

    monkeypatch.setattr(profile_scan, "selective_scan_2d", scan)
    arguments = ("--shape", "1x9x2x4x1x1", "--shape", "1x3x2x4x1x1", "--mode", "forward")
    arguments += ("--backends", "chunked", "triton", "reference", "--repeats", "1")
    rows = run(tmp_path, *arguments, status=1)
    assert [(row["backend"], row["status"], row["reason"]) for row in rows] == [
        ("chunked", "out of memory", ""),
        ("triton", "failed", "RuntimeError: grid"),
        ("reference", "ok", ""),
        ("chunked", "ok", ""),
        ("triton", "ok", ""),
        ("reference", "ok", ""),
    ]
    assert "out of memory" in capsys.readouterr().out
    # Lack of memory alone is no failure.
    run(tmp_path, "--shape", "1x9x2x4x1x1", "--mode", "forward", "--backends", "chunked")


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counted on Linux only")


@on_linux
def test_peak_memory_on_the_cpu():
    mib = 2**20

    def call():
        torch.zeros(64 * mib, dtype=torch.uint8)  # gone at once
        return torch.zeros(16 * mib, dtype=torch.uint8)

    meter = profile_scan.CpuMeter()
    for _ in range(2):  # the second time, the peak of the first must be forgotten
        assert 63 * mib <= meter.peak_bytes(call) <= 70 * mib
    assert meter.peak_bytes(lambda: None) <= 6 * mib


@on_linux
def test_freed_memory_counts_again_when_it_is_used_again(root):
    # In its own process: where memory once ran out, as in a test above, the C library allocates
    # elsewhere from then on, and keeps there what is freed.
    code = """
import resident
def call():
    return [bytearray(b"x" * 60_000) for _ in range(500)]  # small enough for the heap
call()
print(resident.peak_beyond(call))
"""
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=root / "tools", capture_output=True, check=True).stdout
    assert 0.9 <= int(output) / 30e6 <= 1.2


def test_where_the_system_does_not_count_there_is_no_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(resident, "STATUS", tmp_path / "none")
    monkeypatch.setattr(resident, "CLEAR", tmp_path / "neither" / "none")
    assert resident.peak_beyond(lambda: None) is None


def test_forward_only_candidates_are_not_asked_for_a_backward():
    def scan(**arguments):
        with torch.no_grad():
            return selective_scan_2d(**arguments)

    candidate = Candidate("extension", scan, differentiable=False)
    case = profile_scan.Case("small", Shape(1, 2, 3, 4, 1, 1))
    rows = profile_scan.profile_cases([case], [candidate], settings(repeats=1), None)
    assert [(row["mode"], row["status"]) for row in rows] == [
        (FORWARD, "ok"),
        (BACKWARD, "forward only"),
        (BOTH, "forward only"),
    ]


@pytest.mark.gpu
def test_profile_on_cuda(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = ("--shape", "1x32x32x64x4x2", "--backends", "chunked", "vmamba-pipeline")
    for row in run(tmp_path, *arguments, "--device", "cuda"):
        assert row["median_ms"] > 0
        # The output of a forward, or the gradient of x, is the least that is allocated.
        assert row["peak_mib"] >= 32 * 32 * 64 * 4 / 2**20


# ---------------------------------------------------------------- baselines


def fake_mamba_ssm(monkeypatch):
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.__dict__["selective_scan_fn"] = selective_scan
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)


def fake_oflex(monkeypatch):
    def fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, out_float):
        # The extension checks these.
        assert {x.stride(-1) for x in (u, delta, B, C)} == {1}
        assert u.dtype == delta.dtype == B.dtype == C.dtype
        assert nrows == 1 and out_float
        y = selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        return [y.float(), torch.empty(0)]

    module = ModuleType("selective_scan_cuda_oflex")
    module.__dict__["fwd"] = fwd
    monkeypatch.setitem(sys.modules, module.__name__, module)


def fake_mambapy(monkeypatch):
    def pscan(decays, inputs):
        state, states = torch.zeros_like(inputs[:, 0]), []
        for t in range(inputs.shape[1]):
            state = decays[:, t] * state + inputs[:, t]
            states.append(state)
        return torch.stack(states, dim=1)

    module = ModuleType("mambapy.pscan")
    module.__dict__["pscan"] = pscan
    monkeypatch.setitem(sys.modules, "mambapy", ModuleType("mambapy"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("mamba_ssm", fake_mamba_ssm),
        ("selective_scan_cuda_oflex", fake_oflex),
        ("mambapy", fake_mambapy),
        ("ref-style", lambda monkeypatch: None),
        ("vmamba-pipeline", lambda monkeypatch: None),
    ],
)
def test_baselines_do_the_same_work(monkeypatch, name, install, dtype):
    install(monkeypatch)
    monkeypatch.setattr(profile_scan, "CUDA_ONLY", ())
    candidate = replace(profile_scan.find_candidate(name, settings(dtype)), allowance=1)
    assert candidate.differentiable == (name != "selective_scan_cuda_oflex")
    shape = Shape(1, 1, 1, 6, 3, 2)
    outcome = profile_scan.check_correctness(candidate, shape, settings(dtype))
    assert outcome == profile_scan.OK


@pytest.mark.parametrize("skip", [True, False])
def test_pipeline_equals_the_four_direction_scan(skip):
    asked = settings("fp64")
    (pipeline,) = profile_scan.find_candidates(["vmamba-pipeline"], asked)
    arguments = profile_scan.draw_arguments(Shape(2, 5, 3, 4, 2, 3), asked, skip=skip)
    expected = testing.evaluate(arguments, "reference")
    actual = testing.evaluate(arguments, pipeline.scan)
    assert len(actual) == 6 + skip
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-12)


def test_defaults_that_cannot_run_are_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    monkeypatch.setitem(sys.modules, "cmamba_ref.kernels", None)
    assert profile_scan.default_names(CPU) == ("reference", "chunked")
    names = profile_scan.default_names(torch.device("cuda"))
    slow = {"reference", "ref-style", "chunked"}
    assert set(names) == {*profile_scan.BACKENDS, *profile_scan.BASELINES} - slow
    monkeypatch.setattr(profile_scan, "default_names", lambda device: names)
    candidates = profile_scan.find_candidates(None, settings())
    absent = {"triton", "mamba_ssm", "selective_scan_cuda_oflex", "mambapy"}
    assert {candidate.name for candidate in candidates} == {*names} - absent
    left_out = capsys.readouterr().out.splitlines()
    assert len(left_out) == 4
    assert any(line.startswith("mambapy is left out: it cannot be imported") for line in left_out)


def test_defaults_on_a_gpu_take_a_minute():
    """Each measurement ends soon, and there are few of them."""
    args = profile_scan.measuring_parser("").parse_args(["--device", "cpu"])
    args.device = "cuda"
    cases, settings = profile_scan.cases_of(args), profile_scan.settings_of(args)
    rows = len(cases) * len(settings.modes) * len(profile_scan.default_names(settings.device))
    assert settings.seconds * rows <= 30
    # Each of these has kernels of its own to compile, in some 20 seconds.
    assert len({case.shape.kind for case in cases}) <= 2


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "fast"], "'fast'"),
        (["--backends", "mamba_ssm"], "mamba_ssm cannot run: it takes CUDA tensors"),
        (["--backends", "mambapy"], "mambapy cannot run: it cannot be imported"),
        (["--backends", "triton"], "triton cannot run: `backend` must be one that"),
        (["--shape", "1x2x3"], "BxHxWxDxNxR"),
        (["--shape", "1x2x3x4x0x1"], "six positive numbers"),
        (["--preset", "4k"], "'4k'"),
        (["--mode", "train"], "'train'"),
        (["--dtype", "int8"], "'int8'"),
        (["--device", "meta"], "'meta'"),
        (["--repeats", "0"], "must be a whole number above 0"),
        (["--repeats", "2.5"], "must be a whole number above 0"),
        (["--seconds", "-1"], "must be above 0"),
        (["--seconds", "soon"], "invalid positive value"),
        (["--json", "no/such/folder/scan.json"], "existing directory"),
        (["--json", "."], "must be a file"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(monkeypatch, capsys, arguments, message):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    monkeypatch.setitem(sys.modules, "cmamba_ref.kernels", None)
    with pytest.raises(SystemExit) as exit_status:
        profile_scan.main(["--device", "cpu", *arguments])
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err
