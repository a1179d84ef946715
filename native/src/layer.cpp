// The layer's public calls: their argument checks, and the calls into State.
#include "ktv/layer.hpp"

#include <numeric>

#include "backward.hpp"
#include "forward.hpp"
#include "instruction_sets.hpp"
#include "memory.hpp"
#include "state.hpp"

namespace ktv {
namespace {

Sizes sizes_of(const LayerConfig& c) {
    const int I = c.intermediate / c.parts;
    return {c.hidden, I, c.rank, blocks_of(c.hidden), blocks_of(I), blocks_of(c.rank), blocks_of(2 * c.rank)};
}

const LayerConfig& checked(const LayerConfig& c) {
    if (c.num_experts <= 0 || c.top_k <= 0 || c.hidden <= 0 || c.intermediate <= 0 || c.rank <= 0 || c.parts <= 0 ||
        c.threads <= 0 || c.max_rows <= 0 || c.max_cache_depth <= 0)
        throw BadInput("every size of a layer must be positive");
    if (c.intermediate % c.parts != 0)
        throw BadInput("intermediate size " + std::to_string(c.intermediate) + " is not a multiple of " +
                       std::to_string(c.parts));
    const std::size_t table = c.parts * wide(c.num_experts) * sizeof(PackedExpert);
    require_memory({table, table}, "the table of " + std::to_string(c.num_experts) + " experts");
    return c;
}

std::size_t sum_of(const std::vector<BlockCache::Size>& sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), std::size_t{0},
                           [](std::size_t sum, const BlockCache::Size& size) { return sum + size.bytes; });
}

}  // namespace

Layer::State::State(const LayerConfig& c)
    : config(checked(c)),
      size(sizes_of(c)),
      kernels(instruction_set(c.isa).kernels_here()),
      homes(homes_of_parts(c.parts, c.numa_nodes)),
      workers(workers_that_fit(std::max(1, std::min(c.threads, allowed_processors())), homes)),
      experts(c.parts) {
    for (auto& part : experts) part.resize(c.num_experts);
}

Layer::Layer(const LayerConfig& config) : state_(std::make_unique<State>(config)) {}

Layer::~Layer() = default;  // blocks of saved forwards without a backward go back to the kernel, not to the cache

int Layer::load_weights(const WeightSource& gate, const WeightSource& up, const WeightSource& down,
                        const std::vector<std::int64_t>& physical_map, std::shared_ptr<const void> owner,
                        const WeightFormat& format) {
    State& s = *state_;
    const std::size_t E = s.config.num_experts;
    std::vector<int> slot_of(E, -1);
    bool permutation = physical_map.size() == E;
    for (std::size_t p = 0; permutation && p < E; ++p) {
        const std::int64_t logical = physical_map[p];
        permutation = logical >= 0 && logical < s.config.num_experts && slot_of[logical] < 0;
        if (permutation) slot_of[logical] = static_cast<int>(p);
    }
    for (const WeightSource* from : {&gate, &up, &down}) {
        if (from->experts.size() != E)
            throw BadInput("base weights of " + std::to_string(from->experts.size()) + " experts; the layer has " +
                           std::to_string(E));
    }
    const int of_part = s.config.intermediate / s.config.parts;
    const bool grouped = format.format == Format::int4 || format.format == Format::mxfp4;
    if (grouped && (format.group <= 0 || of_part % format.group != 0))
        throw BadInput("a part of " + std::to_string(of_part) + " columns of down begins inside a group of " +
                       std::to_string(format.group));
    if (!permutation) throw BadInput("physical_map must be a permutation of 0.." + std::to_string(E - 1));
    const std::lock_guard lock(process().mutex);
    if (!s.saved.empty())
        throw BadState("load_weights_from_tensors while " + std::to_string(s.saved.size()) +
                       " saved forwards wait for their backward: call backward first");
    s.format = format;
    s.gate = gate;
    s.up = up;
    s.down = down;
    s.owner.swap(owner);  // the earlier one is dropped after the lock
    s.slot_of = std::move(slot_of);
    for (auto& part : s.experts) {
        part.clear();
        part.resize(E);
    }
    s.expert_memory.clear();
    s.packed = 0;
    s.weights_loaded = true;
    s.given_up = false;
    return ++s.source_name;
}

