// Packs the caller's tensors into weight blocks.
#include <cstring>
#include <utility>

#include "state.hpp"

namespace ktv {
namespace {

// Packs 32 rows of a strided bf16 matrix [rows][cols] into one row of weight blocks; zeros beyond its edges.
void pack_row(const bf16* from, std::ptrdiff_t row_stride, std::ptrdiff_t col_stride, int rows, int cols, bf16* to) {
    const int kblocks = blocks_of(cols);
    for (int kb = 0; kb < kblocks; ++kb) {
        const int have = std::min(kBlock, cols - kb * kBlock);
        for (int n = 0; n < kBlock; ++n) {
            bf16* out = to + kb * kBlockSize + n * kBlock;
            if (n >= rows) {
                std::memset(out, 0, kBlock * sizeof(bf16));
                continue;
            }
            const bf16* in = from + n * row_stride + kb * kBlock * col_stride;
            if (col_stride == 1) {
                std::memcpy(out, in, have * sizeof(bf16));
            } else {
                for (int k = 0; k < have; ++k) out[k] = in[k * col_stride];
            }
            std::memset(out + have, 0, (kBlock - have) * sizeof(bf16));
        }
    }
}

// One element of a LoRA tensor as hi and lo.
struct LoraTensor {
    const void* data;
    bool fp32;
    Split at(std::size_t i) const {
        if (!fp32) return {static_cast<const bf16*>(data)[i], 0};
        return split(static_cast<const float*>(data)[i]);
    }
};

// Packs a [rows][cols] piece of a contiguous matrix with leading dimension ld into weight blocks, kblocks in a row, from
// row `row_at` on; other elements are not written. twice: stores hi also half a block to the right.
void put_matrix(const LoraTensor& from, std::size_t offset, std::size_t ld, int rows, int cols, int row_at, int kblocks,
                const Pair& to, bool twice = false) {
    for (int n = 0; n < rows; ++n) {
        for (int k = 0; k < cols; ++k) {
            const int row = row_at + n;
            const std::size_t at =
                (row / kBlock * wide(kblocks) + k / kBlock) * kBlockSize + row % kBlock * kBlock + k % kBlock;
            const Split s = from.at(offset + n * ld + k);
            to.hi[at] = s.hi;
            if (twice) to.hi[at + kBlock / 2] = s.hi;
            if (to.lo) to.lo[at] = s.lo;
        }
    }
}

// The reverse of pack_row, into a contiguous row-major matrix with leading dimension ld.
void unpack_row(const bf16* from, int rows, int cols, std::size_t ld, bf16* to) {
    for (int kb = 0; kb < blocks_of(cols); ++kb) {
        const int have = std::min(kBlock, cols - kb * kBlock);
        for (int n = 0; n < rows; ++n) {
            std::memcpy(to + n * ld + kb * kBlock, from + kb * kBlockSize + n * kBlock, have * sizeof(bf16));
        }
    }
}

}  // namespace

bool Layer::State::unpack(int expert, bf16* gate_to, bf16* up_to, bf16* down_to) const {
    if (!experts[0][expert].is_packed()) return false;
    const std::size_t H = size.H, I = size.I, all_I = I * config.parts;
    for (int part = 0; part < config.parts; ++part) {
        const PackedExpert& from = experts[part][expert];
        std::vector<bf16> unpacked(format.quantised() ? panel(std::max(size.hb, size.ib)) : 0);
        const auto strip_of = [&](Matrix matrix, int row) -> const bf16* {
            const std::optional<CodedMatrix> codes = codes_of(from, part, matrix);
            if (!codes) return strip(from, matrix, row);
            codes->unpack({row, 0}, matrix == Matrix::down ? size.ib : size.hb, codes->blocks, unpacked.data());
            return unpacked.data();
        };
        for (int row = 0; row < size.ib; ++row) {
            const std::size_t at = (part * I + row * kBlock) * H;
            const int rows = std::min(kBlock, size.I - row * kBlock);
            unpack_row(strip_of(Matrix::gate, row), rows, size.H, H, gate_to + at);
            unpack_row(strip_of(Matrix::up, row), rows, size.H, H, up_to + at);
        }
        for (int row = 0; row < size.hb; ++row) {
            const int rows = std::min(kBlock, size.H - row * kBlock);
            unpack_row(strip_of(Matrix::down, row), rows, size.I, all_I, down_to + row * kBlock * all_I + part * I);
        }
    }
    return true;
}

std::size_t Layer::State::expert_bytes() const {
    if (!format.quantised()) return 3 * size.ib * (size.hb * kBlockSize) * sizeof(bf16);
    PackedExpert measured_only;
    return measured([&](Carver& carver) { carve_codes(carver, measured_only); });
}

Need Layer::State::packing_need(std::size_t count) const {
    Need need;
    if (count == 0) return need;
    const std::size_t each = expert_bytes(), of_parts = config.parts * each, left = config.num_experts - packed - count;
    if (expert_memory.empty()) need.mapped = config.parts * Block::footprint(config.num_experts * each);
    // Sources that are released make room for the experts after the first, except for their padding.
    const std::size_t released = given_up ? std::min(of_parts, source_bytes()) : 0;
    // The last huge page may reach into the memory of experts that are packed later.
    need.touched = of_parts + (count - 1) * (of_parts - released) + config.parts * std::min(kHuge, left * each);
    return need;
}

void Layer::State::pack_experts(Team& team, const std::vector<int>& wanted) {
    if (wanted.empty()) return;
    if (gate.disposable && wanted.size() > 1) {
        // One by one, so that at most one expert is in memory twice.
        for (const int e : wanted) pack_experts(team, {e});
        return;
    }
    const std::size_t each = expert_bytes();
    if (expert_memory.empty()) {
        std::vector<Block> blocks;
        for (const Home& home : homes) blocks.emplace_back(config.num_experts * each, home.nodes);
        expert_memory = std::move(blocks);
    }
    // An expert with addresses counts as packed: it gets them at the end.
    std::vector<std::vector<PackedExpert>> made(config.parts);
    for (int p = 0; p < config.parts; ++p) {
        made[p].resize(wanted.size());
        std::byte* memory = expert_memory[p].data() + packed * each;
        for (PackedExpert& expert : made[p]) {
            Carver carver(std::exchange(memory, memory + each));
            if (format.quantised()) {
                carve_codes(carver, expert);
                continue;
            }
            carver.take(expert.gate, size.ib * gate_up_stride());
            expert.up = expert.gate + panel(size.hb);
            carver.take(expert.down, size.hb * panel(size.ib));
        }
    }
    const int per_expert = 2 * size.ib + size.hb;  // rows of blocks
    TaskQueue queue(config.parts, team, static_cast<int>(wanted.size()), per_expert);
    team.run([&](int worker) {
        queue.work(worker, [&](const Task& task) {
            const int part = task.part, e = wanted[task.row], slot = slot_of[e];
            int row = task.column;
            PackedExpert& to = made[part][task.row];
            const Matrix matrix = row < size.ib ? Matrix::gate : row < 2 * size.ib ? Matrix::up : Matrix::down;
            if (format.quantised()) {
                row -= static_cast<int>(matrix) * size.ib;
                pack_codes(slot, part, matrix, row, to.codes[static_cast<int>(matrix)]);
            } else if (matrix != Matrix::down) {
                const WeightSource& from = row < size.ib ? gate : up;
                bf16* out = row < size.ib ? to.gate : to.up;
                row %= size.ib;
                pack_row(
                    static_cast<const bf16*>(from.experts[slot]) + (part * size.I + row * kBlock) * from.row_stride,
                    from.row_stride, from.col_stride, std::min(kBlock, size.I - row * kBlock), size.H,
                    out + row * gate_up_stride());
            } else {
                row -= 2 * size.ib;
                pack_row(static_cast<const bf16*>(down.experts[slot]) + row * kBlock * down.row_stride +
                             part * size.I * down.col_stride,
                         down.row_stride, down.col_stride, std::min(kBlock, size.H - row * kBlock), size.I,
                         to.down + row * panel(size.ib));
            }
        });
    });
    for (std::size_t part = 0; part < made.size(); ++part) {
        for (std::size_t i = 0; i < wanted.size(); ++i) experts[part][wanted[i]] = std::move(made[part][i]);
    }
    for (const int e : wanted) {
        for (const WeightSource* from : {&gate, &up, &down}) {
            if (!from->disposable) continue;
            const int rows = from == &down ? config.hidden : config.intermediate,
                      cols = from == &down ? config.intermediate : config.hidden;
            const std::ptrdiff_t last = (rows - 1) * from->row_stride + (cols - 1) * from->col_stride;
            release_pages(from->experts[slot_of[e]], format.bytes(last + 1));
        }
    }
    // Last, because the sources' owner is dropped when all experts are packed.
    packed += static_cast<int>(wanted.size());
}

LoraPack Layer::State::empty_lora(bool fp32) const {
    LoraPack pack;
    pack.fp32 = fp32;
    pack.gate_b.resize(config.parts);
    pack.up_b.resize(config.parts);
    pack.down_a.resize(config.parts);
    return pack;
}

void Layer::State::carve_lora(LoraPack& pack, int p, Carver& carver) const {
    const std::size_t E = config.num_experts;
    const LoraStrides strides = lora_strides();
    const auto take = [&](Pair& pair, std::size_t count) {
        carver.take(pair.hi, E * count);
        if (pack.fp32) carver.take(pair.lo, E * count);
    };
    if (p == 0) {
        take(pack.gate_up_a, strides.gate_up_a);
        take(pack.down_b, strides.down_b);
    }
    take(pack.gate_b[p], strides.gate_b);
    take(pack.up_b[p], strides.gate_b);
    take(pack.down_a[p], strides.down_a);
}

void Layer::State::pack_lora(Team& team, const LoraPointers& from) {
    const LoraStrides strides = lora_strides();
    const std::size_t a = strides.gate_up_a, b = strides.gate_b, da = strides.down_a, db = strides.down_b;
    // A saved forward keeps its snapshot unchanged, because its backward uses the same values.
    std::shared_ptr<LoraPack> to = lora;
    if (!to || to.use_count() > 2 || to->fp32 != from.fp32) {
        to = std::make_shared<LoraPack>(empty_lora(from.fp32));
        const auto arrays = [&](int p, Carver& carver) { carve_lora(*to, p, carver); };
        const std::vector<BlockCache::Size> sizes = measured_parts(arrays);
        Need need;
        for (const BlockCache::Size& size : sizes) need.add_block(size.bytes);
        require_memory(need, "the snapshot of the LoRA weights");
        // fresh pages are zero, and padding is never written
        for (const BlockCache::Size& size : sizes) to->blocks.emplace_back(size.bytes, size.nodes);
        cut_parts(to->blocks, arrays);
    }
    const std::size_t H = size.H, I = size.I, r = size.r, all_I = I * config.parts;
    const bool fp32 = from.fp32, twice = size.side_by_side();
    TaskQueue queue(config.parts, team, config.num_experts);
    team.run([&](int worker) {
        queue.work(worker, [&](const Task& task) {
            const std::size_t e = task.row, p = task.part;
            if (p == 0) {
                put_matrix({from.gate_a, fp32}, e * r * H, H, size.r, size.H, 0, size.hb, at(to->gate_up_a, e * a));
                put_matrix({from.up_a, fp32}, e * r * H, H, size.r, size.H, size.r, size.hb, at(to->gate_up_a, e * a));
                put_matrix({from.down_b, fp32}, e * H * r, r, size.H, size.r, 0, size.rb, at(to->down_b, e * db),
                           twice);
            }
            const std::size_t rows = (e * all_I + p * I) * r, cols = e * r * all_I + p * I;
            put_matrix({from.gate_b, fp32}, rows, r, size.I, size.r, 0, size.rb, at(to->gate_b[p], e * b), twice);
            put_matrix({from.up_b, fp32}, rows, r, size.I, size.r, 0, size.rb, at(to->up_b[p], e * b), twice);
            put_matrix({from.down_a, fp32}, cols, all_I, size.r, size.I, 0, size.ib, at(to->down_a[p], e * da));
        });
    });
    lora = std::move(to);
}

}  // namespace ktv
