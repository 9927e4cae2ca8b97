#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without network, in less than 9 minutes: build, a small case, GPU tests,
# kernels, optimizer steps (ViT-B/16 and GPT-2 355M among them, PyLO where installed), compute-sanitizer on the small case.
#
#     benchmarks/gpu.sh
#
# OUT     folder for logs, CSV files and summary.txt               (out/gpu)
# PYTHON  its torch is used as it is                               (python3)
# PYTHONPATH  may name a folder with packages that are missing there (safetensors, msgpack)
# DEVICE  cpu tries out the script on a machine without a GPU      (cuda)
#
# A step that fails or runs past its limit is written down, and the next one begins; the exit code counts them.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-out/gpu} python=${PYTHON:-python3} device=${DEVICE:-cuda}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PATH=$PATH:/usr/local/cuda/bin
failed=0 deadline=$((SECONDS + 520))
: >"$out/summary.txt"

note() { echo "$*" | tee -a "$out/summary.txt"; }

# run NAME SECONDS COMMAND ...   with its own limit, and that of the whole script; all it prints goes to NAME.log
run() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  ((limit > deadline - SECONDS)) && limit=$((deadline - SECONDS))
  if ((limit < 5)); then
    note "$name: left out, no time"
    failed=$((failed + 1))
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) note "$name: ok, $((SECONDS - start)) s" ;;
    124 | 137) note "$name: past its limit of $limit s" ;;
    *) note "$name: exit code $code after $((SECONDS - start)) s; last line: $(tail -n 1 "$out/$name.log")" ;;
  esac
  ((code == 0)) || failed=$((failed + 1))
}

if [ "$device" = cuda ]; then
  export LOPT_CUDA=ON CUDAFLAGS=-lineinfo # compute-sanitizer names lines
  nvidia-smi >"$out/nvidia-smi.txt" 2>&1
  tests=(-m gpu)
  kernel=(--sizes 10000 100000 1000000 10000000 100000000 --tensors 1 1000)
  step=(--sizes 1000000 100000000 --tensors 1 1000 --models vit-b16 gpt2-355m)
else
  export LOPT_CUDA=${LOPT_CUDA:-OFF} LOPT_SIM=ON
  tests=(-k test_traffic)
  kernel=(--sizes 10000 --tensors 1 10 --repeats 3)
  step=(--sizes 10000 --tensors 1 10 --models vit-b16 --scale 0.1 --repeats 3)
fi

run build 150 "$python" setup.py --quiet build_ext --inplace
run versions 30 "$python" -c 'import torch, lopt.benchmark.rows as r; print(r.environment(torch.device("'"$device"'")))'
run small_step 60 "$python" benchmarks/small_step.py --device "$device"
run tests 150 "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors "${tests[@]}"
run kernel 70 "$python" -m lopt.benchmark kernel --device "$device" --out "$out/kernel.csv" "${kernel[@]}"
run kernel_bfloat16 40 "$python" -m lopt.benchmark kernel --device "$device" --dtype bfloat16 \
  --out "$out/kernel.csv" "${kernel[@]}"
run step 90 "$python" -m lopt.benchmark step --device "$device" --out "$out/step.csv" "${step[@]}"

if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    run "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" benchmarks/small_step.py --device cuda
  done
elif [ "$device" = cuda ]; then
  note "memcheck, racecheck: left out, compute-sanitizer is not installed"
fi

note "$failed failed, $SECONDS s; results in $out"
exit "$failed"
