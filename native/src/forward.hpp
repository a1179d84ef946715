// One forward call: its working buffers, and a function for each kind of task.
//
//   1 pack    per (part, group of 16 rows):      token pack of x, and x Aᵀ of gate and up while the pack is in cache
//   2 up      per (part, expert, 32 rows of I):  g, u with their LoRA in one product each; h = silu(g) u, packed
//   3 rank    per (part, group):                 h Adᵀ
//   4 down    per (part, expert, 32 rows of H):  y with its LoRA, added to the output in the order of the experts
//
// A worker's tasks of one expert follow each other, so that its packed tokens stay in cache while its weights stream by
// once; see TaskQueue.
#pragma once

#include <atomic>
#include <vector>

#include "state.hpp"

namespace ktv {

// What the caller gave, and where the result goes.
struct ForwardArguments {
    int rows;
    const bf16* x;
    const std::int64_t* ids;
    const float* weights;
    bf16* output;
    bool save;
    int given_up;
};

class Forward {
  public:
    // `kept` has its routing and its LoRA already; with save it gets the rest.
    Forward(Layer::State& layer, Saved& kept, const ForwardArguments& arguments, Watch caller);
    // Takes the working buffers, packs experts that are reached for the first time, computes, and gives them back.
    void run(Process& shared, Team& team, Recording& recording);

  private:
    static constexpr std::size_t kScratch = 2 * std::size_t{kBlock} * kChunkRows;  // fp32: two nt results

    // What a worker has at hand.
    struct Hand {
        int worker;
        float* c;  // [kScratch]
        Watch watch;
    };
    struct Part {
        bf16* x_pack;         // [group][hb]
        Pair gate_xa, up_xa;  // s x Aᵀ: [group][rb]
        bf16* h_pack;         // [group][ib]
        Pair ha;              // s h Adᵀ: [group][rb]
        float* sum;           // [hb][T][32]
    };

    void carve_work(Carver& carver);
    void carve_kept(Carver& carver);
    void pack_new_experts(Process& shared, Team& team);

    void keep_rows(Hand& hand, int first_group);
    void pack(Hand& hand, int p, int group);
    void up(Hand& hand, const Task& task);
    void rank(Hand& hand, int p, int group);
    void down(Hand& hand, const Task& task);
    void finish(int worker, int hb);

    // How an expert's tokens stand in packs and in the results of multiply_a; see kernels.hpp.
    struct Order {
        int few;  // how many there are; 0: groups of 16
        std::size_t k_block() const { return few > 0 ? z(few) * kBlock : kPackSize; }
        // Element (token t, index n), in one group's pack and in multiply_a's c.
        std::size_t in_pack(int n, int t) const {
            const std::size_t at =
                few > 0 ? z(t) * kBlock + z(n % kBlock) : z(n % kBlock / 2 * kGroup + t) * 2 + z(n & 1);
            return z(n / kBlock) * k_block() + at;
        }
        std::size_t in_result(int n, int t) const { return few > 0 ? z(t * kBlock + n) : z(n * kGroup + t); }
    };

    bool is_few(const Routing::Expert& expert) const { return expert.rows <= kernels_.few_rows; }
    Order order_of(const Routing::Expert& expert) const { return {is_few(expert) ? expert.rows : 0}; }
    void multiply(const Routing::Expert& expert, const NtSegment* segments, int used, int rows, float* c,
                  std::size_t ldc) const;
    void multiply_a(const Routing::Expert& expert, int rows, const Pair& a, std::size_t at, const bf16* tokens,
                    std::size_t stride, int kblocks, float* c) const;
    void put_packed(const Pair& to, std::size_t from, int n, int t, Order order, float value) const;
    const bf16* next_weights(const Task& task, bf16* PackedExpert::* matrix, std::size_t stride) const;
    void clear_kept(const Pair& to, std::size_t at, int rows, const Routing::Columns& columns) const;

    Layer::State& layer_;
    const LayerConfig& config_;
    const Sizes& size_;
    const Kernels& kernels_;
    Saved& kept_;
    const Routing& routing_;
    const LoraPack& lora_;
    const LoraStrides strides_;
    const ForwardArguments& given_;
    Watch caller_;

    const bool keep_lora_;  // for backward's LoRA gradients
    const int groups_, active_;
    const std::size_t T_, x_stride_, h_stride_, r_stride_;  // strides: elements of a group in a token pack

    std::vector<Part> parts_;
    float* scratch_ = nullptr;
    // [worker][part]: workers allocate nothing, for nobody could catch what that throws
    const float** part_sums_ = nullptr;
    Turns turns_;
    std::vector<std::atomic<int>> parts_done_;  // [hb]
};

}  // namespace ktv
