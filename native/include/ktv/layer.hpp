// The engine's public face: one Mixture-of-Experts layer with LoRA on gate_proj, up_proj and down_proj.
//
// All tensors are plain pointers with the shapes written beside them; bf16 is stored as uint16_t. Nothing here knows
// of Python, of torch or of an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ktv/bf16.hpp"

namespace ktv {

// Input that the layer refuses. Raised before anything is computed or changed; the layer stays usable.
struct BadInput : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};
// A call that comes at the wrong time, or a choice that this CPU cannot run.
struct BadState : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// Says how much memory was needed and how much there is.
struct OutOfMemory : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Isa { scalar, avx2, avx512_bf16, amx_bf16 };
const char* name_of(Isa isa);
// Best first. An ISA is listed when its kernels are compiled in, the CPU has it and the OS permits it.
std::vector<Isa> available_isas();
// Throws BadState when this CPU cannot run it and BadInput when there is no such ISA; never picks another one.
Isa require_isa(const std::string& name);

struct LayerConfig {
    int num_experts = 0;        // E
    int top_k = 0;              // k
    int hidden = 0;             // H
    int intermediate = 0;       // I
    int rank = 0;               // r
    float scaling = 1.0f;       // lora_alpha / rank
    int parts = 1;              // tensor-parallel degree: I is split evenly
    int threads = 1;            // a ceiling
    int max_rows = 0;           // chunked_prefill_size: largest T
    int max_cache_depth = 1;    // outstanding forwards with save
    bool lora_fp32 = false;     // dtype of the LoRA parameters and of their gradients; otherwise bf16
    bool lora_backward = true;  // false: *_SkipLoRA, base gradients only
    Isa isa = Isa::scalar;
};

// E matrices [rows, cols] of bf16, by slot, anywhere in memory; strides in elements.
struct WeightSource {
    std::vector<const bf16*> experts;
    std::ptrdiff_t row_stride = 0, col_stride = 0;
    // Nobody misses what lies there once it is packed: its pages are given back. So it is with a private mapping of a
    // file that nobody writes, and with memory that nobody else can read.
    bool disposable = false;
};

// The six LoRA tensors, contiguous, in the order of the contract: gate_a [E,r,H], gate_b [E,I,r], up_a, up_b,
// down_a [E,r,I], down_b [E,H,r]; bf16 or fp32 as LayerConfig::lora_fp32 says.
struct LoraPointers {
    void* gate_a = nullptr;
    void* gate_b = nullptr;
    void* up_a = nullptr;
    void* up_b = nullptr;
    void* down_a = nullptr;
    void* down_b = nullptr;
};

// What a worker does at a given moment of a call. Phases of one stage follow each other within a task.
enum class Phase {
    routing,            // which rows go to which expert (one worker)
    allocation,         // working buffers, and whatever is prepared once a call (one worker); backward: clearing the
                        // gradients of idle experts
    pack_weights,       // experts that are reached for the first time
    pack_input,         // forward 1: rows of x, packed; kept for backward
    gate_up_lora_a,     //            x Aᵀ of gate and up
    gate_up,            // forward 2: x Wᵀ + (x Aᵀ) Bᵀ of gate and up
    activation,         //            silu(g) u, packed
    down_lora_a,        // forward 3: h Aᵀ
    down,               // forward 4: h Wᵀ + (h Aᵀ) Bᵀ
    merge,              //            weighted sum over experts and parts, rounded; backward: that of grad_input
    scatter,            // backward 1: rows of grad_output by expert
    down_lora_b,        //             dO B
    down_grad,          // backward 2: dO W + (dO B) A
    activation_grad,    //             dg, du, h, parts of dw
    gate_up_lora_b,     // backward 3: dg B, du B
    gate_up_grad,       // backward 4: dg W + (dg B) A + du W + (du B) A
    gate_up_lora_grad,  //           dA, dB of gate and up
    down_lora_grad,     //           dA, dB of down
    routing_grad,       //           dw
    wait,               // for the others: at barriers, for a turn, before the first task
};
inline constexpr int kPhases = static_cast<int>(Phase::wait) + 1;
const char* name_of(Phase phase);

