#!/usr/bin/env bash
# Builds and runs the C++ tests twice: under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# One test forks a process that has workers, as Python's multiprocessing does; ThreadSanitizer would refuse by default.
export TSAN_OPTIONS=die_after_fork=0:halt_on_error=1
build=$here/../../build/sanitized
mkdir -p "$build"
jobs=$(nproc)
for sanitizer in address,undefined thread; do
    dir=$build/${sanitizer/,/-}
    echo "== native tests under -fsanitize=$sanitizer"
    cmake -S "$here/.." -B "$dir" -G Ninja -DKTV_PYTHON=OFF -DKTV_TESTS=ON -DKTV_SANITIZE="$sanitizer" >"$dir.log" 2>&1 ||
        { cat "$dir.log"; exit 1; }
    cmake --build "$dir" -j "$jobs" >"$dir.log" 2>&1 || { cat "$dir.log"; exit 1; }
    ctest --test-dir "$dir" --output-on-failure -j 1
done
