#!/usr/bin/env bash
# bench/gpu.sh as a rented machine would run it, here: Python 3.12 with the versions that such machines have, no network,
# no .git, no GPU. Both parts then end with "no CUDA device" in every stage but install, and whatever else of them needs
# none is run on the CPU. The exit status says whether all did.
#
#   bash bench/gpu_dry_run.sh            PYTHON312 is an interpreter (python3.12), WHEELS a folder already packed
#
# The environment, 5.6 GB, is made once in out/gpu-dry-run and takes minutes: torch's CUDA build does not import without
# nearly all of its libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/out/gpu-dry-run
PYTHON312=${PYTHON312:-python3.12}
VERSIONS=(torch==2.11.0 triton==3.6.0 numpy==2.5.2 jax==0.11.2 transformers==5.17.0 accelerate==1.15.0
  huggingface_hub==1.33.0 tokenizers==0.23.2 safetensors==0.8.0)
UNPINNED=(pytest pytest-xdist pytest-timeout pytest-benchmark hypothesis pillow matplotlib scikit-learn tqdm
  setuptools wheel cmake ninja pybind11)

if [ ! -e "$root/made" ]; then
  "$PYTHON312" -m venv --clear "$root/env"
  "$root/env/bin/python" -m pip install --quiet "${VERSIONS[@]}" "${UNPINNED[@]}"
  touch "$root/made"
fi
if [ -z "${WHEELS:-}" ]; then
  WHEELS=$root/wheels
  bash bench/gpu.sh wheels "$WHEELS"
fi

# What travels: files that are tracked or not ignored, and the folder of wheels.
rm -rf "$root/checkout" "$root"/{A,B,every-A,every-B,source,source-site} && mkdir -p "$root/checkout" "$root/home"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
  [ ! -e "$file" ] || cp --parents --no-dereference "$file" "$root/checkout"
done
mkdir -p "$root/checkout/out" && cp -r "$WHEELS" "$root/checkout/out/wheels"

there() { # OUT, command...
  local out=$1 && shift
  (cd "$root/checkout" && unshare --map-root-user --net env --ignore-environment PATH="$root/env/bin:$PATH" \
    HOME="$root/home" OUT="$out" WHEELS=out/wheels OMP_NUM_THREADS="${OMP_NUM_THREADS:-}" "$@")
}

failed=0
check() { # what, command...
  local what=$1 started=$SECONDS ended=ok && shift
  "$@" >"$root/said.txt" 2>&1 || ended=FAILED failed=$((failed + 1))
  [ "$ended" = ok ] || tail -n 40 "$root/said.txt"
  printf '%-48s %4d s  %s: %s\n' "$what" $((SECONDS - started)) "$ended" \
    "$(tail -n 1 "$root/said.txt" | tr -s ' ' | cut -c 1-60)"
}

# Where `check` calls a function, `set -e` has no effect in it.
ends_for_want_of_a_device() { # part
  local stages
  stages=$(sed -n "s/^$1=(\(.*\)/\1/p" bench/gpu.sh | wc -w)
  there "$root/$1" bash bench/gpu.sh "$1" && return 1
  [ "$(grep -c 'no CUDA device$' "$root/$1/summary.txt")" = "$stages" ] && # all but install, and the machine
    grep -q "^commit $(cat "$WHEELS/COMMIT")$" "$root/$1/summary.txt" &&
    [ "$(ls "$root/$1" | wc -l)" -le 6 ] &&
    grep '^install .* done$' "$root/$1/summary.txt"
}

every_command() { # part; with an nvidia-smi that names a GPU, each stage comes as far as torch, which finds none
  local stages
  stages=$(sed -n "s/^$1=(\(.*\)/\1/p" bench/gpu.sh | wc -w)
  there "$root/every-$1" env PATH="$root/bin:$root/env/bin:$PATH" bash bench/gpu.sh "$1" && return 1
  cat "$root/every-$1/summary.txt"
  [ "$(grep -c -e ' s  done$' -e 'bench.[a-z]*: no CUDA device' -e 'compute-sanitizer.: No such file' \
    "$root/every-$1/summary.txt")" = "$stages" ] && grep -hE '^=+ .* in .*=+$' "$root/every-$1/log.txt"
}

built_from_source() {
  there "$root/source" env WHEELS= SITE="$root/source-site" bash bench/gpu.sh install && cat "$root/source/summary.txt"
}

installed=(env PYTHONPATH="$root/checkout/out/gpu-site:$root/checkout" PYTHONSAFEPATH=1 python)
check 'part A, to "no CUDA device"' ends_for_want_of_a_device A
check 'part B, to "no CUDA device"' ends_for_want_of_a_device B
check 'the wheel and its CUDA library under this torch' there / "${installed[@]}" -c 'import lvtp, torch
assert lvtp.build_info()["backends"]["native_cuda"] == "loaded", lvtp.build_info()
assert "gpu-site" in lvtp.__file__ and torch.__version__.startswith("2.11"), (lvtp, torch)
print("torch", torch.__version__)'
check 'smoke, on the CPU' there / "${installed[@]}" -m bench.smoke --device cpu
check 'smoke for the sanitizers, on the CPU' there / "${installed[@]}" -m bench.smoke --device cpu --small
check 'prefill, tiny, on the CPU' there / "${installed[@]}" -m bench.prefill --device cpu --geometry tiny --seconds 0 \
  --out "$root/B"
check "bench's own code, the CPU in the device's place" there / "${installed[@]}" -m pytest -q -p no:cacheprovider \
  tests/test_bench_gpu.py

# From here on: fewer workers and more time, for a machine of few cores.
sed -i -E '/^(A|B)=/s/:([0-9]+)/:\199/g; s/-n 8/-n 2/' "$root/checkout/bench/gpu.sh"
mkdir -p "$root/bin" && printf '#!/bin/sh\necho 9.0\n' >"$root/bin/nvidia-smi" && chmod +x "$root/bin/nvidia-smi"
check 'every command of part A' every_command A
check 'every command of part B' every_command B
check 'the source build under this torch' built_from_source
exit "$((failed > 0))"
