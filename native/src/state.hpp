// The state of a layer, and the sizes that follow from its configuration.
#pragma once

#include <algorithm>
#include <atomic>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kernels/kernels.hpp"
#include "ktv/layer.hpp"
#include "process.hpp"
#include "routing.hpp"
#include "stages.hpp"
#include "team.hpp"

namespace ktv {

inline constexpr int blocks_of(int n) {
    return (n + kBlock - 1) / kBlock;
}
inline constexpr int groups_of(int n) {
    return (n + kGroup - 1) / kGroup;
}
// For products of two int that may exceed an int.
inline constexpr std::size_t wide(int n) {
    return static_cast<std::size_t>(n);
}

// Rows of an expert that one kernel call takes, at most `most`: `rows` rows from `first` on, in `groups` groups. An
// expert has the fewest possible chunks, of nearly equal size; after the last one, rows is 0.
struct RowChunk {
    RowChunk(const Routing::Expert& expert, int from, int most)
        : first(from),
          groups(from < expert.rows ? even_chunk(expert.groups - from / kGroup, most / kGroup) : 0),
          rows(std::min(expert.rows - from, groups * kGroup)),
          last(from + rows == expert.rows) {}
    int first, groups, rows;
    bool last;
};

// Neighbouring columns of an expert that one task takes: `most`, a power of two, or so few that each of a part's
// workers has twelve tasks. Then waiting for the last task costs at most a twelfth.
inline int columns_of_task(int most, int experts, int columns, int workers) {
    while (most > 1 && experts * ((columns + most - 1) / most) < 12 * workers) most /= 2;
    return most;
}

// Sizes of one part: I is the part's share of the intermediate size.
struct Sizes {
    int H, I, r;
    int hb, ib, rb, ab;  // blocks of H, I, r and 2 r (gate_a above up_a)
    int hidden() const { return hb * kBlock; }
    int inter() const { return ib * kBlock; }
    // Leading dimensions of wide operands: one cache line more than a row, because at a distance of a power of two the
    // rows of a register block would share a few sets of the first-level cache.
    int hidden_ld() const { return hidden() + kBlock; }
    int inter_ld() const { return inter() + kBlock; }
    int rank() const { return rb * kBlock; }
    // A rank of at most 16 fills half of a block's depth: hi and lo of a small activation are side by side in it, next
    // to B twice.
    bool side_by_side() const { return r <= kBlock / 2; }
    int rank2() const { return ab * kBlock; }
    int rank_rows() const { return groups_of(r) * kGroup; }  // rows of a transposed [r, tokens] operand
    int rank2_rows() const { return groups_of(2 * r) * kGroup; }
};

// An fp32 value as two bf16 operands, hi + lo, in arrays of one layout.
struct Pair {
    bf16* hi = nullptr;
    bf16* lo = nullptr;
};

inline void take(Carver& carver, Pair& pair, std::size_t count) {
    carver.take(pair.hi, count);
    carver.take(pair.lo, count);
}
// An expert's share of a Pair.
inline Pair at(const Pair& p, std::size_t by) {
    return {p.hi + by, p.lo ? p.lo + by : nullptr};
}

// One of an expert's base matrices.
enum class Matrix { gate, up, down };

// A quantised base matrix in one part: blocks of codes, and a scale and a zero point for each row and group, [rows of
// blocks][groups][32 n]; fp8 has two scales there.
struct PackedCodes {
    std::uint8_t* blocks = nullptr;
    std::byte* scales = nullptr;
    std::int8_t* zeros = nullptr;
};
// How it lies: its size, the place of its first element in the whole matrix, bytes from one row of blocks to the next,
// and the groups of columns that it touches.
struct CodeLayout {
    int rows, cols, row0, col0;
    std::size_t stride;
    int first_group, groups;
};

// Base weights of one expert in one part, as weight blocks: gate next to up [ib][2][hb], because the forward reads a
// row of each alternately (Layer::State::gate_up_stride() from row to row of either), and down [hb][ib].
struct PackedExpert {
    bf16* gate = nullptr;
    bf16* up = nullptr;  // gate's neighbour
    bf16* down = nullptr;
    PackedCodes codes[3];  // instead of them, by Matrix
    bool is_packed() const { return gate || codes[0].blocks; }
};

// LoRA of all experts as weight blocks, each with its second bf16 (lo) when the parameters are fp32. Per expert:
// gate_up_a [ab][hb] (the rows of gate_a, then those of up_a), gate_b, up_b [ib][rb], down_a [rb][ib], down_b [hb][rb].
struct LoraPack {
    std::vector<Block> blocks;               // [part]; what all parts share is in the first
    bool fp32 = false;                       // the parameters' dtype
    Pair gate_up_a, down_b;                  // the same for every part
    std::vector<Pair> gate_b, up_b, down_a;  // [part]
};

// What a forward saves for its backward.
struct Saved {
    Ticket ticket = 0;
    std::uint64_t thread = 0;  // that made it: this_thread()
    Routing routing;
    std::shared_ptr<const LoraPack> lora;  // the snapshot that it used
    std::vector<Block> blocks;             // [part]; what all parts share is in the first
    bf16* x = nullptr;                     // [T + 1][hidden_ld], the last row zero
    Pair xa_t;                             // (s x Aᵀ)ᵀ: per expert [2][rank_rows][tokens], gate then up
    struct Part {
        float* g = nullptr;  // [rows][inter_ld]
        float* u = nullptr;
        Pair ha_t;  // (w s h Adᵀ)ᵀ: per expert [rank_rows][tokens]
    };
    std::vector<Part> parts;
};

// Elements of one expert in each of LoraPack's tensors; gate_b is also that of up_b.
struct LoraStrides {
    std::size_t gate_up_a, gate_b, down_a, down_b;
};

// A quantised base matrix of an expert in one part, as kernels read it.
class CodedMatrix final : public CodedBlocks {
  public:
    CodedMatrix(const Layer::State& layer, const PackedExpert& expert, int part, Matrix matrix);
    void unpack(Place at, int count, const std::uint8_t* ahead, bf16* out) const override;

