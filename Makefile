# `make demo` and `make test` set up everything themselves. They need Python 3.11, gcc and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)
# The extension is optional, so pip hides a failed build. If there is a compiler, make a failed build an error.
BUILD := $(if $(shell command -v "$${CXX:-c++}"),DRL_FAST_REQUIRE_EXTENSION=1)

.PHONY: setup demo test lint bench gpu wheel fuzz clean help rebuild

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## make .venv with pinned packages and this project, editable; rebuilds when csrc/ changes

# pip takes a half-written package for an installed one, so recreate .venv if an earlier install was interrupted.
.venv/.packages: constraints.txt
	@[ -e $@ ] || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@echo "drl-fast: installing the pinned packages into .venv (5.8 GB), then compiling; this takes some minutes, once"
	$(BIN)/python -m pip install -q --disable-pip-version-check -r constraints.txt
	@touch $@

# Rebuild if the extension is missing although there is a compiler.
ifeq ($(if $(BUILD),$(wildcard drl_fast/_C*.so),none),)
$(STAMP): rebuild
endif

$(STAMP): .venv/.packages $(SOURCES)
	@$(BUILD) $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e . || \
	  { echo "drl-fast: the install failed, see above; CXX=none make setup installs without the C++ extension"; exit 1; }
	@touch $@
	@echo "ready: source .venv/bin/activate, then drl-fast doctor"

# Make idle OpenMP threads sleep soon: if they spin, other work on the machine slows the demo several times.
demo: setup ## train every interaction on generated clips and compare them; VIDEOS=dir [PRETRAINED= CLIP=] for your own videos
	@GOMP_SPINCOUNT=20000 $(BIN)/drl-fast demo $(if $(VIDEOS),--videos '$(VIDEOS)') $(if $(PRETRAINED),--pretrained '$(PRETRAINED)') $(if $(CLIP),--clip '$(CLIP)')

test: setup ## all tests, one process per core, at most 4; TESTS=path selects some
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup $(TESTS)

# The same language version and macros as in setup.py. -isystem keeps clang-tidy from checking PyTorch's and Python's headers.
TIDY_FLAGS = -std=c++20 -Wall -Wextra -Wcomma -DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000 \
  $(shell $(BIN)/python -c 'import sysconfig; from torch.utils.cpp_extension import include_paths; \
  print(*(f"-isystem {path}" for path in [*include_paths(), sysconfig.get_path("include")]))')

lint: setup ## ruff and mypy, clang-format and clang-tidy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h
	@printf '%s\n' csrc/*.cpp | xargs -P 4 -I {} $(BIN)/clang-tidy --quiet {} -- $(TIDY_FLAGS)

SIZE := $(if $(QUICK),--quick)$(if $(FULL),--full)
# Other libraries to compare with. If one cannot be installed here, the benchmark lists it as not installed.
.venv/.peers: .venv/.packages benchmarks/peers.txt
	@for peer in $$(cat benchmarks/peers.txt); do \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --only-binary :all: $$peer || \
	  echo "$$peer cannot be installed here; the benchmark leaves it out"; done
	@touch $@

bench: setup .venv/.peers ## run the benchmarks; QUICK=1: a minute each, FULL=1: the whole grids
	$(BIN)/python benchmarks/bench_wti.py $(SIZE)
	$(BIN)/python benchmarks/bench_contrastive.py $(SIZE)
	$(BIN)/python benchmarks/bench_pooling.py $(SIZE)
	$(BIN)/python benchmarks/bench_rerank.py $(SIZE)
	$(BIN)/python benchmarks/bench_prepared.py $(SIZE)
	$(BIN)/python benchmarks/bench_cdcr.py $(SIZE)
	$(BIN)/python benchmarks/bench_model.py $(SIZE)
	$(BIN)/python benchmarks/bench_features.py $(SIZE)

# It runs from the source tree, so that a machine with a GPU needs no network, no compiler and no installation.
MINUTES := 9
gpu: ## on a CUDA GPU: check the kernels, then measure; MINUTES=9; run it again to continue, RETRY=1 repeats what failed
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_session.py --minutes $(MINUTES) \
	  $(if $(OUT),--out '$(OUT)') $(if $(RETRY),--retry)

# The oldest supported Triton, beside the installed one. It needs no torch of its own.
.venv/.triton-3.6: .venv/.packages
	@rm -rf $@ $@.part
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $@.part 'triton==3.6.*'
	@mv $@.part $@

fuzz: setup .venv/.triton-3.6 ## run the long random tests, and compile all kernels with the installed Triton and with 3.6
	DRL_FAST_FUZZ=1 $(BIN)/python -m pytest tests/ops/test_fuzz.py tests/engine/test_kill.py \
	  tests/kernels/test_static_report.py tests/benchmarks/test_launches.py -s

wheel: setup ## build a cp310-abi3 wheel and an sdist in dist/
	DRL_FAST_REQUIRE_EXTENSION=1 $(BIN)/python -m build --no-isolation --outdir dist .

clean: ## remove everything that was built
	rm -rf .venv build dist *.egg-info drl_fast/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
