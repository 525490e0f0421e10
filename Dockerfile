# The server. Without arguments it is the CPU build of torch; for a GPU, name the index of a CUDA build:
#
#   docker build -t hsrpc:0.2.0-cpu .
#   docker build -t hsrpc:0.2.0-cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#
# It listens on all addresses of its container, so `docker run` gives it certificates and tokens (docs/security.md), or
# --insecure where nobody else reaches the port: docker run -p 127.0.0.1:50051:50051 hsrpc:0.2.0-cpu --insecure

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH=torch>=2.11
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/hsrpc
ENV PATH=/opt/hsrpc/bin:$PATH
# Before the sources, so that a change of them does not fetch torch again.
RUN pip install --index-url "${TORCH_INDEX}" "${TORCH}"
COPY . /src
RUN pip install "/src[engine,gateway]"

FROM python:${PYTHON}-slim
# triton compiles a launcher for its kernels with the C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin hsrpc
COPY --from=build /opt/hsrpc /opt/hsrpc
# The NVIDIA container runtime reads the last two. Nothing is written but below /tmp.
ENV PATH=/opt/hsrpc/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 50051
ENTRYPOINT ["hsrpc", "serve", "--host", "0.0.0.0"]
