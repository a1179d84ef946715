// Where one call of a layer spent its time, by phase and by worker.
#pragma once

#include <cstdint>
#include <vector>

namespace ktv {

// What a worker does at a given moment of a call. The phases of one stage follow each other within a task.
enum class Phase {
    routing,            // which rows go to which expert (one worker)
    allocation,         // working buffers and other preparation, once a call (one worker); backward: also clearing the
                        // gradients of experts without a token
    pack_weights,       // packing experts that get their first token
    pack_input,         // forward 1: rows of x, packed; copied for backward
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
    wait,               // waiting for other workers: at barriers, in Turns, before the first task
};
inline constexpr int kPhases = static_cast<int>(Phase::wait) + 1;
const char* name_of(Phase phase);

// Floating-point operations by phase, and a lower bound of the bytes read from memory; without padding.
struct Costs {
    double flops[kPhases] = {}, bytes[kPhases] = {};
    void set(Phase phase, double flop_count, double byte_count) {
        flops[static_cast<int>(phase)] = flop_count;
        bytes[static_cast<int>(phase)] = byte_count;
    }
};

// Times of one call, in ns. For every worker the phases add up to wall_ns.
struct StageTimes {
    struct Row {
        Phase phase;
        std::vector<std::int64_t> ns;  // by worker
        double flops, bytes;
    };
    // One worker in one stage, ns since the call began. From `work_end` to `end` it waited at the barrier.
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

}  // namespace ktv
