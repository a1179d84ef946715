// One forward call: its working buffers, and a function for each kind of task.
//
//   1 pack    per (part, 32 rows of an expert):  token packs of x, and x Aᵀ of gate and up while they are in cache
//   2 up      per (part, expert, strips of I):   g, u with their LoRA in one product; h = silu(g) u, packed
//   3 rank    per (part, 32 rows of an expert):  h Adᵀ
//   4 down    per (part, expert, strips of H):   y with its LoRA, added to the output in the order of the experts
//
// A strip is 32 rows of W. A worker's scratch holds the results of one call of nt (kernels.hpp), which activation and sums
// read where they are.
#pragma once

#include <vector>

#include "expert_sums.hpp"
#include "state.hpp"

namespace ktv {

class Forward {
  public:
    // `kept` has its routing and its LoRA already; with save, run() fills in the rest.
    Forward(Layer::State& layer, Saved& kept, const ForwardArguments& arguments, Watch caller)
        : layer_(layer), kept_(kept), call_(arguments), caller_(caller) {}
    // Takes working buffers, packs experts that get their first token, computes, and returns the buffers.
    void run(Process& shared, Team& team, Recording& recording);
    // Of the working buffers, and of what is saved for backward: [part].
    std::vector<BlockCache::Size> work_sizes() {
        return layer_.measured_parts([this](int p, Carver& carver) { carve_work(p, carver); });
    }
    std::vector<BlockCache::Size> kept_sizes() {
        return layer_.measured_parts([this](int p, Carver& carver) { carve_kept(p, carver); });
    }

  private:
    // The resources of one worker.
    struct Worker {
        int index;
        float* c;  // [scratch_size_]
        Watch watch;
    };
    struct Part {
        bf16* x_pack;         // [group][hb]
        Pair gate_xa, up_xa;  // s x Aᵀ: [group][rb]
        bf16* h_pack;         // [group][ib]
        Pair ha;              // s h Adᵀ: [group][rb]
        float* scratch;       // of its workers: [worker][scratch_size_]
    };

    void carve_work(int p, Carver& carver);
    void carve_kept(int p, Carver& carver);
    std::vector<int> new_experts() const;

    void keep_rows(Worker& worker, int first_group);
    void pack(Worker& worker, int p, const Routing::KBlock& block);
    void up(Worker& worker, const Task& task);
    void rank(Worker& worker, int p, const Routing::KBlock& block);
    void down(Worker& worker, const Task& task);

    // The order of an expert's tokens in packs and in the results of multiply_a; see kernels.hpp.
    struct Order {
        int few;  // the number of few tokens; 0: groups of 16
        std::size_t k_block() const { return few > 0 ? few * kBlock : kPackSize; }
        // Element (token t, index n), in packs `stride` apart, and in a result of `groups` groups.
        std::size_t in_pack(int n, int t, std::size_t stride) const {
            if (few > 0) return (n / kBlock * few + t) * kBlock + n % kBlock;
            return t / kGroup * stride + n / kBlock * kPackSize + (n % kBlock / 2 * kGroup + t % kGroup) * 2 + n % 2;
        }
        std::size_t in_result(int n, int t, int groups) const {
            if (few > 0) return (n / kBlock * few + t) * kBlock + n % kBlock;
            return (n / kBlock * groups + t / kGroup) * kResultSize + n % kBlock * kGroup + t % kGroup;
        }
    };

    bool is_few(const Routing::Expert& expert) const { return expert.rows <= kernels_.few_rows; }
    Order order_of(const Routing::Expert& expert) const { return {is_few(expert) ? expert.rows : 0}; }
    void multiply(const Routing::Expert& expert, const NtSegment* segments, int count, int strips, int rows,
                  float* c) const;
    std::size_t result_size(const Routing::Expert& expert, int rows) const;
    std::size_t scratch_size() const;
    template <typename Store>
    void multiply_a(Worker& worker, const Routing::KBlock& block, const Pair& a, int columns, const bf16* tokens,
                    std::size_t stride, int kblocks, const Store& store) const;
    void put_packed(const Pair& to, std::size_t from, int n, int t, Order order, float value) const;
    // Strips of a task, multiplied `batch` at a time, and how their weights lie.
    struct Strips {
        int first, end, batch, of_task, all;
        Matrix matrix;
    };
    void put_weights(NtSegment& segment, const std::optional<CodedMatrix>& codes, const PackedExpert& base,
                     Matrix matrix, int n) const;
    const bf16* next_weights(const Task& task, const Strips& strips, int at, bool last_rows) const;
    void prefetch_sums(const float* sum, const RowChunk& chunk, const std::int32_t* token) const;
    void clear_kept(const Pair& to, std::size_t at, int rows, const Routing::KBlock& block) const;

    Layer::State& layer_;
    Saved& kept_;
    const ForwardArguments& call_;
    Watch caller_;

    const LayerConfig& config_ = layer_.config;
    const Sizes& size_ = layer_.size;
    const Kernels& kernels_ = layer_.kernels;
    const Routing& routing_ = kept_.routing;
    const LoraPack& lora_ = *kept_.lora;
    const LoraStrides strides_ = layer_.lora_strides();
    const bool keep_lora_ = call_.save && config_.lora_backward;  // for backward's LoRA gradients
    const int groups_ = routing_.rows / kGroup, kblocks_ = routing_.k_rows / kBlock,
              active_ = static_cast<int>(routing_.experts.size());
    const std::size_t T_ = call_.rows;
    // Elements of a group in a token pack.
    const std::size_t x_stride_ = size_.hb * kPackSize, h_stride_ = size_.ib * kPackSize,
                      r_stride_ = size_.rb * kPackSize;

    // Strips of a task: of gate, with as many of up; and of down.
    const int most_strips_ = kernels_.strips(routing_.mean_rows());
    const int up_strips_ = columns_of_task(std::max(1, most_strips_ / 2), active_, size_.ib, layer_.workers_of_part());
    const int down_strips_ = columns_of_task(most_strips_, active_, size_.hb, layer_.workers_of_part());
    const std::size_t scratch_size_ = scratch_size();

    std::vector<Part> parts_ = std::vector<Part>(config_.parts);
    // Of the output, in the columns of a task.
    ExpertSums sums_{kernels_, config_.parts, active_, call_.rows, size_.H, down_strips_ * kBlock, call_.output};
};

}  // namespace ktv
