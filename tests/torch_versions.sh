#!/usr/bin/env bash
# One wheel under other torches: the operators' tests from Python, then the C++ example as it was built. liblvtp stays
# the file it is; where the example, which is on torch's C++ API, does not run any more, it alone is built again. Then
# liblvtp is built against that torch, too, beside the one of the wheel.
#
#   tests/torch_versions.sh 2.10.0 2.14.0                    torches that pip finds, installed into out/torches
#   tests/torch_versions.sh /usr/lib/python3/dist-packages   the torch in a folder
#   tests/torch_versions.sh 2.10.0 -- tests/test_torch.py    other tests
#
# PYTHON is an interpreter with what the tests need, a free-threaded one for example; PIP_INDEX_URL says where pip finds
# CPU builds. WHEEL and EXAMPLE, a wheel and a select_tokens, are built here unless they are given: for another system's
# torch, build them elsewhere. PYTHON and EXAMPLE may be several words, with an emulator in front.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD out=$PWD/out/torches
PYTHON=${PYTHON:-$root/.venv/bin/python}
torches=() tests=()
while (($#)) && [ "$1" != -- ]; do torches+=("$1") && shift; done
if (($#)); then
  tests=("${@:2}")
else
  for name in id_selection prune_sid psca cosine_similarity mean_similarity greedy_suppression cluster_nms \
    dynamic_budget bad_input callers torch.py::test_opcheck torch.py::test_export_with_a_dynamic_batch; do
    case $name in *.py*) tests+=("tests/test_$name") ;; *) tests+=("tests/test_$name.py") ;; esac
  done
fi
((${#torches[@]})) || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2; }

if [ -z "${WHEEL:-}" ]; then
  rm -rf "$out/wheel"
  CMAKE_ARGS="-DLVTP_CUDA=OFF" $PYTHON -m pip wheel -q --no-build-isolation --no-deps -w "$out/wheel" .
  WHEEL=$(echo "$out"/wheel/*.whl)
fi
rm -rf "$out/lvtp" && mkdir -p "$out"
$PYTHON -m zipfile -e "$WHEEL" "$out/lvtp" # a wheel is its files
library=$(echo "$out"/lvtp/lvtp/lib/liblvtp.*)
before=$(sha256sum "$library")

build_example() { # the folder to build in; against the torch that PYTHONPATH names
  local prefix
  prefix=$($PYTHON -c 'import torch; print(torch.utils.cmake_prefix_path)')
  cmake -S examples/cpp -B "$1" -G Ninja -DCMAKE_PREFIX_PATH="$prefix;$out/lvtp/lvtp/lib/cmake" >/dev/null
  cmake --build "$1" >/dev/null
}
if [ -z "${EXAMPLE:-}" ]; then
  build_example "$out/example"
  EXAMPLE=$out/example/select_tokens
fi

check_example() { # command
  local folder=$out/run
  rm -rf "$folder" && mkdir -p "$folder"
  $PYTHON -c 'import sys, torch
torch.manual_seed(0)
torch.save((torch.randn(3, 576, 64), torch.rand(3, 576)), sys.argv[1])' "$folder/in.pt"
  LD_LIBRARY_PATH=$where/torch/lib:$(dirname "$library") "$@" "$folder/in.pt" "$folder/out.pt" 64 || return
  $PYTHON -c 'import lvtp, sys, torch
given, got = map(torch.load, sys.argv[1:])
want = lvtp.id_selection(*given, 64), lvtp.prune_sid(*given, 64)
assert all(map(torch.equal, got, want))' "$folder/in.pt" "$folder/out.pt"
}

for torch in "${torches[@]}"; do
  where=$torch
  if [ ! -d "$torch/torch" ]; then
    where=$out/torch-$torch
    [ -d "$where/torch" ] || $PYTHON -m pip install -q --no-deps --target "$where" "torch==$torch"
  fi
  export PYTHONPATH=$where:$out/lvtp
  # -P: the checkout's own lvtp stays out of the way.
  $PYTHON -P -c 'import lvtp, sys, torch
assert torch.__file__.startswith(sys.argv[1]) and lvtp.__file__.startswith(sys.argv[2]), (torch, lvtp)
gil = getattr(sys, "_is_gil_enabled", lambda: True)()
print("== torch", torch.__version__, "Python", sys.version.split()[0], "" if gil else "without the GIL")' "$where" "$out/lvtp"
  $PYTHON -P -m pytest -q -p no:cacheprovider -m "not gpu" -k "not reference" "${tests[@]}"
  if check_example $EXAMPLE; then
    echo "the C++ example runs as it was built"
  else
    build_example "$out/example-$(basename "$where")"
    check_example "$out/example-$(basename "$where")/select_tokens"
    echo "the C++ example had to be built again"
  fi
  [ "$(sha256sum "$library")" = "$before" ]
  cmake -S . -B "$out/build-$(basename "$where")" -G Ninja -DLVTP_TORCH="$where/torch" -DLVTP_CUDA=OFF >/dev/null
  cmake --build "$out/build-$(basename "$where")" >/dev/null
  $PYTHON -P -c 'import sys, torch
torch.ops.load_library(sys.argv[1])
x = torch.randn(1, 9, 4)
assert torch.ops.lvtp.id_selection(x, x[..., 0], 3).shape == (1, 3)' "$out/build-$(basename "$where")/$(basename "$library")"
  echo "builds against it"
done
