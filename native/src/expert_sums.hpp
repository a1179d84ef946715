// The output of a call as fp32 sums over experts.
#pragma once

#include <atomic>
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
          strips_((columns + width - 1) / width),
          tokens_(tokens),
          out_(out),
          turns_(parts, strips_),
          parts_done_(strips_) {}
    // Takes the strips, and pointers for each of `workers`: workers allocate nothing, because no caller could catch what
    // an allocation throws.
    void carve(Carver& carver, int workers);
    float* strip(int part, int column) const { return sums_ + (part * strips_ + column) * tokens_ * width_; }
    // Waits until the earlier experts have added to the task's strip, and clears it for the first one.
    void begin(const Task& task, Watch& watch);
    // Ends an expert's additions.
    void end(const Task& task, int worker);

  private:
    const Kernels& kernels_;
    const int parts_, experts_, columns_, width_, strips_;
    const std::size_t tokens_;
    bf16* const out_;
    float* sums_ = nullptr;
    const float** pointers_ = nullptr;  // [worker][part]
    Turns turns_;
    std::vector<std::atomic<int>> parts_done_;  // [strip]
};

}  // namespace ktv
