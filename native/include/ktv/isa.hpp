// Names of the instruction sets that the engine has kernels for. The table behind them: src/instruction_sets.cpp.
#pragma once

#include <string>
#include <vector>

namespace ktv {

// All names, best first, whether they can run here or not.
std::vector<std::string> known_isas();
// Those whose kernels are compiled in, and which the CPU has and the OS permits; best first.
std::vector<std::string> available_isas();
// Why an instruction set cannot run here; empty when it can. BadInput for an unknown name.
std::string why_not(const std::string& isa);
// BadState when this CPU cannot run it, BadInput for an unknown name. Never picks another instruction set.
void require_isa(const std::string& isa);

}  // namespace ktv
