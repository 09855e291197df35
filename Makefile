# Every target uses one environment, .venv, made anew when pyproject.toml or the constraints change.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/pellucid train digits

test: .venv/dev
	.venv/bin/python -m pytest -n auto

check: .venv/dev
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/ty check --python .venv

benchmark: .venv/dev
	.venv/bin/python benchmarks/overhead.py && .venv/bin/python benchmarks/feeding.py && .venv/bin/python benchmarks/imports.py

lessons: .venv/lessons
	.venv/bin/python lessons/build.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv && .venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e . && touch $@

.venv/dev: .venv/installed
	.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]" && touch $@

.venv/lessons: .venv/installed
	.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[lessons]" && touch $@

.PHONY: demo test check benchmark lessons
