// One backward call: its working buffers, and a function for each kind of task.
//
//   1 gather  per (part, 32 rows of an expert):     rows of dO by expert, and dO Bd
//   2 down    per (part, expert, panels of I):      dh with its LoRA; dg, du, h, and partial sums of dw
//   3 rank    per (part, 32 rows of an expert):     dg Bg, du Bu
//   4 input   per (part, expert, panels of H):      dx with its LoRA, added in the order of the experts; and the six
//             LoRA gradients (lora_grads.cpp), as products whose reduction runs over the tokens
//
// A panel is 128 columns. A worker's scratch holds the result of one call of nn (kernels.hpp), which the activation's
// gradient and sums read where they are.
//
// docs/engine.md (The numbers): why the wide products do not contain the routing weight w.
#pragma once

#include <span>
#include <vector>

#include "expert_sums.hpp"
#include "state.hpp"

namespace ktv {

inline constexpr int kPanelCols = kPanelBlocks * kBlock;
inline constexpr int kGradRows = 256;  // most rows of a LoRA gradient that are computed at once
inline constexpr int panels_of(int blocks) {
    return (blocks + kPanelBlocks - 1) / kPanelBlocks;
}

inline NnSegment segment(const bf16* rows, std::size_t ld, const bf16* weights, std::size_t kblock_stride,
                         int kblocks) {
    return {rows, ld, weights, kblock_stride, nullptr, 0, kblocks};
}

// Writes one LoRA tensor's gradient in the parameter's dtype. With `sums` it first adds the gradient to them, in fp32.
class GradWriter {
  public:
    GradWriter(const Kernels& kernels, void* to, float* sums, bool fp32)
        : kernels_(kernels), to_(to), sums_(sums), fp32_(fp32) {}
    // Writes values[0..count) to the elements from `first` on.
    void put(std::size_t first, const float* values, std::size_t count) const;
    void clear(std::size_t first, std::size_t count) const;
    // Writes the sums of these elements without adding anything.
    void repeat(std::size_t first, std::size_t count) const { round(first, sums_ + first, count); }

  private:
    void round(std::size_t first, const float* values, std::size_t count) const;
    const Kernels& kernels_;
    void* to_;
    float* sums_;
    bool fp32_;
};

class Backward {
  public:
    Backward(Layer::State& layer, const Saved& kept, const BackwardArguments& arguments, Watch caller)
        : layer_(layer), kept_(kept), call_(arguments), caller_(caller) {}
    // Takes working buffers, computes, and returns them.
    void run(Process& shared, Team& team, Recording& recording);
    // Of the working buffers: [part].
    std::vector<BlockCache::Size> work_sizes() {
        return layer_.measured_parts([this](int p, Carver& carver) { carve(p, carver); });
    }

  private:
    // The resources of one worker.
    struct Worker {
        int index;
        float* c;           // [scratch_size_]
        float* transposed;  // [kGradRows * kPanelCols], the transpose of a LoRA gradient's piece
        Watch watch;
    };
    struct Part {
        bf16* out;                                // dO by expert: [rows][hidden_ld]
        const bf16** out_rows;                    // [k_rows], a zero row for padding
        Pair ob, ob_t;                            // s dO Bd: [rows][rank]; (w s dO Bd)ᵀ: per expert [rank_rows][tokens]
        bf16 *g, *u, *h;                          // dg, du, h: [rows][inter_ld]
        const bf16 **g_rows, **u_rows, **h_rows;  // [k_rows]
        float* dot;                               // partial sums of dw: [dots][rows]
        Pair xa, xa_t;   // s dg Bg beside s du Bu: [rows][rank2]; transposed: per expert [rank2_rows][tokens]
        float* scratch;  // of its workers, results and a transpose: [worker][scratch_size_ + kGradRows * kPanelCols]
    };
    // The two destinations of a small activation of a k-block: rows [row][ld] from column `first` on, and its transpose,
    // of which the first `rows` rows are stored.
    struct Small {
        const Pair& plain;
        std::size_t ld, first;
        const Pair& transposed;
        std::size_t rows;
        bool weighted;  // the transposed copy contains the routing weight
    };
    // One panel of columns of one of an expert's LoRA gradients.
    struct Slice {
        const Routing::Expert& expert;
        int panel;
        bool goes_on;  // the worker's next task is the next panel
    };
    // One LoRA gradient, or its transpose: a sum over parts of small [small_rows][tokens] x gathered [tokens][cols].
    // The rows from used_rows on are padding.
    struct Product {
        int small_rows, used_rows, blocks, cols;
    };
    struct Term {
        Pair small;
        const bf16* const* gathered;  // row pointers of the expert's tokens
    };
    // `count` rows of a result, which start at row n and column col of the gradient; `stride` as in kernels.hpp.
    struct Piece {
        int n, count;
        std::size_t col, width, stride;
    };

