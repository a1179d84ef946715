// Forward in four parallel stages:
//   1 pack    per (part, group of 16 rows):      token pack of x, and x Aᵀ of gate and up while the pack is in cache
//   2 up      per (part, expert, 32 rows of I):  g, u with their LoRA in one product each; h = silu(g) u, packed
//   3 rank    per (part, group):                 h Adᵀ
//   4 down    per (part, expert, 32 rows of H):  y with its LoRA, added to the output in the order of the experts
// An expert's tasks are neighbours, so that its packed tokens stay in cache while its weights stream by once.
#include <atomic>
#include <cstring>

#include "state.hpp"

namespace ktv {
namespace {

constexpr std::size_t kScratch = 2 * std::size_t{kBlock} * kChunkRows;  // fp32: two nt results

struct Part {
    bf16* x_pack;         // [group][hb]
    Pair gate_xa, up_xa;  // s x Aᵀ: [group][rb]
    bf16* h_pack;         // [group][ib]
    Pair ha;              // s h Adᵀ: [group][rb]
    float* sum;           // [hb][T][32]
};

void take(Carver& carver, Pair& pair, std::size_t count) {
    carver.take(pair.hi, count);
    carver.take(pair.lo, count);
}

// Element (token t, index n) of one group of a token pack.
std::size_t pack_index(int n, int t, bool few) {
    if (few) return z(n / kBlock) * kPackSize + z(t) * kBlock + z(n % kBlock);
    return z(n / kBlock) * kPackSize + z(n % kBlock / 2) * 2 * kGroup + z(t) * 2 + z(n & 1);
}

// Where a group's 16 tokens stand when the token is the reduction index of its expert.
struct Columns {
    std::size_t ld, first, width;  // of a [rows][ld] operand; width 32 where this group also closes the last k-block
    int tokens;                    // of the 16, those that are no padding
};
Columns columns_of(const Routing::Expert& expert, int group) {
    const int local = group - expert.first_row / kGroup;
    const bool closes = local == expert.groups - 1 && expert.groups % 2 == 1;
    return {z(expert.kblocks) * kBlock, z(local) * kGroup, closes ? z(kBlock) : z(kGroup),
            std::min(kGroup, expert.rows - local * kGroup)};
}

void clear(const Pair& to, std::size_t at, std::size_t count) {
    std::memset(to.hi + at, 0, count * sizeof(bf16));
    std::memset(to.lo + at, 0, count * sizeof(bf16));
}

}  // namespace

int nt_lora_segments(const LoraFactor& lora, NtSegment* out) {
    out[0] = {lora.b.hi, lora.activation.hi, lora.group_stride, lora.kblocks};
    out[1] = {lora.b.hi, lora.activation.lo, lora.group_stride, lora.kblocks};
    if (!lora.fp32) return 2;
    out[2] = {lora.b.lo, lora.activation.hi, lora.group_stride, lora.kblocks};
    return 3;
}

Layer::Ticket Layer::State::forward(int rows, const bf16* x, const std::int64_t* ids, const float* weights,
                                    bf16* output, bool save) {
    Process& shared = process();
    const std::lock_guard lock(shared.mutex);
    Team& team = shared.team(workers, config.parts);

    if (save && static_cast<int>(saved.size()) >= config.max_cache_depth)
        throw BadState("forward_sft(save_for_backward=True): " + std::to_string(saved.size()) +
                       " forwards already wait for their backward, and max_cache_depth is " +
                       std::to_string(config.max_cache_depth) + "; call backward first or raise max_cache_depth");
    const LoraPack& snapshot = *lora;

    Saved kept;
    kept.lora = lora;
    kept.routing = route(ids, weights, rows, config.top_k, config.num_experts);
    const Routing& routing = kept.routing;
    const int groups = routing.rows / kGroup, active = static_cast<int>(routing.experts.size());
    const std::size_t T = z(rows), R = z(routing.rows), G = z(groups);
    const std::size_t x_stride = z(size.hb) * kPackSize, h_stride = z(size.ib) * kPackSize,
                      r_stride = z(size.rb) * kPackSize;

    std::vector<Part> parts(z(config.parts));
    float* scratch;
    const auto carve_work = [&](Carver& carver) {
        for (Part& part : parts) {
            carver.take(part.x_pack, G * x_stride);
            take(carver, part.gate_xa, G * r_stride);
            take(carver, part.up_xa, G * r_stride);
            carver.take(part.h_pack, G * h_stride);
            take(carver, part.ha, G * r_stride);
            carver.take(part.sum, T * z(size.hidden()));
        }
        carver.take(scratch, z(workers) * kScratch);
    };
    kept.parts.resize(z(config.parts));
    const auto carve_kept = [&](Carver& carver) {
        carver.take(kept.x, (T + 1) * z(size.hidden_ld()));
        take(carver, kept.xa_t, z(routing.k_rows) * 2 * z(size.rank_rows()));
        for (Saved::Part& part : kept.parts) {
            carver.take(part.g, R * z(size.inter_ld()));
            carver.take(part.u, R * z(size.inter_ld()));
            take(carver, part.ha_t, z(routing.k_rows) * z(size.rank_rows()));
        }
    };
    Carver measure_work, measure_kept;
    carve_work(measure_work);
    if (save) carve_kept(measure_kept);

    std::vector<int> wanted;
    for (const Routing::Expert& e : routing.experts) {
        if (!experts[0][z(e.expert)].block) wanted.push_back(e.expert);
    }
    Block work = shared.cache.take(measure_work.used(), "a forward of " + std::to_string(rows) + " tokens");
    Carver cut_work(work.data());
    carve_work(cut_work);
    if (save) {
        kept.block = shared.cache.take(measure_kept.used(), "saving a forward of " + std::to_string(rows) + " tokens");
        Carver cut_kept(kept.block.data());
        carve_kept(cut_kept);
    }
    if (!wanted.empty()) {
        const std::size_t need = wanted.size() * z(config.parts) * Block::footprint(expert_bytes());
        const std::string what = "packing the weights of " + std::to_string(wanted.size()) + " experts";
        if (need > available_memory()) shared.cache.clear();
        require_memory(need, what);
        pack_experts(team, wanted);
    }

    const float scaling = config.scaling;
    const std::size_t a = z(size.ab) * panel(size.hb), b = z(size.ib) * panel(size.rb),
                      da = z(size.rb) * panel(size.ib), db = z(size.hb) * panel(size.rb);
    const auto at = [](const Pair& p, std::size_t by) { return Pair{p.hi + by, p.lo ? p.lo + by : nullptr}; };
    const auto expert_of = [&](int group) -> const Routing::Expert& {
        return routing.experts[z(routing.expert_of_group[z(group)])];
    };

    const auto is_few = [&](const Routing::Expert& expert) { return expert.rows <= kernels.few_rows; };
    // nt for `count` groups of an expert.
    const auto multiply = [&](const Routing::Expert& expert, const NtSegment* segments, int used, int count, float* c,
                              std::size_t ldc) {
        if (is_few(expert)) {
            kernels.nt_few(segments, used, expert.rows, c, ldc);
        } else {
            kernels.nt(segments, used, count, c, ldc);
        }
    };

    const auto pack = [&](int p, int index, float* c) {
        if (index >= groups) {  // the rows of x that backward wants, with room for whole blocks, and a zero row
            const int first = (index - groups) * kGroup;
            for (int t = first; t < std::min(rows + 1, first + kGroup); ++t) {
                bf16* row = kept.x + z(t) * z(size.hidden_ld());
                const std::size_t have = t < rows ? z(size.H) : 0;
                if (have) std::memcpy(row, x + z(t) * have, have * sizeof(bf16));
                std::memset(row + have, 0, (z(size.hidden()) - have) * sizeof(bf16));
            }
            return;
        }
        Part& part = parts[z(p)];
        const Routing::Expert& expert = expert_of(index);
        const bf16* token[kGroup];
        for (int t = 0; t < kGroup; ++t) {
            const int id = routing.token[z(index * kGroup + t)];
            token[t] = id < 0 ? nullptr : x + z(id) * z(size.H);
        }
        bf16* packed_x = part.x_pack + z(index) * x_stride;
        const bool few = is_few(expert);
        kernels.pack_tokens(token, size.H, size.hb, few, packed_x);

        const bool keep = save && p == 0 && config.lora_backward;
        const Columns to = columns_of(expert, index);
        const std::size_t kept_at = z(expert.first_k) * 2 * z(size.rank_rows());
        clear(part.gate_xa, z(index) * r_stride, r_stride);
        clear(part.up_xa, z(index) * r_stride, r_stride);
        if (keep) {
            for (int row = 0; row < 2 * size.rank_rows(); ++row)
                clear(kept.xa_t, kept_at + z(row) * to.ld + to.first, to.width);
        }
        for (int nb = 0; nb < size.ab; ++nb) {
            NtSegment segments[2];
            for (int term = 0; term < terms(); ++term) {
                const bf16* matrix = term == 0 ? snapshot.gate_up_a.hi : snapshot.gate_up_a.lo;
                segments[term] = {matrix + z(expert.expert) * a + z(nb) * panel(size.hb), packed_x, x_stride, size.hb};
            }
            multiply(expert, segments, terms(), 1, c, kGroup);
            for (int j = 0; j < kBlock && nb * kBlock + j < 2 * size.r; ++j) {
                const bool is_up = nb * kBlock + j >= size.r;
                const int n = nb * kBlock + j - (is_up ? size.r : 0);
                const Pair& pack_to = is_up ? part.up_xa : part.gate_xa;
                const std::size_t row = z(is_up ? size.rank_rows() + n : n);
                for (int t = 0; t < to.tokens; ++t) {
                    const float value = scaling * c[j * kGroup + t];
                    put(pack_to, z(index) * r_stride + pack_index(n, t, few), value);
                    if (keep) put(kept.xa_t, kept_at + row * to.ld + to.first + z(t), value);
                }
            }
        }
    };

    const auto up = [&](int p, int index, float* c) {
        Part& part = parts[z(p)];
        const Routing::Expert& expert = routing.experts[z(index / size.ib)];
        const int ib = index % size.ib;
        const PackedExpert& base = experts[z(p)][z(expert.expert)];
        const std::size_t b_at = z(expert.expert) * b + z(ib) * panel(size.rb);
        for (int first = 0; first < expert.groups; first += kChunkGroups) {
            const int count = std::min(kChunkGroups, expert.groups - first);
            const std::size_t group = z(expert.first_row / kGroup + first);
            NtSegment gate_segments[4], up_segments[4];
            gate_segments[0] = {base.gate + z(ib) * panel(size.hb), part.x_pack + group * x_stride, x_stride, size.hb};
            up_segments[0] = {base.up + z(ib) * panel(size.hb), part.x_pack + group * x_stride, x_stride, size.hb};
            const int more = nt_lora_segments({at(snapshot.gate_b[z(p)], b_at), at(part.gate_xa, group * r_stride),
                                               r_stride, size.rb, config.lora_fp32},
                                              gate_segments + 1);
            nt_lora_segments(
                {at(snapshot.up_b[z(p)], b_at), at(part.up_xa, group * r_stride), r_stride, size.rb, config.lora_fp32},
                up_segments + 1);
            const std::size_t ldc = z(count) * kGroup;
            float* g = c;
            float* u = c + kBlock * ldc;
            multiply(expert, gate_segments, 1 + more, count, g, ldc);
            multiply(expert, up_segments, 1 + more, count, u, ldc);
            const std::size_t keep_at = group * kGroup * z(size.inter_ld()) + z(ib) * kBlock;
            kernels.silu_mul(g, u, ldc, count, part.h_pack + group * h_stride + z(ib) * kPackSize, h_stride,
                             is_few(expert), save ? kept.parts[z(p)].g + keep_at : nullptr,
                             save ? kept.parts[z(p)].u + keep_at : nullptr, z(size.inter_ld()));
        }
    };

    const auto rank = [&](int p, int group, float* c) {
        Part& part = parts[z(p)];
        const Routing::Expert& expert = expert_of(group);
        const bool keep = save && config.lora_backward;
        const Pair& kept_to = kept.parts[z(p)].ha_t;
        const Columns to = columns_of(expert, group);
        const std::size_t kept_at = z(expert.first_k) * z(size.rank_rows());
        const bool few = is_few(expert);
        clear(part.ha, z(group) * r_stride, r_stride);
        if (keep) {
            for (int row = 0; row < size.rank_rows(); ++row)
                clear(kept_to, kept_at + z(row) * to.ld + to.first, to.width);
        }
        for (int nb = 0; nb < size.rb; ++nb) {
            NtSegment segments[2];
            for (int term = 0; term < terms(); ++term) {
                const bf16* matrix = term == 0 ? snapshot.down_a[z(p)].hi : snapshot.down_a[z(p)].lo;
                segments[term] = {matrix + z(expert.expert) * da + z(nb) * panel(size.ib),
                                  part.h_pack + z(group) * h_stride, h_stride, size.ib};
            }
            multiply(expert, segments, terms(), 1, c, kGroup);
            for (int j = 0; j < kBlock && nb * kBlock + j < size.r; ++j) {
                const int n = nb * kBlock + j;
                for (int t = 0; t < to.tokens; ++t) {
                    const float value = scaling * c[j * kGroup + t];
                    put(part.ha, z(group) * r_stride + pack_index(n, t, few), value);
                    if (keep)
                        put(kept_to, kept_at + z(n) * to.ld + to.first + z(t),
                            routing.weight[z(group * kGroup + t)] * value);
                }
            }
        }
    };

    Turns turns(config.parts, size.hb);
    std::vector<std::atomic<int>> parts_done(z(size.hb));
    const auto finish = [&](int hb) {
        std::vector<const float*> sums(z(config.parts));
        const std::size_t cols = z(std::min(kBlock, size.H - hb * kBlock));
        for (std::size_t t = 0; t < T; ++t) {
            for (std::size_t p = 0; p < sums.size(); ++p) sums[p] = parts[p].sum + (z(hb) * T + t) * kBlock;
            kernels.round_sum(sums.data(), config.parts, cols, output + t * z(size.H) + z(hb) * kBlock);
        }
    };
    const auto down_proj = [&](int p, int index, float* c) {
        Part& part = parts[z(p)];
        const int ticket = index / size.hb, hb = index % size.hb;
        const Routing::Expert& expert = routing.experts[z(ticket)];
        float* sum = part.sum + z(hb) * T * kBlock;
        for (int first = 0; first < expert.groups; first += kChunkGroups) {
            const int count = std::min(kChunkGroups, expert.groups - first);
            const std::size_t group = z(expert.first_row / kGroup + first);
            NtSegment segments[4];
            segments[0] = {experts[z(p)][z(expert.expert)].down + z(hb) * panel(size.ib),
                           part.h_pack + group * h_stride, h_stride, size.ib};
            const int more = nt_lora_segments({at(snapshot.down_b, z(expert.expert) * db + z(hb) * panel(size.rb)),
                                               at(part.ha, group * r_stride), r_stride, size.rb, config.lora_fp32},
                                              segments + 1);
            const std::size_t ldc = z(count) * kGroup;
            multiply(expert, segments, 1 + more, count, c, ldc);
            if (first == 0) {
                turns.wait(p, hb, ticket);
                if (ticket == 0) std::memset(sum, 0, T * kBlock * sizeof(float));
            }
            const std::size_t row = group * kGroup;
            kernels.add_transposed(c, ldc, std::min(expert.rows - first * kGroup, kChunkRows),
                                   routing.token.data() + row, routing.weight.data() + row, sum, kBlock);
        }
        turns.pass(p, hb, ticket);
        if (ticket == active - 1 && parts_done[z(hb)].fetch_add(1, std::memory_order_acq_rel) == config.parts - 1)
            finish(hb);
    };

    TaskQueue packing(config.parts, team), upping(config.parts, team), ranking(config.parts, team),
        downing(config.parts, team);
    const int copies = save ? groups_of(rows + 1) : 0;
    const std::function<void(int)> body = [&](int worker) {
        float* c = scratch + z(worker) * kScratch;
        kernels.enter();
        packing.work(worker, groups + copies, [&](int p, int i) {
            if (i < groups || p == 0) pack(p, i, c);
        });
        team.barrier();
        upping.work(worker, active * size.ib, [&](int p, int i) { up(p, i, c); });
        team.barrier();
        ranking.work(worker, groups, [&](int p, int i) { rank(p, i, c); });
        team.barrier();
        downing.work(worker, active * size.hb, [&](int p, int i) { down_proj(p, i, c); });
        kernels.leave();
    };
    team.run(body);
    if (active == 0 && T > 0) std::memset(output, 0, T * z(size.H) * sizeof(bf16));
    shared.cache.give(std::move(work));
    if (!save) return 0;
    kept.ticket = ++last_ticket;
    saved.push_back(std::move(kept));
    note_saved();
    return last_ticket;
}

}  // namespace ktv
