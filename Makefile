# From a bare clone with python3: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES := $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
READY := $(VENV)/.ready

.PHONY: demo demo-all study test check format clean

# torch is installed by its exact version first: another package's open range would take the newest CUDA build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

TRAIN := $(BIN)/accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml \
	--num_cpu_threads_per_process $(CORES) recipes/sft.py

demo: $(READY)
	$(TRAIN)

# All tasks of the demo one after the other, and one table of what they reach.
demo-all: $(READY)
	for name in demo demo_vqa demo_grounding digits demo_chat demo_slides; do \
		$(TRAIN) --config recipes/configs/$$name.yaml --overwrite_output_dir true || exit 1; \
	done
	$(BIN)/python eval/demo_all.py

# Runs that are finished are kept: the same command goes on.
study: $(READY)
	$(BIN)/python recipes/compare.py --config recipes/configs/study_demo.yaml --jobs $(CORES)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) outputs build *.egg-info
