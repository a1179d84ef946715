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

// A [E, rows, cols] bf16 tensor anywhere in memory; strides in elements.
struct WeightSource {
    const bf16* data = nullptr;
    std::ptrdiff_t expert_stride = 0, row_stride = 0, col_stride = 0;
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

class Layer {
  public:
    explicit Layer(const LayerConfig& config);
    ~Layer();
    Layer(const Layer&) = delete;
    Layer& operator=(const Layer&) = delete;

    // gate, up [E, I, H], down [E, H, I], slot-ordered: slot p holds logical expert physical_map[p]. The sources must
    // stay alive until `packed_experts() == num_experts`: an expert is packed when its first token arrives.
    void load_weights(const WeightSource& gate, const WeightSource& up, const WeightSource& down,
                      const std::vector<std::int64_t>& physical_map);
    // Takes a snapshot of all six tensors; the caller may change them afterwards.
    void update_lora(const LoraPointers& lora);

    // Names one saved forward of this layer; never 0, never used twice.
    using Ticket = std::uint64_t;

    // x [T, H] bf16, ids [T, k], weights [T, k] fp32 -> output [T, H] bf16. The ticket of what was saved; 0 without.
    Ticket forward(int rows, const bf16* x, const std::int64_t* ids, const float* weights, bf16* output, bool save);
    // grad_output [T, H] bf16 -> grad_input [T, H] bf16, six LoRA gradients in the parameters' dtype, grad_weights [T,
    // k] fp32; of the saved forward that `ticket` names, 0 for the newest, which is dropped. `accumulate` adds to the
    // LoRA gradients of the calls before it in fp32 and stores the rounded sum.
    void backward(int rows, const bf16* grad_output, bf16* grad_input, const LoraPointers& grads, float* grad_weights,
                  bool accumulate, Ticket ticket = 0);
    // Frees a saved forward that will not see its backward; nothing where there is none of this ticket.
    void drop(Ticket ticket);

    int saved_forwards() const;
    int saved_rows() const;  // of the newest saved forward; -1 without one
    int packed_experts() const;
    int threads() const;  // workers that a call uses
    const LayerConfig& config() const;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

// Frees the working buffers that layers share. Saved forwards keep theirs.
void clear_buffer_cache();

}  // namespace ktv
