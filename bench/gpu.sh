#!/usr/bin/env bash
# On a machine with a CUDA device: build, test, time, and leave everything under bench/results/<GPU>-<date>/, within ten
# minutes. Each stage has its own time limit and log; one that fails, or is cut short, does not lose the others' results.
# summary.txt says how each ended; the exit status is the number of those that did not end well.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr -s ' /' '--')
results=${RESULTS:-bench/results/${gpu:-no-gpu}-$(date +%F)}
mkdir -p "$results"
failed=0
# All architectures take minutes to compile; this one's code is what will run.
chip=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
[ "$chip" = 9.0 ] && chip=9.0a
[ -z "$chip" ] || export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$chip}

stage() { # name, seconds, command...
  local name=$1 limit=$2 started=$SECONDS status ended
  shift 2
  local left=$((590 - SECONDS)) # what earlier stages saved is there for later ones, but no more
  ((limit <= left)) || limit=$((left > 1 ? left : 1))
  printf '== %s\n' "$name"
  timeout --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1
  status=$?
  tail -n 12 "$results/$name.log"
  case $status in
    0) ended=done ;;
    124 | 137) ended="cut short after $limit s" ;;
    *) ended="failed with exit status $status: $(grep -v '^\s*$' "$results/$name.log" | tail -n 1 | cut -c 1-200)" ;;
  esac
  [ "$status" = 0 ] || failed=$((failed + 1))
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - started)) "$ended" | tee -a "$results/summary.txt"
}

on_gpu() { # as stage, where there is a device
  if [ -n "$gpu" ]; then
    stage "$@"
  else
    stage "$1" 5 bash -c 'echo "no CUDA device: nvidia-smi finds none"; exit 1'
  fi
}

{
  date --iso-8601=seconds
  git log -1 --format='commit %H' && git status --short --untracked-files=no
  "$PYTHON" --version
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no CUDA device'
  command -v nvcc >/dev/null && nvcc --version | tail -n 2 | head -n 1
} >"$results/summary.txt" 2>&1

stage build 150 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
stage info 15 "$PYTHON" -c 'import lvtp, pprint
info = lvtp.build_info()
pprint.pprint(info)
assert info["backends"]["native_cuda"] == "loaded", "the compiled CUDA kernels are not there"'
tested=("$PYTHON" -m pytest -v --tb=short -p no:cacheprovider -m gpu)
files=(tests/test_psca.py tests/test_prune_sid.py tests/test_id_selection.py tests/test_cosine_similarity.py
  tests/test_mean_similarity.py tests/test_greedy_suppression.py tests/test_cluster_nms.py)
on_gpu gpu-tests 60 "${tested[@]}" tests/test_gpu.py -k 'not triton'
on_gpu native 60 "${tested[@]}" "${files[@]}" tests --ignore=tests/test_gpu.py --ignore=tests/hf -k native
on_gpu bench 130 "$PYTHON" -m bench.gpu "$results"
on_gpu prefill 110 "$PYTHON" -m bench.prefill --device cuda --seconds 8 --out "$results"
on_gpu soak 50 "$PYTHON" -m bench.soak --minutes 0.5
# Under the sanitizer a kernel is 10 to 100 times slower, so: small shapes, and no test that starts other processes.
# torch's own cache of memory would hide what is written beyond a tensor's end.
for tool in memcheck racecheck synccheck; do
  on_gpu "$tool" 35 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "${tested[@]}" "${files[@]}" -k 'native and (33 or mask or tie or finite or any_length or (psca and 577))'
done
on_gpu jax 30 env XLA_PYTHON_CLIENT_PREALLOCATE=false "${tested[@]}" tests/test_jax.py # skipped without JAX's CUDA
on_gpu triton 60 "${tested[@]}" tests/test_gpu.py "${files[@]}" -k triton
printf '\n%s\n' "$results/summary.txt" && cat "$results/summary.txt"
exit "$failed"
