# make demo        the whole pipeline on the bundled sample: prepare, train, evaluate, report
# make test        the Python tests          make cpp-test   the C++ tests (SANITIZE=address,undefined or thread)
# make lint        ruff                      make docs       the pages and the API as a site: build/docs/index.html
# make bare        a fresh clone with the packages of a bare GPU image alone
# make clean       remove what was built, and .venv
# PYTHON=python3.12 picks the interpreter; TORCH_INDEX=<url> the package index that torch comes from.
PYTHON ?= python3
CMAKE ?= cmake
TORCH_INDEX ?=
SANITIZE ?=
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
TORCH_CPU := https://download.pytorch.org/whl/cpu
PACKAGE := pyproject.toml setup.py constraints.txt CMakeLists.txt case_fast/__init__.py $(shell find csrc -type f)
CPP_BUILD := build/cpp$(addprefix -,$(SANITIZE))
# what a browser would fetch from elsewhere: pictures, scripts, styles, fonts; not the links that people follow
FETCHED := '( (src|srcset|data|poster)=|<link[^>]* href=|url\(|@import |import\(|fetch\()["'"'"']?(https?:)?//'
# cmake and ninja for the C++ tests: the machine's, or where it lacks one, .venv's
CPP_TOOLS = $(if $(shell sh -c 'command -v $(CMAKE) && command -v ninja' >/dev/null 2>&1 && echo there),,$(VENV)/.cpp-tools)

.PHONY: demo test lint docs cpp-test bare clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(VENV)/bin/case-fast demo

test: $(VENV)/.installed-test
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-test
	@$(VENV)/bin/ruff check .

docs: $(VENV)/.installed-docs
	@$(VENV)/bin/python -m sphinx -q -W --keep-going docs build/docs
	@! grep -rEn --include='*.html' --include='*.css' --include='*.js' $(FETCHED) build/docs || \
	  { echo "build/docs would fetch these from the network when a page is read" >&2; exit 1; }
	@echo "build/docs/index.html"

# Without CUDA: the tests run CUDA's kernels as plain C++ on the CPU.
cpp-test: export PATH := $(PATH):$(CURDIR)/$(VENV)/bin
cpp-test: $(CPP_TOOLS)
	@$(CMAKE) -S . -B $(CPP_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCASE_FAST_SANITIZE=$(SANITIZE) -DCASE_FAST_CUDA=OFF
	@$(CMAKE) --build $(CPP_BUILD)
	@ctest --test-dir $(CPP_BUILD) --output-on-failure -j 2

bare: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
bare: $(VENV)/.installed
	@PYTHON=$(PYTHON) benchmarks/bare.sh

clean:
	rm -rf $(VENV) build dist *.egg-info case_fast/_native*.so .pytest_cache .ruff_cache .hypothesis

# ---- installation: each step leaves a stamp in .venv and is done again only when its inputs have changed

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "case_fast needs Python 3.11 or newer as $(PYTHON); choose one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	  { echo "$(PYTHON) cannot create virtual environments (Debian/Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch from PyPI brings gigabytes of CUDA libraries on Linux, so a machine without an NVIDIA driver gets the CPU build:
# TORCH_INDEX if it is given; else a wheel that pip's own find-links already offer; else the CPU index; else PyPI.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "installing $(TORCH)"
	@if [ -n "$(TORCH_INDEX)" ]; then $(PIP) install -q --no-deps --index-url $(TORCH_INDEX) $(TORCH); \
	elif $(PIP) install -q --no-deps --no-index $(TORCH) 2>/dev/null; then :; \
	elif command -v nvidia-smi >/dev/null; then $(PIP) install -q --no-deps $(TORCH); \
	else $(PIP) install -q --no-deps --retries 1 --index-url $(TORCH_CPU) $(TORCH) || \
	  { echo "$(TORCH_CPU) cannot be used; taking torch from PyPI"; $(PIP) install -q --no-deps $(TORCH); }; fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(PACKAGE)
	@echo "installing case_fast and its dependencies, building the native module (a minute or two)"
	@$(PIP) install -q -c constraints.txt -e '.[tensorboard]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch $(PACKAGE)
	@echo "installing case_fast with its test dependencies, building the native module (a minute or two)"
	@$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $(VENV)/.installed $@

# The extra docs alone: case_fast is there, and would be built anew.
$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "installing Sphinx"
	@$(PIP) install -q -c constraints.txt $$($(VENV)/bin/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

$(VENV)/.cpp-tools: $(VENV)/.created
	@echo "installing cmake and ninja, which this machine lacks"
	@$(PIP) install -q -c constraints.txt cmake ninja
	@touch $@
