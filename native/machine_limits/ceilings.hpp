// The two ceilings with which the bench compares an engine's times: what this machine can do at best with a given number
// of threads. No layer uses them.
#pragma once

#include <cstddef>
#include <string>

namespace ktv {

// Bytes per second at which `threads` workers together read `bytes` of memory, the best of `passes` passes. Keeps that
// memory for the next call (OutOfMemory where there is not enough); clear_buffer_cache frees it.
double read_rate(int threads, std::size_t bytes, int passes);

// Floating-point operations per second of `threads` workers that only multiply registers for `seconds`, with the
// instruction of the kernels of `isa`: bf16 products for amx_bf16 and avx512_bf16, fp32 for the others, which widen bf16
// first. An addition and a multiplication count as two. Throws as require_isa does.
double multiply_rate(const std::string& isa, int threads, double seconds);

}  // namespace ktv
