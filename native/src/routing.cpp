#include "routing.hpp"

#include <algorithm>

#include "kernels/kernels.hpp"
#include "ktv/errors.hpp"

namespace ktv {

void check_ids(const std::vector<std::int64_t>& ids, int slots, int num_experts) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < -1 || ids[i] >= num_experts) {
            throw BadInput("expert_ids[" + std::to_string(i / slots) + ", " + std::to_string(i % slots) + "] is " +
                           std::to_string(ids[i]) + "; it takes 0 to " + std::to_string(num_experts - 1) +
                           ", or -1 for a slot that is not this layer's");
        }
    }
}

Routing route(const std::vector<std::int64_t>& ids, const float* weights, int tokens, int slots, int num_experts) {
    Routing r;
    r.tokens = tokens;
    r.slots = slots;
    const std::size_t count = ids.size();
    std::vector<int> rows(num_experts);
    for (std::size_t i = 0; i < count; ++i) {
        if (ids[i] >= 0) ++rows[ids[i]];
    }
    std::vector<int> next(num_experts);
    for (int e = 0; e < num_experts; ++e) {
        const int have = rows[e];
        next[e] = r.rows;
        if (have == 0) continue;
        const int groups = (have + kGroup - 1) / kGroup, kblocks = (have + kBlock - 1) / kBlock;
        r.expert_of_kblock.insert(r.expert_of_kblock.end(), kblocks, static_cast<std::int32_t>(r.experts.size()));
        r.experts.push_back({e, have, r.rows, groups, r.k_rows, kblocks});
        r.rows += groups * kGroup;
        r.k_rows += kblocks * kBlock;
    }
    r.token.assign(r.rows, -1);
    r.weight.assign(r.rows, 0.0f);
    r.row_of.assign(count, -1);
    for (std::size_t i = 0; i < count; ++i) {
        if (ids[i] < 0) continue;
        const int row = next[ids[i]]++;
        r.token[row] = static_cast<std::int32_t>(i / slots);
        r.weight[row] = weights[i];
        r.row_of[i] = row;
    }
    return r;
}

Routing::KBlock Routing::kblock(int index) const {
    const Expert& e = experts[expert_of_kblock[index]];
    const int first = index * kBlock - e.first_k, row = e.first_row + first, rows = std::min(kBlock, e.rows - first);
    return {
        e, row, row / kGroup, (rows + kGroup - 1) / kGroup, rows, std::size_t(e.kblocks) * kBlock, std::size_t(first)};
}

}  // namespace ktv
