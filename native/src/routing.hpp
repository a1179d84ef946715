// Which rows go to which expert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ktv {

// Rows are (token, slot) pairs, grouped by expert in ascending order, within an expert in token order. Each expert's
// rows are padded to a multiple of 16 (a group); padding rows have token -1 and weight 0.
struct Routing {
    struct Expert {
        int expert;     // logical id
        int rows;       // without padding, > 0
        int first_row;  // a multiple of 16
        int groups;     // padded rows / 16
        int first_k;    // a multiple of 32: its first token where the token is the reduction index
        int kblocks;    // rows / 32, rounded up
    };
    int tokens = 0, slots = 0;
    int rows = 0;                                // padded, all experts
    int k_rows = 0;                              // padded to 32, all experts
    std::vector<Expert> experts;                 // those with rows
    std::vector<std::int32_t> token;             // [rows]
    std::vector<float> weight;                   // [rows]
    std::vector<std::int32_t> row_of;            // [tokens * slots], -1 for an empty slot
    std::vector<std::int32_t> expert_of_kblock;  // [k_rows / 32] index into experts

    // 32 rows of an expert, the last ones maybe padding, in one or two groups. Where the row is the reduction index, they
    // are a k-block: columns first..first + 32 of an operand [..][ld] of the expert, which are whole cache lines.
    struct KBlock {
        const Expert& expert;
        int row, group, groups;  // the first row and its group, and how many groups
        int rows;                // without padding
        std::size_t ld, first;
    };
    // Rows of an expert in the mean, rounded up.
    int mean_rows() const {
        int all = 0;
        for (const Expert& e : experts) all += e.rows;
        return experts.empty() ? 1 : (all + static_cast<int>(experts.size()) - 1) / static_cast<int>(experts.size());
    }
    KBlock kblock(int index) const;
};

// Throws BadInput with the position of an id that is neither -1 nor an expert. Takes a copy, and route() likewise, because
// the caller's array may be written by another thread between the two.
void check_ids(const std::vector<std::int64_t>& ids, int slots, int num_experts);
Routing route(const std::vector<std::int64_t>& ids, const float* weights, int tokens, int slots, int num_experts);

}  // namespace ktv
