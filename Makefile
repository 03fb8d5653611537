# `make check` is what the continuous integration runs, in the environment that is active.
.PHONY: check lint types contracts test format

check: lint types contracts test

lint:
	ruff check .
	ruff format --check .

types:
	mypy

contracts:
	lint-imports

test:
	pytest

format:
	ruff check --fix .
	ruff format .
