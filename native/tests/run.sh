#!/usr/bin/env bash
# Builds and runs the C++ tests under each of the sanitizers given. The default is all: AddressSanitizer with
# UndefinedBehaviorSanitizer (address,undefined), and ThreadSanitizer (thread).
set -euo pipefail
[ $# -gt 0 ] || set -- address,undefined thread
here=$(cd "$(dirname "$0")" && pwd)
# of fuzz_layer, under each sanitizer
export KTV_FUZZ_SECONDS=${KTV_FUZZ_SECONDS:-30}
# One test forks a process with workers, as Python's multiprocessing does; by default ThreadSanitizer refuses that.
export TSAN_OPTIONS=die_after_fork=0:halt_on_error=1
# The sanitizers' shadow memory needs fixed addresses, which are free without address randomisation.
plain=()
setarch "$(uname -m)" -R true 2>/dev/null && plain=(setarch "$(uname -m)" -R)
if [ "$(uname -m)" = x86_64 ]; then
    echo "== what the inner loops of the AMX kernels execute"
    python3 "$here/count_tile_instructions.py" "${CXX:-g++}"
fi
build=$here/../../build/sanitized
mkdir -p "$build"
jobs=$(nproc)
for sanitizer in "$@"; do
    dir=$build/${sanitizer/,/-}
    echo "== native tests under -fsanitize=$sanitizer"
    cmake -S "$here/.." -B "$dir" -G Ninja -DKTV_PYTHON=OFF -DKTV_TESTS=ON -DKTV_WERROR=ON -DKTV_SANITIZE="$sanitizer" >"$dir.log" 2>&1 ||
        { cat "$dir.log"; exit 1; }
    cmake --build "$dir" -j "$jobs" >"$dir.log" 2>&1 || { cat "$dir.log"; exit 1; }
    # these use one thread, so ThreadSanitizer has nothing to find
    of_one_thread=()
    [ "$sanitizer" = thread ] && of_one_thread=(-E 'test_(decoding|kernels|task_schedule|amx_instructions)')
    "${plain[@]}" ctest --test-dir "$dir" --output-on-failure -j "$jobs" "${of_one_thread[@]}"
done