  private:
    WeightFormat format_;
    Kernels::Unpack unpack_;
    int row0_ = 0;  // the part's first row in the whole matrix
};

struct Layer::State {
    explicit State(const LayerConfig& config);

    LayerConfig config;
    Sizes size;
    const Kernels& kernels;
    const std::vector<Home> homes;  // [part]
    int workers;

    // Atomic, like the counts below, because readers that must not wait for a computation read them without the lock.
    std::atomic<bool> weights_loaded{false}, lora_loaded{false}, lora_fp32{false};
    WeightFormat format;
    WeightSource gate, up, down;
    int source_name = 0;                             // name of these three: see load_weights
    std::shared_ptr<const void> owner;               // keeps them alive
    bool given_up = false;                           // their memory is released as experts are packed
    std::vector<int> slot_of;                        // logical expert -> physical slot
    std::vector<std::vector<PackedExpert>> experts;  // [part][logical expert]
    // [part]: all its experts in the order in which they are packed; empty before the first. Not a block for each, because
    // the kernel limits the mappings of a process (vm.max_map_count, 65530).
    std::vector<Block> expert_memory;
    std::atomic<int> packed{0};  // experts whose sources are not read any more
    std::shared_ptr<LoraPack> lora;
    std::vector<Saved> saved;  // oldest first
    Ticket last_ticket = 0;
    std::vector<Saved>::iterator find_saved(Ticket ticket) {
        return std::find_if(saved.begin(), saved.end(), [&](const Saved& s) { return s.ticket == ticket; });
    }
    std::vector<Saved>::iterator find_newest(bool of_any_thread) {
        const auto mine = [me = this_thread()](const Saved& s) { return s.thread == me; };
        const auto found = std::find_if(saved.rbegin(), saved.rend(), mine);
        if (found != saved.rend()) return std::prev(found.base());
        return of_any_thread && !saved.empty() ? std::prev(saved.end()) : saved.end();
    }
    // The size of `saved`, for readers that do not wait for a computation.
    std::atomic<int> saved_forwards{0};
    void note_saved() { saved_forwards = static_cast<int>(saved.size()); }
    Block grad_sums;             // fp32 sums of the LoRA gradients, in the order of LoraPointers, when accumulating
    std::vector<bool> has_sums;  // experts with a sum

