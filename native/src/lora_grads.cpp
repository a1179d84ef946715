// The six LoRA gradients of an expert: products whose reduction runs over its tokens, in tasks of 128 columns.
#include <cstring>

#include "backward.hpp"

namespace ktv {

void GradWriter::put(std::size_t first, const float* values, std::size_t count) const {
    if (sums_) {
        for (std::size_t i = 0; i < count; ++i) sums_[first + i] += values[i];
    }
    round(first, sums_ ? sums_ + first : values, count);
}

void GradWriter::clear(std::size_t first, std::size_t count) const {
    const std::size_t element = fp32_ ? sizeof(float) : sizeof(bf16);
    std::memset(static_cast<std::byte*>(to_) + first * element, 0, count * element);
}

void GradWriter::round(std::size_t first, const float* values, std::size_t count) const {
    if (fp32_) {
        std::memcpy(static_cast<float*>(to_) + first, values, count * sizeof(float));
    } else {
        kernels_.round_sum(&values, 1, count, static_cast<bf16*>(to_) + first);
    }
}

// The sums of earlier calls, where there are any; else zero.
void Backward::fill_idle(int expert) const {
    const bool sums = call_.accumulate && layer_.has_sums[expert];
    for (std::size_t i = 0; i < write_.size(); ++i) {
        const std::size_t count = grad_sizes_[i] / config_.num_experts, first = expert * count;
        if (sums) {
            write_[i].repeat(first, count);
        } else {
            write_[i].clear(first, count);
        }
    }
}

// dA of gate and up together, dB of down; then for each part dB of gate, dB of up, dA of down.
int Backward::lora_tasks() const {
    return with_lora_ ? 2 * h_panels_ + 3 * config_.parts * i_panels_ : 0;
}

void Backward::lora_grad(Worker& worker, const Task& task) {
    const Routing::Expert& expert = routing_.experts[task.row];
    const auto slice = [&](int panel, int panels) {
        const bool neighbour = task.next_row == task.row && task.next_column == task.column + 1;
        return Slice{expert, panel, neighbour && panel + 1 < panels};
    };
    int left = task.column;
    if (left < h_panels_) return grad_gate_up_a(worker, slice(left, h_panels_));
    left -= h_panels_;
    if (left < h_panels_) return grad_down_b(worker, slice(left, h_panels_));
    left -= h_panels_;
    const std::size_t p = left / (3 * i_panels_);
    const int which = left / i_panels_ % 3;
    const Slice of_inter = slice(left % i_panels_, i_panels_);
    if (which == 2) return grad_down_a(worker, of_inter, p);
    grad_gate_up_b(worker, of_inter, p, which);
}

// Computes the product into worker.c, in pieces of at most kChunkRows rows; emit(piece) stores each.
template <typename TermOf, typename Emit>
void Backward::multiply(Worker& worker, const Slice& slice, const Product& product, int parts, const TermOf& term_of,
                        const Emit& emit) {
    const Routing::Expert& expert = slice.expert;
    const std::size_t ld = expert.kblocks * kBlock, col = slice.panel * kPanelCols;
    const int cblocks = std::min(kPanelBlocks, product.blocks - slice.panel * kPanelBlocks);
    const int width = std::min(cblocks * kBlock, product.cols - slice.panel * kPanelCols);
    const int idle = (expert.kblocks * kBlock - expert.rows) / 2;
    NnSegment* segments = segments_ + (worker.index * 2 * config_.parts);
    for (int first = 0; first < product.small_rows; first += kChunkRows) {
        int used = 0;
        for (int p = 0; p < parts; ++p) {
            const Term term = term_of(p);
            for (const bf16* half : {term.small.hi, term.small.lo})
                segments[used++] = {half + first * ld, ld,   nullptr,      0, term.gathered + expert.first_k, col,
                                    expert.kblocks,    idle, slice.goes_on};
        }
        const int chunk = std::min(kChunkRows, product.small_rows - first);
        kernels_.nn(segments, used, chunk, cblocks, worker.c, kPanelCols);
        emit(Piece{first, std::min(chunk, product.used_rows - first), col, wide(width)});
    }
}

// Rows of c into a gradient [..][cols] of which `to` is row 0.
void Backward::put_rows(const float* c, const GradWriter& writer, std::size_t to, std::size_t cols,
                        const Piece& piece) const {
    for (int i = 0; i < piece.count; ++i)
        writer.put(to + (piece.n + i) * cols + piece.col, c + i * kPanelCols, piece.width);
}

// worker.c into a gradient [cols][r], which begins at `to`: its transpose.
void Backward::put_columns(const Worker& worker, const GradWriter& writer, std::size_t to, const Piece& piece) const {
    const std::size_t count = piece.count;
    kernels_.transpose(worker.c, kPanelCols, piece.count, static_cast<int>(piece.width), worker.transposed);
    if (count == r_) return writer.put(to + piece.col * r_, worker.transposed, piece.width * r_);
    for (std::size_t j = 0; j < piece.width; ++j)
        writer.put(to + (piece.col + j) * r_ + piece.n, worker.transposed + j * count, count);
}

// dA of gate above dA of up: (s dg Bg beside s du Bu)ᵀ x, summed over the parts.
void Backward::grad_gate_up_a(Worker& worker, const Slice& slice) {
    const Routing::Expert& expert = slice.expert;
    const GradWriter &gate_a = write_[0], &up_a = write_[2];
    const std::size_t to = expert.expert * r_ * H_, from = wide(expert.first_k) * size_.rank2_rows();
    multiply(
        worker, slice, {size_.rank2_rows(), 2 * size_.r, size_.hb, size_.H}, config_.parts,
        [&](std::size_t p) { return Term{at(parts_[p].xa_t, from), x_rows_.data()}; },
        [&](const Piece& piece) {
            const int of_gate = std::clamp(size_.r - piece.n, 0, piece.count);
            put_rows(worker.c, gate_a, to, H_, {piece.n, of_gate, piece.col, piece.width});
            put_rows(worker.c + of_gate * kPanelCols, up_a, to, H_,
                     {piece.n + of_gate - size_.r, piece.count - of_gate, piece.col, piece.width});
        });
    worker.watch.lap(Phase::gate_up_lora_grad);
}

// dB of down, transposed: (w s h Adᵀ)ᵀ dO, summed over the parts.
void Backward::grad_down_b(Worker& worker, const Slice& slice) {
    const Routing::Expert& expert = slice.expert;
    const std::size_t from = wide(expert.first_k) * size_.rank_rows();
    multiply(
        worker, slice, {size_.rank_rows(), size_.r, size_.hb, size_.H}, config_.parts,
        [&](std::size_t p) { return Term{at(kept_.parts[p].ha_t, from), parts_[p].out_rows}; },
        [&](const Piece& piece) { put_columns(worker, write_[5], expert.expert * H_ * r_, piece); });
    worker.watch.lap(Phase::down_lora_grad);
}

// dA of down, the part's columns: (w s dO Bd)ᵀ h.
void Backward::grad_down_a(Worker& worker, const Slice& slice, std::size_t p) {
    const Routing::Expert& expert = slice.expert;
    const std::size_t all_I = I_ * config_.parts, to = expert.expert * r_ * all_I + p * I_;
    const Term term{at(parts_[p].ob_t, wide(expert.first_k) * size_.rank_rows()), parts_[p].h_rows};
    multiply(
        worker, slice, {size_.rank_rows(), size_.r, size_.ib, size_.I}, 1, [&](std::size_t) { return term; },
        [&](const Piece& piece) { put_rows(worker.c, write_[4], to, all_I, piece); });
    worker.watch.lap(Phase::down_lora_grad);
}

// dB of gate (which = 0) or up (1), the part's rows, transposed: (s x Aᵀ)ᵀ dg.
void Backward::grad_gate_up_b(Worker& worker, const Slice& slice, std::size_t p, int which) {
    const Routing::Expert& expert = slice.expert;
    const std::size_t all_I = I_ * config_.parts, to = (expert.expert * all_I + p * I_) * r_;
    const std::size_t from = (2 * wide(expert.first_k) + which * expert.kblocks * kBlock) * size_.rank_rows();
    const Term term{at(kept_.xa_t, from), which == 0 ? parts_[p].g_rows : parts_[p].u_rows};
    multiply(
        worker, slice, {size_.rank_rows(), size_.r, size_.ib, size_.I}, 1, [&](std::size_t) { return term; },
        [&](const Piece& piece) { put_columns(worker, write_[which == 0 ? 1 : 3], to, piece); });
    worker.watch.lap(Phase::gate_up_lora_grad);
}

}  // namespace ktv
