#!/usr/bin/env bash
# Whether a fresh clone builds, passes the ops' tests and begins to train where there is no network and no package but those of a
# bare GPU image: torch, triton, numpy, safetensors, huggingface_hub, pytest, ninja, cmake, an old setuptools. Takes some minutes.
#   STORE=ed.travel    what to train on, packed; default: the bundled sample, prepared by the case-fast that is on PATH
#   PYTHON=python3     which Python          TORCH=torch==2.13.0          WORK=build/bare   folder, made anew
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} TORCH=${TORCH:-$(sed -n '/^torch==/p' constraints.txt)} WORK=${WORK:-build/bare}
rm -rf "$WORK" && mkdir -p "$WORK/clone"
WORK=$(cd "$WORK" && pwd)
note() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

note "packages of the image"
"$PYTHON" -m venv "$WORK/venv"
export PATH="$WORK/venv/bin:$PATH" PYTHONPATH=
python -m pip install -q "$TORCH" triton numpy safetensors huggingface_hub pytest ninja cmake
python -m pip install -q --no-deps 'setuptools==68.*'  # older than this torch would have it
export PIP_NO_INDEX=1 HF_HUB_OFFLINE=1 CASE_FAST_CUDA=${CASE_FAST_CUDA:-0}

note "clone and packed store"
git archive HEAD | tar -x -C "$WORK/clone"
if [ -z "${STORE:-}" ]; then
  STORE=$WORK/sample.travel
  case-fast prepare --dialogues bundled --knowledge bundled --conceptnet bundled --lexicon bundled --out "$WORK/sample.store"
  case-fast pack "$WORK/sample.store" "$STORE"
fi
STORE=$(realpath "$STORE")
cd "$WORK/clone"

note "native module"
python setup.py -q build_ext --inplace
python -c 'from case_fast.ops import native_report as r; assert r()["available"], r(); print(r())'
families=$(python -c 'from case_fast import _native; print(*_native.report()["families"])')

note "tests of the ops"
OMP_NUM_THREADS=1 python -m pytest -q -p no:cacheprovider -m "not slow" -k "not scorecard" \
  $(printf 'python_tests/ops/test_%s.py ' families common $families)

note "training"
python -m benchmarks.gpu_training steps --store "$STORE" --out "$WORK/steps.json" --device cpu --steps 3
python -m benchmarks.gpu_training recipe --store "$STORE" --out "$WORK/out" --run "$WORK/run" --device cpu --steps 2 --limit 8
python -m benchmarks.gpu_training join "$WORK/out" "$WORK/weights"
python -c "import sys, case_fast.models as m; print(type(m.load(sys.argv[1])).__name__, 'opens')" "$WORK/weights"
note "done"
