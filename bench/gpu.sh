#!/usr/bin/env bash
# All that needs a GPU, for a rented machine that is there for minutes and may have neither network nor .git.
#
#   bash bench/gpu.sh wheels [FOLDER]        here: packs into FOLDER (out/wheels) what that machine lacks
#   WHEELS=out/wheels bash bench/gpu.sh A    there, in at most 270 s: is it right, and how fast
#   WHEELS=out/wheels bash bench/gpu.sh B    there, in at most 270 s: streams, threads, memory, models, Triton
#   bash bench/gpu.sh smoke bench            stages by name, of A, of B, or sweep: all other shapes, and fp32
#
# Each call has a folder of results of its own.
#
# FOLDER travels with the checkout. Without WHEELS, or where the wheel does not load, install builds from source.
# Results go to $OUT, else to bench/results/<GPU>-<date>-<part>: log.txt of all stages, summary.txt, ops.json, ops.txt,
# kernels.txt and prefill.json. A stage that fails, or is cut short, costs the others nothing: it ends when its seconds
# and those of the stages before it have passed, so what one saves the next may use. The exit status is the number of
# those that did not end well. PYTHON is the interpreter that has torch; lvtp is installed into the folder SITE.
set -uo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
export PYTHON=${PYTHON:-python3} SITE=${SITE:-$PWD/out/gpu-site}

# install has time for a build from source; a wheel leaves most of it to the others.
A=(install:100 info:20 smoke:25 kernels:25 bench:55 native:45)
B=(install:100 streams:40 memcheck:30 prefill:45 triton:20 triton-times:15 soak:5 jax:10 racecheck:5)
ALONE=(sweep:240)

sources() { # of what a wheel is built from
  find csrc lvtp triton_kernels CMakeLists.txt setup.py pyproject.toml -path lvtp/lib -prune -o \
    -type f -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2 && exit 2; }

wheels() { # folder
  mkdir -p "$1" && rm -f "$1"/lvtp-*.whl "$1"/transformers-*.whl
  # sm_90a: an H100 or an H200. All architectures take minutes to compile, and several times the space.
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} CMAKE_ARGS=-DLVTP_CUDA=ON \
    "$PYTHON" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$1" . || return
  PIP_CONSTRAINT=constraints.txt "$PYTHON" -m pip download --quiet --no-deps --dest "$1" transformers || return
  "$PYTHON" -m zipfile -l "$1"/lvtp-*.whl | grep -q liblvtp_cuda || {
    echo 'the wheel has no CUDA library: is there an nvcc?' >&2 && return 1
  }
  echo "$(git rev-parse HEAD)$(git diff --quiet HEAD || echo ', with changes')" >"$1/COMMIT"
  sources >"$1/SOURCES"
  ls -l "$1"
}

loads() { # the package, and its CUDA library for the GPUs that are here
  "$PYTHON" -c 'import lvtp
state = lvtp.build_info()["backends"]["native_cuda"]
assert state == "loaded", state'
}

