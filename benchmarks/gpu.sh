#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, test against float64, compute-sanitizer, benchmarks, one JSON file. Under ten minutes, no
# network, no build isolation; needs torch with CUDA, numpy, safetensors, pytest, nvcc, cmake, ninja, setuptools >= 77 and pybind11.
#   PYTHON=python3   which Python                    WHEELS=.whl   folder of wheels for what it lacks (pybind11, say)
#   OUT=folder       writes gpu.json there, else benchmarks/results/<device>/gpu.json
#   BUDGET=300       seconds for the benchmarks
# Ends with 1 where a test failed or a sanitizer reported something; the file is written all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-.whl} BUDGET=${BUDGET:-300}
PARTS=build/gpu
rm -rf "$PARTS" && mkdir -p "$PARTS"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
failed=0
note() { printf '\n== %s (%ds)\n' "$1" "$SECONDS"; }

"$PYTHON" -c 'import torch' 2>/dev/null || { echo "benchmarks/gpu.sh: $PYTHON has no torch; name another with PYTHON=" >&2; exit 1; }
"$PYTHON" -m benchmarks.gpu device || exit 1
for tool in nvcc cmake ninja; do
  command -v "$tool" >/dev/null || "$PYTHON" -c "import $tool" 2>/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/$tool" ] ||
    { echo "benchmarks/gpu.sh: $tool was not found" >&2; exit 1; }
done
if ! "$PYTHON" -c 'import pybind11' 2>/dev/null; then
  compgen -G "$WHEELS/pybind11-*.whl" >/dev/null ||
    { echo "benchmarks/gpu.sh: $PYTHON has no pybind11, and there is no wheel of it in $WHEELS/ (pip download --no-deps -d $WHEELS pybind11)" >&2; exit 1; }
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$PARTS/site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$PWD/$PARTS/site"
fi

note "building the native module"
CASE_FAST_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace >"$PARTS/build.txt" 2>&1 || { tail -40 "$PARTS/build.txt"; exit 1; }
"$PYTHON" -c 'from case_fast.ops import native_report as r; print(r())'
"$PYTHON" -m benchmarks.kernel_resources --json >"$PARTS/resources.json" || failed=1

note "tests against float64"
timeout 300 "$PYTHON" -m pytest --noconftest -p no:cacheprovider python_tests/ops/test_gpu_*.py -q --junitxml="$PARTS/tests.xml" 2>&1 |
  tail -30 || failed=1

note "compute-sanitizer on small inputs"
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ -x "$sanitizer" ]; then
  running=()
  for check in memcheck racecheck initcheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 "$sanitizer" --tool "$check" --error-exitcode 9 \
      "$PYTHON" -m benchmarks.gpu small >"$PARTS/sanitizer-$check.txt" 2>&1 &
    running+=($!)
  done
  for job in "${running[@]}"; do wait "$job" || failed=1; done
  tail -n 2 "$PARTS"/sanitizer-*.txt
else
  echo "compute-sanitizer was not found: left out" | tee "$PARTS/sanitizer-absent.txt"
  failed=1
fi

note "benchmarks"
timeout $((BUDGET + 100)) "$PYTHON" -m benchmarks.gpu bench --out "$PARTS/bench.json" --budget "$BUDGET" || failed=1

note "joining"
"$PYTHON" -m benchmarks.gpu join --parts "$PARTS" ${OUT:+--out "$OUT/gpu.json"} || failed=1
exit $failed
