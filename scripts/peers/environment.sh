# Read by the setup_*.sh beside it: an environment for one peer.
#
#   new_environment FOLDER     makes it with torch in it, and sets `pip`, an array to install more with
#   bare_environment FOLDER    the same without torch
#
# PYTHON names the interpreter; TORCH_INDEX_URL an index of CPU builds of torch, so that a peer that
# merely asks for torch does not bring the CUDA libraries along.

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'pass' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or 3.12 found: name one with PYTHON=" >&2
  return 1
}

bare_environment() {
  local folder=$1 python
  python=$(find_python)
  "$python" -m venv "$folder"
  pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
}

new_environment() {
  bare_environment "$1"
  if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
    "${pip[@]}" --index-url "$TORCH_INDEX_URL" torch==2.13.0
  else
    "${pip[@]}" torch==2.13.0
  fi
}
