PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
# One thread each: the interpreter's many small operations lose to thread switching otherwise.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest
EMULATOR = OMP_NUM_THREADS=1 PYTHONPATH=.:tests/support $(PY)

.PHONY: demo test test-all test-release mutants ptx fuzz lint matrix test-versions models docs numerics gpu-day gpu-test gpu-sanitize gpu-bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(PY) -m bert_fused demo $(ARGS)

test: $(VENV)/.test
	$(PYTEST) -n auto --maxprocesses 4 --dist loadgroup -m "not alone" $(ARGS)

# 5 is pytest's status where ARGS selects nothing.
test-all: test $(VENV)/.dev $(VENV)/.examples
	$(PYTEST) -n auto --maxprocesses 4 --dist loadgroup -m "slow and not alone" $(ARGS) || test $$? -eq 5
	$(PYTEST) -m alone $(ARGS) || test $$? -eq 5

# The wheel in clean environments of some 5 GB each, kept in .release/.
test-release: $(VENV)/.test
	$(PY) tests/project/release.py $(ARGS)

mutants: $(VENV)/.test
	$(PY) tests/mutants $(ARGS)
	test -n "$(ARGS)" || $(EMULATOR) tests/ptx/faults.py

# Every kernel shipped or offered, as compiled, in the PTX emulator.
ptx: $(VENV)/.test
	$(EMULATOR) tests/ptx $(ARGS)

fuzz: $(VENV)/.test
	BERT_FUSED_FUZZ=$${BERT_FUSED_FUZZ:-2000} $(PYTEST) tests/ops/test_properties.py $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=tests/ptx $(VENV)/bin/mypy -p emulator

# Other versions are installed into .versions/, beside the pinned ones.
matrix: $(VENV)/.test
	$(PY) -m benchmarks matrix $(ARGS)

test-versions: $(VENV)/.test
	$(PY) -m benchmarks versions $(ARGS)

models: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/support/families.py $(ARGS)

docs: $(VENV)/.test
	$(PY) -m sphinx -W --keep-going -n -q -E -b html docs/api build/api

numerics: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/support/numerics.py $(ARGS)

# For a machine with an NVIDIA GPU, torch and Triton of its own; these install nothing. See CONTRIBUTING.md.
gpu-day:
	sh benchmarks/gpu.sh day $(PYTHON)

gpu-test:
	sh benchmarks/gpu.sh test $(PYTHON) $(ARGS)

gpu-sanitize:
	sh benchmarks/gpu.sh sanitize $(PYTHON) $(ARGS)

gpu-bench:
	sh benchmarks/gpu.sh bench $(PYTHON) $(ARGS)

clean:
	rm -rf $(VENV) .versions .release

# torch comes first and under the constraints, so that nothing below pulls another one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.examples $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
