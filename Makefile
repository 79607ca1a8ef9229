# Everything a newcomer needs: `make demo` and `make test` set up by themselves.
#
#   make setup TORCH=torch==2.11.0     another torch than the one below
#   make demo VENV=/path/to/venv       another place for the environment
#   make demo PYTHON=python3.12        another Python (3.11 or newer)
#
# A torch that $(PYTHON) already has is kept (GPU machines), also one in a virtual environment, which
# the new one sees through kept_torch.pth; otherwise $(TORCH) is installed first, so that nothing else
# pulls in a torch of its own choice. The clone may lie in a folder with spaces in its
# path: all paths here are relative to it.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
READY  := $(VENV)/.omnipretrain-ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

ifneq ($(words $(VENV)),1)
$(error VENV=$(VENV) has spaces, and make knows no such targets: choose another place)
endif

.PHONY: setup demo test test-slow lint clean

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "omnipretrain needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@if [ ! -x $(BIN)/python ]; then \
	  if $(PYTHON) -c 'import torch, sys; v = torch.__version__.split(".")[:2]; sys.exit(tuple(map(int, v)) < (2, 9))' 2>/dev/null; \
	  then echo "keeping the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	    $(PYTHON) -c 'import site, sys; [print(f"import site; site.addsitedir({p!r})") for p in site.getsitepackages() if sys.prefix != sys.base_prefix]' \
	      > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kept_torch.pth"; \
	  else $(PYTHON) -m venv $(VENV); fi; fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
	  { echo "installing $(TORCH)"; $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH); }
	@echo "installing omnipretrain and what it needs"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	@touch $@

demo: setup
	@$(BIN)/python -m tools.demo

# Two files at a time: the tests of one file share runs, and start processes of their own. In their
# order, which has the long files in the middle: xdist would put those of few tests, the longest, last.
test: setup
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) *.egg-info
