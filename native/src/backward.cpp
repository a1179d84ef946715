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

// What a worker has at hand in a call.
struct Hand {
    int worker;
    float* c;       // [kScratch]
    float* turned;  // [kScratch], the transpose of a LoRA gradient's piece
    Watch watch;
};

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

// Writes one LoRA tensor's gradient in the parameter's dtype; with `sums` it first adds to them, in fp32.
struct GradWriter {
    const Kernels& kernels;
    void* to;
    float* sums;
    bool fp32;
    // values[0..count) to elements first..
    void put(std::size_t first, const float* values, std::size_t count) const {
        if (sums) {
            for (std::size_t i = 0; i < count; ++i) sums[first + i] += values[i];
        }
        round(first, sums ? sums + first : values, count);
    }
    // The sums as they are.
    void repeat(std::size_t first, std::size_t count) const { round(first, sums + first, count); }

  private:
    void round(std::size_t first, const float* values, std::size_t count) const {
        if (fp32) {
            std::memcpy(static_cast<float*>(to) + first, values, count * sizeof(float));
        } else {
            kernels.round_sum(&values, 1, count, static_cast<bf16*>(to) + first);
        }
    }
};

}  // namespace

std::vector<std::size_t> Layer::State::grad_sizes() const {
    const std::size_t E = z(config.num_experts), H = z(config.hidden), I = z(config.intermediate), r = z(config.rank);
    return {E * r * H, E * I * r, E * r * H, E * I * r, E * r * I, E * H * r};
}

