#!/bin/sh
# Installs what this machine lacks for the clients in other languages, by apt-get; of Debian 12 all of it is there.
#
#   tools/toolchains.sh
set -eu
cd "$(dirname "$0")/.."

lacking=$(for makefile in clients/*/Makefile; do
    make --silent --no-print-directory -C "${makefile%/Makefile}" missing
done)
# shellcheck disable=SC2086
set -- $lacking
if [ $# -eq 0 ]; then
    echo "all are here"
    exit
fi
if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install, by your system's own means, what is in Debian $*" >&2
    exit 1
fi
echo "installing $*"
as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo --preserve-env=DEBIAN_FRONTEND "$@"; fi; }
export DEBIAN_FRONTEND=noninteractive
as_root apt-get -qq update
as_root apt-get -qq install --yes --no-install-recommends -o DPkg::Lock::Timeout=300 "$@" >/dev/null
