# make demo    the main job on the embedded default: pretrain, adapt by four methods, table and picture
# make benchmark   eight methods on eight small tasks of real images, three seeds: table and picture, half an hour
# make gpu-report   on a CUDA machine: steps, operator and all memory, measured beside their predictions, 9 minutes;
#              elsewhere a rehearsal of it on the CPU, 2 minutes
# make test    the whole test suite
# make lint    style and types
# make docs    these pages as HTML: docs/_build/html/index.html
PYTHON ?= python3
VENV   ?= .venv
# The versions that CI tested; they bind on CI's Python only. `make demo CONSTRAINTS=` takes the newest.
CONSTRAINTS ?= constraints.txt

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo benchmark gpu-report test lint docs constraints clean

demo: $(INSTALLED)
	$(BIN)/python profiling/demo.py

benchmark: $(INSTALLED)
	$(BIN)/python profiling/mini_benchmark.py

gpu-report: $(INSTALLED)
	$(BIN)/python profiling/gpu_report.py

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build/html

# Made once, and again when the project's own files change.
$(INSTALLED): setup.cfg pyproject.toml $(wildcard $(CONSTRAINTS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) --version); say make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[dev,benchmark,deepspeed,docs,export,peft,quantized,report,trackers]'
	@touch $@

# What is installed now becomes what binds; after a green run of the tests on newer versions.
constraints:
	{ echo '# The versions that CI tested; made by make constraints.'; \
	  $(BIN)/python -m pip freeze --exclude-editable \
	  | sed 's/$$/ ; python_version == "3.11" and sys_platform == "linux"/'; } > constraints.txt

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info