Costs Layer::State::backward_costs(const Routing& routing) const {
    Costs costs;
    const auto set = [&](Phase phase, double flops, double bytes) {
        costs.flops[static_cast<int>(phase)] = flops;
        costs.bytes[static_cast<int>(phase)] = bytes;
    };
    double rows = 0;
    for (const Routing::Expert& e : routing.experts) rows += e.rows;
    const double H = config.hidden, I = config.intermediate, r = config.lora_backward ? config.rank : 0,
                 T = routing.tokens, experts = static_cast<double>(routing.experts.size()), element = sizeof(bf16),
                 lora = element * terms();
    set(Phase::scatter, 0, T * H * element);
    set(Phase::down_lora_b, 2 * rows * config.rank * H, experts * config.rank * H * lora);
    set(Phase::down_grad, 2 * rows * I * (H + config.rank), experts * I * (H * element + config.rank * lora));
    set(Phase::activation_grad, 0, rows * I * 2 * sizeof(float));
    set(Phase::gate_up_lora_b, 4 * rows * I * r, experts * 2 * I * r * lora);
    set(Phase::gate_up_grad, 4 * rows * H * (I + r), experts * 2 * H * (I * element + r * lora));
    set(Phase::gate_up_lora_grad, 4 * rows * r * (H + I), experts * 2 * r * (H + I) * lora);
    set(Phase::down_lora_grad, 2 * rows * r * (H + I), experts * r * (H + I) * lora);
    set(Phase::merge, rows * H, T * H * element);
    return costs;
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
    Recording recording_of(recording, workers, config.lora_backward ? 4 : 3);
    Watch caller = recording_of.watch(0);
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
    // Per worker, for workers allocate nothing: nobody could catch what that throws.
    const float** part_sums;       // [worker][part]
    NnSegment* gradient_segments;  // [worker][2 parts]
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
        carver.take(scratch, z(workers) * 2 * kScratch);
        carver.take(part_sums, z(workers * config.parts));
        carver.take(gradient_segments, z(workers * 2 * config.parts));
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
        has_sums.assign(z(config.num_experts), false);
    }
    std::vector<GradWriter> write;
    {
        void* const to[6] = {grads.gate_a, grads.gate_b, grads.up_a, grads.up_b, grads.down_a, grads.down_b};
        float* sums = accumulate ? reinterpret_cast<float*>(grad_sums.data()) : nullptr;
        for (std::size_t i = 0; i < 6; ++i) {
            write.push_back({kernels, to[i], sums, config.lora_fp32});
            if (sums) sums += sizes[i];
        }
    }
    const GradWriter &gate_a = write[0], &gate_b = write[1], &up_a = write[2], &up_b = write[3], &down_a = write[4],
                     &down_b = write[5];

    const std::size_t a = z(size.ab) * panel(size.hb), b = z(size.ib) * panel(size.rb),
                      da = z(size.rb) * panel(size.ib), db = z(size.hb) * panel(size.rb);
    // c [16][ldc], columns n0..n0+cols of a small activation -> rows [row][ld] as they are, and transposed with a
    // factor per row; the columns of padding rows are zero.
    const auto put_small = [&](const float* c, std::size_t ldc, int cols, float scale, int group,
                               const Routing::Columns& place, const Pair& plain, std::size_t ld, std::size_t n0,
                               const Pair& transposed, std::size_t t_rows, bool weighted) {
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

    const auto gather = [&](Hand& hand, int p, int group) {
        float* c = hand.c;
        Part& part = parts[z(p)];
        const Routing::Expert& expert = routing.expert_at(group);
        const Routing::Columns place = routing.columns(group);
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
        hand.watch.lap(Phase::scatter);
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
        hand.watch.lap(Phase::down_lora_b);
    };

    const auto down_grad = [&](Hand& hand, int p, int index) {
        float* c = hand.c;
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
                hand.watch.lap(Phase::down_grad);
                kernels.silu_mul_grad(c, kPanelCols, count, cblocks * kBlock, routing.weight.data() + row, was.g + to,
                                      was.u + to, inter, part.g + to, part.u + to, part.h + to,
                                      part.dot + row * z(dots) + z(slot), z(dots));
                hand.watch.lap(Phase::activation_grad);
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

    const auto rank_grad = [&](Hand& hand, int p, int group) {
        float* c = hand.c;
        Part& part = parts[z(p)];
        const Routing::Expert& expert = routing.expert_at(group);
        const Routing::Columns place = routing.columns(group);
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
        hand.watch.lap(Phase::gate_up_lora_b);
    };

    Turns turns(config.parts, h_panels);
    std::vector<std::atomic<int>> parts_done(z(h_panels));
    const auto finish = [&](int worker, int hp) {
        const float** sums = part_sums + z(worker * config.parts);
        const std::size_t cols = z(std::min(kPanelCols, size.H - hp * kPanelCols));
        for (std::size_t t = 0; t < T; ++t) {
            for (std::size_t p = 0; p < parts.size(); ++p) sums[p] = parts[p].sum + (z(hp) * T + t) * kPanelCols;
            kernels.round_sum(sums, config.parts, cols, grad_input + t * H + z(hp) * kPanelCols);
        }
    };
    const auto input_grad = [&](Hand& hand, int p, int index) {
        float* c = hand.c;
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
            hand.watch.lap(Phase::gate_up_grad);
            if (first == 0) {
                turns.wait(p, hp, ticket);
                hand.watch.lap(Phase::wait);
                if (ticket == 0) std::memset(sum, 0, T * kPanelCols * sizeof(float));
            }
            kernels.add_rows(c, kPanelCols, count, cblocks * kBlock, routing.token.data() + row, sum, kPanelCols);
        }
        turns.pass(p, hp, ticket);
        if (ticket == active - 1 && parts_done[z(hp)].fetch_add(1, std::memory_order_acq_rel) == config.parts - 1)
            finish(hand.worker, hp);
        hand.watch.lap(Phase::merge);
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
    // Sizes of one product: rows of the small operand and how many of them are no padding; column blocks and columns
    // of the gathered one.
    struct Extent {
        int small_rows, used_rows, blocks, cols;
    };
    const auto lora_product = [&](Hand& hand, int count, const auto& term_of, const Routing::Expert& expert,
                                  const Extent& extent, int cp, const auto& emit) {
        float* c = hand.c;
        const std::size_t ld = z(expert.kblocks) * kBlock;
        const int cblocks = std::min(kPanelBlocks, extent.blocks - cp * kPanelBlocks);
        const int width = std::min(cblocks * kBlock, extent.cols - cp * kPanelCols);
        NnSegment* segments = gradient_segments + z(hand.worker * 2 * config.parts);
        for (int first = 0; first < extent.small_rows; first += kChunkRows) {
            int used = 0;
            for (int i = 0; i < count; ++i) {
                const Term term = term_of(z(i));
                for (const bf16* half : {term.small.hi, term.small.lo}) {
                    segments[used++] = {
                        half + z(first) * ld, ld, nullptr, 0, term.gathered + expert.first_k, z(cp) * kPanelCols,
                        expert.kblocks};
                }
            }
            const int chunk = std::min(kChunkRows, extent.small_rows - first);
            kernels.nn(segments, used, chunk, cblocks, c, kPanelCols);
            emit(first, std::min(chunk, extent.used_rows - first), z(cp) * kPanelCols, z(width));
        }
    };
    // The result, rows n of hand.c, into a gradient [..][cols] of which `to` is row 0.
    const auto put_rows = [&](const Hand& hand, const GradWriter& writer, std::size_t to, std::size_t cols, int n,
                              int count, std::size_t col, std::size_t width) {
        for (int i = 0; i < count; ++i) writer.put(to + z(n + i) * cols + col, hand.c + z(i) * kPanelCols, width);
    };
    // The same into a gradient [cols][r]: its transpose.
    const auto put_columns = [&](const Hand& hand, const GradWriter& writer, std::size_t to, int n, int count,
                                 std::size_t col, std::size_t width) {
        for (std::size_t j = 0; j < width; ++j) {
            for (int i = 0; i < count; ++i) hand.turned[j * z(count) + z(i)] = hand.c[z(i) * kPanelCols + j];
        }
        if (z(count) == r) {
            writer.put(to + col * r, hand.turned, width * r);
        } else {
            for (std::size_t j = 0; j < width; ++j)
                writer.put(to + (col + j) * r + z(n), hand.turned + j * z(count), z(count));
        }
    };

    const std::size_t all_I = I * z(config.parts);
    const int lora_tasks = with_lora ? 2 * h_panels + 3 * config.parts * i_panels : 0;
    const auto lora_grad = [&](Hand& hand, const Routing::Expert& expert, int task) {
        const std::size_t e = z(expert.expert), k = z(expert.first_k);
        if (task < h_panels) {  // dA of gate and up: (s dxa)ᵀ x, summed over the parts
            lora_product(
                hand, config.parts,
                [&](std::size_t p) { return Term{at(parts[p].xa_t, k * z(size.rank2_rows())), x_rows.data()}; }, expert,
                {size.rank2_rows(), 2 * size.r, size.hb, size.H}, task,
                [&](int n, int count, std::size_t col, std::size_t width) {
                    const int of_gate = std::clamp(size.r - n, 0, count);
                    put_rows(hand, gate_a, e * r * H, H, n, of_gate, col, width);
                    const Hand rest{hand.worker, hand.c + z(of_gate) * kPanelCols, hand.turned, hand.watch};
                    put_rows(rest, up_a, e * r * H, H, n + of_gate - size.r, count - of_gate, col, width);
                });
            hand.watch.lap(Phase::gate_up_lora_grad);
            return;
        }
        task -= h_panels;
        if (task < h_panels) {  // dB of down, transposed: (w s h Adᵀ)ᵀ dO
            lora_product(
                hand, config.parts,
                [&](std::size_t p) { return Term{at(kept.parts[p].ha_t, k * z(size.rank_rows())), parts[p].out_rows}; },
                expert, {size.rank_rows(), size.r, size.hb, size.H}, task,
                [&](int n, int count, std::size_t col, std::size_t width) {
                    put_columns(hand, down_b, e * H * r, n, count, col, width);
                });
            hand.watch.lap(Phase::down_lora_grad);
            return;
        }
        task -= h_panels;
        const std::size_t p = z(task / (3 * i_panels));
        const int which = task / i_panels % 3, ip = task % i_panels;
        const Part& part = parts[p];
        const Extent extent{size.rank_rows(), size.r, size.ib, size.I};
        if (which == 2) {  // dA of down: (w s dO Bd)ᵀ h
            const Term term{at(part.ob_t, k * z(size.rank_rows())), part.h_rows};
            lora_product(
                hand, 1, [&](std::size_t) { return term; }, expert, extent, ip,
                [&](int n, int count, std::size_t col, std::size_t width) {
                    put_rows(hand, down_a, e * r * all_I + p * I, all_I, n, count, col, width);
                });
            hand.watch.lap(Phase::down_lora_grad);
        } else {  // dB of gate or up, transposed: (s x Aᵀ)ᵀ dg
            const GradWriter& to = which == 0 ? gate_b : up_b;
            const std::size_t from = (2 * k + z(which) * z(expert.kblocks) * kBlock) * z(size.rank_rows());
            const Term term{at(kept.xa_t, from), which == 0 ? part.g_rows : part.u_rows};
            lora_product(
                hand, 1, [&](std::size_t) { return term; }, expert, extent, ip,
                [&](int n, int count, std::size_t col, std::size_t width) {
                    put_columns(hand, to, (e * all_I + p * I) * r, n, count, col, width);
                });
            hand.watch.lap(Phase::gate_up_lora_grad);
        }
    };

    // Gradients of experts without a token are zero already, for LoraPointers are given so; not so where earlier calls
    // left a sum.
    std::vector<int> idle;
    if (accumulate) {
        std::vector<bool> now(z(config.num_experts));
        if (with_lora) {
            for (const Routing::Expert& e : routing.experts) now[z(e.expert)] = has_sums[z(e.expert)] = true;
        }
        for (int e = 0; e < config.num_experts; ++e) {
            if (has_sums[z(e)] && !now[z(e)]) idle.push_back(e);
        }
    }
    const auto copy_sums = [&](int expert) {
        for (std::size_t i = 0; i < 6; ++i) {
            const std::size_t count = sizes[i] / z(config.num_experts);
            write[i].repeat(z(expert) * count, count);
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
        float* own = scratch + z(worker) * 2 * kScratch;
        Hand hand{worker, own, own + kScratch, recording_of.watch(worker)};
        const auto stage_ends = [&] {
            hand.watch.tasks_done();
            team.barrier();
            hand.watch.stage_done();
        };
        kernels.enter();
        gathering.work(worker, groups, [&](int p, int i) { gather(hand, p, i); });
        stage_ends();
        downing.work(worker, active * i_panels, [&](int p, int i) { down_grad(hand, p, i); });
        stage_ends();
        if (with_lora) {
            ranking.work(worker, groups, [&](int p, int i) { rank_grad(hand, p, i); });
            stage_ends();
        }
        inputs.work(worker, active * h_panels, [&](int p, int i) { input_grad(hand, p, i); });
        loras.work(worker, active * lora_tasks,
                   [&](int, int i) { lora_grad(hand, routing.experts[z(i / lora_tasks)], i % lora_tasks); });
        idles.work(worker, static_cast<int>(idle.size()), [&](int, int i) { copy_sums(idle[z(i)]); });
        routings.work(worker, token_chunks, [&](int, int i) { weight_grad(i * kChunkRows); });
        hand.watch.lap(Phase::routing_grad);
        kernels.leave();
        hand.watch.tasks_done();
        hand.watch.stage_done();
    };
    caller.lap(Phase::allocation);
    team.run(body);
    if (active == 0 && T > 0) std::memset(grad_input, 0, T * H * sizeof(bf16));
    if (recording_of.on()) recorded = recording_of.finish(true, rows, backward_costs(routing));
    shared.cache.give(std::move(work));
    shared.cache.give(std::move(found->block));
    saved.erase(found);
    note_saved();
}

}  // namespace ktv