// Floating-point operations, and bytes that at least come from memory, by phase; without padding.
struct Costs {
    double flops[kPhases] = {}, bytes[kPhases] = {};
    void set(Phase phase, double flop_count, double byte_count) {
        flops[static_cast<int>(phase)] = flop_count;
        bytes[static_cast<int>(phase)] = byte_count;
    }
};

// Where one call spent its time. For every worker the phases add up to wall_ns.
struct StageTimes {
    struct Row {
        Phase phase;
        std::vector<std::int64_t> ns;  // by worker
        double flops, bytes;
    };
    // One worker in one parallel stage, ns since the call began: `work_end` to `end` it waited at the barrier.
    struct Span {
        int stage;
        std::int64_t begin, work_end, end;
    };
    bool backward = false;
    int rows = 0, workers = 0, stages = 0;
    std::int64_t wall_ns = 0;
    std::vector<Row> phases;               // those that took time, in the order of Phase
    std::vector<std::vector<Span>> spans;  // [worker]
};

class Layer {
  public:
    struct State;  // src/state.hpp

    explicit Layer(const LayerConfig& config);
    ~Layer();
    Layer(const Layer&) = delete;
    Layer& operator=(const Layer&) = delete;

    // gate, up [E, I, H], down [E, H, I], slot-ordered: slot p holds logical expert physical_map[p]. The sources must
    // stay alive until `packed_experts() == num_experts`: an expert is packed when its first token arrives. Returns
    // what names these sources, never 0.
    int load_weights(const WeightSource& gate, const WeightSource& up, const WeightSource& down,
                     const std::vector<std::int64_t>& physical_map);
    // Takes a snapshot of all six tensors; the caller may change them afterwards.
    void update_lora(const LoraPointers& lora);

    // Names one saved forward of this layer; never 0, never used twice.
    using Ticket = std::uint64_t;

    // x [T, H] bf16, ids [T, k], weights [T, k] fp32 -> output [T, H] bf16. The ticket of what was saved; 0 without.
    // given_up: the sources of that name are disposable, and their pages in memory, from now on; 0 for none.
    Ticket forward(int rows, const bf16* x, const std::int64_t* ids, const float* weights, bf16* output, bool save,
                   int given_up = 0);
    // grad_output [T, H] bf16 -> grad_input [T, H] bf16, six LoRA gradients in the parameters' dtype, grad_weights [T,
    // k] fp32; of the saved forward that `ticket` names, 0 for the newest, which is dropped. grads_zero: the memory of
    // the LoRA gradients is zero, and of experts without a token is not written, so that fresh pages of theirs cost
    // nothing. `accumulate` adds to the LoRA gradients of the calls before it in fp32 and stores the rounded sum.
    void backward(int rows, const bf16* grad_output, bf16* grad_input, const LoraPointers& grads, bool grads_zero,
                  float* grad_weights, bool accumulate, Ticket ticket = 0);
    // Frees a saved forward that will not see its backward; nothing where there is none of this ticket.
    void drop(Ticket ticket);

    // Off by default; costs a clock read a task when on. `stage_times` are those of the last call that was recorded.
    // BadState in a build with KTV_STAGES=OFF.
    void record_stages(bool on);
    StageTimes stage_times() const;

    int saved_forwards() const;
    int saved_rows() const;  // of the newest saved forward; -1 without one
    int packed_experts() const;
    int threads() const;  // workers that a call uses
    const LayerConfig& config() const;

  private:
    std::unique_ptr<State> state_;
};

// Frees the working buffers that layers share, and dropped gradients' memory. Saved forwards keep theirs.
void clear_buffer_cache();

}  // namespace ktv
