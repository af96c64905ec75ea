#!/usr/bin/env bash
# The CPU modules under AddressSanitizer and UndefinedBehaviorSanitizer, and tests that run on them:
#
#     bash bench/sanitize.sh                                    the compiled operators' tests
#     bash bench/sanitize.sh tests/test_planned.py -k bilinear  what pytest is to run
#     bash bench/sanitize.sh python tests/fuzz/run.py           what else is to run
#
# The first error ends the process and prints where it is. The modules are compiled in a folder of
# their own, HTF_SANITIZED (build/sanitized without it), where a later run compiles only what has
# changed; those of the checkout stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
into=$(realpath -m "${HTF_SANITIZED:-build/sanitized}")
mkdir -p "$into"
rm -rf "$into"/{csrc,htfkernels,python,tests}
tar -c --exclude='*.so' --exclude=__pycache__ csrc htfkernels python tests setup.py pyproject.toml \
  README.md | tar -x -C "$into"
cd "$into"

# -fno-wrapv: Python's own flags would have overflow of signed numbers defined.
checks="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-wrapv"
HTF_BUILD_CUDA=0 HTF_CXX_FLAGS="-O1 -g1 -fno-omit-frame-pointer $checks" \
  python setup.py -q build_ext --inplace >compiled.log 2>&1 || { cat compiled.log; exit 1; }

[ $# -gt 0 ] || set -- tests/test_evaluate.py tests/test_evaluate_at.py tests/test_planned.py \
  tests/test_full_tensor.py tests/test_gradients.py tests/test_large.py tests/test_library.py \
  tests/test_robustness.py tests/test_spectra.py tests/test_spectra_ops.py \
  tests/test_group_rmsprop.py tests/test_index_plan.py
runtime() { "${CXX:-g++}" -print-file-name="$1"; }
# libstdc++ too: the sanitizer looks for what throws exceptions when the process starts.
export LD_PRELOAD="$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so.6)"
# What Python never frees is not a leak; where memory is short, an operator is to raise.
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
export PYTHONPATH="$into:$into/python"
[ "$1" = python ] || set -- python -m pytest -q -p no:cacheprovider "$@"
exec "$@"
