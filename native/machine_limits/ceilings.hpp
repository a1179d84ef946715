// What this machine can do at best with a given number of threads: the two ceilings that an engine's times are held
// against. For the bench; no layer uses it.
#pragma once

#include <cstddef>
#include <string>

namespace ktv {

// Bytes per second at which `threads` workers together read `bytes` of memory from one end to the other: the best of
// `passes` passes over it. Keeps that memory (OutOfMemory where there is not enough) for the
// next call; clear_buffer_cache returns it.
double read_rate(int threads, std::size_t bytes, int passes);

// Floating-point operations per second of `threads` workers that do nothing for `seconds` but multiply registers with
// the instruction that the kernels of `isa` multiply with: bf16 products for amx_bf16 and avx512_bf16, fp32 for the
// others, which widen bf16 first. An addition and a multiplication count as two.
double multiply_rate(const std::string& isa, int threads, double seconds);

}  // namespace ktv
