# One environment for everything, in .venv; pip runs again only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV = .venv
# nibabel, pydicom, finufft and astra (with 240 MB of CUDA libraries to download) are tested too.
TEST_EXTRAS := test,nifti,dicom,finufft,astra,diffusers,monai
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 4 --dist loadfile

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format setup peers clean

help: ## say what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16
	@echo
	@echo "  PYTHON=... chooses the interpreter (3.11 or later) and VENV=... the environment's folder."

demo: $(VENV)/.core ## reconstruct the bundled example into demo/
	$(BIN)/recon demo --out demo/

# One thread a process: the files run in parallel, and sums come out in the same order everywhere.
test: $(VENV)/.test ## run every test
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.dev ## install everything a developer needs

peers: ## make .venv-peers: the environment with the packages that benchmarks compare with
	PYTHON="$(PYTHON)" VENV=.venv-peers benchmarks/peers/make_environment.sh

clean: ## remove the environment, caches and the demo's results
	rm -rf .venv .venv-peers demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Each stamp is touched only after its installation succeeded, so an interrupted one is taken up again.
$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "No '$(PYTHON)' on the PATH: install Python 3.11 or later, or name one with make PYTHON=/path/to/python3." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or later is needed, and '$(PYTHON)' is $$("$(PYTHON)" -c 'import platform; print(platform.python_version())'): name another with make PYTHON=/path/to/python3." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' comes without venv or ensurepip, so no environment can be made: install them (Debian and Ubuntu: the package python3-venv)." >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

$(VENV)/.core: $(VENV)/.created $(INPUTS)
	@echo "Installing into $(VENV); the first time this downloads torch and takes some minutes."
	$(INSTALL) .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(INSTALL) ".[$(TEST_EXTRAS)]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) ".[dev,$(TEST_EXTRAS)]"
	@touch $@
