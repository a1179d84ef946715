// Random calls of layers, for the sanitizers: `fuzz_layer [SECONDS [SEED]]`. What a sequence of calls promises is that
// each one gives the bits that it gives on a new layer, so that is what every result is compared with; and with the
// portable kernels. Sizes, calls and their order follow from the seed. Without SECONDS, KTV_FUZZ_SECONDS, or 5.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "instruction_sets.hpp"
#include "problem.hpp"

using namespace ktv;

namespace {

long calls = 0;

// From 1 to `most`; every second one beside a multiple of 16, where blocks end.
int size(Random& random, int most) {
    if (random.below(2) == 0) return 1 + static_cast<int>(random.below(static_cast<unsigned>(most)));
    const int near = 16 * static_cast<int>(random.below(static_cast<unsigned>(most / 16 + 1)));
    return std::clamp(near + static_cast<int>(random.below(3)) - 1, 1, most);
}

Shape draw_shape(Random& random) {
    Shape s{};
    s.E = 1 + static_cast<int>(random.below(6));
    s.k = 1 + static_cast<int>(random.below(static_cast<unsigned>(std::min(s.E, 3))));
    s.parts = 1 + static_cast<int>(random.below(3));
    s.H = size(random, 100);
    s.I = s.parts * size(random, 100 / s.parts);
    s.T = random.below(8) == 0 ? 0 : size(random, 60);
    s.r = size(random, 36);
    s.fp32 = random.below(2) == 1;
    return s;
}

// One layer and a dozen calls. Returns false after the first wrong result.
class Session {
  public:
    explicit Session(std::uint64_t seed)
        : random_{seed}, seed_(seed), shape_(draw_shape(random_)), problem_(shape_, random_()) {
        const auto isas = available_isas();
        isa_ = isas[random_.below(static_cast<unsigned>(isas.size()))];
        layer_ = problem_.layer(isa_, threads());
    }

    bool run() {
        for (int i = 0; i < 12; ++i) {
            ++calls;
            if (!call(random_.below(9))) return false;
        }
        return true;
    }

  private:
    int threads() { return 1 + static_cast<int>(random_.below(3)); }

    // What a new layer gives for the present weights and tokens.
    std::vector<float> alone() {
        const auto found = problem_.run(*problem_.layer(isa_, threads()));
        if (isa_ != "scalar") {
            expect(rel_l2(found, problem_.run(*problem_.layer("scalar", 1))) < 2e-3, "against the portable kernels");
        }
        return found;
    }

    bool expect(bool good, const char* what) {
        const Shape& s = shape_;
        good_ = good_ && check(good, "seed %llu on %s, E=%d k=%d H=%d I=%d T=%d r=%d parts=%d%s: %s",
                               static_cast<unsigned long long>(seed_), isa_.c_str(), s.E, s.k, s.H, s.I, s.T, s.r,
                               s.parts, s.fp32 ? " fp32" : "", what);
        return good_;
    }

    // Other tokens, as many.
    void next_tokens() {
        const Problem other(shape_, random_());
        problem_.x = other.x;
        problem_.ids = other.ids;
        problem_.weights = other.weights;
        problem_.grad_output = other.grad_output;
        if (random_.below(6) == 0) std::ranges::fill(problem_.ids, -1);
    }

    bool call(unsigned which) {
        switch (which) {
            case 0:
                next_tokens();
                return expect(problem_.run(*layer_) == alone(), "forward and backward");
            case 1: {
                next_tokens();
                const auto right = alone();
                const auto output = problem_.forward(*layer_);
                return expect(std::equal(output.begin(), output.end(), right.begin(),
                                         [](bf16 a, float b) { return to_float(a) == b; }),
                              "forward");
            }
            case 2:
                return two_tickets();
            case 3: {  // other values of LoRA
                for (auto& six : problem_.lora16)
                    for (auto& v : six) v = to_bf16(-0.75f * to_float(v));
                for (auto& six : problem_.lora32)
                    for (auto& v : six) v *= -0.75f;
                layer_->update_lora(shape_.fp32 ? Problem::pointers(problem_.lora32)
                                                : Problem::pointers(problem_.lora16));
                return expect(problem_.run(*layer_) == alone(), "after update_lora");
            }
            case 4:
                clear_buffer_cache();
                return expect(problem_.run(*layer_) == alone(), "after clear_buffer_cache");
            case 5:
                return refused();
            case 6:
                return in_threads();
            case 7:  // stage times change no bit
                layer_->record_stages(random_.below(2) == 1);
                return expect(problem_.run(*layer_) == alone(), "while stages are recorded");
            default:  // a new layer in the place of the old, which may have packed some experts only
                layer_ = problem_.layer(isa_, threads());
                return true;
        }
    }

