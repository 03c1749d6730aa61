# make demo   set everything up, build an engine bundle of models/ring-nano and let it write text
# make test   set everything up and run the tests
# make check  set everything up and run lint, format and type checks
# make docs   regenerate the reference pages from the code
# make plugins  compile the CUDA kernels and the TensorRT plugins; needs nvcc, no GPU; ARCHITECTURES=90a for one only
# make sanitize   run the kernel tests under compute-sanitizer; needs a GPU and the library of `make plugins`

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A pinned release: without a GPU nobody wants the CUDA packages of a newer one.
TORCH ?= torch==2.13.0
BUNDLE ?= bundles/ring-nano
PROMPT ?= def read_config(path):

ARCHITECTURES ?= 80;86;89;90a;100;120
JOBS ?= $(shell nproc)

.PHONY: setup demo test tensorrt check docs plugins sanitize clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("ringexport needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV), 1.5 GB on the disk: some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[ort,torch,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps kernel-lens==2.0.1
	touch $@

demo: setup
	$(BIN)/ringexport build models/ring-nano -o $(BUNDLE)
	$(BIN)/ringexport run $(BUNDLE) "$(PROMPT)" --max-new-tokens 60 --temperature 0.5 --seed 1

# Full TensorRT as far as a registry has it: its Python module and the lean runtime, apart from the environment, where
# they would pass for an installed TensorRT. Tests that need them say so when they are missing.
TENSORRT ?= 11.4.0.106

tensorrt: setup
	[ -d build/tensorrt/tensorrt_lean_libs ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --only-binary :all: --target build/tensorrt tensorrt-cu13-bindings==$(TENSORRT) tensorrt-lean-cu13-libs==$(TENSORRT)

test: setup
	$(MAKE) tensorrt || echo "TensorRT's Python module and lean runtime cannot be had: their tests are skipped"
	$(BIN)/python -m pytest -n auto --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python scripts/generate_docs.py

plugins: setup
	cmake -S plugins -B build/plugins -DPython3_EXECUTABLE="$(abspath $(BIN))/python" "-DRINGEXPORT_CUDA_ARCHITECTURES=$(ARCHITECTURES)"
	cmake --build build/plugins --parallel $(JOBS)

sanitize: setup
	$(BIN)/python benchmarks/sanitize.py

clean:
	rm -rf $(VENV) bundles build .pytest_cache .mypy_cache .ruff_cache
