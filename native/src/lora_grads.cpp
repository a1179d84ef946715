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

// Computes the product into worker.c, in pieces of at most kGradRows rows; emit(piece) stores each.
template <typename TermOf, typename Emit>
void Backward::multiply(Worker& worker, const Slice& slice, const Product& product, int parts, const TermOf& term_of,
                        const Emit& emit) {
    const Routing::Expert& expert = slice.expert;
    const std::size_t ld = expert.kblocks * kBlock, col = slice.panel * kPanelCols;
    const int cblocks = std::min(kPanelBlocks, product.blocks - slice.panel * kPanelBlocks);
    const int width = std::min(cblocks * kBlock, product.cols - slice.panel * kPanelCols);
    const int idle = (expert.kblocks * kBlock - expert.rows) / 2;
    NnSegment* segments = segments_ + worker.index * segments_of_worker_;
    for (int first = 0; first < product.small_rows; first += kGradRows) {
        int used = 0;
        for (int p = 0; p < parts; ++p) {
            const Term term = term_of(p);
            for (const bf16* half : {term.small.hi, term.small.lo})
                segments[used++] = {half + first * ld, ld,   nullptr,      0, term.gathered + expert.first_k, col,
                                    expert.kblocks,    idle, slice.goes_on};
        }
        const int chunk = std::min(kGradRows, product.small_rows - first);
        kernels_.nn(segments, used, chunk, cblocks, worker.c);
        emit(Piece{first, std::min(chunk, product.used_rows - first), col, wide(width), nn_stride(chunk)});
    }
}

// Rows of c into a gradient [..][cols] of which `to` is row 0. A row is collected from its column blocks first, because
// one addition to the sums and one rounding of a whole row cost less than those of its pieces.
void Backward::put_rows(const float* c, const GradWriter& writer, std::size_t to, std::size_t cols,
                        const Piece& piece) const {
    float row[kPanelCols];
    for (int i = 0; i < piece.count; ++i, c += kBlock) {
        for (std::size_t at = 0; at < piece.width; at += kBlock)
            std::memcpy(row + at, c + at / kBlock * piece.stride, kBlock * sizeof(float));
        writer.put(to + (piece.n + i) * cols + piece.col, row, piece.width);
    }
}

// worker.c into a gradient [cols][r], which begins at `to`: its transpose.
void Backward::put_columns(const Worker& worker, const GradWriter& writer, std::size_t to, const Piece& piece) const {
    const std::size_t count = piece.count;
    kernels_.transpose(worker.c, piece.stride, piece.count, static_cast<int>(piece.width), worker.transposed);
    if (count == r_) return writer.put(to + piece.col * r_, worker.transposed, piece.width * r_);
    for (std::size_t j = 0; j < piece.width; ++j)
        writer.put(to + (piece.col + j) * r_ + piece.n, worker.transposed + j * count, count);
}

void Backward::lora_grad(Worker& worker, const Task& task) {
    const Routing::Expert& expert = routing_.experts[task.row];
    const std::size_t e = expert.expert, first_k = expert.first_k, all_I = I_ * config_.parts;
    const int rank_rows = size_.rank_rows(), rank2_rows = size_.rank2_rows();
    const auto slice = [&](int panel, int panels) {
        const bool neighbour = task.next_row == task.row && task.next_column == task.column + 1;
        return Slice{expert, panel, neighbour && panel + 1 < panels};
    };
    int left = task.column;
    if (left < h_panels_) {  // dA of gate above dA of up: (s dg Bg beside s du Bu)ᵀ x, summed over the parts
        const std::size_t to = e * r_ * H_;
        multiply(
            worker, slice(left, h_panels_), {rank2_rows, 2 * size_.r, size_.hb, size_.H}, config_.parts,
            [&](int p) { return Term{at(parts_[p].xa_t, first_k * rank2_rows), x_rows_.data()}; },
            [&](const Piece& piece) {
                const int of_gate = std::clamp(size_.r - piece.n, 0, piece.count);
                put_rows(worker.c, write_[0], to, H_, {piece.n, of_gate, piece.col, piece.width, piece.stride});
                put_rows(worker.c + of_gate * kBlock, write_[2], to, H_,
                         {piece.n + of_gate - size_.r, piece.count - of_gate, piece.col, piece.width, piece.stride});
            });
        return worker.watch.lap(Phase::gate_up_lora_grad);
    }
    left -= h_panels_;
    if (left < h_panels_) {  // dB of down, transposed: (w s h Adᵀ)ᵀ dO, summed over the parts
        multiply(
            worker, slice(left, h_panels_), {rank_rows, size_.r, size_.hb, size_.H}, config_.parts,
            [&](int p) { return Term{at(kept_.parts[p].ha_t, first_k * rank_rows), parts_[p].out_rows}; },
            [&](const Piece& piece) { put_columns(worker, write_[5], e * H_ * r_, piece); });
        return worker.watch.lap(Phase::down_lora_grad);
    }
    left -= h_panels_;
    const std::size_t p = left / (3 * i_panels_);
    const int which = left / i_panels_ % 3;
    const Part& part = parts_[p];
    const auto multiply_part = [&](const Term& term, const auto& emit) {
        const Product product{rank_rows, size_.r, size_.ib, size_.I};
        multiply(worker, slice(left % i_panels_, i_panels_), product, 1, [&](int) { return term; }, emit);
    };
    if (which == 2) {  // dA of down, the part's columns: (w s dO Bd)ᵀ h
        multiply_part({at(part.ob_t, first_k * rank_rows), part.h_rows}, [&](const Piece& piece) {
            put_rows(worker.c, write_[4], e * r_ * all_I + p * I_, all_I, piece);
        });
        return worker.watch.lap(Phase::down_lora_grad);
    }
    // dB of gate or up, the part's rows, transposed: (s x Aᵀ)ᵀ dg
    const std::size_t from = (2 * first_k + which * expert.kblocks * kBlock) * rank_rows;
    multiply_part({at(kept_.xa_t, from), which == 0 ? part.g_rows : part.u_rows}, [&](const Piece& piece) {
        put_columns(worker, write_[which == 0 ? 1 : 3], (e * all_I + p * I_) * r_, piece);
    });
    worker.watch.lap(Phase::gate_up_lora_grad);
}

}  // namespace ktv