    // Two saved forwards, of which one is dropped or both have their backward, the older first.
    bool two_tickets() {
        const auto save = [&] {
            std::vector<bf16> output(problem_.x.size());
            return layer_->forward(
                {shape_.T, problem_.x.data(), problem_.ids.data(), problem_.weights.data(), output.data(), true});
        };
        next_tokens();
        const auto right = alone();
        const Problem older = problem_;
        const Ticket first = save();
        next_tokens();
        const Ticket second = save();
        if (!expect(first != second && layer_->saved_forwards() == 2, "two forwards are saved")) return false;
        std::vector<bf16> output(problem_.x.size());
        if (!expect(throws<BadState>([&] { save(); }), "a third one is refused")) return false;
        layer_->drop(random_.below(2) == 0 ? second : 0);
        std::vector<bf16> grad_input(older.x.size());
        std::vector<float> dw(older.ids.size());
        std::vector<std::vector<bf16>> g16;
        std::vector<std::vector<float>> g32;
        for (const int count : older.sizes) {
            g16.emplace_back(count);
            g32.emplace_back(count);
        }
        layer_->backward({shape_.T, older.grad_output.data(), grad_input.data(),
                          shape_.fp32 ? Problem::pointers(g32) : Problem::pointers(g16), false, dw.data(), false,
                          first});
        layer_->drop(second);
        const std::size_t at = older.x.size();
        return expect(std::equal(grad_input.begin(), grad_input.end(), right.begin() + static_cast<std::ptrdiff_t>(at),
                                 [](bf16 a, float b) { return to_float(a) == b; }) &&
                          layer_->saved_forwards() == 0,
                      "the older of two saved forwards");
    }

    // Bad input is refused and changes nothing.
    bool refused() {
        std::vector<std::int64_t> ids(problem_.ids.size() + static_cast<std::size_t>(shape_.k),
                                      random_.below(2) == 0 ? shape_.E : -2);
        std::vector<bf16> x(static_cast<std::size_t>((shape_.T + 1) * shape_.H)), output(x.size());
        std::vector<float> weights(ids.size());
        const bool thrown = throws<BadInput>(
            [&] { layer_->forward({shape_.T + 1, x.data(), ids.data(), weights.data(), output.data(), true}); });
        return expect(thrown, "a bad id is refused") && expect(problem_.run(*layer_) == alone(), "after a refusal");
    }

    // Forwards of three threads on this layer, and the clearing of the buffers that they share.
    bool in_threads() {
        const auto right = problem_.forward(*problem_.layer(isa_, threads()));
        std::atomic<bool> same = true;
        {
            std::vector<std::jthread> workers;
            for (int i = 0; i < 3; ++i) {
                workers.emplace_back([&, i] {
                    if (i == 2) clear_buffer_cache();
                    if (problem_.forward(*layer_) != right) same = false;
                });
            }
        }
        return expect(same, "three threads");
    }

    Random random_;
    std::uint64_t seed_;
    Shape shape_;
    Problem problem_;
    std::string isa_;
    std::unique_ptr<Layer> layer_;
    bool good_ = true;
};

}  // namespace

int main(int count, char** arguments) {
    const char* set = std::getenv("KTV_FUZZ_SECONDS");
    const double seconds = count > 1 ? std::atof(arguments[1]) : set ? std::atof(set) : 5;
    const std::uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
    const auto begun = std::chrono::steady_clock::now();
    std::uint64_t seed = first;
    bool good = true;
    do {
        good = Session(seed++).run();
    } while (good && std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count() < seconds);
    std::printf("%llu sessions from seed %llu, %ld calls\n", static_cast<unsigned long long>(seed - first),
                static_cast<unsigned long long>(first), calls);
    return finish();
}
