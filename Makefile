# make demo | test | lint | docs   each sets up what it needs, from nothing but Python and a C++ compiler.
#
# VENV    the environment to create and use; pinned versions, CPU torch where the index offers one   (.venv)
# VENV=   (empty) use PYTHON's own environment and its torch as they are: nothing is downloaded or replaced
# PYTHON  the Python to create VENV with, or, with VENV=, to use                                      (python3)
# ARGS    passed on to the command, as in: make test ARGS='-k optimizer -x'
VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=

ifeq ($(strip $(VENV)),)
PY    = $(PYTHON)
BIN   = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
READY = existing-environment
TOOLS_READY = existing-environment
TRAINERS_READY = existing-environment
DOCS_READY = existing-environment
RELEASE_READY = existing-environment
else
PY    = $(VENV)/bin/python
BIN   = $(VENV)/bin
READY = $(VENV)/.installed
TOOLS_READY = $(VENV)/.installed-tools
TRAINERS_READY = $(VENV)/.installed-trainers
DOCS_READY = $(VENV)/.installed-docs
RELEASE_READY = $(VENV)/.installed-release
endif
TORCH  = $(shell grep -E '^torch==' constraints.txt)
BUILD  = setuptools pybind11 cmake ninja
SOURCES = $(wildcard csrc/*/*.cpp csrc/*/*.h cuda/*.cu cuda/*.cuh cuda/*.cpp cuda/*.h)

.PHONY: help install demo test test-distributed integrations lint format docs release sass asan clean existing-environment
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

# The extension is brought up to date each time: CMake and Ninja know what changed, and need half a second to say "nothing".
install: $(READY)
	$(PY) setup.py --quiet build_ext --inplace

# torch first, under its pin: without one, pip takes the newest torch and gigabytes of CUDA packages with it.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lopt needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt $(TORCH) $(BUILD)
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[tasks,plot]'
	touch $@

# What only test, lint and sass need.
$(VENV)/.installed-tools: $(VENV)/.installed
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[test,lint,sass]'
	touch $@

# The trainers of others that lopt.integrations is for, Ray, the loggers of others and the hub, a minute.
$(VENV)/.installed-trainers: $(VENV)/.installed-tools
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[hf,hub,lightning,ray,tensorboard,wandb]'
	touch $@

# Sphinx and its theme.
$(VENV)/.installed-docs: $(VENV)/.installed
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

# What makes and mends wheels.
$(VENV)/.installed-release: $(VENV)/.installed
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[release]'
	touch $@

existing-environment:
	@$(PY) -c 'import torch' 2>/dev/null || { echo 'VENV= uses the environment of PYTHON=$(PYTHON), which has no torch: install it there, or leave VENV out.'; exit 1; }
	@$(PY) -c 'import importlib.metadata as m; m.version("lopt")' 2>/dev/null || $(PY) -m pip install --no-build-isolation --no-deps -e .

demo: install
	$(BIN)/lopt train --out out/demo $(ARGS)

# The tests need lopt._sim, the CUDA kernels on the CPU.
test test-distributed integrations asan: export LOPT_SIM = ON
test: $(TOOLS_READY) install
	$(PY) -m pytest $(ARGS)

# What starts several ranks and takes minutes: checkpoints in every way, a training that is killed.
test-distributed: $(TOOLS_READY) install
	$(PY) -m pytest -m distributed $(ARGS)

# Real runs with the trainers of others, on Ray, with the loggers of others and a stand-in for the hub; what is not
# installed is skipped.
integrations: $(TRAINERS_READY) install
	$(PY) -m pytest python_tests/integrations $(ARGS)

lint: $(TOOLS_READY) install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: $(TOOLS_READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# The site of all pages and docstrings, in build/docs, without network. A warning, as of a broken link, is an error; all is
# made anew, as a page that did not change may link to one that did. With SITE=FOLDER it is put there too, beside those of
# other versions, under the name of this one or NAME.
docs: $(DOCS_READY) install
	$(PY) -m sphinx -q -E -a -W --keep-going -c docs -d build/doctrees . build/docs $(ARGS)
	$(if $(SITE),$(PY) docs/versions.py build/docs $(SITE) $(or $(NAME),$$($(PY) -c 'import lopt; print(lopt.__version__)')))
	@echo 'Open build/docs/index.html'

# In DIST: a source distribution, and a wheel made of it that is marked for the Linux it fits. The OpenMP of a process is
# torch's, so the wheel brings none.
DIST = dist
release: $(RELEASE_READY)
	rm -rf $(DIST)
	$(PY) -m build --no-isolation --outdir $(DIST)/built
	PATH="$(BIN):$$PATH" $(PY) -m auditwheel repair --exclude libgomp.so.1 --wheel-dir $(DIST) $(DIST)/built/*.whl
	mv $(DIST)/built/*.tar.gz $(DIST) && rm -r $(DIST)/built

# A second build of the package, beside the first one. libstdc++ is loaded early for ASAN to see torch's exceptions; Python
# and torch leave memory behind at exit, so leaks are not reported. pytest must not capture what ASAN says last.
asan: $(TOOLS_READY)
	LOPT_SANITIZE=address LOPT_CUDA=OFF $(PY) setup.py --quiet build --build-lib build/asan
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(CURDIR)/build/asan $(BIN)/pytest --capture=no --ignore=python_tests/distributed -k "sim and not reverse" $(ARGS)

sass: $(TOOLS_READY) install
	$(PY) benchmarks/sass.py $(ARGS)

clean:
	rm -rf build dist out *.egg-info lopt/*.so .pytest_cache .mypy_cache .ruff_cache
	find lopt python_tests -name __pycache__ -type d -prune -exec rm -rf {} +
