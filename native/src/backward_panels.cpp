// The wide products of a backward: panels of dh and of dx for all rows of an expert.
#include "backward.hpp"

namespace ktv {
namespace {

// nn segments of (activation) · W for a small activation of `depth` columns stored as hi + lo; W is bf16, or fp32 as hi
// + lo.
int nn_lora_segments(const Pair& activation, std::size_t ld, const Pair& w, std::size_t stride, int depth,
                     NnSegment* out) {
    const int kblocks = (depth + kBlock - 1) / kBlock, idle = (kblocks * kBlock - depth) / 2;
    out[0] = {activation.hi, ld, w.hi, stride, nullptr, 0, kblocks, idle};
    out[1] = {activation.lo, ld, w.hi, stride, nullptr, 0, kblocks, idle};
    if (!w.lo) return 2;
    out[2] = {activation.hi, ld, w.lo, stride, nullptr, 0, kblocks, idle};
    return 3;
}

}  // namespace

// Elements of the largest result of a call.
std::size_t Backward::scratch_size() const {
    std::size_t most = kPanelBlocks * nn_stride(kGradRows);
    for (const Routing::Expert& e : routing_.experts) {
        const RowChunk chunk(e, 0, kernels_.most_rows);
        most = std::max(most, kernels_.cblocks(e.rows) * nn_stride(chunk.groups * kGroup));
    }
    return most;
}

// nn for `cblocks` column blocks from `first` on into worker.c. The first segments have the base matrices `base`.
void Backward::multiply_base(Worker& worker, const Task& task, std::span<NnSegment> segments,
                             std::span<const Matrix> base, int rows, int first, int cblocks) const {
    const PackedExpert& expert = layer_.experts[task.part][routing_.experts[task.row].expert];
    std::optional<CodedMatrix> codes[2];
    for (std::size_t i = 0; i < base.size(); ++i) {
        codes[i] = layer_.codes_of(expert, task.part, base[i]);
        if (!codes[i]) continue;
        segments[i].codes = &*codes[i];
        segments[i].column_block = first;
    }
    kernels_.nn(segments.data(), static_cast<int>(segments.size()), rows, cblocks, worker.c);
}

// The column blocks of a task of `panels` panels; the matrix has `blocks`.
Backward::Panels Backward::panels_of_task(const Task& task, int panels, int blocks) const {
    const int width = panels * kPanelBlocks, first = task.column * width;
    const int batch = kernels_.cblocks(routing_.experts[task.row].rows);
    return {first, std::min(first + width, blocks), std::min(batch, width), width, blocks};
}

// Where a worker goes on after the column blocks from `at` on: in its task, in it from the beginning with the next
// rows, or in its next task. Null where that is not known or has fewer column blocks. weights_of(expert): its first
// column block.
template <typename WeightsOf>
const bf16* Backward::next_weights(const Task& task, const Panels& panels, int at, bool last_rows,
                                   const WeightsOf& weights_of) const {
    if (layer_.format.quantised()) return nullptr;
    const int cblocks = std::min(panels.batch, panels.end - at);
    int next = at + panels.batch, row = task.row;
    if (next >= panels.end) {
        next = last_rows ? task.next_column * panels.of_task : panels.first;
        if (last_rows) row = task.next_row;
    }
    if (row < 0 || next + cblocks > panels.all) return nullptr;
    return weights_of(routing_.experts[row]) + next * kBlockSize;
}

void Backward::down_grad(Worker& worker, const Task& task) {
    const int p = task.part;
    Part& part = parts_[p];
    const Saved::Part& was = kept_.parts[p];
    const Routing::Expert& expert = routing_.experts[task.row];
    const Panels panels = panels_of_task(task, down_panels_, size_.ib);
    const std::size_t stride = layer_.panel(size_.ib);
    const auto base_of = [&](const Routing::Expert& e) { return layer_.experts[p][e.expert].down; };
    for (RowChunk chunk(expert, 0, kernels_.most_rows); chunk.rows > 0;
         chunk = RowChunk(expert, chunk.first + chunk.rows, kernels_.most_rows)) {
        for (int first = panels.first; first < panels.end; first += panels.batch) {
            const int count = chunk.rows, cblocks = std::min(panels.batch, panels.end - first);
            const std::size_t row = expert.first_row + chunk.first, at_block = first * kBlockSize;
            const Pair a = at(lora_.down_a[p], expert.expert * layer_.lora_strides().down_a + at_block);
            NnSegment segments[4];
            const bf16* base = layer_.format.quantised() ? nullptr : base_of(expert) + at_block;
            segments[0] = segment(part.out + row * hidden_, hidden_, base, stride, size_.hb);
            segments[0].next = next_weights(task, panels, first, chunk.last, base_of);
            const int more = nn_lora_segments(at(part.ob, row * rank_), rank_, a, stride, size_.r, segments + 1);
            constexpr Matrix down[] = {Matrix::down};
            const auto product = [&](std::span<NnSegment> of, std::span<const Matrix> bases, int slot) {
                multiply_base(worker, task, of, bases, count, first, cblocks);
                worker.watch.lap(Phase::down_grad);
                // A panel at a time, because a partial sum of dw is that of a panel.
                for (int cb = 0; cb < cblocks; cb += kPanelBlocks) {
                    const int panel = (first + cb) / kPanelBlocks;
                    const std::size_t to = row * inter_ + panel * kPanelCols;
                    kernels_.silu_mul_grad(worker.c + cb * nn_stride(count), nn_stride(count), count,
                                           std::min(kPanelBlocks, cblocks - cb), routing_.weight.data() + row,
                                           was.g + to, was.u + to, inter_, part.g + to, part.u + to, part.h + to,
                                           part.dot + wide(slot + panel) * routing_.rows + row);
                }
                worker.watch.lap(Phase::activation_grad);
            };
            if (with_lora_) {
                product({segments, 1u + more}, down, 0);
            } else {
                // dw is <dO, y> of the forward, with its LoRA; the other gradients contain the base alone.
                product({segments + 1, 0u + more}, {}, i_panels_);
                product({segments, 1}, down, 0);
            }
        }
    }
}

void Backward::input_grad(Worker& worker, const Task& task) {
    const int p = task.part;
    Part& part = parts_[p];
    const Routing::Expert& expert = routing_.experts[task.row];
    const PackedExpert& base = layer_.experts[p][expert.expert];
    const Panels panels = panels_of_task(task, input_panels_, size_.hb);
    const std::size_t stride = layer_.panel(size_.hb), width = input_panels_ * kPanelCols;
    const auto gate_of = [&](const Routing::Expert& e) { return layer_.experts[p][e.expert].gate; };
    bool begun = false;
    for (RowChunk chunk(expert, 0, kernels_.most_rows); chunk.rows > 0;
         chunk = RowChunk(expert, chunk.first + chunk.rows, kernels_.most_rows)) {
        for (int first = panels.first; first < panels.end; first += panels.batch) {
            const int count = chunk.rows, cblocks = std::min(panels.batch, panels.end - first);
            const std::size_t row = expert.first_row + chunk.first, at_block = first * kBlockSize;
            const Pair a = at(lora_.gate_up_a, expert.expert * layer_.lora_strides().gate_up_a + at_block);
            NnSegment segments[5];
            const auto wide_segment = [&](const bf16* rows, const bf16* weights) {
                return segment(rows + row * inter_, inter_, weights ? weights + at_block : nullptr,
                               layer_.gate_up_stride(), size_.ib);
            };
            segments[0] = wide_segment(part.g, base.gate);
            segments[1] = wide_segment(part.u, base.up);
            segments[0].next = next_weights(task, panels, first, chunk.last, gate_of);
            std::size_t used = 2;
            if (with_lora_)
                used += nn_lora_segments(at(part.xa, row * rank2_), rank2_, a, stride, 2 * size_.r, segments + 2);
            constexpr Matrix gate_and_up[] = {Matrix::gate, Matrix::up};
            multiply_base(worker, task, {segments, used}, gate_and_up, count, first, cblocks);
            worker.watch.lap(Phase::gate_up_grad);
            if (!begun) sums_.begin(task, worker.watch);
            begun = true;
            float* sum = sums_.strip(p, task.column) + (first - panels.first) * kBlock;
            kernels_.add_rows(worker.c, nn_stride(count), count, cblocks, routing_.token.data() + row, nullptr, sum,
                              width);
            worker.watch.lap(Phase::merge);
        }
    }
    sums_.end(task, worker.index);
    worker.watch.lap(Phase::merge);
}

}  // namespace ktv
