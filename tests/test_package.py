"""What is installed: imports, wheel contents, both import paths of the kernels, no stray paths."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

MAX_PRETRAINED_BYTES = 16_000_000
# An application pays for these only when it uses them.
OPTIONAL_MODULES = ("triton", "PIL", "matplotlib", "huggingface_hub", "cmamba_ref.training")


def run_python(code: str, cwd: Path, **env: str) -> str:
    """The stdout of `code` in a fresh process that sees neither the tests nor their environment."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=clean | env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: no stale `build` directory can leak into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("cmamba_ref", "kernels"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = source.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel is installed."""
    path = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    result = subprocess.run(
        [*command, "--target", str(path), str(wheel)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def outside(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process that runs outside the clone, without triton, imports from the wheel."""
    code = (
        "import json, sys; sys.modules['triton'] = None;"
        "import cmamba_ref, cmamba_ref.kernels;"
        "print(json.dumps({'package': cmamba_ref.__file__, 'version': cmamba_ref.__version__,"
        " 'kernels': cmamba_ref.kernels.__file__}))"
    )
    return json.loads(run_python(code, tmp_path_factory.mktemp("cwd"), PYTHONPATH=str(target)))


def test_import_is_light(root: Path) -> None:
    """Beyond `import torch`, all names of `cmamba_ref` cost under 0.5 s and no optional module."""
    code = (
        "import json, sys, time, torch; before = set(sys.modules); start = time.perf_counter();"
        "from cmamba_ref import *; seconds = time.perf_counter() - start;"
        f"heavy = [m for m in {OPTIONAL_MODULES} if m in sys.modules and m not in before];"
        "print(json.dumps([seconds, heavy]))"
    )
    runs = [json.loads(run_python(code, root)) for _ in range(3)]
    assert runs[0][1] == []
    assert min(seconds for seconds, _ in runs) < 0.5


def test_import_needs_no_torch_until_it_is_used(root: Path) -> None:
    """Every name can be imported all the same, as can every submodule as an attribute."""
    code = (
        "import json, sys, cmamba_ref; before = 'torch' in sys.modules;"
        "listed = set(cmamba_ref.__all__) <= set(dir(cmamba_ref));"
        "assert 'torch' not in sys.modules and not hasattr(cmamba_ref, 'no_such_name');"
        "module = cmamba_ref.weights.__name__; from cmamba_ref import *;"
        "names = [n for n in cmamba_ref.__all__ if n not in globals()];"
        "print(json.dumps([before, listed, module, names, 'torch' in sys.modules]))"
    )
    assert json.loads(run_python(code, root)) == [False, True, "cmamba_ref.weights", [], True]


@pytest.mark.parametrize(
    ("args", "absent"),
    [
        (["--version"], {"torch", "numpy", "PIL", "tqdm"}),
        (["encode", "--help"], {"torch", "numpy", "PIL", "tqdm"}),
        (["integrate"], {"torch", "numpy", "PIL", "tqdm"}),
        (["info", "tests/golden/pixel.cmb"], {"torch", "PIL", "tqdm"}),
        (
            ["encode", "cmamba_ref/data/coffee.png", "-o", "{}"],
            {"pytorch_msssim", "matplotlib", "torch._dynamo", "sympy", "triton"},
        ),
    ],
)
def test_commands_import_lazily(
    root: Path, tmp_path: Path, args: list[str], absent: set[str]
) -> None:
    code = (
        "import sys; from cmamba_ref.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    args = [arg.format(tmp_path / "a.cmb") for arg in args]
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout
    assert not absent & set(done.stderr.split()), args


def test_clone_works_without_installation(root: Path, tmp_path: Path) -> None:
    """Its own kernels are found, also where another checkout is installed."""
    for name in ("cmamba_ref", "kernels"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "cwd").mkdir()
    code = "import cmamba_ref.kernels; print(cmamba_ref.kernels.__file__)"
    found = run_python(code, tmp_path / "cwd", PYTHONPATH=str(tmp_path)).strip()
    assert Path(found) == tmp_path / "kernels" / "__init__.py"


def test_torch_hub_finds_the_models(root: Path, tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "for name in ('tiny', 'tiny_msssim', 'small', 'base'):\n"
        f"    model = torch.hub.load({str(root)!r}, name, source='local')\n"
        "    print(model.config.name, model.training, model.gaussian_conditional.stored.filled)"
    )
    found = run_python(code, tmp_path).splitlines()
    trained, untrained = ("tiny", "tiny-msssim"), ("small", "base")
    assert found == [
        *(f"{name} False True" for name in trained),
        *(f"{name} False False" for name in untrained),
    ]


def test_citation_and_changes_name_this_version(root: Path) -> None:
    version = importlib.metadata.version("cmamba-ref")
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()
    first = re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), re.M)
    assert first is not None and first[1] == version


def test_wheel_works_outside_the_clone(target: Path, outside: dict[str, str]) -> None:
    assert Path(outside["package"]).is_relative_to(target)
    assert Path(outside["kernels"]).is_relative_to(target / "cmamba_ref" / "kernels")


def test_wheel_installs_one_top_level_package(wheel_names: set[str]) -> None:
    top_level = {name.partition("/")[0] for name in wheel_names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"cmamba_ref"}


def test_wheel_holds_every_module(root: Path, wheel_names: set[str]) -> None:
    """A new subpackage has to be added to `packages` in pyproject.toml."""
    expected = {path.relative_to(root).as_posix() for path in root.glob("cmamba_ref/**/*.py")}
    expected |= {
        f"cmamba_ref/{path.relative_to(root).as_posix()}" for path in root.glob("kernels/**/*.py")
    }
    assert expected == {name for name in wheel_names if name.endswith(".py")}


def test_wheel_holds_the_data(root: Path, wheel_names: set[str]) -> None:
    expected = {"cmamba_ref/py.typed"}
    for pattern in (
        "data/*",
        "pretrained/**/*.safetensors",
        "pretrained/**/*.safetensors.gz",
        "pretrained/**/*.json",
    ):
        found = {path.relative_to(root).as_posix() for path in root.glob(f"cmamba_ref/{pattern}")}
        assert found, f"nothing matches cmamba_ref/{pattern}"
        expected |= found
    assert expected <= wheel_names


def test_pretrained_weights_stay_small(root: Path) -> None:
    files = [path for path in (root / "cmamba_ref" / "pretrained").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_PRETRAINED_BYTES


def test_demo_image_names_its_source(root: Path) -> None:
    data = root / "cmamba_ref" / "data"
    source = (data / "SOURCE.md").read_text(encoding="utf-8")
    images = [path.name for path in data.iterdir() if path.suffix != ".md"]
    assert images
    assert all(f"`{name}`" in source for name in images)


def test_version_is_consistent(root: Path, wheel: Path, outside: dict[str, str]) -> None:
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name.split("-")[1] == declared
    assert outside["version"] == declared


def test_every_pin_satisfies_its_range(root: Path) -> None:
    """Each direct dependency is pinned in constraints.txt, inside the range of pyproject.toml."""
    requirements = pytest.importorskip("packaging.requirements")
    pins = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.partition("#")[0].strip().split("==")
            pins[name] = version
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for text in (text for group in groups for text in group):
        requirement = requirements.Requirement(text)
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[requirement.name]), text


def test_installed_package_maps_the_kernels(tmp_path: Path) -> None:
    """Also true of an editable install, which is how the README and the gate install for tests."""
    try:
        importlib.metadata.distribution("cmamba-ref")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cmamba-ref is not installed in this environment")
    code = (
        "import importlib.util, cmamba_ref.kernels;"
        "spec = importlib.util.find_spec('kernels');"
        "print(spec is not None and spec.origin == cmamba_ref.kernels.__file__)"
    )
    assert run_python(code, tmp_path).strip() == "False"


def test_no_file_names_a_path_of_one_machine(root: Path) -> None:
    if not (root / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"git cannot list the files: {result.stderr.strip()}")
    absolute = re.compile(r"(?<![\w./-])/(?:{})/".format("|".join(("wor" + "k", "roo" + "t"))))
    offenders = []
    for path in (root / name for name in result.stdout.split("\0") if name):
        if path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a binary file
            if absolute.search(text):
                offenders.append(path.relative_to(root).as_posix())
    assert not offenders
