// Backward in four parallel stages:
//   1 gather  per (part, group of 16 rows):         rows of dO by expert, and dO Bd
//   2 down    per (part, expert, 128 columns of I): dh with its LoRA; dg, du, h, and partial sums of dw
//   3 rank    per (part, group):                    dg Bg, du Bu
//   4 input   per (part, expert, 128 columns of H): dx with its LoRA, added in the order of the experts; and the six
//             LoRA gradients, as products whose reduction runs over the tokens
//
// The routing weight w is left out of the wide products and applied in fp32 where their results are used: dO goes into
// the down product as it came, without a rounding of w dO, and dw = <dO, y> = <dO Wd + s (dO Bd) Ad, h> falls out.
#include <cstring>

#include "state.hpp"

namespace ktv {
namespace {

constexpr int kPanelCols = kPanelBlocks * kBlock;
constexpr std::size_t kScratch = std::size_t{kChunkRows} * kPanelCols;  // fp32: one nn result

int panels_of(int blocks) {
    return (blocks + kPanelBlocks - 1) / kPanelBlocks;
}

struct Part {
    bf16* out;                                // dO by expert: [rows][hidden_ld]
    const bf16** out_rows;                    // [k_rows], a zero row for padding
    Pair ob, ob_t;                            // s dO Bd: [rows][rank]; (w s dO Bd)ᵀ: per expert [rank_rows][tokens]
    bf16 *g, *u, *h;                          // dg, du, h: [rows][inter_ld]
    const bf16 **g_rows, **u_rows, **h_rows;  // [k_rows]
    float* dot;                               // partial sums of dw: [rows][dots]
    Pair xa, xa_t;  // s dg Bg beside s du Bu: [rows][rank2]; transposed: per expert [rank2_rows][tokens]
    float* sum;     // [panels of H][T][128]
};

void take(Carver& carver, Pair& pair, std::size_t count) {
    carver.take(pair.hi, count);
    carver.take(pair.lo, count);
}
Pair at(const Pair& p, std::size_t by) {
    return {p.hi + by, p.lo ? p.lo + by : nullptr};
}

// nn segments of (activation) · W for a small activation kept as hi + lo, and an fp32 W.
int nn_lora_segments(const Pair& activation, std::size_t ld, const Pair& w, std::size_t stride, int kblocks,
                     NnSegment* out) {
    out[0] = {activation.hi, ld, w.hi, stride, nullptr, 0, kblocks};
    out[1] = {activation.lo, ld, w.hi, stride, nullptr, 0, kblocks};
    if (!w.lo) return 2;
    out[2] = {activation.hi, ld, w.lo, stride, nullptr, 0, kblocks};
    return 3;
}

// Writes gradients in the parameters' dtype; with `sums` it first adds them to what is there, in fp32.
struct GradWriter {
    void* to;
    float* sums;
    bool fp32;
    void operator()(std::size_t i, float value) const {
        if (sums) value = sums[i] += value;
        if (fp32) {
            static_cast<float*>(to)[i] = value;
        } else {
            static_cast<bf16*>(to)[i] = to_bf16(value);
        }
    }
    void zero(std::size_t first, std::size_t count) const {
        if (sums) {
            for (std::size_t i = first; i < first + count; ++i) (*this)(i, 0.0f);
        } else {
            const std::size_t width = fp32 ? sizeof(float) : sizeof(bf16);
            std::memset(static_cast<std::byte*>(to) + first * width, 0, count * width);
        }
    }
};

}  // namespace

std::vector<std::size_t> Layer::State::grad_sizes() const {
    const std::size_t E = z(config.num_experts), H = z(config.hidden), I = z(config.intermediate), r = z(config.rank);
    return {E * r * H, E * I * r, E * r * H, E * I * r, E * r * I, E * H * r};
}

void Layer::State::backward(int rows, const bf16* grad_output, bf16* grad_input, const LoraPointers& grads,
                            float* grad_weights, bool accumulate, Layer::Ticket ticket) {
    Process& shared = process();
    const std::lock_guard lock(shared.mutex);
    Team& team = shared.team(workers, config.parts);
    const auto found = find_saved(ticket);
    if (found == saved.end())
        throw BadState(ticket == 0
                           ? "backward without a saved forward: call forward_sft(..., save_for_backward=True) first"
                           : "backward of ticket " + std::to_string(ticket) + ", which was used or dropped before");
    const Saved& kept = *found;
    if (rows != kept.routing.tokens)
        throw BadInput("grad_output has " + std::to_string(rows) + " rows; the saved forward had " +
                       std::to_string(kept.routing.tokens));
    const LoraPack& snapshot = *kept.lora;
    const Routing& routing = kept.routing;
    const int groups = routing.rows / kGroup, active = static_cast<int>(routing.experts.size());
    const int i_panels = panels_of(size.ib), h_panels = panels_of(size.hb);
    const int dots = config.lora_backward ? i_panels : 2 * i_panels;  // partial sums of dw, a row
    const std::size_t T = z(rows), R = z(routing.rows), K = z(routing.k_rows), H = z(size.H), I = z(size.I),
                      r = z(size.r);
    const std::size_t hidden = z(size.hidden_ld()), inter = z(size.inter_ld()), rank = z(size.rank()),
                      rank2 = z(size.rank2());
    const bool with_lora = config.lora_backward;

    std::vector<Part> parts(z(config.parts));
    float* scratch;
    bf16* zeros;
    const auto carve = [&](Carver& carver) {
        for (Part& part : parts) {
            carver.take(part.out, R * hidden);
            carver.take(part.out_rows, K);
            take(carver, part.ob, R * rank);
            take(carver, part.ob_t, K * z(size.rank_rows()));
            carver.take(part.g, R * inter);
            carver.take(part.u, R * inter);
            carver.take(part.h, R * inter);
            carver.take(part.g_rows, K);
            carver.take(part.u_rows, K);
            carver.take(part.h_rows, K);
            carver.take(part.dot, R * z(dots));
            take(carver, part.xa, R * rank2);
            take(carver, part.xa_t, K * z(size.rank2_rows()));
            carver.take(part.sum, z(h_panels) * T * kPanelCols);
        }
        carver.take(zeros, std::max(hidden, inter));
        carver.take(scratch, z(workers) * kScratch);
    };
    Carver measure;
    carve(measure);
    Block work = shared.cache.take(measure.used(), "a backward of " + std::to_string(rows) + " tokens");
    Carver cut(work.data());
    carve(cut);
    std::memset(zeros, 0, std::max(hidden, inter) * sizeof(bf16));

    const std::vector<std::size_t> sizes = grad_sizes();
    if (accumulate && !grad_sums) {
        std::size_t count = 0;
        for (const std::size_t n : sizes) count += n;
        require_memory(count * sizeof(float), "the fp32 sums of the LoRA gradients");
        grad_sums = Block(count * sizeof(float));  // fresh pages are zero
    }
    GradWriter write[6];
    {
        void* const to[6] = {grads.gate_a, grads.gate_b, grads.up_a, grads.up_b, grads.down_a, grads.down_b};
        float* sums = accumulate ? reinterpret_cast<float*>(grad_sums.data()) : nullptr;
        for (std::size_t i = 0; i < 6; ++i) {
            write[i] = {to[i], sums, config.lora_fp32};
            if (sums) sums += sizes[i];
        }
    }
    const GradWriter &gate_a = write[0], &gate_b = write[1], &up_a = write[2], &up_b = write[3], &down_a = write[4],
                     &down_b = write[5];

    const std::size_t a = z(size.ab) * panel(size.hb), b = z(size.ib) * panel(size.rb),
                      da = z(size.rb) * panel(size.ib), db = z(size.hb) * panel(size.rb);
    const auto expert_of = [&](int group) -> const Routing::Expert& {
        return routing.experts[z(routing.expert_of_group[z(group)])];
    };
    // Rows of `group` that are not padding, and its place when tokens are the reduction index.
    struct Place {
        int rows;
        std::size_t ld, first, width;
    };
    const auto place_of = [&](int group) {
        const Routing::Expert& e = expert_of(group);
        const int local = group - e.first_row / kGroup;
        const bool last = local == e.groups - 1;
        return Place{std::min(kGroup, e.rows - local * kGroup), z(e.kblocks) * kBlock, z(local) * kGroup,
                     last && e.groups % 2 == 1 ? z(kBlock) : z(kGroup)};
    };
    // c [16][ldc], columns n0..n0+cols of a small activation -> rows [row][ld] as they are, and transposed with a
    // factor per row; the columns of padding rows are zero.
    const auto put_small = [&](const float* c, std::size_t ldc, int cols, float scale, int group, const Place& place,
                               const Pair& plain, std::size_t ld, std::size_t n0, const Pair& transposed,
                               std::size_t t_rows, bool weighted) {
        for (int t = 0; t < place.rows; ++t) {
            for (int n = 0; n < cols; ++n)
                put(plain, (z(group) * kGroup + z(t)) * ld + n0 + z(n), scale * c[z(t) * ldc + z(n)]);
        }
        for (int n = 0; n < cols && n0 + z(n) < t_rows; ++n) {
            const std::size_t row = (n0 + z(n)) * place.ld + place.first;
            for (int t = 0; t < static_cast<int>(place.width); ++t) {
                const float value = t < place.rows ? scale * c[z(t) * ldc + z(n)] : 0.0f;
                const float w = weighted && t < place.rows ? routing.weight[z(group) * kGroup + z(t)] : 1.0f;
                put(transposed, row + z(t), w * value);
            }
        }
    };

    const auto gather = [&](int p, int group, float* c) {
        Part& part = parts[z(p)];
        const Routing::Expert& expert = expert_of(group);
        const Place place = place_of(group);
        for (int t = 0; t < place.rows; ++t) {
            bf16* row = part.out + (z(group) * kGroup + z(t)) * hidden;
            std::memcpy(row, grad_output + z(routing.token[z(group * kGroup + t)]) * H, H * sizeof(bf16));
            std::memset(row + H, 0, (hidden - H) * sizeof(bf16));
        }
        const std::size_t k = z(expert.first_k) + place.first;
        for (std::size_t t = 0; t < place.width; ++t) {
            const bool real = t < z(place.rows);
            const std::size_t row = z(group) * kGroup + t;
            part.out_rows[k + t] = real ? part.out + row * hidden : zeros;
            part.g_rows[k + t] = real ? part.g + row * inter : zeros;
            part.u_rows[k + t] = real ? part.u + row * inter : zeros;
            part.h_rows[k + t] = real ? part.h + row * inter : zeros;
        }
        const Pair t_rows = at(part.ob_t, z(expert.first_k) * z(size.rank_rows()));
        for (int nb = 0; nb < size.rb; nb += kPanelBlocks) {
            const int cblocks = std::min(kPanelBlocks, size.rb - nb);
            NnSegment segments[2];
            for (int term = 0; term < terms(); ++term) {
                const bf16* matrix = term == 0 ? snapshot.down_b.hi : snapshot.down_b.lo;
                segments[term] = {part.out + z(group) * kGroup * hidden,
                                  hidden,
                                  matrix + z(expert.expert) * db + z(nb) * kBlockSize,
                                  panel(size.rb),
                                  nullptr,
                                  0,
                                  size.hb};
            }
            kernels.nn(segments, terms(), place.rows, cblocks, c, kPanelCols);
            put_small(c, kPanelCols, cblocks * kBlock, config.scaling, group, place, part.ob, rank, z(nb) * kBlock,
                      t_rows, z(size.rank_rows()), true);
        }
    };

    const auto down_grad = [&](int p, int index, float* c) {
        Part& part = parts[z(p)];
        const Saved::Part& was = kept.parts[z(p)];
        const Routing::Expert& expert = routing.experts[z(index / i_panels)];
        const int ip = index % i_panels, cblocks = std::min(kPanelBlocks, size.ib - ip * kPanelBlocks);
        const std::size_t cb = z(ip) * kPanelBlocks * kBlockSize, col = z(ip) * kPanelCols;
        for (int first = 0; first < expert.rows; first += kChunkRows) {
            const int count = std::min(kChunkRows, expert.rows - first);
            const std::size_t row = z(expert.first_row + first);
            NnSegment segments[4];
            segments[0] = {part.out + row * hidden,
                           hidden,
                           experts[z(p)][z(expert.expert)].down + cb,
                           panel(size.ib),
                           nullptr,
                           0,
                           size.hb};
            const int more =
                nn_lora_segments(at(part.ob, row * rank), rank, at(snapshot.down_a[z(p)], z(expert.expert) * da + cb),
                                 panel(size.ib), size.rb, segments + 1);
            const std::size_t to = row * inter + col;
            const auto product = [&](const NnSegment* first_segment, int used, int slot) {
                kernels.nn(first_segment, used, count, cblocks, c, kPanelCols);
                kernels.silu_mul_grad(c, kPanelCols, count, cblocks * kBlock, routing.weight.data() + row, was.g + to,
                                      was.u + to, inter, part.g + to, part.u + to, part.h + to,
                                      part.dot + row * z(dots) + z(slot), z(dots));
            };
            if (with_lora) {
                product(segments, 1 + more, ip);
            } else {
                // dw is <dO, y> of the forward as it was, LoRA included; the gradients that go on have the base alone.
                product(segments + 1, more, i_panels + ip);
                product(segments, 1, ip);
            }
        }
    };

    const auto rank_grad = [&](int p, int group, float* c) {
        Part& part = parts[z(p)];
        const Routing::Expert& expert = expert_of(group);
        const Place place = place_of(group);
        const Pair t_rows = at(part.xa_t, z(expert.first_k) * z(size.rank2_rows()));
        // Rows and columns beyond 2 r multiply padding: zero, not what the last call left there.
        for (std::size_t n = 2 * r; n < z(size.rank2_rows()); ++n) {
            for (std::size_t t = 0; t < place.width; ++t) put(t_rows, n * place.ld + place.first + t, 0.0f);
        }
        for (int t = 0; t < place.rows; ++t) {
            for (std::size_t n = 2 * r; n < rank2; ++n) put(part.xa, (z(group) * kGroup + z(t)) * rank2 + n, 0.0f);
        }
        for (int which = 0; which < 2; ++which) {
            const Pair& w = which == 0 ? snapshot.gate_b[z(p)] : snapshot.up_b[z(p)];
            const bf16* from = (which == 0 ? part.g : part.u) + z(group) * kGroup * inter;
            for (int nb = 0; nb < size.rb; nb += kPanelBlocks) {
                const int cblocks = std::min(kPanelBlocks, size.rb - nb);
                NnSegment segments[2];
                for (int term = 0; term < terms(); ++term) {
                    const bf16* matrix = term == 0 ? w.hi : w.lo;
                    segments[term] = {from,           inter,   matrix + z(expert.expert) * b + z(nb) * kBlockSize,
                                      panel(size.rb), nullptr, 0,
                                      size.ib};
                }
                kernels.nn(segments, terms(), place.rows, cblocks, c, kPanelCols);
                put_small(c, kPanelCols, std::min(cblocks * kBlock, size.r - nb * kBlock), config.scaling, group, place,
                          part.xa, rank2, z(which * size.r + nb * kBlock), t_rows, z(size.rank2_rows()), false);
            }
        }
    };

    Turns turns(config.parts, h_panels);
    std::vector<std::atomic<int>> parts_done(z(h_panels));
    const auto finish = [&](int hp) {
        std::vector<const float*> sums(z(config.parts));
        const std::size_t cols = z(std::min(kPanelCols, size.H - hp * kPanelCols));
        for (std::size_t t = 0; t < T; ++t) {
            for (std::size_t p = 0; p < sums.size(); ++p) sums[p] = parts[p].sum + (z(hp) * T + t) * kPanelCols;
            kernels.round_sum(sums.data(), config.parts, cols, grad_input + t * H + z(hp) * kPanelCols);
        }
    };
    const auto input_grad = [&](int p, int index, float* c) {
        Part& part = parts[z(p)];
        const int ticket = index / h_panels, hp = index % h_panels;
        const Routing::Expert& expert = routing.experts[z(ticket)];
        const PackedExpert& base = experts[z(p)][z(expert.expert)];
        const int cblocks = std::min(kPanelBlocks, size.hb - hp * kPanelBlocks);
        const std::size_t cb = z(hp) * kPanelBlocks * kBlockSize;
        float* sum = part.sum + z(hp) * T * kPanelCols;
        for (int first = 0; first < expert.rows; first += kChunkRows) {
            const int count = std::min(kChunkRows, expert.rows - first);
            const std::size_t row = z(expert.first_row + first);
            NnSegment segments[5];
            segments[0] = {part.g + row * inter, inter, base.gate + cb, panel(size.hb), nullptr, 0, size.ib};
            segments[1] = {part.u + row * inter, inter, base.up + cb, panel(size.hb), nullptr, 0, size.ib};
            int used = 2;
            if (with_lora)
                used +=
                    nn_lora_segments(at(part.xa, row * rank2), rank2, at(snapshot.gate_up_a, z(expert.expert) * a + cb),
                                     panel(size.hb), size.ab, segments + 2);
            kernels.nn(segments, used, count, cblocks, c, kPanelCols);
            if (first == 0) {
                turns.wait(p, hp, ticket);
                if (ticket == 0) std::memset(sum, 0, T * kPanelCols * sizeof(float));
            }
            kernels.add_rows(c, kPanelCols, count, cblocks * kBlock, routing.token.data() + row, sum, kPanelCols);
        }
        turns.pass(p, hp, ticket);
        if (ticket == active - 1 && parts_done[z(hp)].fetch_add(1, std::memory_order_acq_rel) == config.parts - 1)
            finish(hp);
    };

    // One LoRA gradient, or its transpose: small [rows][tokens] of every part times gathered rows, columns of panel
    // `cp`. emit(row, column, value) stores it.
    std::vector<const bf16*> x_rows(with_lora ? K : 0, kept.x + T * hidden);
    if (with_lora) {
        for (const Routing::Expert& e : routing.experts) {
            for (int i = 0; i < e.rows; ++i)
                x_rows[z(e.first_k + i)] = kept.x + z(routing.token[z(e.first_row + i)]) * hidden;
        }
    }
    struct Term {
        Pair small;
        const bf16* const* gathered;
    };
    const auto lora_product = [&](const Term* terms_of, int count, const Routing::Expert& expert, int small_rows,
                                  int used_rows, int blocks, int cols, int cp, float* c, const auto& emit) {
        const std::size_t ld = z(expert.kblocks) * kBlock;
        const int cblocks = std::min(kPanelBlocks, blocks - cp * kPanelBlocks);
        const int width = std::min(cblocks * kBlock, cols - cp * kPanelCols);
        std::vector<NnSegment> segments;
        for (int first = 0; first < small_rows; first += kChunkRows) {
            segments.clear();
            for (int i = 0; i < count; ++i) {
                const Term& term = terms_of[i];
                for (const bf16* half : {term.small.hi, term.small.lo}) {
                    segments.push_back({half + z(first) * ld, ld, nullptr, 0, term.gathered + expert.first_k,
                                        z(cp) * kPanelCols, expert.kblocks});
                }
            }
            const int chunk = std::min(kChunkRows, small_rows - first);
            kernels.nn(segments.data(), static_cast<int>(segments.size()), chunk, cblocks, c, kPanelCols);
            for (int n = 0; n < chunk && first + n < used_rows; ++n) {
                for (int j = 0; j < width; ++j)
                    emit(z(first + n), z(cp) * kPanelCols + z(j), c[z(n) * kPanelCols + z(j)]);
            }
        }
    };

    const std::size_t all_I = I * z(config.parts);
    const int lora_tasks = with_lora ? 2 * h_panels + 3 * config.parts * i_panels : 0;
    const auto lora_grad = [&](const Routing::Expert& expert, int task, float* c) {
        const std::size_t e = z(expert.expert), k = z(expert.first_k);
        std::vector<Term> terms_of;
        if (task < h_panels) {  // dA of gate and up: (s dxa)ᵀ x, summed over the parts
            for (const Part& part : parts) terms_of.push_back({at(part.xa_t, k * z(size.rank2_rows())), x_rows.data()});
            lora_product(terms_of.data(), config.parts, expert, size.rank2_rows(), 2 * size.r, size.hb, size.H, task, c,
                         [&](std::size_t n, std::size_t col, float value) {
                             if (n < r) {
                                 gate_a((e * r + n) * H + col, value);
                             } else {
                                 up_a((e * r + n - r) * H + col, value);
                             }
                         });
            return;
        }
        task -= h_panels;
        if (task < h_panels) {  // dB of down, transposed: (w s h Adᵀ)ᵀ dO
            for (std::size_t p = 0; p < parts.size(); ++p)
                terms_of.push_back({at(kept.parts[p].ha_t, k * z(size.rank_rows())), parts[p].out_rows});
            lora_product(terms_of.data(), config.parts, expert, size.rank_rows(), size.r, size.hb, size.H, task, c,
                         [&](std::size_t n, std::size_t col, float value) { down_b((e * H + col) * r + n, value); });
            return;
        }
        task -= h_panels;
        const std::size_t p = z(task / (3 * i_panels));
        const int which = task / i_panels % 3, ip = task % i_panels;
        const Part& part = parts[p];
        if (which == 2) {  // dA of down: (w s dO Bd)ᵀ h
            const Term term{at(part.ob_t, k * z(size.rank_rows())), part.h_rows};
            lora_product(
                &term, 1, expert, size.rank_rows(), size.r, size.ib, size.I, ip, c,
                [&](std::size_t n, std::size_t col, float value) { down_a((e * r + n) * all_I + p * I + col, value); });
        } else {  // dB of gate or up, transposed: (s x Aᵀ)ᵀ dg
            const GradWriter& to = which == 0 ? gate_b : up_b;
            const std::size_t from = (2 * k + z(which) * z(expert.kblocks) * kBlock) * z(size.rank_rows());
            const Term term{at(kept.xa_t, from), which == 0 ? part.g_rows : part.u_rows};
            lora_product(
                &term, 1, expert, size.rank_rows(), size.r, size.ib, size.I, ip, c,
                [&](std::size_t n, std::size_t col, float value) { to((e * all_I + p * I + col) * r + n, value); });
        }
    };

    // Experts without a gradient: idle ones, or all of them when LoRA is left out.
    std::vector<int> idle;
    {
        std::vector<bool> has(z(config.num_experts));
        if (with_lora) {
            for (const Routing::Expert& e : routing.experts) has[z(e.expert)] = true;
        }
        for (int e = 0; e < config.num_experts; ++e) {
            if (!has[z(e)]) idle.push_back(e);
        }
    }
    const auto clear_idle = [&](int expert) {
        for (std::size_t i = 0; i < 6; ++i) {
            const std::size_t per_expert = sizes[i] / z(config.num_experts);
            write[i].zero(z(expert) * per_expert, per_expert);
        }
    };
    const auto weight_grad = [&](int first) {
        for (std::size_t i = z(first) * z(routing.slots); i < std::min(T, z(first + kChunkRows)) * z(routing.slots);
             ++i) {
            float sum = 0.0f;
            const int row = routing.row_of[i];
            for (std::size_t p = 0; row >= 0 && p < parts.size(); ++p) {
                for (int i_dot = 0; i_dot < dots; ++i_dot) sum += parts[p].dot[z(row) * z(dots) + z(i_dot)];
            }
            grad_weights[i] = sum;
        }
    };

    TaskQueue gathering(config.parts, team), downing(config.parts, team), ranking(config.parts, team),
        inputs(config.parts, team), loras(1, team), idles(1, team), routings(1, team);
    const int token_chunks = (rows + kChunkRows - 1) / kChunkRows;
    const std::function<void(int)> body = [&](int worker) {
        float* c = scratch + z(worker) * kScratch;
        kernels.enter();
        gathering.work(worker, groups, [&](int p, int i) { gather(p, i, c); });
        team.barrier();
        downing.work(worker, active * i_panels, [&](int p, int i) { down_grad(p, i, c); });
        team.barrier();
        if (with_lora) {
            ranking.work(worker, groups, [&](int p, int i) { rank_grad(p, i, c); });
            team.barrier();
        }
        inputs.work(worker, active * h_panels, [&](int p, int i) { input_grad(p, i, c); });
        loras.work(worker, active * lora_tasks,
                   [&](int, int i) { lora_grad(routing.experts[z(i / lora_tasks)], i % lora_tasks, c); });
        idles.work(worker, static_cast<int>(idle.size()), [&](int, int i) { clear_idle(idle[z(i)]); });
        routings.work(worker, token_chunks, [&](int, int i) { weight_grad(i * kChunkRows); });
        kernels.leave();
    };
    team.run(body);
    if (active == 0 && T > 0) std::memset(grad_input, 0, T * H * sizeof(bf16));
    shared.cache.give(std::move(work));
    shared.cache.give(std::move(found->block));
    saved.erase(found);
    note_saved();
}

}  // namespace ktv
