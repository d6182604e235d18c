"""A module that shadows ``operators`` or ``priors`` stops ``import recon`` with one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def import_recon(*path: Path, first: str = "") -> subprocess.CompletedProcess[str]:
    """Import recon in a fresh interpreter whose search path starts with the folders given."""
    # "-P" keeps the working directory off the path, so the folders given come first.
    return subprocess.run(
        [sys.executable, "-P", "-c", f"{first}\nimport recon\nprint(recon.__file__)"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["operators", "priors"])
@pytest.mark.parametrize("layout", ["{}.py", "{}/__init__.py"])
def test_shadowing_module_is_named(tmp_path, name, layout):
    intruder = tmp_path / layout.format(name)
    intruder.parent.mkdir(exist_ok=True)
    intruder.write_text("raise SystemExit('the shadowing module was run')\n")
    result = import_recon(tmp_path, ROOT)
    assert result.returncode == 1
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith(f"ImportError: recon needs its own package '{name}'")
    assert str(intruder) in sentence


def test_shadowing_module_that_is_already_loaded_is_named(tmp_path):
    intruder = tmp_path / "operators.py"
    intruder.write_text("")
    first = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import operators; del sys.path[0]"
    result = import_recon(ROOT, first=first)
    assert result.returncode == 1
    assert str(intruder) in result.stderr.strip().splitlines()[-1]


def test_module_without_spec_or_file_counts_as_none():
    result = import_recon(ROOT, first="import sys, types; sys.modules['priors'] = types.ModuleType('priors')")
    assert result.returncode == 1
    assert "needs its package 'priors'" in result.stderr.strip().splitlines()[-1]


def test_folder_without_init_does_not_shadow(tmp_path):
    # Such a folder is only a candidate for a namespace package, and a real package further on goes first.
    (tmp_path / "operators").mkdir()
    result = import_recon(tmp_path, ROOT)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "recon" / "__init__.py"


def test_missing_package_is_named(tmp_path):
    (tmp_path / "recon").symlink_to(ROOT / "recon")
    # "-S" leaves out site-packages, where an installed copy would be found.
    result = subprocess.run(
        [sys.executable, "-P", "-S", "-c", "import recon"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "needs its package 'operators'" in result.stderr.strip().splitlines()[-1]
