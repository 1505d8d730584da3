# `make demo` and `make test` need nothing but Python 3.11 or newer, with its venv module.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test torture bench gpu lint clean

demo: $(VENV)/.installed
	$(BIN)/spectralvae simulate configs/demo/simulate.yaml
	$(BIN)/spectralvae prepare configs/demo/prepare.yaml
	$(BIN)/spectralvae train configs/demo/train.yaml
	$(BIN)/spectralvae evaluate configs/demo/evaluate.yaml
	$(BIN)/spectralvae encode configs/demo/encode.yaml
	$(BIN)/spectralvae decode configs/demo/decode.yaml
	$(BIN)/spectralvae probe configs/demo/probe.yaml
	$(BIN)/spectralvae compress configs/demo/compress.yaml
	$(BIN)/spectralvae decompress configs/demo/decompress.yaml

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Kills, damage and full disks in the numbers that `make test` has no time for.
torture: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --torture -n auto tests/test_torture_*.py tests/test_codec_roundtrips.py tests/test_compress.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --steps 6000

# Everything measured on CPUs, into benchmarks/results.
bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/train_step.py --modes plain-two-forwards plain ours ours-float32-nchw ours-bf16 --profile --json benchmarks/results/train_step.json
	$(BIN)/python benchmarks/train_step.py --network small --batch-size 8 --json benchmarks/results/train_step_small.json
	$(BIN)/python benchmarks/loader.py --json benchmarks/results/loader.json
	$(BIN)/python benchmarks/prepare.py --json benchmarks/results/prepare.json
	$(BIN)/python benchmarks/encode.py --json benchmarks/results/encode.json
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	$(BIN)/python benchmarks/startup.py --json benchmarks/results/startup.json

# Everything that only a GPU can tell, in eight minutes. The script says what to carry to a machine without network access.
gpu: $(VENV)/.installed-test
	$(BIN)/python benchmarks/gpu.py --json benchmarks/results/gpu.json

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[analysis,codec]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo build .pytest_cache .mypy_cache .ruff_cache
