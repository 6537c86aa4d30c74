# Two commands: `make demo` and `make test`. Each sets up what it needs; `make install` alone makes .venv/.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED := 0
# The demo and the tests use embedded models only; nothing asks a hub.
export HF_HUB_OFFLINE := 1
# Empty is unset: each of a job's processes would compile the project's modules for itself.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow cluster-test chaos mutants install lint submit-size constraints clean

demo: $(STAMP)
	$(VENV)/bin/python -m jobs.demo --out demo

# Test files run side by side in so many processes, each with a Ray of its own: 2.5 GB of memory each.
WORKERS ?= 2
test: lint
	$(VENV)/bin/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

# What `make test` leaves out for its length.
test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -m slow

# 20 seeded kills -9 of drivers, actors, raylets and the store; another round: make chaos CHAOS='--kills 50 --seed 7'
chaos: $(STAMP)
	$(VENV)/bin/python -m tests.chaos.chaos $(CHAOS)

# Clusters of several hosts on this machine, in network, process and mount namespaces; needs root.
cluster-test: $(STAMP)
	$(VENV)/bin/python -m pytest -m slow tests/end_to_end/test_hosts.py tests/end_to_end/test_jobs_over_hosts.py \
		tests/end_to_end/test_growing_cluster.py tests/end_to_end/test_autoscaled_cluster.py tests/end_to_end/test_reach.py \
		tests/end_to_end/test_job_submit.py

# Takes the handling of each fault away in a copy of the tree, and sees its test fail.
mutants: $(STAMP)
	$(VENV)/bin/python -m tests.chaos.mutants

lint: $(STAMP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

# How much `ray job submit --working-dir .` would send from here, and which files are the largest.
submit-size: $(STAMP)
	@$(VENV)/bin/python -m cluster.submit_size

install: $(STAMP)

# torch first: what else needs torch then finds it, and takes no other build. The modules are compiled after that, on all
# cores: pip uses one, and where PYTHONDONTWRITEBYTECODE is set every process would compile what it imports again.
# Packages carry some modules for a newer Python, which do not compile: no error.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev,evaluation]'
	$(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	touch $(STAMP)

# Of every extra, those that `make install` leaves out too.
constraints: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,evaluation,gcs,azure,world]'
	@{ echo "# Exact versions for laptop, CI and cluster image: pip install -c constraints.txt -e '.[dev,evaluation]'   (made by: make constraints)"; \
	$(VENV)/bin/python -m pip freeze --exclude-editable | grep -v ' @ ' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'; } > constraints.txt

clean:
	rm -rf $(VENV) demo
