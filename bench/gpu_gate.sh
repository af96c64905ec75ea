#!/usr/bin/env bash
# Everything that needs a GPU, in less than ten minutes, without a network:
#
#   bash bench/gpu_gate.sh [--dry] [DIRECTORY]
#
# Builds the package for this GPU, checks its kernels against the formulas, runs the GPU's tests, a
# memory checker and a race checker, measures, and leaves JSON, tables and a log in DIRECTORY
# (bench/results; of a dry run a temporary one). Exit code 1: a step failed; the later ones ran.
#
# --dry, or HTF_GATE_DEVICE=cpu HTF_GATE_SCALE=tiny: the same steps on a CPU with tiny workloads,
# to check this script. HTF_GATE_PYTHON: the Python to use. HTF_COMMIT: what this is a copy of, where
# the copy has no history.
set -uo pipefail

python=${HTF_GATE_PYTHON:-python3}
device=${HTF_GATE_DEVICE:-cuda}
scale=${HTF_GATE_SCALE:-full}
out=
for argument; do
  case $argument in
    --dry) device=cpu scale=tiny ;;
    -*) echo "gpu_gate: there is no option $argument, only --dry" >&2; exit 2 ;;
    *) out=$argument ;;
  esac
done

# Seconds of each step at most. A benchmark stops to begin workloads some time before its limit, and
# keeps what it has at each: the important ones come first.
declare -A limit=(
  [install]=90 [verify]=30 [tests]=80 [memory]=38 [race]=38 [float32]=113 [training]=25 [model]=30
  [spectra]=25 [bfloat16]=60 [autotune]=25 [report]=15
)
declare -A budget=([float32]=90 [spectra]=15 [bfloat16]=40 [autotune]=15)
declare -A compiling=([float32]=15 [spectra]=5 [bfloat16]=10 [autotune]=10)
total=0
for step in "${!limit[@]}"; do total=$((total + limit[$step])); done
((total < 570)) || { echo "gpu_gate: the steps may take $total s, more than 570" >&2; exit 2; }

if [[ -z $out ]]; then
  if [[ $device == cuda ]]; then out=$(dirname "${BASH_SOURCE[0]}")/results; else out=$(mktemp -d); fi
fi
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export HTF_COMMIT=${HTF_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
name=gpu-gate-$(date -u +%Y%m%dT%H%M%SZ)-${HTF_COMMIT:0:8}
[[ $device == cuda ]] || name=dry-$name
log=$out/$name-log.txt
verdicts=() failed=0

skipped() { # STEP SENTENCE
  verdicts+=("$1: skipped, $2")
  printf '\n== %s: skipped, %s\n' "$1" "$2"
}

run() { # STEP COMMAND...: within its limit; shows the end of what it printed
  local step=$1 start=$SECONDS code=0 part
  shift
  printf '\n== %s (at most %s s, begun after %s s)\n' "$step" "${limit[$step]}" "$start"
  part=$(mktemp)
  # Interrupted first: pytest still says then what had failed.
  timeout -s INT -k 5 "${limit[$step]}" "$@" >"$part" 2>&1 || code=$?
  { printf '== %s\n' "$step"; cat "$part"; } >>"$log"
  [[ $step == verify ]] && cp "$part" "$out/$name-verify.txt"
  tail -n 10 "$part"
  if [[ $step == memory || $step == race ]] && grep -q "Device not supported" "$part"; then
    code=0
    skipped "$step" "compute-sanitizer does not support this device"
  elif ((code == 0)); then
    verdicts+=("$step: ok, $((SECONDS - start)) s")
  elif ((code == 124 || code == 137)); then
    failed=1
    verdicts+=("$step: FAILED, it took more than ${limit[$step]} s")
  else
    failed=1
    verdicts+=("$step: FAILED with exit code $code, $((SECONDS - start)) s")
  fi
  rm -f "$part"
  return "$code"
}

bench() { # STEP ARGUMENTS..., among them the passes
  local step=$1
  shift
  run "$step" "$python" -m htflearn.cli bench --device "$device" --scale "$scale" \
    --budget "${budget[$step]}" --compile-limit "${compiling[$step]}" --repeats "$repeats" \
    --out "$out/$name-$step.json" "$@"
}

if [[ $device == cuda ]] && ! "$python" -c "import torch; assert torch.cuda.is_available()"; then
  echo "gpu_gate: PyTorch of $python finds no CUDA device; --dry checks the script without one" >&2
  exit 2
fi

if [[ $device == cuda ]]; then
  export MAX_JOBS=${MAX_JOBS:-$(nproc)}
  capability=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} HTF_NVCC_FLAGS=-lineinfo \
    run install "$python" -m pip install -q --no-build-isolation --no-deps -e .
  # Of Triton's kernels, which it has to compile first, those that are measured by `auto` below.
  run verify "$python" -m htflearn.cli verify cuda "triton tf32" "triton bfloat16" cpp
  # From here on kernels run by name, whatever was found, but for what is measured.
  export HTF_VERIFY=0
  parallel=()
  "$python" -c "import xdist" 2>/dev/null && parallel=(-n 10)
  # Values and gradients: every new shape of a kernel is compiled, and time is short.
  chosen="(triton-cuda or cuda-cuda) and not (second or gradgrad or shapes or alone or no_graph)"
  run tests "$python" -m pytest -q "${parallel[@]}" --maxfail 40 -p no:cacheprovider \
    -m "not slow" -k "($chosen) or on_a_gpu or test_triton_ or test_cuda_ or completion_step" \
    tests/test_cuda_*.py tests/test_triton_*.py tests/test_values.py tests/test_gradients.py tests/test_planned.py \
    tests/test_evaluate.py tests/test_evaluate_at.py tests/test_full_tensor.py \
    tests/test_algebra.py tests/learn/test_bench_gpu.py tests/learn/test_completion_step.py
  PATH=$PATH:/usr/local/cuda/bin
  if command -v compute-sanitizer >/dev/null; then
    # Every tensor in memory of its own: past the end of one there is nothing.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run memory compute-sanitizer --tool memcheck \
      --error-exitcode 9 "$python" bench/sanitize.py
    # Of shared memory, which Triton manages by itself.
    run race compute-sanitizer --tool racecheck --error-exitcode 9 \
      "$python" bench/sanitize.py --backend cuda --only primes batch1
  else
    skipped memory "compute-sanitizer is not on the PATH"
    skipped race "compute-sanitizer is not on the PATH"
  fi
  unset HTF_VERIFY
  repeats=20 precision=(--precision tf32)
