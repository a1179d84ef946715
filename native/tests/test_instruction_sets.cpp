// The table of instruction sets is complete, and every row that runs here has a register peak.
#include <set>
#include <string>

#include "check.hpp"
#include "instruction_sets.hpp"
#include "ktv/errors.hpp"
#include "ktv/isa.hpp"
#include "machine_limits/ceilings.hpp"

using namespace ktv;

namespace {

template <typename Error, typename Call>
bool throws(const Call& call) {
    try {
        call();
    } catch (const Error&) {
        return true;
    }
    return false;
}

void check_kernels(const char* name, const Kernels& k) {
    check(k.enter && k.leave && k.nt && k.nn && k.pack_tokens && k.silu_mul && k.silu_mul_few && k.silu_mul_grad &&
              k.add_transposed && k.add_rows && k.round_sum && k.transpose,
          "%s: a kernel is missing", name);
    check(k.few_rows >= 0 && k.few_rows <= kGroup && (k.few_rows > 0) == (k.nt_few != nullptr),
          "%s: nt_few does not match few_rows", name);
    k.enter();
    k.leave();
}

void check_row(const InstructionSet& row) {
    check(row.missing != nullptr, "%s: the requirement is missing", row.name);
    check((row.kernels != nullptr) == (row.register_peak != nullptr), "%s: kernels without a register peak", row.name);
    const std::string reason = row.why_not();
    check(row.kernels || !reason.empty(), "%s: no kernels and no reason", row.name);
    check(reason == why_not(row.name), "%s: why_not", row.name);
    if (row.runs_here()) {
        require_isa(row.name);
        check_kernels(row.name, *row.kernels);
        check(multiply_rate(row.name, 1, 1e-4) > 0, "%s: register peak", row.name);
    } else {
        check(throws<BadState>([&] { require_isa(row.name); }), "%s is accepted, but: %s", row.name, reason.c_str());
    }
}

}  // namespace

int main() {
    emulate_amx();
    std::set<std::string> names;
    std::vector<std::string> known, available;
    for (const InstructionSet& row : instruction_sets()) {
        if (!check(row.name && *row.name && names.insert(row.name).second, "a row without a name of its own")) continue;
        check_row(row);
        known.push_back(row.name);
        if (row.runs_here()) available.push_back(row.name);
    }
    check(known == known_isas() && available == available_isas(), "names in the order of the table");
    check(!available.empty() && available.back() == "scalar" && known.back() == "scalar", "scalar is last and runs");
    check(throws<BadInput>([] { require_isa("avx9"); }) && throws<BadInput>([] { (void)why_not("avx9"); }),
          "an unknown name is refused");
    return finish();
}
