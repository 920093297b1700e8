# Sourced by demo.sh and test.sh: a virtual environment of the project's own, made on first use.
#
# MLCAWQ_VENV    where it lies (default: .venv in the project)
# PYTHON         the interpreter it is made from (default: python3)
#
# Arguments: what to install, as pip takes it (". " or ".[dev]").

venv="${MLCAWQ_VENV:-$PWD/.venv}"
# The environment is current when it was installed from these very files.
stamp="$(cat pyproject.toml constraints.txt scripts/environment.sh | cksum | tr ' ' '-')"
installed="$(cat "$venv/installed" 2>/dev/null || true)"

# What was installed with more extras serves as well.
if [ "$installed" != "$stamp $1" ] && [ "$installed" != "$stamp .[dev]" ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || {
    echo "error: mlcawq needs Python 3.10 to 3.13, found $("$python" --version 2>&1)" >&2
    echo "  -> set PYTHON to such an interpreter and run again" >&2
    exit 1
  }
  command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || {
    echo "error: no C++ compiler, which linking a model library needs" >&2
    echo "  -> install one (Debian, Ubuntu: apt install g++) and run again" >&2
    exit 1
  }
  echo "setting up $venv (first run only)" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # torch first and by its exact version: a range could take a build of several gigabytes where
  # a CPU build of this version is at hand.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "torch==$(sed -n 's/^torch==//p' constraints.txt)" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable "$1" >&2
  echo "$stamp $1" >"$venv/installed"
fi
PATH="$venv/bin:$PATH"
export PATH
