#!/bin/bash
# Makes .venv with hsrpc and its tools, and says on the way how far it is; for `make`.
#
#   tools/install.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."

bin=.venv/bin
large='(Downloading|Using cached) ([^ ]*/)?([^ /-]+)-[^ ]* \(([0-9]{2,}[^ ]* MB|[^ ]+ GB)\)'

# Of pip's many lines: each file of 10 MB or more, and how many packages are installed once all are there.
tell() {
    local line packages
    while IFS= read -r line; do
        if [[ $line =~ $large ]]; then
            echo "      ${BASH_REMATCH[3]}, ${BASH_REMATCH[4]}"
        elif [[ $line == "Installing collected packages: "* ]]; then
            packages=${line//[^,]/}
            echo "[3/4] installing $((${#packages} + 1)) packages"
        fi
    done
}

echo "[1/4] making .venv with $("$1" --version)"
"$1" -m venv .venv
echo "[2/4] finding and fetching hsrpc's packages and tools, a minute or two; of these are large:"
$bin/pip install --disable-pip-version-check --no-color --progress-bar off -c constraints.txt -e '.[dev]' \
    2> >(grep -v '^WARNING: ' >&2) | tell
$bin/python -c 'import torch; print(f"[4/4] ready, with torch {torch.__version__}")'