else
  export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
  skipped install "a dry run leaves the environment as it is"
  run verify "$python" -m htflearn.cli verify
  run tests "$python" -m pytest -q -p no:cacheprovider tests/test_evaluate.py -k "cpp or batch"
  run memory "$python" bench/sanitize.py --device cpu --only primes batch1
  skipped race "it is for a GPU"
  repeats=1 precision=()
fi

peers=(
  -i htfkernels -i "folded bmm" -i "batch-major" -i "distinct, PyTorch" -i "einsum tensor" -i cirkit
)
if [[ $device == cuda ]]; then
  peers+=(
    -i "htfkernels, CUDA graph" -i "folded bmm, CUDA graph" -i "folded bmm, compiled" -i cuTensorNet
  )
fi
# In the order in which the benchmark takes them.
sizes=(
  -w wide -w huge -w medium -w deep -w small -w few -w one -w ragged -w paper -w completion -w dense
)
both=(--pass forward --pass backward)
bench float32 "${both[@]}" --dtype float32 "${precision[@]}" "${sizes[@]}" "${peers[@]}"
if [[ $device == cuda ]]; then
  run training "$python" bench/train_step.py --precision ieee --precision tf32 \
    --steps 1000 --blocks 5 --out "$out/$name-training.json"
  run model "$python" bench/tree_model.py --seconds 20 --out "$out/$name-model.json"
  bench spectra --pass forward-qr --pass forward-gram --dtype float64 \
    -w spectra-64 -w spectra-256 \
    -i htfkernels -i "linalg, node by node" -i "folded linalg"
else
  skipped training "it is for a GPU"
  skipped model "it is for a GPU"
  skipped spectra "it is for a GPU"
fi
bench bfloat16 "${both[@]}" --dtype bfloat16 "${sizes[@]}" "${peers[@]}"
if [[ $device == cuda ]]; then
  # Apart, since trying GEMM kernels takes longer than all the rest.
  bench autotune "${both[@]}" --dtype float32 "${precision[@]}" -w wide -w huge -w medium \
    -i htfkernels -i "htfkernels, CUDA graph" -i "folded bmm, max-autotune"
else
  skipped autotune "it is for a GPU"
fi

files=()
for step in float32 spectra bfloat16 autotune; do
  [[ -e $out/$name-$step.json ]] && files+=("$out/$name-$step.json")
done
table=$out/$name.md
if ((${#files[@]})); then
  run report "$python" bench/gpu_report.py "${files[@]}" --out "$table"
else
  failed=1
  verdicts+=("report: FAILED, no benchmark left a file")
fi

printf '\n== summary (%s s of at most %s)\n' "$SECONDS" "$total"
[[ -e $table ]] && cat "$table"
printf '%s\n' "${verdicts[@]}" | tee -a "$log"
echo "written: $name.md, $name-*.json, $name-verify.txt, $name-log.txt"
exit "$failed"
