// From the caller's tensors to weight blocks.
#include <cstring>

#include "state.hpp"

namespace ktv {
namespace {

// rows [0, 32) of a row of weight blocks from a strided bf16 matrix [rows][cols]; zeros beyond its edges.
void pack_row(const bf16* from, std::ptrdiff_t row_stride, std::ptrdiff_t col_stride, int rows, int cols, bf16* to) {
    const int kblocks = blocks_of(cols);
    for (int kb = 0; kb < kblocks; ++kb) {
        const int have = std::min(kBlock, cols - kb * kBlock);
        for (int n = 0; n < kBlock; ++n) {
            bf16* out = to + z(kb) * kBlockSize + z(n) * kBlock;
            if (n >= rows) {
                std::memset(out, 0, kBlock * sizeof(bf16));
                continue;
            }
            const bf16* in = from + n * row_stride + kb * kBlock * col_stride;
            if (col_stride == 1) {
                std::memcpy(out, in, z(have) * sizeof(bf16));
            } else {
                for (int k = 0; k < have; ++k) out[k] = in[k * col_stride];
            }
            std::memset(out + have, 0, z(kBlock - have) * sizeof(bf16));
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

// A [rows][cols] piece of a contiguous matrix, ld apart, into weight blocks that are kblocks wide, from block row
// `row_at` on; what lies beyond stays as it is. twice: hi also half a block to the right.
void put_matrix(const LoraTensor& from, std::size_t offset, std::size_t ld, int rows, int cols, int row_at, int kblocks,
                const Pair& to, bool twice = false) {
    for (int n = 0; n < rows; ++n) {
        for (int k = 0; k < cols; ++k) {
            const int row = row_at + n;
            const std::size_t at =
                (z(row / kBlock) * z(kblocks) + z(k / kBlock)) * kBlockSize + z(row % kBlock) * kBlock + z(k % kBlock);
            const Split s = from.at(offset + z(n) * ld + z(k));
            to.hi[at] = s.hi;
            if (twice) to.hi[at + kBlock / 2] = s.hi;
            if (to.lo) to.lo[at] = s.lo;
        }
    }
}

}  // namespace

std::size_t Layer::State::expert_bytes() const {
    return 3 * z(size.ib) * z(size.hb) * kBlockSize * sizeof(bf16);
}

void Layer::State::pack_experts(Team& team, const std::vector<int>& wanted) {
    if (wanted.empty()) return;
    if (gate.disposable && wanted.size() > 1) {
        // One by one: at no time is more than one expert there twice.
        for (const int e : wanted) pack_experts(team, {e});
        return;
    }
    // All memory first: an expert whose block is there counts as packed, so none may stay behind half made.
    std::vector<std::vector<PackedExpert>> made(z(config.parts));
    for (auto& part : made) {
        part.resize(wanted.size());
        for (PackedExpert& expert : part) {
            expert.block = Block(expert_bytes());
            Carver carver(expert.block.data());
            carver.take(expert.gate, z(size.ib) * gate_up_stride());
            expert.up = expert.gate + panel(size.hb);
            carver.take(expert.down, z(size.hb) * panel(size.ib));
        }
    }
    const int per_expert = 2 * size.ib + size.hb;  // rows of blocks
    TaskQueue queue(config.parts, team, static_cast<int>(wanted.size()), per_expert);
    const std::function<void(int)> body = [&](int worker) {
        queue.work(worker, [&](const Task& task) {
            const int part = task.part, e = wanted[z(task.row)], slot = slot_of[z(e)];
            int row = task.column;
            PackedExpert& to = made[z(part)][z(task.row)];
            if (row < 2 * size.ib) {
                const WeightSource& from = row < size.ib ? gate : up;
                bf16* out = row < size.ib ? to.gate : to.up;
                row %= size.ib;
                pack_row(from.experts[z(slot)] + (part * size.I + row * kBlock) * from.row_stride, from.row_stride,
                         from.col_stride, std::min(kBlock, size.I - row * kBlock), size.H,
                         out + z(row) * gate_up_stride());
            } else {
                row -= 2 * size.ib;
                pack_row(down.experts[z(slot)] + row * kBlock * down.row_stride + part * size.I * down.col_stride,
                         down.row_stride, down.col_stride, std::min(kBlock, size.H - row * kBlock), size.I,
                         to.down + z(row) * panel(size.ib));
            }
        });
    };
    team.run(body);
    for (std::size_t part = 0; part < made.size(); ++part) {
        for (std::size_t i = 0; i < wanted.size(); ++i) experts[part][z(wanted[i])] = std::move(made[part][i]);
    }
    for (const int e : wanted) {
        release(gate, e, config.intermediate, config.hidden);
        release(up, e, config.intermediate, config.hidden);
        release(down, e, config.hidden, config.intermediate);
    }
    // Last: whoever sees that all are packed lets the sources go.
    packed += static_cast<int>(wanted.size());
}

void Layer::State::release(const WeightSource& from, int expert, int rows, int cols) const {
    if (!from.disposable) return;
    const std::ptrdiff_t last = (rows - 1) * from.row_stride + (cols - 1) * from.col_stride;
    release_pages(from.experts[z(slot_of[z(expert)])], (static_cast<std::size_t>(last) + 1) * sizeof(bf16));
}

void Layer::State::pack_lora(Team& team, const LoraPointers& from) {
    const std::size_t E = z(config.num_experts);
    const LoraStrides strides = lora_strides();
    const std::size_t a = strides.gate_up_a, b = strides.gate_b, da = strides.down_a, db = strides.down_b;
    const auto carve = [&](LoraPack& pack, Carver& carver) {
        const auto take = [&](Pair& pair, std::size_t count) {
            carver.take(pair.hi, E * count);
            if (config.lora_fp32) carver.take(pair.lo, E * count);
        };
        take(pack.gate_up_a, a);
        take(pack.down_b, db);
        for (int p = 0; p < config.parts; ++p) {
            take(pack.gate_b[z(p)], b);
            take(pack.up_b[z(p)], b);
            take(pack.down_a[z(p)], da);
        }
    };
    // A snapshot that a saved forward still needs stays as it is: its backward belongs to the same values.
    std::shared_ptr<LoraPack> to = lora;
    if (!to || to.use_count() > 2) {
        to = std::make_shared<LoraPack>();
        to->gate_b.resize(z(config.parts));
        to->up_b.resize(z(config.parts));
        to->down_a.resize(z(config.parts));
        Carver measure;
        carve(*to, measure);
        require_memory(measure.used(), "the snapshot of the LoRA weights");
        to->block = Block(measure.used());  // fresh pages are zero, and padding is never written
        Carver cut(to->block.data());
        carve(*to, cut);
    }
    const std::size_t H = z(size.H), I = z(size.I), r = z(size.r), all_I = I * z(config.parts);
    const bool fp32 = config.lora_fp32, twice = size.side_by_side();
    TaskQueue queue(1, team, config.num_experts);
    const std::function<void(int)> body = [&](int worker) {
        queue.work(worker, [&](const Task& task) {
            const std::size_t e = z(task.row);
            put_matrix({from.gate_a, fp32}, e * r * H, H, size.r, size.H, 0, size.hb, at(to->gate_up_a, e * a));
            put_matrix({from.up_a, fp32}, e * r * H, H, size.r, size.H, size.r, size.hb, at(to->gate_up_a, e * a));
            put_matrix({from.down_b, fp32}, e * H * r, r, size.H, size.r, 0, size.rb, at(to->down_b, e * db), twice);
            for (std::size_t p = 0; p < z(config.parts); ++p) {
                const std::size_t rows = (e * all_I + p * I) * r, cols = e * r * all_I + p * I;
                put_matrix({from.gate_b, fp32}, rows, r, size.I, size.r, 0, size.rb, at(to->gate_b[p], e * b), twice);
                put_matrix({from.up_b, fp32}, rows, r, size.I, size.r, 0, size.rb, at(to->up_b[p], e * b), twice);
                put_matrix({from.down_a, fp32}, cols, all_I, size.r, size.I, 0, size.ib, at(to->down_a[p], e * da));
            }
        });
    };
    team.run(body);
    lora = std::move(to);
}

}  // namespace ktv
