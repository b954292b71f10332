# make train | test | test-docker | test-vllm | test-sanitized | lint | clean
#
#   PYTHON=python3.12     the interpreter for the virtual environment
#   VENV=.venv            where it goes
#   PIP_ARGS="..."        more arguments for pip: an index with CPU builds of torch, --no-cache-dir, ...
#   TRAIN_ARGS="..."      such as --set seed=1
#   PYTEST_ARGS="..."     such as -k models
#
# Every path is relative, so that a folder with a space in its name does not matter.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TRAIN_ARGS ?=
PYTEST_ARGS ?=

ROOMS = tools envs agents trainers scenarios
SOURCES := $(shell find .treegym $(ROOMS) -name '*.py' -o -name '*.yaml' -o -name '*.[ch]' -o -path '*/page/*' -o -name py.typed)
# setuptools would ship what an older build/ holds.
INSTALL = rm -rf build && "$(VENV)/bin/python" -m pip --disable-pip-version-check install $(PIP_ARGS)

.PHONY: train test test-docker test-vllm test-sanitized lint clean
.NOTPARALLEL:

train: $(VENV)/.installed
	"$(VENV)/bin/treegym" train scenarios/quickstart.yaml $(TRAIN_ARGS)

test: $(VENV)/.extras $(VENV)/.installed
	OMP_NUM_THREADS=1 "$(VENV)/bin/pytest" --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

# With an engine that is started where none runs; its image is made of this Python.
test-docker: $(VENV)/.extras $(VENV)/.installed
	TREEGYM_NEEDS=docker OMP_NUM_THREADS=1 .ci/with-docker "$(VENV)/bin/pytest" --numprocesses 2 -k docker $(PYTEST_ARGS) \
		tests/test_tools_sandbox.py tests/test_envs_pythonmath.py tests/test_envs_code.py tests/test_packages.py

# With a real vLLM server on the CPU, installed into the cache where TREEGYM_VLLM names no vllm.
test-vllm: $(VENV)/.extras $(VENV)/.installed
	PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" .ci/with-vllm \
		"$(VENV)/bin/pytest" -m vllm $(PYTEST_ARGS) tests/test_vllm.py tests/test_vllm_sync.py

# The C under the sanitizers of addresses and of undefined behaviour, which come with gcc. They do not see into products
# of tiles (AMX), so the tests take the way without. The compiler itself runs as ever.
SANITIZED = env -u LD_PRELOAD cc -fsanitize=address,undefined -fno-sanitize-recover=undefined
test-sanitized: $(VENV)/.extras $(VENV)/.installed
	CC="$(SANITIZED)" LD_PRELOAD="$$(cc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
		"$(VENV)/bin/pytest" -k "tiles and grouped and (exact or move or beyond) and not long" $(PYTEST_ARGS) \
		tests/test_native.py tests/test_kernels.py

lint: $(VENV)/.extras $(VENV)/.installed
	"$(VENV)/bin/ruff" check --output-format concise .
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/mypy"

clean:
	rm -rf "$(VENV)" build treegym.egg-info

$(VENV)/.requirements: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "treegym needs Python 3.11 or newer and this is %d.%d: make PYTHON=..." % v[:2])'
	"$(PYTHON)" -m venv "$(VENV)"
	$(INSTALL) -c constraints.txt . && rm -rf build
	@touch "$@"

$(VENV)/.extras: $(VENV)/.requirements
	$(INSTALL) -c constraints.txt '.[test,plot]' && rm -rf build
	@touch "$@"

# An ordinary install, made again when a source is newer: what is tested and type-checked is what ships.
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	$(INSTALL) --quiet --no-deps --no-build-isolation . && rm -rf build
	@touch "$@"
