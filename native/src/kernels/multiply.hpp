// Register-only products, one loop for each instruction set: how fast the arithmetic units go when nothing else waits.
#pragma once

#include "ktv/layer.hpp"

namespace ktv {

// Some microseconds of products (milliseconds where tiles are emulated); returns the floating-point operations done.
// For amx_bf16 the worker has entered its kernels (tile configuration).
double multiply_registers(Isa isa);

}  // namespace ktv