void Layer::move_weights(int name, const WeightSource& gate, const WeightSource& up, const WeightSource& down) {
    State& s = *state_;
    const std::lock_guard lock(process().mutex);
    if (name != s.source_name) return;
    for (const auto& [to, from] : {std::pair{&s.gate, &gate}, std::pair{&s.up, &up}, std::pair{&s.down, &down}}) {
        to->experts = from->experts;
        to->scales = from->scales;
        to->zeros = from->zeros;
    }
}

bool Layer::unpack(int expert, bf16* gate, bf16* up, bf16* down) const {
    const std::lock_guard lock(process().mutex);
    if (expert < 0 || expert >= state_->config.num_experts)
        throw BadInput("there is no expert " + std::to_string(expert));
    return state_->unpack(expert, gate, up, down);
}

void Layer::update_lora(const LoraPointers& lora) {
    State& s = *state_;
    const std::lock_guard lock(process().mutex);
    if (s.lora && s.lora->fp32 != lora.fp32 && !s.saved.empty())
        throw BadState("init_lora_weights with another dtype while " + std::to_string(s.saved.size()) +
                       " saved forwards wait for their backward: call backward first");
    s.pack_lora(s.team(), lora);
    s.grad_sums = Block();
    s.lora_fp32 = lora.fp32;
    s.lora_loaded = true;
}

Ticket Layer::forward(const ForwardArguments& arguments) {
    State& s = *state_;
    const int rows = arguments.rows;
    if (!s.weights_loaded) throw BadState("forward_sft before the base weights: call load_weights_from_tensors first");
    if (!s.lora_loaded) throw BadState("forward_sft before the LoRA weights: call init_lora_weights first");
    if (rows < 0 || rows > s.config.max_rows)
        throw BadInput("hidden_states has " + std::to_string(rows) + " rows; chunked_prefill_size allows " +
                       std::to_string(s.config.max_rows));
    const std::vector<std::int64_t> ids(arguments.ids, arguments.ids + rows * wide(s.config.top_k));
    check_ids(ids, s.config.top_k, s.config.num_experts);
    return s.forward(arguments, ids);
}

void Layer::backward(const BackwardArguments& arguments) {
    state_->backward(arguments);
}

void Layer::drop(Ticket ticket) {
    State& s = *state_;
    Process& shared = process();
    const std::lock_guard lock(shared.mutex);
    const auto found = s.find_saved(ticket);
    if (found == s.saved.end()) return;
    shared.cache.give(std::move(found->blocks));
    s.saved.erase(found);
    s.note_saved();
}

std::vector<std::uint64_t> Layer::fingerprint(const std::vector<MemorySpan>& memory) const {
    constexpr std::size_t kPiece = std::size_t{256} << 10;
    constexpr int kState = 16, kAlone = 4;  // pieces that one worker reads sooner than a team is awake
    const State& s = *state_;
    std::vector<MemorySpan> pieces;
    for (const auto& [data, bytes] : memory) {
        for (std::size_t at = 0; at < bytes; at += kPiece)
            pieces.push_back({static_cast<const std::byte*>(data) + at, std::min(kPiece, bytes - at)});
    }
    std::vector<std::uint64_t> found(pieces.size() * kState);
    const auto read = [&](std::size_t i) {
        s.kernels.fingerprint(static_cast<const std::uint8_t*>(pieces[i].data), pieces[i].bytes, &found[i * kState]);
    };
    if (pieces.size() <= kAlone) {
        for (std::size_t i = 0; i < pieces.size(); ++i) read(i);
        return found;
    }
    const std::lock_guard lock(process().mutex);
    Team& team = s.team();
    TaskQueue queue(1, team, static_cast<int>(pieces.size()));
    team.run([&](int worker) { queue.work(worker, [&](const Task& task) { read(task.row); }); });
    return found;
}

