#!/bin/sh
# Make the two environments of the peers: TRL with transformers and PEFT, and LLaMA-Factory's data path.
# PYTHON: the interpreter (3.11 or newer). With CUDA, `GPU=1` also installs Liger's kernels.
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
REQUIREMENTS=peers

install() {  # install FOLDER ARGUMENTS_OF_PIP...
    folder="$1"
    shift
    test -x "$folder/bin/python" || "$PYTHON" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

echo "[1/2] TRL, transformers and PEFT in bench/.venv-peers ..."
install .venv-peers -c ../constraints.txt -r "$REQUIREMENTS/requirements.txt"
if [ -n "${GPU:-}" ]; then install .venv-peers -c ../constraints.txt "liger-kernel>=0.8.2"; fi
echo "[2/2] LLaMA-Factory in bench/.venv-llamafactory ..."
install .venv-llamafactory -r "$REQUIREMENTS/requirements-llamafactory.txt"
install .venv-llamafactory --no-deps llamafactory==0.9.5
echo "Ready. How to run the benchmarks: bench/README.md"
