#!/bin/sh
# Writes requirements/{cpu,cuda}.txt, what the images install, and requirements/build.txt, what builds a wheel: each
# package in one version and with its hashes, from the ranges of pyproject.toml and the versions of constraints.txt. For
# `make lock`; UV is the program uv.
#
# The build of torch for the CPU is on an index of its own: requirements/torch-cpu.txt is kept by hand.
set -eu
cd "$(dirname "$0")/.."
uv=${UV:-uv}

lock() {
    output=$1
    shift
    {
        echo "# Made by \`make lock\`; not edited by hand."
        "$uv" pip compile --constraint constraints.txt --python-version 3.12 --python-platform x86_64-manylinux_2_31 \
            --only-binary :all: --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet "$@"
    } > "$output.new"
    mv "$output.new" "$output"
}

extras="--extra engine --extra gateway --extra otel"
# shellcheck disable=SC2086 # words, none of which has a space
lock requirements/cuda.txt pyproject.toml $extras
# shellcheck disable=SC2046,SC2086 # likewise
lock requirements/cpu.txt pyproject.toml $extras --no-emit-package torch \
    $(sed -n 's/^\(nvidia-[^=]*\|cuda-[^=]*\|triton\)==.*/--no-emit-package \1/p' requirements/cuda.txt)
printf 'build\nsetuptools\n' | lock requirements/build.txt -
