#include "expert_sums.hpp"

#include <algorithm>
#include <cstring>

namespace ktv {

void ExpertSums::carve(Carver& carver, int workers) {
    carver.take(sums_, parts_ * strips_ * tokens_ * width_);
    carver.take(pointers_, workers * parts_);
}

void ExpertSums::begin(const Task& task, Watch& watch) {
    turns_.wait(task);
    watch.lap(Phase::wait);
    if (task.row == 0) std::memset(strip(task.part, task.column), 0, tokens_ * width_ * sizeof(float));
}

void ExpertSums::end(const Task& task, int worker) {
    turns_.pass(task);
    if (task.row < experts_ - 1) return;
    if (parts_done_[task.column].fetch_add(1, std::memory_order_acq_rel) < parts_ - 1) return;
    const float** sums = pointers_ + worker * parts_;
    const int first = task.column * width_, count = std::min(width_, columns_ - first);
    for (std::size_t t = 0; t < tokens_; ++t) {
        for (int part = 0; part < parts_; ++part) sums[part] = strip(part, task.column) + t * width_;
        kernels_.round_sum(sums, parts_, count, out_ + t * columns_ + first);
    }
}

}  // namespace ktv
