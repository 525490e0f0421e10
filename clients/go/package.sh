#!/bin/sh
# Installs the module outside the tree, and builds README.md's first example against it: in GOPATH mode, where it is
# placed as `go get` places it, and as a module, whose requirements are replaced by Debian's packages.
#
#   package.sh MODULE DEBIAN PROGRAM    DEBIAN is the GOPATH of Debian's packages, PROGRAM the example's executable
set -eu
module=$1 debian=$2 program=$3
cd "$(dirname "$0")"

outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
installed=$outside/gopath/src/$module
example=$outside/gopath/src/readme-example

install_module() {
    mkdir -p "$installed"
    cp -r go.mod ./*.go hsrpcv1 conformance example "$installed"
}

extract_example() {
    mkdir -p "$example"
    awk '/^```go$/ {inside = 1; next} /^```$/ {if (inside) exit} inside' README.md >"$example/main.go"
}

build_in_gopath() {
    GO111MODULE=off GOFLAGS='' GOPATH=$outside/gopath:$debian go build -o "$program" readme-example
}

requirements() {
    (cd "$installed" && go mod edit -json) | sed -n 's/.*"Path": "\(.*\)",\{0,1\}$/\1/p' | grep -v "^$module\$"
}

# Debian's sources of a requirement, with a go.mod that asks for nothing: the module's own must name all that is needed.
replace() {
    mkdir -p "$outside/debian/$(dirname "$1")"
    cp -rs "$debian/src/$1" "$outside/debian/$1"
    rm -f "$outside/debian/$1/go.mod"
    printf 'module %s\ngo 1.19\n' "$1" >"$outside/debian/$1/go.mod"
    go mod edit -replace "$1=$outside/debian/$1"
}

build_as_module() {
    cd "$example"
    export GO111MODULE=on GOFLAGS=-mod=mod GOPATH="$outside/gopath" GOPROXY=off GOSUMDB=off
    go mod init readme-example 2>/dev/null
    go mod edit -require "$module@v0.0.0" -replace "$module=$installed"
    go mod edit -require github.com/golang/protobuf@v1.5.2 # for Debian's release of gRPC alone
    for requirement in $(requirements) github.com/golang/protobuf; do
        replace "$requirement"
    done
    # Without paths in it, what was built in another folder before is taken from the cache.
    go build -trimpath -o "$outside/as-module" .
}

rm -f "$program"
mkdir -p "$(dirname "$program")"
install_module
extract_example
build_in_gopath
build_as_module
