"""What holds for the project as a whole: public names, import rules, pinned versions, links."""

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import recon

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SLOW = ("matplotlib", "skimage", "sigpy", "torchkbnufft", "nibabel", "astra")


# Public names


@pytest.mark.parametrize("package", ["operators", "priors", "recon"])
def test_every_public_name_can_be_imported(package):
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'recon' has no attribute 'reconstrukt'"):
        _ = recon.reconstrukt


def test_no_submodule_takes_the_place_of_a_public_name():
    submodules = {module.name for module in pkgutil.iter_modules(recon.__path__)}
    assert submodules.isdisjoint(recon.__all__)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("recon", ("torch", *SLOW)),
        *((name, SLOW) for name in ("recon.cli", "recon.sampling", "operators", "priors")),
    ],
)
def test_importing_does_not_load_what_is_slow(module, absent):
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


# Who may import whom


def imported_modules(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def source_files(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return files


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        # Engines of the NUFFT and of line integrals, and sparse matrices.
        ("operators", {"operators", "torch", "numpy", "scipy", "torchkbnufft", "finufft", "astra"}),
        # Networks of other libraries: folders that diffusers wrote, modules of MONAI.
        ("priors", {"priors", "torch", "numpy", "safetensors", "diffusers", "monai"}),
    ],
)
def test_operators_and_priors_know_torch_and_nothing_else_of_ours(package, allowed):
    for file in source_files(package):
        extra = tops(imported_modules(file)) - allowed - sys.stdlib_module_names
        assert not extra, f"{file.relative_to(ROOT)} imports {sorted(extra)}"


def test_solvers_see_tensors_operators_and_priors_only():
    ours = ("recon.solvers", "recon.errors")
    no_files_no_command_line = {"argparse", "glob", "io", "os", "pathlib", "shutil", "sys", "tempfile"}
    for file in source_files("recon/solvers"):
        names = imported_modules(file)
        outside = tops(names) - {"operators", "priors", "recon", "torch", "numpy"} - sys.stdlib_module_names
        outside |= tops(names) & no_files_no_command_line
        outside |= {name for name in names if tops({name}) == {"recon"} and not name.startswith(ours)}
        assert not outside, f"{file.relative_to(ROOT)} imports {sorted(outside)}"


def test_the_packages_do_not_import_tests_benchmarks_or_examples():
    for file in source_files("operators", "priors", "recon"):
        assert tops(imported_modules(file)).isdisjoint({"tests", "benchmarks", "examples"}), file


FORMATS = {"h5py", "nibabel", "pydicom", "tifffile"}


def test_file_formats_are_read_in_recon_io_only():
    for file in source_files("operators", "priors", "recon"):
        if not file.is_relative_to(ROOT / "recon" / "io"):
            assert tops(imported_modules(file)).isdisjoint(FORMATS), file.relative_to(ROOT)


def test_every_folder_of_modules_is_a_package():
    # A folder without __init__.py can be imported from a checkout, but is left out of the distribution.
    folders = {file.parent for file in source_files("operators", "priors", "recon")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_module_is_called_utils():
    stems = {file.stem for file in source_files("operators", "priors", "recon")}
    assert stems.isdisjoint({"util", "utils", "misc", "helpers"})


# Versions


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line.startswith("#") or not line:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line)
        assert match, f"constraints.txt: not an exact, public version: {line!r}"
        found[canonicalize_name(match[1])] = match[2]
    return found


def requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for texts in lists for text in texts]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_pinned_version_is_one_that_pyproject_allows(requirement):
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_everything_that_the_requirements_bring_along_is_pinned():
    # torch pins the CUDA libraries it comes with itself, and setuptools is the installer's matter.
    not_ours = re.compile(r"setuptools|triton|nvidia-.*|cuda-.*")
    todo = [canonicalize_name(requirement.name) for requirement in requirements()]
    seen: set[str] = set()
    missing: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen or not_ours.fullmatch(name):
            continue
        seen.add(name)
        if name not in pins():
            missing.add(name)
        try:
            brought = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed here
            continue
        for needed in map(Requirement, brought):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(canonicalize_name(needed.name))
    assert not missing


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert recon.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# Documents


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (ROOT / target.partition("#")[0]).exists(), f"{document}: {target}"