void Layer::record_stages(bool on) {
    if (on && !kStages) throw BadState("record_stages: this engine was built with KTV_STAGES=OFF; build it without");
    const std::lock_guard lock(process().mutex);
    state_->recording = on;
}

StageTimes Layer::stage_times() const {
    const std::lock_guard lock(process().mutex);
    return state_->recorded;
}

std::vector<PartPlacement> Layer::placement() const {
    const State& s = *state_;
    const std::lock_guard lock(process().mutex);
    std::vector<PartPlacement> found(s.config.parts);
    std::vector<std::vector<int>> cpus(s.workers);
    s.team().run([&](int worker) { cpus[worker] = processors_of_this_thread(); });
    for (int worker = 0; worker < s.workers; ++worker) found[worker % s.config.parts].workers.push_back(cpus[worker]);
    for (int p = 0; p < s.config.parts; ++p) {
        PartPlacement& part = found[p];
        part.nodes = nodes_in(s.homes[p].nodes);
        const auto count = [&part](const Block& block, std::map<int, std::size_t>& pages) {
            if (const int error = count_pages(block.data(), block.size(), pages)) part.error = error;
        };
        if (!s.expert_memory.empty()) count(s.expert_memory[p], part.weights);
        if (s.lora) count(s.lora->blocks[p], part.lora);
        for (const Saved& saved : s.saved) count(saved.blocks[p], part.saved);
        for (const Block& block : process().cache.unused()) {
            if (block.nodes() == s.homes[p].nodes) count(block, part.buffers);
        }
    }
    return found;
}

int Layer::saved_forwards() const {
    return state_->saved_forwards;
}
bool Layer::lora_fp32() const {
    return state_->lora_fp32;
}
int Layer::packed_experts() const {
    return state_->packed;
}
int Layer::threads() const {
    return state_->workers;
}
const LayerConfig& Layer::config() const {
    return state_->config;
}

MemoryUse memory_use(const LayerConfig& config, const WeightFormat& format, bool lora_fp32,
                     const std::vector<std::int64_t>& ids) {
    Layer::State layer(config);
    layer.format = format;
    check_ids(ids, config.top_k, config.num_experts);
    const int rows = static_cast<int>(ids.size()) / config.top_k;
    LoraPack lora = layer.empty_lora(lora_fp32);
    MemoryUse found;
    found.expert = config.parts * layer.expert_bytes();
    found.lora = sum_of(layer.measured_parts([&](int p, Carver& carver) { layer.carve_lora(lora, p, carver); }));

    Saved kept;
    kept.lora = std::make_shared<LoraPack>(std::move(lora));
    const std::vector<float> weights(ids.size());
    kept.routing = route(ids, weights.data(), rows, config.top_k, config.num_experts);
    kept.parts.resize(config.parts);
    Recording off(false, 1, 1);
    const ForwardArguments ahead{.rows = rows, .x = {}, .ids = {}, .weights = {}, .output = {}, .save = true};
    Forward forward(layer, kept, ahead, off.watch(0));
    found.saved = sum_of(forward.kept_sizes());
    const BackwardArguments back{.rows = rows,
                                 .grad_output = {},
                                 .grad_input = {},
                                 .grads = {},
                                 .grads_zero = true,
                                 .grad_weights = {},
                                 .accumulate = false};
    found.working =
        std::max(sum_of(forward.work_sizes()), sum_of(Backward(layer, kept, back, off.watch(0)).work_sizes()));
    return found;
}

void clear_buffer_cache() {
    Process& shared = process();
    const std::lock_guard lock(shared.mutex);
    shared.release();
}

}  // namespace ktv
