#!/bin/sh
# Generates hsrpc/v1 from proto/ with the oldest grpcio-tools that hsrpc supports at run time.
#
#   tools/proto.sh           write the stubs
#   tools/proto.sh --check   exit 1 when the stubs in hsrpc/v1 are not those that proto/ gives
#   tools/proto.sh --lint    buf lint, format and, where the main branch has a proto/ already, breaking changes
#
# PYTHON (default python3) makes the private environment .venv-proto; BUF (default buf) lints.
set -eu
cd "$(dirname "$0")/.."

environment=.venv-proto
requirements="grpcio-tools==1.72.2 grpcio==1.72.2 protobuf==6.30.2 mypy-protobuf==3.7.0 types-protobuf==6.30.2.20250516
setuptools==80.9.0"

prepare() {
    if [ ! -f "$environment/requirements" ] || [ "$(cat "$environment/requirements")" != "$requirements" ]; then
        rm -rf "$environment"
        "${PYTHON:-python3}" -m venv "$environment"
        # shellcheck disable=SC2086
        "$environment/bin/pip" install --quiet --disable-pip-version-check $requirements
        printf '%s' "$requirements" >"$environment/requirements"
    fi
}

generate() {
    PYTHONWARNINGS=ignore "$environment/bin/python" -m grpc_tools.protoc --proto_path=proto \
        --plugin=protoc-gen-mypy="$environment/bin/protoc-gen-mypy" \
        --plugin=protoc-gen-mypy_grpc="$environment/bin/protoc-gen-mypy_grpc" \
        --python_out="$1" --grpc_python_out="$1" --mypy_out="quiet:$1" --mypy_grpc_out="quiet:$1" \
        proto/hsrpc/v1/*.proto
}

check() {
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    generate "$fresh"
    if ! diff --recursive --brief --exclude=__init__.py --exclude=__pycache__ "$fresh/hsrpc/v1" hsrpc/v1; then
        echo "hsrpc/v1 is stale: run tools/proto.sh and commit what changes" >&2
        exit 1
    fi
}

lint() {
    buf=${BUF:-buf}
    "$buf" lint proto
    "$buf" format proto --exclude-path proto/google --diff --exit-code
    base=$(git rev-parse --verify --quiet origin/main || git rev-parse --verify --quiet main || true)
    if [ -n "$base" ] && git cat-file -e "$base:proto" 2>/dev/null; then
        "$buf" breaking proto --against ".git#ref=$base,subdir=proto"
    else
        echo "no proto/ on the main branch yet: nothing to compare with"
    fi
}

case "${1:-}" in
    "") prepare && generate . ;;
    --check) prepare && check ;;
    --lint) lint ;;
    *) echo "usage: tools/proto.sh [--check|--lint]" >&2 && exit 2 ;;
esac
