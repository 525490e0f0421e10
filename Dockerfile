# The server, for the CPU or for NVIDIA GPUs (linux/amd64):
#
#   docker build --target cpu -t hsrpc:0.2.0-cpu .
#   docker build --target cuda -t hsrpc:0.2.0-cuda .
#
# Python packages are those of requirements/, each by its hash. For an image that comes out the same again, name the base
# by its digest too, as the release does: --build-arg BASE=python:3.12-slim-bookworm@sha256:..., of which
# `docker buildx imagetools inspect python:3.12-slim-bookworm --format '{{.Manifest.Digest}}'` tells the digest of today.
# Nothing here has been built yet: the linter, the locks and what the manifests start of it are checked, the build is not.
#
# It listens on all addresses of its container, so `docker run` gives it certificates and tokens (docs/security.md), or
# --insecure where nobody else reaches the port: docker run -p 127.0.0.1:50051:50051 hsrpc:0.2.0-cpu --insecure
# It downloads nothing; with `--env HF_HUB_OFFLINE=0`, --model may name a model of the Hugging Face Hub.

ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all: PIP_REQUIRE_HASHES=1
RUN python -m venv /opt/hsrpc
ENV PATH=/opt/hsrpc/bin:$PATH

# The packages before the sources, so that a change of them does not fetch torch again.
FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/cpu.txt requirements/torch-cpu.txt /requirements/
RUN pip install --extra-index-url "${TORCH_INDEX}" -r /requirements/cpu.txt -r /requirements/torch-cpu.txt
COPY . /src
RUN PIP_REQUIRE_HASHES=0 pip install --no-deps --no-build-isolation /src

FROM build AS build-cuda
COPY requirements/cuda.txt /requirements/
RUN pip install -r /requirements/cuda.txt
COPY . /src
RUN PIP_REQUIRE_HASHES=0 pip install --no-deps --no-build-isolation /src

FROM ${BASE} AS server
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin hsrpc
# Nothing is written but below /tmp.
ENV PATH=/opt/hsrpc/bin:$PATH \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hsrpc" \
      org.opencontainers.image.description="Serves language models larger than the GPU, streamed over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
EXPOSE 50051
# The port for probes where there is one (it speaks neither TLS nor tokens), else the server's own.
HEALTHCHECK --interval=15s --timeout=5s --start-period=20m --start-interval=2s \
    CMD ["sh", "-c", "exec hsrpc health --target localhost:${HSRPC_HEALTH_PORT:-${HSRPC_PORT:-50051}}"]
ENTRYPOINT ["hsrpc", "serve", "--host", "0.0.0.0"]

FROM server AS cuda
# triton compiles a launcher for its kernels with the C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# Read by the NVIDIA container runtime.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/hsrpc /opt/hsrpc
USER 10001:10001

# The last is what a build without --target makes.
FROM server AS cpu
COPY --from=build-cpu /opt/hsrpc /opt/hsrpc
USER 10001:10001
