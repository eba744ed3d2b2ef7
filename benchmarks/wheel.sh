#!/usr/bin/env bash
# Builds the sdist, and from it alone the wheel, as a release does: in an environment of its own, without torch. Says what the wheel
# links, and tries it in a fresh environment. Takes minutes, with nvcc many (CASE_FAST_CUDA=0 builds for the CPU alone).
#   PYTHON=python3     which Python; the one on PATH lends the packages that case_fast needs, torch among them
#   WORK=build/wheel   folder, made anew; sdist and wheel are in its dist/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} WORK=${WORK:-build/wheel}
rm -rf "$WORK" && mkdir -p "$WORK"
WORK=$(cd "$WORK" && pwd)
note() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

note "sdist and wheel"
"$PYTHON" -m venv "$WORK/tools"
"$WORK/tools/bin/python" -m pip install -q build auditwheel
"$WORK/tools/bin/python" -m build --outdir "$WORK/dist" .
ls -l "$WORK"/dist

note "what it links"
if [ "$(uname)" = Linux ]; then
  "$WORK/tools/bin/auditwheel" show "$WORK"/dist/*.whl | tee "$WORK/links.txt"
  grep -q manylinux_ "$WORK/links.txt"  # else it needs a library that not every Linux has
fi

note "in a fresh environment"
packages=$(python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
"$PYTHON" -m venv "$WORK/venv"
"$WORK/venv/bin/python" -m pip install -q --no-deps --no-index "$WORK"/dist/*.whl
echo "$packages" > "$("$WORK/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/packages.pth"
cd "$WORK"
"$WORK/venv/bin/python" "$OLDPWD/benchmarks/wheel_smoke.py"
note "done"
