# Everything here works from a clean clone: .venv is made when it is missing or pyproject.toml has changed.
# Settings: PYTHON=python3.12 (any >= 3.11), PYTEST_ARGS='-k planner', SECONDS=60, EXAMPLES=1000, CALLS=2000, KILLS=20.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

supported := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach python,python3.11 python3 python3.12 python3.13 python3.14,\
	$(shell $(python) -c '$(supported)' 2>/dev/null && echo $(python))))
PYTEST_ARGS ?=
SECONDS = 600
EXAMPLES ?= 10000
CALLS ?= 20000
KILLS ?= 50

bin := .venv/bin
installed := .venv/installed
clients := $(patsubst %/Makefile,%,$(wildcard clients/*/Makefile))
interpreter := build/triton/installed
ray := build/ray-installed
lm_eval := build/lm-eval-installed
uv := build/uv/bin/uv
workflows := $(wildcard .github/workflows/*.yml)
proto := PYTHON=$(bin)/python BUF=$(bin)/buf tools/proto.sh

# One core per worker: torch's own threads would only compete with the other workers.
# worksteal evens out a few long tests.
pytest := OMP_NUM_THREADS=1 $(bin)/python -m pytest

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(installed) ## Stream text from a model that does not fit its device memory, on this machine
	@$(bin)/python -m hsrpc.cli.demo

.PHONY: test
test: $(installed) ## Run all tests
	@for client in $(clients); do lacking=$$($(MAKE) --silent --no-print-directory -C $$client missing); \
		test -z "$$lacking" || echo "$$client is left out of the tests: apt-get install $$lacking"; done
	@$(pytest) -n auto --dist worksteal $(PYTEST_ARGS)

.PHONY: clients
clients: $(installed) ## Run the suite of all clients, as far as their tools are here, and show its table
	@OMP_NUM_THREADS=1 $(bin)/python -m clients.conformance --markdown

.PHONY: kernels
kernels: $(installed) $(interpreter) ## Run the GPU kernels on the CPU, in Triton's interpreter (1 GB in build/triton)
	@TRITON_INTERPRET=1 PYTHONPATH=build/triton $(pytest) -n auto --dist worksteal tests/kernels

.PHONY: ray
ray: $(installed) $(ray) ## Test the stage of Ray Data with a real Ray on this machine, of which a worker is killed
	@HSRPC_TEST_RAY=1 $(pytest) tests/ray

.PHONY: lm-eval
lm-eval: $(installed) $(lm_eval) ## Test the model of lm-eval: its numbers are those of lm-eval's own for transformers
	@HSRPC_TEST_LM_EVAL=1 $(pytest) tests/lm_eval

.PHONY: soak
soak: $(installed) ## Serve under load, faults, kills and a siege, for SECONDS=600 and more; report in build/soak
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(bin)/python tools/soak.py --seconds $(SECONDS) --out build/soak

.PHONY: cancels
cancels: $(installed) ## End CALLS=20000 calls early, and check that the server holds what it held before
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(bin)/python tools/cancels.py --calls $(CALLS)

.PHONY: kills
kills: $(installed) ## Harm ranks of engines with two GPUs KILLS=50 times, and check that nothing is left of them
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(bin)/python tools/kills.py --kills $(KILLS)

.PHONY: fuzz
fuzz: $(installed) ## Send EXAMPLES=10000 mutated requests to a server
	@HSRPC_FUZZ_EXAMPLES=$(EXAMPLES) $(pytest) -s --timeout 0 tests/server/grpc/test_fuzz.py

.PHONY: guard
guard: $(installed) ## Hold the speed of the engine's data path against the reference of this kind of GPU
	@$(bin)/python -m benchmarks.guard

.PHONY: lint
lint: $(installed) proto-check ## Check style, format, types, proto files, stubs, Dockerfile and workflows
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@$(bin)/hadolint Dockerfile
	@$(bin)/check-jsonschema --builtin-schema vendor.github-workflows $(workflows)
	@$(bin)/zizmor --offline --quiet $(workflows)

.PHONY: format
format: $(installed) ## Fix style and format
	@$(bin)/ruff check --fix .
	@$(bin)/ruff format .

.PHONY: proto
proto: $(installed) ## Generate hsrpc/v1 from proto/
	@$(proto)

.PHONY: proto-check
proto-check: $(installed) ## Check proto/ for style and breaking changes, and hsrpc/v1 for staleness
	@$(proto) --lint
	@$(proto) --check

.PHONY: manifests
manifests: $(installed) ## Check the Kubernetes manifests, offline (promtool of Debian's prometheus tests alerts)
	@$(bin)/yamllint --strict k8s tests/k8s .yamllint.yaml
	@$(pytest) -rs -n auto --dist worksteal tests/k8s

.PHONY: lock
lock: $(uv) ## Write requirements/, what the images install: one version of each package, and its hashes
	@UV=$(uv) tools/lock.sh

.PHONY: clean
clean: ## Remove the environments and everything else that was built
	rm -rf .venv .venv-proto build dist *.egg-info
	@for client in $(clients); do $(MAKE) --silent --no-print-directory -C $$client clean; done
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(installed): pyproject.toml constraints.txt
	@$(if $(PYTHON),,echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1)
	@tools/install.sh $(PYTHON)
	@touch $@

# Beside the environment, not in it: nothing but these tests needs it without a GPU. It must suit the newest numpy.
$(interpreter): Makefile
	@rm -rf build/triton
	@$(bin)/pip install -qq --disable-pip-version-check --no-deps --target build/triton 'triton==3.9.0'
	@touch $@

$(ray): $(installed)
	@$(bin)/pip install -qq --disable-pip-version-check -c constraints.txt 'ray[data]'
	@mkdir -p $(@D)
	@touch $@

$(lm_eval): $(installed)
	@$(bin)/pip install -qq --disable-pip-version-check -c constraints.txt lm-eval
	@mkdir -p $(@D)
	@touch $@

# Beside the environment: only who makes the locks anew needs it.
$(uv): | $(installed)
	@$(bin)/pip install -qq --disable-pip-version-check --target build/uv uv