    bool recording = false;
    StageTimes recorded;
    Costs forward_costs(const Routing& routing) const;
    Costs backward_costs(const Routing& routing) const;

    int workers_of_part() const { return std::max(1, workers / config.parts); }
    // Those of one part; none where there are fewer workers than parts.
    int workers_of(int part) const { return std::max(0, (workers - part + config.parts - 1) / config.parts); }
    Team& team() const { return process().team(workers, homes); }
    // carve(part, Carver&) lists a part's arrays: the sizes of the parts' blocks, and their cut.
    template <typename Carve>
    std::vector<BlockCache::Size> measured_parts(const Carve& carve) const {
        std::vector<BlockCache::Size> sizes;
        for (int p = 0; p < config.parts; ++p)
            sizes.push_back({measured([&](Carver& carver) { carve(p, carver); }), homes[p].nodes});
        return sizes;
    }
    template <typename Carve>
    void cut_parts(std::span<const Block> blocks, const Carve& carve) const {
        for (int p = 0; p < config.parts; ++p) cut(blocks[p], [&](Carver& carver) { carve(p, carver); });
    }
    int terms() const { return lora->fp32 ? 2 : 1; }
    std::size_t expert_bytes() const;  // packed, of one part
    std::size_t source_bytes() const { return format.bytes(3 * wide(config.hidden) * config.intermediate); }
    double weight_bytes() const { return format.bits() / 8.0; }  // of one base weight
    // Elements of one row of weight blocks.
    std::size_t panel(int kblocks) const { return kblocks * kBlockSize; }
    std::size_t gate_up_stride() const { return 2 * panel(size.hb); }
    LoraStrides lora_strides() const {
        return {size.ab * panel(size.hb), size.ib * panel(size.rb), size.rb * panel(size.ib), size.hb * panel(size.rb)};
    }

    // quantised.cpp
    CodeLayout layout_of(Matrix matrix, int part) const;
    void carve_codes(Carver& carver, PackedExpert& expert) const;
    void pack_codes(int slot, int part, Matrix matrix, int row, const PackedCodes& to) const;
    // What kernels read of quantised weights; nothing for bf16.
    std::optional<CodedMatrix> codes_of(const PackedExpert& expert, int part, Matrix matrix) const;
    // A strip of a base matrix that is not quantised.
    const bf16* strip(const PackedExpert& expert, Matrix matrix, int n) const;

    Need packing_need(std::size_t experts) const;
    void pack_experts(Team& team, const std::vector<int>& wanted);
    bool unpack(int expert, bf16* gate_to, bf16* up_to, bf16* down_to) const;
    LoraPack empty_lora(bool fp32) const;
    void carve_lora(LoraPack& pack, int part, Carver& carver) const;
    void pack_lora(Team& team, const LoraPointers& lora);
    // ids: the layer's own copy, checked.
    Ticket forward(const ForwardArguments& arguments, const std::vector<std::int64_t>& ids);
    void backward(const BackwardArguments& arguments);
    std::vector<std::size_t> grad_sizes() const;  // elements of each of the six LoRA tensors
};

inline void put(const Pair& to, std::size_t at, float value) {
    const Split s = split(value);
    to.hi[at] = s.hi;
    to.lo[at] = s.lo;
}

// Ends a stage of a parallel region: every worker calls it.
inline void end_stage(Watch& watch, Team& team) {
    watch.tasks_done();
    team.barrier();
    watch.stage_done();
}

}  // namespace ktv