install() {
  rm -rf "$SITE"/lvtp "$SITE"/lvtp-*.dist-info # what does not install must not seem to
  if compgen -G "${WHEELS:-/nowhere}/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" \
      "$WHEELS"/*.whl
    if [ "$(sources)" != "$(cat "$WHEELS/SOURCES")" ]; then
      echo 'the wheels were built from other sources than these: building'
    elif loads; then
      return
    fi
  fi
  # One architecture, the one that will run.
  local chip
  chip=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
  [ "$chip" = 9.0 ] && chip=9.0a
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${chip:-9.0a}} CMAKE_ARGS=-DLVTP_CUDA=ON
  "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --upgrade --target "$SITE" . && loads
}
export -f install loads sources

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr -s ' /' '--')
case ${1:-} in
  wheels)
    wheels "${2:-out/wheels}"
    exit
    ;;
  A | B)
    (($# == 1)) || usage
    [ "$1" = A ] && stages=("${A[@]}") || stages=("${B[@]}")
    ;;
  *)
    stages=()
    for name in "$@"; do
      found=$(printf '%s\n' "${A[@]}" "${B[@]}" "${ALONE[@]}" | grep -m 1 "^$name:") || usage
      stages+=("$found")
    done
    ((${#stages[@]})) || usage
    [ "$(printf '%s\n' "$@" | grep -cE '^(bench|triton-times|sweep)$')" -le 1 ] || {
      echo 'bench, triton-times and sweep each write ops.json: one of them a call' >&2 && exit 2
    }
    [ -d "$SITE/lvtp" ] || [ "$1" = install ] || stages=("${A[0]}" "${stages[@]}")
    ;;
esac
results=${OUT:-bench/results/${gpu:-no-gpu}-$(date +%F)-$(IFS=-; echo "$*")}
mkdir -p "$results"
log=$results/log.txt summary=$results/summary.txt failed=0

# The checkout's own lvtp has no libraries, so what is installed comes first and the working directory does not count.
export PYTHONPATH=$SITE:$PWD PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
{
  date --iso-8601=seconds
  if [ -e .git ]; then
    git log -1 --format='commit %H' && git status --short --untracked-files=no
  else
    echo "commit $(cat COMMIT 2>/dev/null || cat "${WHEELS:-.}/COMMIT")"
  fi
  "$PYTHON" --version
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no CUDA device'
  command -v nvcc >/dev/null && nvcc --version | tail -n 2 | head -n 1
} >"$summary" 2>&1
cp "$summary" "$log"

tests=("$PYTHON" -m pytest -v --tb=short -p no:cacheprovider -m gpu --continue-on-collection-errors)
# What hangs ends its process after 15 s. After an illegal access a worker ends, too (tests/conftest.py), and another one
# goes on with the rest of the file.
"$PYTHON" -c 'import pytest_timeout' 2>/dev/null && tests+=(--timeout 15 --timeout-method thread)
alone=() workers=()
"$PYTHON" -c 'import xdist' 2>/dev/null && alone=(-n 1 --dist loadfile --max-worker-restart 8) \
  workers=(-n 8 --dist loadfile --max-worker-restart 8)
# Many processes at once: OpenMP's waiting threads would take the cores from those that work.
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
# The files with tests on devices, the longest first: to collect all files takes each worker seconds.
mapfile -t files < <({ printf 'tests/test_%s.py\n' psca prune_sid id_selection
  grep -lE '^def .*\b(device|backend)\b|mark\.gpu' tests/test_*.py; } | grep -v -e test_gpu -e test_jax | awk '!seen[$0]++')
# torch's own cache of memory would hide what is written beyond a tensor's end.
sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1)

command_of() { # stage -> command
  case $1 in
    install) command=(bash -c install) ;;
    info) command=("$PYTHON" -m bench.device) ;;
    smoke) command=("$PYTHON" -m bench.smoke) ;;
    kernels) command=("$PYTHON" -m bench.kernels "$results") ;;
    bench) command=("$PYTHON" -m bench.gpu "$results") ;;
    native) command=("${tests[@]}" "${workers[@]}" "${files[@]}" -k 'not triton and not reference') ;;
    streams) command=("${tests[@]}" "${alone[@]}" tests/test_gpu.py -k 'not triton') ;;
    memcheck) command=("${sanitizer[@]}" --tool memcheck "$PYTHON" -m bench.smoke --small) ;;
    prefill) command=(env -u OMP_NUM_THREADS "$PYTHON" -m bench.prefill --device cuda --seconds 8 --out "$results") ;;
    triton) command=("${tests[@]}" "${workers[@]}" "${files[@]}" tests/test_gpu.py -k triton) ;;
    triton-times) command=("$PYTHON" -m bench.gpu "$results" --beside triton published) ;;
    soak) command=("$PYTHON" -m bench.soak --minutes 0.1) ;;
    jax) command=(env XLA_PYTHON_CLIENT_PREALLOCATE=false "${tests[@]}" tests/test_jax.py) ;; # skipped without its CUDA
    racecheck) command=("${sanitizer[@]}" --tool racecheck "$PYTHON" -m bench.smoke --small) ;;
    sweep) command=("$PYTHON" -m bench.gpu "$results" --rows sweep --beside eager) ;;
  esac
}

deadline=$SECONDS
for stage in "${stages[@]}"; do
  name=${stage%:*} started=$SECONDS begin=$(wc -c <"$log")
  deadline=$((deadline + ${stage#*:}))
  limit=$((deadline > SECONDS ? deadline - SECONDS : 1)) # to timeout, 0 is no limit
  command_of "$name"
  # Without a device nothing is worth starting.
  [ -n "$gpu" ] || [ "$name" = install ] || command=(bash -c 'echo "no CUDA device"; exit 1')
  printf '\n== %s\n' "$name" | tee -a "$log"
  timeout --signal=INT --kill-after=10 "$limit" "${command[@]}" >>"$log" 2>&1
  status=$?
  said=$(tail -c +$((begin + 1)) "$log" | grep -av '^\s*$' | tail -n +2)
  tail -n 12 <<<"$said" | cut -c 1-400
  case $status in
    0) ended=done ;;
    124 | 137) ended="cut short after $limit s" ;;
    *) ended="failed with exit status $status: $(tail -n 1 <<<"$said" | cut -c 1-200)" ;;
  esac
  [ "$status" = 0 ] || failed=$((failed + 1))
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - started)) "$ended" >>"$summary"
  [ "$name" != install ] || [ "$status" = 0 ] || { echo 'nothing is installed: the other stages are left out' | tee -a "$summary" && break; }
done
printf '\n== summary\n' && cat "$summary"
exit "$failed"
