// The engine's public face: one Mixture-of-Experts layer with LoRA on gate_proj, up_proj and down_proj.
//
// All tensors are plain pointers; their shapes are in the comments. bf16 is stored as uint16_t. Nothing here depends on
// Python, torch or an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ktv/bf16.hpp"
#include "ktv/errors.hpp"
#include "ktv/isa.hpp"
#include "ktv/stage_times.hpp"
#include "ktv/weight_format.hpp"

namespace ktv {

// A layer has at most as many threads as its thread may use processors. A CPU quota of a control group is not read here:
// callers give no more threads than that (ktverify/system/limits.py does).
struct LayerConfig {
    int num_experts = 0;               // E
    int top_k = 0;                     // k
    int hidden = 0;                    // H
    int intermediate = 0;              // I
    int rank = 0;                      // r
    float scaling = 1.0f;              // lora_alpha / rank
    int parts = 1;                     // tensor parallel degree: I is split evenly
    int threads = 1;                   // upper limit
    int max_rows = 0;                  // chunked_prefill_size: largest T
    int max_cache_depth = 1;           // most saved forwards at a time
    bool lora_backward = true;         // false: *_SkipLoRA, base gradients only
    std::string isa = "scalar";        // one of available_isas()
    std::vector<int> numa_nodes = {};  // the NUMA node of each part; empty: see homes_of_parts in src/numa.hpp
};

// E matrices [rows, cols], by slot, anywhere in memory: bf16 with strides in elements, or codes, which are contiguous.
struct WeightSource {
    std::vector<const void*> experts;
    std::ptrdiff_t row_stride = 0, col_stride = 0;
    // Pages may be released after packing, because no other owner reads them. True of a private file mapping that
    // nothing writes, and of memory that only this layer can reach.
    bool disposable = false;
    // Of codes, by slot, contiguous: scales, one for each group_rows() rows and group columns, finite and not negative;
    // zero points, int8, where the format has them.
    std::vector<const void*> scales = {}, zeros = {};
};

// The six LoRA tensors, contiguous, in the contract's order: gate_a [E,r,H], gate_b [E,I,r], up_a, up_b,
// down_a [E,r,I], down_b [E,H,r]; all fp32 or all bf16.
struct LoraPointers {
    void* gate_a = nullptr;
    void* gate_b = nullptr;
    void* up_a = nullptr;
    void* up_b = nullptr;
    void* down_a = nullptr;
    void* down_b = nullptr;
    bool fp32 = false;
};

struct MemorySpan {
    const void* data;
    std::size_t bytes;
};

// Names one saved forward of a layer; never 0, never used twice.
using Ticket = std::uint64_t;

struct ForwardArguments {
    int rows;                 // T
    const bf16* x;            // [T, H]
    const std::int64_t* ids;  // [T, k]
    const float* weights;     // [T, k]
    bf16* output;             // [T, H]
    bool save = false;
    int room =
        0;  // with save: 0 refuses one saved forward too many; else it is saved only while fewer than `room` wait
    int given_up = 0;  // the name of sources (load_weights) that are disposable from now on; 0 for none
};

struct BackwardArguments {
    int rows;                 // T
    const bf16* grad_output;  // [T, H]
    bf16* grad_input;         // [T, H]
    LoraPointers grads;       // in the dtype of the LoRA that the forward used
    // The memory of `grads` is zero already: the gradients of experts without a token are not written, and their fresh
    // pages cost nothing.
    bool grads_zero;
    float* grad_weights;  // [T, k]
    bool accumulate;      // adds to the LoRA gradients of earlier calls in fp32 and stores the rounded sum
    // Of the saved forward. 0: the calling thread's newest; a thread without one takes the newest of all if it may.
    Ticket ticket = 0;
    bool of_any_thread = true;
};

// Where a tensor-parallel part of a layer is.
struct PartPlacement {
    std::vector<int> nodes;                 // those that it should be on; empty: any
    std::vector<std::vector<int>> workers;  // for each of its workers the processors that the kernel lets it run on
    // Touched pages on each node, as the kernel says, of the part's packed weights, LoRA, saved forwards and, for all layers
    // with the same nodes, unused working buffers. What parts share belongs to part 0.
    std::map<int, std::size_t> weights, lora, saved, buffers;
    int error = 0;  // the error number where the kernel does not tell where pages are; then there are none
};

class Layer {
  public:
    struct State;  // src/state.hpp

