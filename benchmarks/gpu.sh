#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, without network: what the kernels do there, as one JSON file, within nine minutes.
#   benchmarks/gpu.sh          device, build, every kernel once, training steps, tests, sanitizers, benchmarks; `case-fast bench --show gpu`
#   benchmarks/gpu.sh recipe   the whole recipe of training within nine and a half minutes; a second call goes on where it stopped
# Environment (folders from the checkout's root on):
#   OUT=folder          writes gpu.json there besides benchmarks/results/<device>/; where the weights of `recipe` go
#   STORE=path          the packed store that training reads; default: a *.travel in the checkout
#   PYTHON=python3      which Python: with torch, triton, numpy, safetensors, pytest; the build needs nvcc, cmake and ninja
#   FAMILIES=a,b        these families alone        COMMIT=abc   said in the record where git is not there
#   WHEELS=.whl         folder of wheels that are unpacked first, where it is there
#   DRY=1 OUT=folder    every stage without a GPU at tiny sizes: whether all works; never a result
# Ends with 1 where a stage failed, a test or a sanitizer's finding among them; the file is there all the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-.whl}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target build/wheels "$WHEELS"/*.whl ||
    echo "benchmarks/gpu.sh: the wheels in $WHEELS were not unpacked; on without them" >&2
  export PYTHONPATH="$PYTHONPATH:$PWD/build/wheels"
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
