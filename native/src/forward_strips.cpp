// The wide products of a forward: strips of gate and up, and of down, by all rows of an expert.
#include "forward.hpp"

namespace ktv {
namespace {

// A small activation as operands: token packs [group][rb], group_stride elements a group.
struct LoraFactor {
    Pair b;           // one row of weight blocks
    Pair activation;  // from the first group on
    std::size_t group_stride;
    int kblocks;
    bool side_by_side;  // activation.hi contains lo as well
};

// nt segments of B (s A x)ᵀ: hi and lo of the small activation, and lo of an fp32 B. Returns their number.
int nt_lora_segments(const LoraFactor& lora, NtSegment* out) {
    int used = 0;
    out[used++] = {lora.b.hi, lora.activation.hi, lora.group_stride, lora.kblocks};
    if (!lora.side_by_side) out[used++] = {lora.b.hi, lora.activation.lo, lora.group_stride, lora.kblocks};
    if (lora.b.lo) out[used++] = {lora.b.lo, lora.activation.hi, lora.group_stride, lora.kblocks};
    return used;
}

}  // namespace

// nt for `rows` tokens of an expert; c: an nt result, or a few result where they are few.
void Forward::multiply(const Routing::Expert& expert, const NtSegment* segments, int count, int strips, int rows,
                       float* c) const {
    (is_few(expert) ? kernels_.nt_few : kernels_.nt)(segments, count, strips, rows, c);
}

// Elements of the result of one strip.
std::size_t Forward::result_size(const Routing::Expert& expert, int rows) const {
    return is_few(expert) ? wide(rows) * kBlock : groups_of(rows) * kResultSize;
}

// Elements of the largest result of a call.
std::size_t Forward::scratch_size() const {
    std::size_t most = 2 * 2 * kResultSize;  // multiply_a: strips, groups
    for (const Routing::Expert& e : routing_.experts) {
        const int rows = RowChunk(e, 0, kernels_.most_rows).groups * kGroup;
        most = std::max(most, std::max(2, kernels_.strips(e.rows)) * (rows * wide(kBlock)));
    }
    return most;
}

// Strip n of a base matrix as the weights of a segment; codes: the matrix, where it is quantised.
void Forward::put_weights(NtSegment& segment, const std::optional<CodedMatrix>& codes, const PackedExpert& base,
                          Matrix matrix, int n) const {
    segment.strip = n;
    if (codes) segment.codes = &*codes;
    else segment.weights = layer_.strip(base, matrix, n);
}

// Where a worker goes on after strip `at`: in its task, in the task's first strips with the next rows, or in its next
// task. Null where that is not known, or where the weights are quantised.
const bf16* Forward::next_weights(const Task& task, const Strips& strips, int at, bool last_rows) const {
    if (layer_.format.quantised()) return nullptr;
    const int place = (at - strips.first) % strips.batch;
    int strip = at + strips.batch, row = task.row;
    if (strip >= strips.end) {
        strip = strips.first + place;
        if (last_rows) {
            row = task.next_row;
            strip = task.next_column * strips.of_task + place;
        }
        if (row < 0 || strip >= strips.all) return nullptr;
    }
    return layer_.strip(layer_.experts[task.part][routing_.experts[row].expert], strips.matrix, strip);
}

void Forward::up(Worker& worker, const Task& task) {
    const int p = task.part, first = task.column * up_strips_;
    Part& part = parts_[p];
    Saved::Part& kept = kept_.parts[p];
    const Routing::Expert& expert = routing_.experts[task.row];
    const PackedExpert& base = layer_.experts[p][expert.expert];
    const Order order = order_of(expert);
    const std::size_t b_stride = layer_.panel(size_.rb), keep_ld = size_.inter_ld();
    const int batch = std::clamp(kernels_.strips(expert.rows) / 2, 1, up_strips_);
    const Strips strips{first, std::min(first + up_strips_, size_.ib), batch, up_strips_, size_.ib, Matrix::gate};
    const std::optional<CodedMatrix> codes[] = {layer_.codes_of(base, p, Matrix::gate),
                                                layer_.codes_of(base, p, Matrix::up)};
    for (RowChunk chunk(expert, 0, kernels_.most_rows); chunk.rows > 0;
         chunk = RowChunk(expert, chunk.first + chunk.rows, kernels_.most_rows)) {
        const std::size_t group = (expert.first_row + chunk.first) / kGroup, result = result_size(expert, chunk.rows);
        const bf16* x = part.x_pack + group * x_stride_;
        for (int ib = strips.first; ib < strips.end; ib += batch) {
            const int pairs = std::min(batch, strips.end - ib);
            NtSegment segments[kMostStrips * 4];
            int count = 0, used = 0;
            for (int i = ib; i < ib + pairs; ++i) {  // a strip of gate, then the same of up, as they lie in memory
                const std::size_t b_at = expert.expert * strides_.gate_b + i * b_stride;
                for (const bool is_up : {false, true}) {
                    const bf16* next = next_weights(task, strips, i, chunk.last);
                    if (next && is_up) next += layer_.panel(size_.hb);
                    segments[used] = {nullptr, x, x_stride_, size_.hb, next};
                    put_weights(segments[used], codes[is_up], base, is_up ? Matrix::up : Matrix::gate, i);
                    const Pair& b = (is_up ? lora_.up_b : lora_.gate_b)[p];
                    const Pair& xa = is_up ? part.up_xa : part.gate_xa;
                    count = 1 + nt_lora_segments(
                                    {at(b, b_at), at(xa, group * r_stride_), r_stride_, size_.rb, size_.side_by_side()},
                                    segments + used + 1);
                    used += count;
                }
            }
            multiply(expert, segments, count, 2 * pairs, chunk.rows, worker.c);
            worker.watch.lap(Phase::gate_up);
            for (int i = 0; i < pairs; ++i) {
                const float *g = worker.c + 2 * i * result, *u = g + result;
                const std::size_t keep_at = group * kGroup * keep_ld + (ib + i) * kBlock;
                bf16* h = part.h_pack + group * h_stride_ + (ib + i) * order.k_block();
                float* keep_g = call_.save ? kept.g + keep_at : nullptr;
                float* keep_u = call_.save ? kept.u + keep_at : nullptr;
                if (order.few > 0) {
                    kernels_.silu_mul_few(g, u, chunk.rows, h, keep_g, keep_u, keep_ld);
                } else {
                    kernels_.silu_mul(g, u, chunk.groups, h, h_stride_, keep_g, keep_u, keep_ld);
                }
            }
            worker.watch.lap(Phase::activation);
        }
    }
}

// Prefetches a strip's sums during the product or the additions before it, because the sums and weights of other strips
// have displaced them from the near caches.
void Forward::prefetch_sums(const float* sum, const RowChunk& chunk, const std::int32_t* token) const {
    for (int i = 0; i < chunk.rows; ++i) {
        const float* to = sum + wide(token[i]) * down_strips_ * kBlock;
        __builtin_prefetch(to, 0, 2);
        __builtin_prefetch(to + kBlock / 2, 0, 2);
    }
}

void Forward::down(Worker& worker, const Task& task) {
    const int p = task.part, first = task.column * down_strips_;
    Part& part = parts_[p];
    const Routing::Expert& expert = routing_.experts[task.row];
    const PackedExpert& base = layer_.experts[p][expert.expert];
    const Pair b = at(lora_.down_b, expert.expert * strides_.down_b);
    const std::size_t b_stride = layer_.panel(size_.rb), ld = down_strips_ * kBlock;
    const int batch = std::min(kernels_.strips(expert.rows), down_strips_);
    const Strips strips{first, std::min(first + down_strips_, size_.hb), batch, down_strips_, size_.hb, Matrix::down};
    const std::optional<CodedMatrix> codes = layer_.codes_of(base, p, Matrix::down);
    bool begun = false;
    for (RowChunk chunk(expert, 0, kernels_.most_rows); chunk.rows > 0;
         chunk = RowChunk(expert, chunk.first + chunk.rows, kernels_.most_rows)) {
        const std::size_t row = expert.first_row + chunk.first, group = row / kGroup,
                          result = result_size(expert, chunk.rows);
        const std::int32_t* token = routing_.token.data() + row;
        const float* weight = routing_.weight.data() + row;
        for (int hb = strips.first; hb < strips.end; hb += batch) {
            const int count = std::min(batch, strips.end - hb);
            float* sum = sums_.strip(p, task.column) + (hb - first) * kBlock;
            NtSegment segments[kMostStrips * 4];
            int terms = 0, used = 0;
            for (int i = hb; i < hb + count; ++i, used += terms) {
                segments[used] = {nullptr, part.h_pack + group * h_stride_, h_stride_, size_.ib,
                                  next_weights(task, strips, i, chunk.last)};
                put_weights(segments[used], codes, base, Matrix::down, i);
                terms = 1 + nt_lora_segments({at(b, i * b_stride), at(part.ha, group * r_stride_), r_stride_, size_.rb,
                                              size_.side_by_side()},
                                             segments + used + 1);
            }
            if (task.row > 0) prefetch_sums(sum, chunk, token);  // with the first expert there are no sums yet
            multiply(expert, segments, terms, count, chunk.rows, worker.c);
            worker.watch.lap(Phase::down);
            if (!begun) sums_.begin(task, worker.watch);
            begun = true;
            for (int i = 0; i < count; ++i, sum += kBlock) {
                if (i + 1 < count) prefetch_sums(sum + kBlock, chunk, token);
                const float* c = worker.c + i * result;
                if (is_few(expert)) {
                    kernels_.add_rows(c, 0, chunk.rows, 1, token, weight, sum, ld);
                } else {
                    kernels_.add_transposed(c, chunk.rows, token, weight, sum, ld);
                }
            }
            worker.watch.lap(Phase::merge);
        }
    }
    sums_.end(task, worker.index);
    worker.watch.lap(Phase::merge);
}

}  // namespace ktv
