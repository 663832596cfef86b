#!/bin/sh
# Makes .uv/ (uv, in a folder of its own) and .venv/ (the workspace and its development tools) under the checkout.
#
# Needs a Python >= 3.11 and a package index; touches nothing outside of the checkout, and never downloads an interpreter.
# Run by `make setup`, from the root of the checkout. PYTHON=/path/to/python chooses the interpreter.
set -eu

minimum="3.11"
uv_requirement="uv>=0.13,<0.14"

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    for line in "$@"; do say "$line"; done
    exit 1
}

# Prints the interpreter's own path, so that a version manager's shim, or a link, is looked through once.
probe() {
    "$1" -c '
import sys
if sys.version_info < (3, 11):
    sys.exit(f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}")
try:
    import ctypes, sqlite3, ssl, zlib
except ImportError as error:
    sys.exit(f"{sys.executable} was built without a part that fieldlab needs: {error}")
print(sys.executable)
' 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        python=$(probe "$PYTHON") || die "PYTHON=$PYTHON is not a usable Python >= $minimum: $(printf '%s\n' "$python" | tail -n 1)"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if answer=$(probe "$candidate"); then
            python=$answer
            return
        fi
        refused="${refused}
setup:   $candidate: $(printf '%s\n' "$answer" | tail -n 1)"
    done
    die "no usable Python >= $minimum was found (tried python3.11 to python3.14, and python3).${refused}" \
        "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: make setup PYTHON=/path/to/python3"
}

# uv comes into a virtual environment; where Debian's python3-venv is missing, into a plain folder by the system's pip.
install_uv() {
    rm -rf .uv
    if "$python" -m venv .uv >/dev/null 2>&1; then
        pip_install() { .uv/bin/python -m pip install "$@"; }
    elif rm -rf .uv && "$python" -m pip --version >/dev/null 2>&1; then
        say "$python cannot make a virtual environment with pip (no python3-venv?); its own pip installs uv into .uv instead"
        pip_install() { "$python" -m pip install --target .uv "$@"; }
    else
        die "$python can neither make a virtual environment with pip nor has pip itself, so uv cannot be installed." \
            "Install what is missing (Debian, Ubuntu: apt-get install python3-venv), then run make again."
    fi
    pip_install --quiet --disable-pip-version-check --no-cache-dir --only-binary :all: "$uv_requirement" || {
        rm -rf .uv
        die "pip could not install $uv_requirement; its message stands above." \
            "Is a package index reachable? Behind a mirror, set PIP_INDEX_URL and UV_DEFAULT_INDEX; behind a proxy, HTTPS_PROXY."
    }
}

uv_works() { .uv/bin/uv --version 2>/dev/null | grep -q '^uv 0\.13\.'; }

# The lock file names the public index. Behind a mirror the same versions and hashes are taken from the mirror.
sync() {
    if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        .uv/bin/uv sync --quiet --locked --all-packages --all-extras --python "$python"
        return
    fi
    [ -x .venv/bin/python ] || .uv/bin/uv venv --quiet --python "$python" .venv
    .uv/bin/uv export --quiet --frozen --all-packages --all-extras --no-emit-workspace --output-file .cache/locked.txt
    .uv/bin/uv pip sync --quiet --python .venv --require-hashes .cache/locked.txt
    for package in packages/*; do
        .uv/bin/uv pip install --quiet --python .venv --no-deps --editable "$package"
    done
}

unset VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH PIP_TARGET PIP_USER UV_PYTHON UV_FROZEN UV_LOCKED || true
export PIP_REQUIRE_VIRTUALENV=0 UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT=.venv UV_SYSTEM_CERTS=1
export UV_CACHE_DIR="${UV_CACHE_DIR:-$PWD/.cache/uv}"
mkdir -p .cache

refused=""
find_python
say "Python: $python"
uv_works || install_uv
say "uv: $(.uv/bin/uv --version)"
sync || die "the environment .venv could not be made; uv's message stands above." \
    "Is a package index reachable? Behind a mirror, set UV_DEFAULT_INDEX; behind a proxy, HTTPS_PROXY." \
    "If uv says that the lock file is out of date: .uv/bin/uv lock, and commit uv.lock."
say "ready: .venv"
