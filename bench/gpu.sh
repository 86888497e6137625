#!/usr/bin/env bash
# On a machine with a CUDA device: build, test, time, and leave everything under bench/results/<host GPU>-<date>/.
# Each stage has its own time limit; one that fails does not lose the others' results.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' '-')
results=${RESULTS:-bench/results/${gpu:?no CUDA device}-$(date +%F)}
mkdir -p "$results"

stage() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  printf '== %s\n' "$name"
  timeout "$limit" "$@" >"$results/$name.log" 2>&1
  local status=$?
  tail -n 12 "$results/$name.log"
  printf '%s: exit %s\n' "$name" "$status" | tee -a "$results/summary.txt"
}

{
  date --iso-8601=seconds
  git rev-parse HEAD
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} >"$results/summary.txt"

stage build 240 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
stage info 60 "$PYTHON" -c "import lvtp, pprint; pprint.pprint(lvtp.build_info())"
stage test 240 "$PYTHON" -m pytest -q -m gpu tests --ignore=tests/hf --ignore=tests/test_demo.py
# Under the sanitizer a kernel is 10 to 100 times slower, so: small shapes, and no test that starts other processes.
if command -v compute-sanitizer >/dev/null; then
  small=(-m pytest -q -p no:cacheprovider -m gpu tests/test_greedy_suppression.py tests/test_cluster_nms.py
    tests/test_mean_similarity.py tests/test_cosine_similarity.py tests/test_id_selection.py tests/test_prune_sid.py
    -k "native and (33 or mask or tie or finite)")
  for tool in memcheck racecheck synccheck; do
    stage "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" "${small[@]}"
  done
fi
stage bench 240 "$PYTHON" -m pytest bench -q --benchmark-only --benchmark-json="$results/ops.json"
