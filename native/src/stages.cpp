#include "stages.hpp"

#include <numeric>

namespace ktv {

const char* name_of(Phase phase) {
    static constexpr const char* names[kPhases] = {
        // any stage, or before the first
        "routing", "allocation", "pack_weights",
        // forward
        "pack_input", "gate_up_lora_a", "gate_up", "activation", "down_lora_a", "down", "merge",
        // backward
        "scatter", "down_lora_b", "down_grad", "activation_grad", "gate_up_lora_b", "gate_up_grad", "gate_up_lora_grad",
        "down_lora_grad", "routing_grad", "wait"};
    return names[static_cast<int>(phase)];
}

Recording::Recording(bool on, int workers, int stages) {
    if (!on) return;
    began_ = now_ns();
    workers_.resize(workers);
    for (WorkerTimes& times : workers_) times.spans.reserve(stages);
}

StageTimes Recording::finish(bool backward, int rows, const Costs& costs) const {
    StageTimes out{backward, rows, static_cast<int>(workers_.size()), 0, now_ns() - began_, {}, {}};
    for (int phase = 0; phase < kPhases; ++phase) {
        StageTimes::Row row{static_cast<Phase>(phase), {}, costs.flops[phase], costs.bytes[phase]};
        std::int64_t total = 0;
        for (const WorkerTimes& times : workers_) {
            std::int64_t ns = times.ns[phase];
            if (row.phase == Phase::wait)
                ns += out.wall_ns - std::accumulate(times.ns, times.ns + kPhases, std::int64_t{0});
            row.ns.push_back(ns);
            total += ns;
        }
        if (total > 0) out.phases.push_back(std::move(row));
    }
    for (const WorkerTimes& times : workers_) {
        auto& spans = out.spans.emplace_back(times.spans);
        for (StageTimes::Span& span : spans) {
            span.begin -= began_;
            span.work_end -= began_;
            span.end -= began_;
        }
        out.stages = std::max(out.stages, static_cast<int>(spans.size()));
    }
    return out;
}

}  // namespace ktv