    void carve(int p, Carver& carver);
    Need results_need() const;
    std::size_t scratch_size() const;
    void prepare_sums();
    void prepare_rows_of_x();

    void gather(Worker& worker, int p, const Routing::KBlock& block);
    void down_grad(Worker& worker, const Task& task);
    void rank_grad(Worker& worker, int p, const Routing::KBlock& block);
    void input_grad(Worker& worker, const Task& task);
    // Column blocks of a task, multiplied `batch` at a time.
    struct Panels {
        int first, end, batch, of_task, all;
    };
    Panels panels_of_task(const Task& task, int panels, int blocks) const;
    void multiply_base(Worker& worker, const Task& task, std::span<NnSegment> segments, std::span<const Matrix> base,
                       int rows, int first, int cblocks) const;
    template <typename WeightsOf>
    const bf16* next_weights(const Task& task, const Panels& panels, int at, bool last_rows,
                             const WeightsOf& weights_of) const;
    void weight_grad(int first, int last);
    void put_small(const float* c, int cols, const Routing::KBlock& block, const Small& to) const;
    void multiply_b(Worker& worker, const Routing::KBlock& block, const bf16* from, std::size_t ld, const Pair& b,
                    int kblocks, int columns, Small to) const;

    // lora_grads.cpp
    void lora_grad(Worker& worker, const Task& task);
    template <typename TermOf, typename Emit>
    void multiply(Worker& worker, const Slice& slice, const Product& product, int parts, const TermOf& term_of,
                  const Emit& emit);
    void put_rows(const float* c, const GradWriter& writer, std::size_t to, std::size_t cols, const Piece& piece) const;
    void put_columns(const Worker& worker, const GradWriter& writer, std::size_t to, const Piece& piece) const;
    void fill_idle(int expert) const;

    Layer::State& layer_;
    const Saved& kept_;
    const BackwardArguments& call_;
    Watch caller_;

    const LayerConfig& config_ = layer_.config;
    const Sizes& size_ = layer_.size;
    const Kernels& kernels_ = layer_.kernels;
    const Routing& routing_ = kept_.routing;
    const LoraPack& lora_ = *kept_.lora;
    const bool with_lora_ = config_.lora_backward;
    const int kblocks_ = routing_.k_rows / kBlock, active_ = static_cast<int>(routing_.experts.size());
    const int i_panels_ = panels_of(size_.ib), h_panels_ = panels_of(size_.hb);
    // Partial sums of dw, a row. Without LoRA in the gradients, it needs further ones for the LoRA of the forward.
    const int dots_ = with_lora_ ? i_panels_ : 2 * i_panels_;
    // Panels of a task.
    const int most_panels_ = kernels_.cblocks(routing_.mean_rows()) / kPanelBlocks;
    const int down_panels_ = columns_of_task(most_panels_, active_, i_panels_, layer_.workers_of_part());
    const int input_panels_ = columns_of_task(most_panels_, active_, h_panels_, layer_.workers_of_part());
    const std::size_t scratch_size_ = scratch_size();
    // Tasks of lora_grad, an expert: dA of gate and up, dB of down; for each part dB of gate, dB of up, dA of down.
    const int lora_tasks_ = with_lora_ ? 2 * h_panels_ + 3 * config_.parts * i_panels_ : 0;
    const std::size_t T_ = call_.rows, H_ = size_.H, I_ = size_.I, r_ = size_.r;
    const std::size_t hidden_ = size_.hidden_ld(), inter_ = size_.inter_ld(), rank_ = size_.rank(),
                      rank2_ = size_.rank2();

    std::vector<Part> parts_ = std::vector<Part>(config_.parts);
    bf16* zeros_ = nullptr;
    // [worker][segments_of_worker_]. Workers allocate nothing, because no caller could catch what an allocation throws.
    NnSegment* segments_ = nullptr;
    const std::size_t segments_of_worker_ = whole_lines<NnSegment>(2 * config_.parts);

    std::vector<std::size_t> grad_sizes_ = layer_.grad_sizes();
    std::vector<GradWriter> write_;    // in the order of LoraPointers
    std::vector<const bf16*> x_rows_;  // [k_rows]
    std::vector<int> idle_;            // experts without a token whose gradients are written
    // Of grad_input, in the columns of a task.
    ExpertSums sums_{kernels_,        config_.parts, active_, call_.rows, size_.H, input_panels_ * kPanelCols,
                     call_.grad_input};
};

}  // namespace ktv
