#pragma once

#include <string>

#include "ktv/layer.hpp"

namespace ktv {

// Why this ISA cannot run here; empty when it can.
std::string why_not(Isa isa);
// Lets amx_bf16 count as available where a trap handler executes tile instructions: for checking, never for speed.
void set_amx_emulation(bool on);

}  // namespace ktv