    // BadInput and BadState as require_isa(config.isa), BadInput for sizes that fit no layer and as homes_of_parts.
    explicit Layer(const LayerConfig& config);
    ~Layer();
    Layer(const Layer&) = delete;
    Layer& operator=(const Layer&) = delete;

    // gate, up [E, I, H], down [E, H, I], in slot order: slot p contains logical expert physical_map[p]. The sources
    // must stay alive as long as `owner` does: it is kept until every expert is packed, because an expert is packed when
    // its first token arrives, and dropped without a lock. Returns the number that names these sources, never 0.
    // BadInput where a part would begin inside a group of int4 or mxfp4.
    int load_weights(const WeightSource& gate, const WeightSource& up, const WeightSource& down,
                     const std::vector<std::int64_t>& physical_map, std::shared_ptr<const void> owner = nullptr,
                     const WeightFormat& format = {});
    // The sources of this name are now at other addresses. Does nothing when they are not the present ones.
    void move_weights(int name, const WeightSource& gate, const WeightSource& up, const WeightSource& down);
    // Writes an expert's base weights, as the products use them, to gate, up [I, H] and down [H, I], contiguous. Returns false, and
    // writes nothing, where it is not packed yet: then the sources still have it.
    bool unpack(int expert, bf16* gate, bf16* up, bf16* down) const;
    // Takes a snapshot of all six tensors; the caller may change them afterwards. BadState for another dtype than before
    // while a forward waits.
    void update_lora(const LoraPointers& lora);

    // Computes `output`. Returns the ticket of the saved forward; 0 if it was not saved. Another thread may write the
    // input meanwhile: then this call's results are undefined, and nothing else.
    Ticket forward(const ForwardArguments& arguments);
    // Computes grad_input, `grads` and grad_weights. Uses and drops the saved forward.
    void backward(const BackwardArguments& arguments);
    // Frees a saved forward without its backward. Does nothing when no saved forward has this ticket.
    void drop(Ticket ticket);

    // 16 numbers for each 256 KiB of each span, which tell its content from any other of the same length: see
    // Kernels::fingerprint. Computed by all workers, about as fast as the memory is read.
    std::vector<std::uint64_t> fingerprint(const std::vector<MemorySpan>& memory) const;

    // Off by default; when on, it costs one clock read a task. `stage_times` returns those of the last recorded call.
    // BadState in a build with KTV_STAGES=OFF.
    void record_stages(bool on);
    StageTimes stage_times() const;

    // Of each part. Asks the kernel, for every page; starts the workers.
    std::vector<PartPlacement> placement() const;

    // These four do not wait for a computation.
    int saved_forwards() const;
    bool lora_fp32() const;  // of the last update; constant while a forward waits
    int packed_experts() const;
    int threads() const;  // workers that a call uses
    const LayerConfig& config() const;

  private:
    std::unique_ptr<State> state_;
};

// What a layer takes, in bytes, all its parts together.
struct MemoryUse {
    std::size_t expert = 0;   // base weights of one expert, packed
    std::size_t lora = 0;     // the snapshot of the LoRA of all experts
    std::size_t saved = 0;    // what a forward saves for its backward
    std::size_t working = 0;  // buffers of a forward or of its backward, whichever takes more; layers share them
};
// The sizes that a layer of this configuration would ask for; nothing of it is allocated. ids: [T, k] of one call.
// BadInput for sizes that fit no layer, and for ids as in Layer::forward.
MemoryUse memory_use(const LayerConfig& config, const WeightFormat& format, bool lora_fp32,
                     const std::vector<std::int64_t>& ids);

// Frees the working buffers that layers share, and the memory of gradients that were dropped. Saved forwards keep theirs.
void clear_buffer_cache();

}  // namespace ktv
