#include "backward.hpp"

#include <cstring>

namespace ktv {
namespace {

// nn segments of (activation) · W for a small activation of `depth` columns kept as hi + lo, and an fp32 W.
int nn_lora_segments(const Pair& activation, std::size_t ld, const Pair& w, std::size_t stride, int depth,
                     NnSegment* out) {
    const int kblocks = (depth + kBlock - 1) / kBlock, idle = (kblocks * kBlock - depth) / 2;
    out[0] = {activation.hi, ld, w.hi, stride, nullptr, 0, kblocks, idle};
    out[1] = {activation.lo, ld, w.hi, stride, nullptr, 0, kblocks, idle};
    if (!w.lo) return 2;
    out[2] = {activation.hi, ld, w.lo, stride, nullptr, 0, kblocks, idle};
    return 3;
}

NnSegment segment(const bf16* rows, std::size_t ld, const bf16* weights, std::size_t kblock_stride, int kblocks) {
    return {rows, ld, weights, kblock_stride, nullptr, 0, kblocks};
}

}  // namespace

std::vector<std::size_t> Layer::State::grad_sizes() const {
    const std::size_t E = z(config.num_experts), H = z(config.hidden), I = z(config.intermediate), r = z(config.rank);
    return {E * r * H, E * I * r, E * r * H, E * I * r, E * r * I, E * H * r};
}

Costs Layer::State::backward_costs(const Routing& routing) const {
    Costs costs;
    double rows = 0;
    for (const Routing::Expert& e : routing.experts) rows += e.rows;
    const double H = config.hidden, I = config.intermediate, r = config.lora_backward ? config.rank : 0,
                 T = routing.tokens, experts = static_cast<double>(routing.experts.size()), element = sizeof(bf16),
                 lora = element * terms();
    costs.set(Phase::scatter, 0, T * H * element);
    costs.set(Phase::down_lora_b, 2 * rows * config.rank * H, experts * config.rank * H * lora);
    costs.set(Phase::down_grad, 2 * rows * I * (H + config.rank), experts * I * (H * element + config.rank * lora));
    costs.set(Phase::activation_grad, 0, rows * I * 2 * sizeof(float));
    costs.set(Phase::gate_up_lora_b, 4 * rows * I * r, experts * 2 * I * r * lora);
    costs.set(Phase::gate_up_grad, 4 * rows * H * (I + r), experts * 2 * H * (I * element + r * lora));
    costs.set(Phase::gate_up_lora_grad, 4 * rows * r * (H + I), experts * 2 * r * (H + I) * lora);
    costs.set(Phase::down_lora_grad, 2 * rows * r * (H + I), experts * r * (H + I) * lora);
    costs.set(Phase::merge, rows * H, T * H * element);
    return costs;
}

void Layer::State::backward(const BackwardArguments& arguments, Layer::Ticket ticket) {
    Process& shared = process();
    const std::lock_guard lock(shared.mutex);
    Team& team = shared.team(workers, config.parts);
    const auto found = find_saved(ticket);
    if (found == saved.end())
        throw BadState(ticket == 0
                           ? "backward without a saved forward: call forward_sft(..., save_for_backward=True) first"
                           : "backward of ticket " + std::to_string(ticket) + ", which was used or dropped before");
    if (arguments.rows != found->routing.tokens)
        throw BadInput("grad_output has " + std::to_string(arguments.rows) + " rows; the saved forward had " +
                       std::to_string(found->routing.tokens));
    Recording recording_of(recording, workers, config.lora_backward ? 4 : 3);
    Backward(*this, *found, arguments, recording_of.watch(0)).run(shared, team, recording_of);
    if (recording_of.on()) recorded = recording_of.finish(true, arguments.rows, backward_costs(found->routing));
    shared.cache.give(std::move(found->block));
    saved.erase(found);
    note_saved();
}

Backward::Backward(Layer::State& layer, const Saved& kept, const BackwardArguments& arguments, Watch caller)
    : layer_(layer),
      config_(layer.config),
      size_(layer.size),
      kernels_(layer.kernels),
      kept_(kept),
      routing_(kept.routing),
      lora_(*kept.lora),
      given_(arguments),
      caller_(caller),
      with_lora_(config_.lora_backward),
      groups_(routing_.rows / kGroup),
      active_(static_cast<int>(routing_.experts.size())),
      i_panels_(panels_of(size_.ib)),
      h_panels_(panels_of(size_.hb)),
      // Without LoRA in the gradients dw has a part of its own for the LoRA of the forward.
      dots_(with_lora_ ? i_panels_ : 2 * i_panels_),
      T_(z(arguments.rows)),
      H_(z(size_.H)),
      I_(z(size_.I)),
      r_(z(size_.r)),
      hidden_(z(size_.hidden_ld())),
      inter_(z(size_.inter_ld())),
      rank_(z(size_.rank())),
      rank2_(z(size_.rank2())),
      parts_(z(config_.parts)),
      grad_sizes_(layer.grad_sizes()),
      turns_(config_.parts, h_panels_),
      parts_done_(z(h_panels_)) {}

void Backward::carve(Carver& carver) {
    const std::size_t R = z(routing_.rows), K = z(routing_.k_rows);
    for (Part& part : parts_) {
        carver.take(part.out, R * hidden_);
        carver.take(part.out_rows, K);
        take(carver, part.ob, R * rank_);
        take(carver, part.ob_t, K * z(size_.rank_rows()));
        carver.take(part.g, R * inter_);
        carver.take(part.u, R * inter_);
        carver.take(part.h, R * inter_);
        carver.take(part.g_rows, K);
        carver.take(part.u_rows, K);
        carver.take(part.h_rows, K);
        carver.take(part.dot, R * z(dots_));
        take(carver, part.xa, R * rank2_);
        take(carver, part.xa_t, K * z(size_.rank2_rows()));
        carver.take(part.sum, z(h_panels_) * T_ * kPanelCols);
    }
    carver.take(zeros_, std::max(hidden_, inter_));
    carver.take(scratch_, z(layer_.workers) * 2 * kScratch);
    carver.take(part_sums_, z(layer_.workers * config_.parts));
    carver.take(segments_, z(layer_.workers * 2 * config_.parts));
}

void Backward::run(Process& shared, Team& team, Recording& recording) {
    Carver measure;
    carve(measure);
    Block work = shared.cache.take(measure.used(), "a backward of " + std::to_string(given_.rows) + " tokens");
    Carver cut(work.data());
    carve(cut);
    std::memset(zeros_, 0, std::max(hidden_, inter_) * sizeof(bf16));
    prepare_sums();
    prepare_rows_of_x();

    const int parts = config_.parts, token_chunks = (given_.rows + kChunkRows - 1) / kChunkRows;
    TaskQueue gathering(parts, team, groups_), downing(parts, team, active_, i_panels_), ranking(parts, team, groups_),
        inputs(parts, team, active_, h_panels_), loras(1, team, active_, lora_tasks()),
        idles(1, team, static_cast<int>(idle_.size())), routings(1, team, token_chunks);
    const std::function<void(int)> body = [&](int worker) {
        float* own = scratch_ + z(worker) * 2 * kScratch;
        Hand hand{worker, own, own + kScratch, recording.watch(worker)};
        const auto stage_ends = [&] {
            hand.watch.tasks_done();
            team.barrier();
            hand.watch.stage_done();
        };
        kernels_.enter();
        gathering.work(worker, [&](const Task& task) { gather(hand, task.part, task.row); });
        stage_ends();
        downing.work(worker, [&](const Task& task) { down_grad(hand, task); });
        stage_ends();
        if (with_lora_) {
            ranking.work(worker, [&](const Task& task) { rank_grad(hand, task.part, task.row); });
            stage_ends();
        }
        inputs.work(worker, [&](const Task& task) { input_grad(hand, task); });
        loras.work(worker, [&](const Task& task) { lora_grad(hand, task); });
        idles.work(worker, [&](const Task& task) { fill_idle(idle_[z(task.row)]); });
        hand.watch.lap(Phase::allocation);
        routings.work(worker, [&](const Task& task) { weight_grad(task.row * kChunkRows); });
        hand.watch.lap(Phase::routing_grad);
        kernels_.leave();
        hand.watch.tasks_done();
        hand.watch.stage_done();
    };
    caller_.lap(Phase::allocation);
    team.run(body);
    if (active_ == 0 && T_ > 0) std::memset(given_.grad_input, 0, T_ * H_ * sizeof(bf16));
    shared.cache.give(std::move(work));
}

void Backward::prepare_sums() {
    if (given_.accumulate && !layer_.grad_sums) {
        std::size_t count = 0;
        for (const std::size_t n : grad_sizes_) count += n;
        require_memory(count * sizeof(float), "the fp32 sums of the LoRA gradients");
        layer_.grad_sums = Block(count * sizeof(float));  // fresh pages are zero
        layer_.has_sums.assign(z(config_.num_experts), false);
    }
    const LoraPointers& to = given_.grads;
    float* sums = given_.accumulate ? reinterpret_cast<float*>(layer_.grad_sums.data()) : nullptr;
    std::size_t i = 0;
    for (void* const tensor : {to.gate_a, to.gate_b, to.up_a, to.up_b, to.down_a, to.down_b}) {
        write_.emplace_back(kernels_, tensor, sums, config_.lora_fp32);
        if (sums) sums += grad_sizes_[i++];
    }
    std::vector<bool> now(z(config_.num_experts));
    if (with_lora_) {
        for (const Routing::Expert& e : routing_.experts) now[z(e.expert)] = true;
    }
    for (int e = 0; e < config_.num_experts; ++e) {
        if (given_.accumulate && now[z(e)]) layer_.has_sums[z(e)] = true;
        const bool has_sums = given_.accumulate && layer_.has_sums[z(e)];
        if (!now[z(e)] && (has_sums || !given_.grads_zero)) idle_.push_back(e);
    }
}

void Backward::prepare_rows_of_x() {
    if (!with_lora_) return;
    x_rows_.assign(z(routing_.k_rows), kept_.x + T_ * hidden_);
    for (const Routing::Expert& e : routing_.experts) {
        for (int i = 0; i < e.rows; ++i)
            x_rows_[z(e.first_k + i)] = kept_.x + z(routing_.token[z(e.first_row + i)]) * hidden_;
    }
}

// c [16][128], columns 0..cols: `plain` gets the rows that are no padding; `transposed` all columns of the group, zero
// where they are padding.
void Backward::put_small(const float* c, int cols, int group, const Small& to) const {
    const Routing::Columns place = routing_.columns(group);
    const std::size_t row0 = z(group) * kGroup;
    for (int t = 0; t < place.rows; ++t) {
        for (int n = 0; n < cols; ++n)
            put(to.plain, (row0 + z(t)) * to.ld + to.first + z(n), config_.scaling * c[z(t) * kPanelCols + z(n)]);
    }
    for (int n = 0; n < cols && to.first + z(n) < to.rows; ++n) {
        const std::size_t at_row = (to.first + z(n)) * place.ld + place.first;
        for (int t = 0; t < static_cast<int>(place.width); ++t) {
            const bool real = t < place.rows;
            const float value = real ? config_.scaling * c[z(t) * kPanelCols + z(n)] : 0.0f;
            const float w = to.weighted && real ? routing_.weight[row0 + z(t)] : 1.0f;
            put(to.transposed, at_row + z(t), w * value);
        }
    }
}

void Backward::gather(Hand& hand, int p, int group) {
    Part& part = parts_[z(p)];
    const Routing::Expert& expert = routing_.expert_at(group);
    const Routing::Columns place = routing_.columns(group);
    const std::size_t row0 = z(group) * kGroup, k = z(expert.first_k) + place.first;
    for (int t = 0; t < place.rows; ++t) {
        bf16* row = part.out + (row0 + z(t)) * hidden_;
        std::memcpy(row, given_.grad_output + z(routing_.token[row0 + z(t)]) * H_, H_ * sizeof(bf16));
        std::memset(row + H_, 0, (hidden_ - H_) * sizeof(bf16));
    }
    for (std::size_t t = 0; t < place.width; ++t) {
        const bool real = t < z(place.rows);
        const std::size_t row = row0 + t;
        part.out_rows[k + t] = real ? part.out + row * hidden_ : zeros_;
        part.g_rows[k + t] = real ? part.g + row * inter_ : zeros_;
        part.u_rows[k + t] = real ? part.u + row * inter_ : zeros_;
        part.h_rows[k + t] = real ? part.h + row * inter_ : zeros_;
    }
    hand.watch.lap(Phase::scatter);
    const Pair b = at(lora_.down_b, z(expert.expert) * layer_.lora_strides().down_b);
    const Pair transposed = at(part.ob_t, z(expert.first_k) * z(size_.rank_rows()));
    for (int nb = 0; nb < size_.rb; nb += kPanelBlocks) {
        const int cblocks = std::min(kPanelBlocks, size_.rb - nb);
        NnSegment segments[2];
        for (int term = 0; term < layer_.terms(); ++term) {
            segments[term] = segment(part.out + row0 * hidden_, hidden_, (term == 0 ? b.hi : b.lo) + z(nb) * kBlockSize,
                                     layer_.panel(size_.rb), size_.hb);
        }
        kernels_.nn(segments, layer_.terms(), place.rows, cblocks, hand.c, kPanelCols);
        put_small(hand.c, cblocks * kBlock, group,
                  {part.ob, rank_, z(nb) * kBlock, transposed, z(size_.rank_rows()), true});
    }
    hand.watch.lap(Phase::down_lora_b);
}

void Backward::down_grad(Hand& hand, const Task& task) {
    const int p = task.part, ip = task.column;
    Part& part = parts_[z(p)];
    const Saved::Part& was = kept_.parts[z(p)];
    const Routing::Expert& expert = routing_.experts[z(task.row)];
    const int cblocks = std::min(kPanelBlocks, size_.ib - ip * kPanelBlocks);
    const std::size_t cb = z(ip) * kPanelBlocks * kBlockSize, stride = layer_.panel(size_.ib);
    const bf16* base = layer_.experts[z(p)][z(expert.expert)].down + cb;
    const Pair a = at(lora_.down_a[z(p)], z(expert.expert) * layer_.lora_strides().down_a + cb);
    for (RowChunk chunk(expert, 0); chunk.rows > 0; chunk = RowChunk(expert, chunk.first + chunk.rows)) {
        const int count = chunk.rows;
        const std::size_t row = z(expert.first_row + chunk.first), to = row * inter_ + z(ip) * kPanelCols;
        NnSegment segments[4];
        segments[0] = segment(part.out + row * hidden_, hidden_, base, stride, size_.hb);
        const int more = nn_lora_segments(at(part.ob, row * rank_), rank_, a, stride, size_.r, segments + 1);
        const auto product = [&](const NnSegment* first_segment, int used, int slot) {
            kernels_.nn(first_segment, used, count, cblocks, hand.c, kPanelCols);
            hand.watch.lap(Phase::down_grad);
            kernels_.silu_mul_grad(hand.c, kPanelCols, count, cblocks * kBlock, routing_.weight.data() + row,
                                   was.g + to, was.u + to, inter_, part.g + to, part.u + to, part.h + to,
                                   part.dot + row * z(dots_) + z(slot), z(dots_));
            hand.watch.lap(Phase::activation_grad);
        };
        if (with_lora_) {
            product(segments, 1 + more, ip);
        } else {
            // dw is <dO, y> of the forward as it was, LoRA included; the gradients that go on have the base alone.
            product(segments + 1, more, i_panels_ + ip);
            product(segments, 1, ip);
        }
    }
}

void Backward::rank_grad(Hand& hand, int p, int group) {
    Part& part = parts_[z(p)];
    const Routing::Expert& expert = routing_.expert_at(group);
    const Routing::Columns place = routing_.columns(group);
    const std::size_t row0 = z(group) * kGroup;
    const Pair transposed = at(part.xa_t, z(expert.first_k) * z(size_.rank2_rows()));
    // Rows and columns beyond 2 r multiply padding: zero, not what the last call left there.
    for (std::size_t n = 2 * r_; n < z(size_.rank2_rows()); ++n) {
        for (std::size_t t = 0; t < place.width; ++t) put(transposed, n * place.ld + place.first + t, 0.0f);
    }
    for (int t = 0; t < place.rows; ++t) {
        for (std::size_t n = 2 * r_; n < rank2_; ++n) put(part.xa, (row0 + z(t)) * rank2_ + n, 0.0f);
    }
    for (int which = 0; which < 2; ++which) {
        const Pair b =
            at((which == 0 ? lora_.gate_b : lora_.up_b)[z(p)], z(expert.expert) * layer_.lora_strides().gate_b);
        const bf16* from = (which == 0 ? part.g : part.u) + row0 * inter_;
        for (int nb = 0; nb < size_.rb; nb += kPanelBlocks) {
            const int cblocks = std::min(kPanelBlocks, size_.rb - nb);
            NnSegment segments[2];
            for (int term = 0; term < layer_.terms(); ++term) {
                segments[term] = segment(from, inter_, (term == 0 ? b.hi : b.lo) + z(nb) * kBlockSize,
                                         layer_.panel(size_.rb), size_.ib);
            }
            kernels_.nn(segments, layer_.terms(), place.rows, cblocks, hand.c, kPanelCols);
            const std::size_t column = z(which * size_.r + nb * kBlock);
            put_small(hand.c, std::min(cblocks * kBlock, size_.r - nb * kBlock), group,
                      {part.xa, rank2_, column, transposed, z(size_.rank2_rows()), false});
        }
    }
    hand.watch.lap(Phase::gate_up_lora_b);
}

void Backward::input_grad(Hand& hand, const Task& task) {
    const int p = task.part, ticket = task.row, hp = task.column;
    Part& part = parts_[z(p)];
    const Routing::Expert& expert = routing_.experts[z(ticket)];
    const PackedExpert& base = layer_.experts[z(p)][z(expert.expert)];
    const int cblocks = std::min(kPanelBlocks, size_.hb - hp * kPanelBlocks);
    const std::size_t cb = z(hp) * kPanelBlocks * kBlockSize, stride = layer_.panel(size_.hb);
    const Pair a = at(lora_.gate_up_a, z(expert.expert) * layer_.lora_strides().gate_up_a + cb);
    float* sum = part.sum + z(hp) * T_ * kPanelCols;
    for (RowChunk chunk(expert, 0); chunk.rows > 0; chunk = RowChunk(expert, chunk.first + chunk.rows)) {
        const int count = chunk.rows;
        const std::size_t row = z(expert.first_row + chunk.first);
        NnSegment segments[5];
        segments[0] = segment(part.g + row * inter_, inter_, base.gate + cb, layer_.gate_up_stride(), size_.ib);
        segments[1] = segment(part.u + row * inter_, inter_, base.up + cb, layer_.gate_up_stride(), size_.ib);
        int used = 2;
        if (with_lora_)
            used += nn_lora_segments(at(part.xa, row * rank2_), rank2_, a, stride, 2 * size_.r, segments + 2);
        kernels_.nn(segments, used, count, cblocks, hand.c, kPanelCols);
        hand.watch.lap(Phase::gate_up_grad);
        if (chunk.first == 0) {
            turns_.wait(task);
            hand.watch.lap(Phase::wait);
            if (ticket == 0) std::memset(sum, 0, T_ * kPanelCols * sizeof(float));
        }
        kernels_.add_rows(hand.c, kPanelCols, count, cblocks * kBlock, routing_.token.data() + row, nullptr, sum,
                          kPanelCols);
    }
    turns_.pass(task);
    if (ticket == active_ - 1 && parts_done_[z(hp)].fetch_add(1, std::memory_order_acq_rel) == config_.parts - 1)
        finish(hand.worker, hp);
    hand.watch.lap(Phase::merge);
}

// The sum over the parts of one panel of grad_input, rounded.
void Backward::finish(int worker, int panel) {
    const float** sums = part_sums_ + z(worker * config_.parts);
    const std::size_t cols = z(std::min(kPanelCols, size_.H - panel * kPanelCols));
    for (std::size_t t = 0; t < T_; ++t) {
        for (std::size_t p = 0; p < parts_.size(); ++p) sums[p] = parts_[p].sum + (z(panel) * T_ + t) * kPanelCols;
        kernels_.round_sum(sums, config_.parts, cols, given_.grad_input + t * H_ + z(panel) * kPanelCols);
    }
}

// dw of kChunkRows tokens from `first` on.
void Backward::weight_grad(int first) {
    const std::size_t slots = z(routing_.slots), end = std::min(T_, z(first + kChunkRows)) * slots;
    for (std::size_t i = z(first) * slots; i < end; ++i) {
        float sum = 0.0f;
        const int row = routing_.row_of[i];
        for (std::size_t p = 0; row >= 0 && p < parts_.size(); ++p) {
            for (int dot = 0; dot < dots_; ++dot) sum += parts_[p].dot[z(row) * z(dots_) + z(dot)];
        }
        given_.grad_weights[i] = sum;
    }
}

}  // namespace ktv
