// The output of a call as fp32 sums over experts.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels/kernels.hpp"
#include "memory.hpp"
#include "stages.hpp"
#include "team.hpp"

namespace ktv {

// Each part sums into its own strips [strip][T][width], in the order of the experts. The last part to finish a strip adds
// the parts in order and rounds. So the bits depend neither on the threads nor on which worker is last. A strip is the
// column of a task, an expert its row.
class ExpertSums {
  public:
    // out [T][columns] bf16.
    ExpertSums(const Kernels& kernels, int parts, int experts, int tokens, int columns, int width, bf16* out)
        : kernels_(kernels),
          parts_(parts),
          experts_(experts),
          columns_(columns),
          width_(width),
          tokens_(tokens),
          out_(out) {}
    // Takes the strips of a part, and with those of part 0 pointers for each of `workers`: workers allocate nothing, because
    // no caller could catch what an allocation throws.
    void carve(int part, Carver& carver, int workers) {
        carver.take(sums_[part], strips_ * tokens_ * width_);
        if (part == 0) carver.take(pointers_, workers * pointers_of_worker_);
    }
    float* strip(int part, int column) const { return sums_[part] + column * tokens_ * width_; }
    // Waits until the earlier experts have added to the task's strip, and clears it for the first one.
    void begin(const Task& task, Watch& watch) {
        turns_.wait(task);
        watch.lap(Phase::wait);
        if (task.row == 0) std::memset(strip(task.part, task.column), 0, tokens_ * width_ * sizeof(float));
    }
    // Ends an expert's additions.
    void end(const Task& task, int worker) {
        turns_.pass(task);
        if (task.row < experts_ - 1) return;
        if (parts_done_[task.column].value.fetch_add(1, std::memory_order_acq_rel) < parts_ - 1) return;
        const float** sums = pointers_ + worker * pointers_of_worker_;
        const int first = task.column * width_, count = std::min(width_, columns_ - first);
        for (std::size_t t = 0; t < tokens_; ++t) {
            for (int part = 0; part < parts_; ++part) sums[part] = strip(part, task.column) + t * width_;
            kernels_.round_sum(sums, parts_, count, out_ + t * columns_ + first);
        }
    }

  private:
    const Kernels& kernels_;
    const int parts_, experts_, columns_, width_, strips_ = (columns_ + width_ - 1) / width_;
    const std::size_t tokens_;
    bf16* const out_;
    std::vector<float*> sums_ = std::vector<float*>(parts_);
    const float** pointers_ = nullptr;  // [worker][pointers_of_worker_], of the parts
    const std::size_t pointers_of_worker_ = whole_lines<const float*>(parts_);
    Turns turns_{parts_, strips_};
    std::vector<Counter> parts_done_ = std::vector<Counter>(strips_);
};

}  // namespace ktv
