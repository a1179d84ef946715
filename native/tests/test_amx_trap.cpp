// The AMX emulator against an oracle of its own, written in integers, and against the CPU where that has AMX.
//
//   test_amx_trap            all checks; the last line is "N passed, N failed"; exits 1 when one failed
//   test_amx_trap --bench    nanoseconds per instruction instead
//
// Every check holds on hardware too: there the instructions run as they are and the oracle is what is put to the test.
#include <cpuid.h>
#include <immintrin.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../emulation/amx_trap.hpp"
#include "amx_trap_code.hpp"
#include "amx_trap_harness.hpp"
#include "amx_trap_oracle.hpp"

using namespace ktv::emulation;

// ---------------------------------------------------------------------------------------------------------------
// Checks: which signals the handler takes
// ---------------------------------------------------------------------------------------------------------------

// Run before this process installs the handler itself.
void check_installation() {
    static volatile sig_atomic_t seen = 0;
    const auto skip_two_bytes = [](int, siginfo_t* info, void* context) {
        auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
        if (info->si_addr == reinterpret_cast<void*>(registers[REG_RIP])) seen = seen + 1;
        registers[REG_RIP] += 2;
    };
    const auto use_amx = [] {
        load_config(Config::full());
        zero(3);
        return store_config().rows[3] == 16;
    };
    check(!amx_trap_installed(), "nothing is installed before somebody asks");
    Outcome outcome = in_child([&] {
        if (hardware) return 0;
        zero(0);
        return 0;
    });
    check(outcome.killed_by(SIGILL) || hardware, "without the emulator a tile instruction ends the process");

    outcome = in_child([&] {
        if (!amx_trap_install() || !amx_trap_install() || !amx_trap_installed() || !use_amx()) return 1;
        entry(illegal_ret)(nullptr, 0);
        return 2;
    });
    check(outcome.killed_by(SIGILL) && outcome.errors.empty(), "ud2 still kills, in silence");

    outcome = in_child([&] {
        amx_trap_install();
        raise(SIGILL);
        return 2;
    });
    check(outcome.killed_by(SIGILL), "a SIGILL that was sent still kills");

    outcome = in_child([&] {
        signal(SIGILL, SIG_IGN);
        if (!amx_trap_install()) return 1;
        raise(SIGILL);
        return use_amx() ? 0 : 2;
    });
    check(outcome.exited_with(0), "a SIGILL that was sent and ignored stays ignored");

    outcome = in_child([&] {
        struct sigaction action{};
        action.sa_sigaction = skip_two_bytes;
        action.sa_flags = SA_SIGINFO;
        sigaddset(&action.sa_mask, SIGUSR1);
        sigaction(SIGILL, &action, nullptr);
        if (!amx_trap_install() || !use_amx()) return 1;
        entry(illegal_ret)(nullptr, 0);
        entry(illegal_ret)(nullptr, 0);
        sigset_t mask;
        pthread_sigmask(SIG_SETMASK, nullptr, &mask);
        if (sigismember(&mask, SIGUSR1) || sigismember(&mask, SIGILL)) return 2;
        return seen == 2 && use_amx() ? 0 : 3;
    });
    check(outcome.exited_with(0), "an earlier handler gets what is not AMX");

    outcome = in_child([&] {
        amx_trap_install();
        struct sigaction action{};
        action.sa_sigaction = skip_two_bytes;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGILL, &action, nullptr);
        return !amx_trap_installed() && !amx_trap_install() ? 0 : 1;
    });
    check(outcome.exited_with(0), "another handler in its place is not pushed aside");

    outcome = in_child([&] {
        std::vector<std::thread> threads;
        std::array<bool, 8> good{};
        for (bool& result : good) threads.emplace_back([&result] { result = amx_trap_install(); });
        for (std::thread& thread : threads) thread.join();
        for (const bool result : good) {
            if (!result) return 1;
        }
        entry(illegal_ret)(nullptr, 0);
        return 2;
    });
    check(outcome.killed_by(SIGILL), "installing from eight threads at once");
}

// ---------------------------------------------------------------------------------------------------------------
// Checks: configuration and addressing
// ---------------------------------------------------------------------------------------------------------------

Context random_context(Random& random) {
    Context context;
    std::memset(static_cast<void*>(&context), 0, sizeof context);
    random.fill(context.gpr, sizeof context.gpr);
    // Of the flags: carry, parity, adjust, zero, sign, direction, overflow; interrupts are always on, bit 1 always set.
    context.flags = (random() & 0xcd5) | 0x202;
    // Any rounding, denormal handling and exceptions recorded so far; exceptions masked, as loads would raise them.
    context.mxcsr = 0x1f80 | (random() & 0xe07f);
    const unsigned width = 16u << vector_level;
    for (unsigned v = 0; v < (vector_level == 2 ? 32 : 16); ++v) random.fill(context.vector[v], width);
    if (vector_level == 2) random.fill(context.mask, sizeof context.mask);
    return context;
}

// Runs it and says whether every register came back as it went in.
bool run_undisturbed(const void* code, const Context& context) {
    Context after = context;
    run_snippet(code, &after);
    return std::memcmp(&after, &context, sizeof context) == 0;
}

struct Arena {
    static constexpr std::size_t kSize = 1 << 20;
    std::uint8_t* memory;
    explicit Arena(std::uint64_t address = 0)
        : memory(static_cast<std::uint8_t*>(mmap(reinterpret_cast<void*>(address), kSize, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS | (address ? MAP_FIXED_NOREPLACE : 0), -1,
                                                 0))) {
        if (memory == MAP_FAILED) std::abort();
    }
    ~Arena() { munmap(memory, kSize); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    std::uint8_t* middle() const { return memory + kSize / 2; }
};

void check_configuration() {
    Random random{1};
    Config config;
    for (unsigned tile = 0; tile < 8; ++tile) config.set(tile, 1 + 2 * tile, 64 - 4 * tile);
    load_config(config);
    Config stored = store_config();
    check(std::memcmp(&stored, &config, 64) == 0, "sttilecfg gives back what ldtilecfg took");
    release();
    stored = store_config();
    const std::uint8_t zeros[64] = {};
    check(std::memcmp(&stored, zeros, 64) == 0, "sttilecfg stores zeros after tilerelease");
    load_config(config);
    Config initial;
    initial.palette = 0;
    initial.rows[0] = 99;  // nothing but the palette is looked at
    load_config(initial);
    stored = store_config();
    check(std::memcmp(&stored, zeros, 64) == 0, "palette 0 is the initial state");

    std::memcpy(rip_config, &config, 64);
    entry(load_rip_config)(nullptr, 0);
    entry(store_rip_config)(nullptr, 0);
    check(std::memcmp(rip_stored, &config, 64) == 0, "ldtilecfg and sttilecfg relative to rip");

    Tile ones, tile{};
    std::memset(&ones, 1, sizeof ones);
    load_config(Config::full());
    load(4, &ones);
    load_config(Config::full());
    std::memset(&tile, 7, sizeof tile);
    store(4, &tile);
    check(same_int(tile, Tile{}), "ldtilecfg zeroes the tiles");

    // start_row, as left behind by an interrupted load: rows before it stay, and it ends at zero.
    config = Config::full();
    config.start_row = 5;
    load_config(config);
    load(2, &ones);
    check(store_config().start_row == 0, "tileloadd ends with start_row 0");
    store(2, &tile);
    Tile expected = ones;
    std::memset(&expected, 0, 5 * 64);
    check(same_int(tile, expected), "tileloadd begins at start_row");
    config.start_row = 3;
    load_config(config);
    std::memset(&tile, 9, sizeof tile);
    store(0, &tile);
    expected = Tile{};
    std::memset(&expected, 9, 3 * 64);
    check(same_int(tile, expected) && store_config().start_row == 0, "tilestored begins at start_row");
    release();

    // Every base register, with each displacement and with an index.
    const Arena arena, stack;
    for (unsigned base = 0; base < 16; ++base) {
        for (unsigned form = 0; form < 6; ++form) {
            const std::int32_t displacement = form < 5 ? kDisplacements[form] : 0x1240;
            if (base == kRsp && displacement < 0) continue;  // below the stack is where the signal goes
            const unsigned slot = 32 * (6 * base + form);
            Context context = random_context(random);
            context.gpr[kRsp] = reinterpret_cast<std::uint64_t>(stack.middle());
            const std::uint64_t index = form < 5 ? 0 : 0x30;
            if (form == 5) context.gpr[base == 8 ? 9 : 8] = index;
            std::uint8_t* target = arena.middle();
            context.gpr[base] =
                reinterpret_cast<std::uint64_t>(target) - static_cast<std::uint64_t>(displacement) - 4 * index;
            config = Config{};
            for (unsigned tile_number = 0; tile_number < 8; ++tile_number) {
                config.set(tile_number, 1 + random.below(16), 1 + random.below(64));
            }
            std::memcpy(target, &config, 64);
            bool good = run_undisturbed(config_load_forms + slot, context);
            std::memset(target, 0x5a, 64);
            good = good && run_undisturbed(config_store_forms + slot, context);
            check(good && std::memcmp(target, &config, 64) == 0, "configuration at register %u, form %u", base, form);
        }
    }
    release();
}

// Every base, index, scale and displacement, with register contents that put the rows where they are expected.
void check_addressing() {
    Random random{2};
    const Arena arena, stack, absolute(kAbsolute);
    random.fill(arena.memory, Arena::kSize);
    random.fill(absolute.memory, Arena::kSize);
    constexpr unsigned kTile = 5;
    Tile actual, expected;

    const auto run = [&](const char* code, unsigned base, unsigned index, unsigned scale, std::int32_t displacement,
                         bool is_store, std::uint8_t* target, const char* what) {
        const bool one_row = base == index;
        const unsigned rows = one_row ? 1 : 1 + random.below(16);
        const unsigned colsb = 4 * (1 + random.below(16));
        std::int64_t stride = 8 * static_cast<std::int64_t>(random.below(200));
        if (base != kRsp && random.below(2)) stride = -stride;
        if (is_store && index != kRsp) stride = stride < 0 ? stride - 64 : stride + 64;  // rows apart
        Context context = random_context(random);
        context.gpr[kRsp] = reinterpret_cast<std::uint64_t>(stack.middle());
        if (index != kRsp) context.gpr[index] = static_cast<std::uint64_t>(stride) >> scale;
        if (index != kRsp && stride < 0) context.gpr[index] |= ~(~std::uint64_t{0} >> scale);
        context.gpr[base] = reinterpret_cast<std::uint64_t>(target) - static_cast<std::uint64_t>(displacement);
        if (one_row || index == kRsp) stride = 0;  // one register for both: row 0 alone has a known place

        load_config(Config{}.set(kTile, rows, colsb));
        std::memset(&actual, 0, sizeof actual);
        std::memset(&expected, 0, sizeof expected);
        bool good;
        if (is_store) {
            Tile content;
            random.fill(&content, sizeof content);
            load(kTile, &content);
            good = run_undisturbed(code, context);
            for (unsigned row = 0; row < rows; ++row) {
                const unsigned kept = stride == 0 ? rows - 1 : row;  // the last row wins
                std::memcpy(actual.bytes[row], target + row * stride, colsb);
                std::memcpy(expected.bytes[row], content.bytes[kept], colsb);
            }
        } else {
            good = run_undisturbed(code, context);
            store(kTile, &actual);
            for (unsigned row = 0; row < rows; ++row) std::memcpy(expected.bytes[row], target + row * stride, colsb);
        }
        check(good, "%s base %u index %u scale %u displacement %d: registers changed", what, base, index, 1 << scale,
              displacement);
        check(same_int(actual, expected), "%s base %u index %u scale %u displacement %d: wrong rows", what, base, index,
              1 << scale, displacement);
    };

    unsigned slot = 0;
    for (unsigned base = 0; base < 16; ++base) {
        for (unsigned index = 0; index < 16; ++index) {
            for (unsigned scale = 0; scale < 4; ++scale) {
                for (const std::int32_t displacement : kDisplacements) {
                    const unsigned at = 32 * slot++;
                    if (base == kRsp && displacement < 0) continue;  // below the stack is where the signal goes
                    run(load_forms + at, base, index, scale, displacement, false, arena.middle(), "tileloadd");
                    run(store_forms + at, base, index, scale, displacement, true, arena.middle(), "tilestored");
                }
            }
        }
    }
    const auto run_absolute = [&](const char* code, unsigned index, unsigned scale) {
        Context context = random_context(random);
        context.gpr[kRsp] = reinterpret_cast<std::uint64_t>(stack.middle());
        if (index != kRsp) context.gpr[index] = 24;
        load_config(Config{}.set(kTile, 16, 64));
        const bool good = run_undisturbed(code, context);
        store(kTile, &actual);
        const unsigned stride = index == kRsp ? 0 : 24u << scale;
        for (unsigned row = 0; row < 16; ++row) {
            std::memcpy(expected.bytes[row], absolute.memory + row * stride, 64);
        }
        check(good && same_int(actual, expected), "tileloadd without base, index %u scale %u", index, 1 << scale);
    };
    for (unsigned index = 0; index < 16; ++index) {
        for (unsigned scale = 0; scale < 4; ++scale) {
            run_absolute(absolute_forms + 32 * (4 * index + scale), index, scale);
        }
    }
    run_absolute(absolute_extended, 0, 0);
    load_config(Config::full());
    entry(padded_load)(arena.memory, 64);
    store(0, &actual);
    check(std::memcmp(&actual, arena.memory, sizeof actual) == 0, "tileloadd behind null segment prefixes");
    release();
}

// Each tile on its own, in every size, with sentinels around what is stored.
void check_moves() {
    Random random{3};
    constexpr unsigned kStride = 100, kBefore = 64;
    std::vector<std::uint8_t> source(16 * kStride), target, expected;
    random.fill(source.data(), source.size());
    for (unsigned tile = 0; tile < 8; ++tile) {
        for (unsigned rows = 1; rows <= 16; ++rows) {
            for (unsigned colsb = 4; colsb <= 64; colsb += 4) {
                load_config(Config::full().set(tile, rows, colsb));
                entry(rows % 2 ? load_tile : load_t1_tile, tile)(source.data(), kStride);
                target.assign(2 * kBefore + 16 * kStride, 0xee);
                expected = target;
                store(tile, target.data() + kBefore, kStride);
                for (unsigned row = 0; row < rows; ++row) {
                    std::memcpy(&expected[kBefore + row * kStride], &source[row * kStride], colsb);
                }
                check(target == expected, "tmm%u, %u rows of %u bytes", tile, rows, colsb);
            }
        }
        load_config(Config::full());
        for (unsigned each = 0; each < 8; ++each) load(each, source.data());
        zero(tile);
        for (unsigned each = 0; each < 8; ++each) {
            Tile content;
            store(each, &content);
            const bool good =
                each == tile ? same_int(content, Tile{}) : std::memcmp(&content, source.data(), 1024) == 0;
            check(good, "tilezero tmm%u, then tmm%u", tile, each);
        }
    }
    release();
}

// ---------------------------------------------------------------------------------------------------------------
// Checks: arithmetic
// ---------------------------------------------------------------------------------------------------------------

enum class Data { integer, gaussian, wide, tiny, huge, special, bits };
constexpr const char* kDataNames[] = {"integer", "gaussian", "wide", "tiny", "huge", "special", "bits"};

std::uint32_t truncate_to_bf16(float x) {
    return std::bit_cast<std::uint32_t>(x) & 0xffff0000;
}

// An fp32 whose lower half is zero, thus a bf16.
std::uint32_t draw(Data data, Random& random) {
    const std::uint32_t sign = random() & kSign, fraction = random() & 0x7f0000;
    const auto scaled = [&](unsigned low, unsigned count) {
        return sign | (low + random.below(count)) << 23 | fraction;
    };
    switch (data) {
        case Data::integer:
            return truncate_to_bf16(static_cast<float>(static_cast<int>(random.below(17)) - 8));
        case Data::gaussian:
            return truncate_to_bf16(random.gaussian());
        case Data::wide:
            return scaled(90, 75);
        case Data::tiny:
            return random.below(4) ? scaled(60, 8) : scaled(0, 2);  // products around 2^-126, denormals
        case Data::huge:
            return scaled(186, 6);  // products around 2^127
        case Data::special: {
            constexpr std::uint32_t kValues[] = {0x7f800000, 0xff800000, 0x7fc00000, 0xff810000,
                                                 0,          kSign,      0x00010000, 0x3f800000};
            return random.below(8) ? truncate_to_bf16(random.gaussian()) : kValues[random.below(8)];
        }
        case Data::bits:
            return static_cast<std::uint32_t>(random()) & 0xffff0000;
    }
    return 0;
}

void fill(Tile& tile, Data data, Random& random) {
    for (unsigned i = 0; i < 256; ++i) set_element(tile, i / 16, i % 16, draw(data, random) | draw(data, random) >> 16);
}
void fill_dest(Tile& tile, Data data, Random& random) {
    for (unsigned i = 0; i < 256; ++i) {
        std::uint32_t bits = draw(data, random);
        if (data == Data::tiny) bits = random.below(2) ? bits & 0x80ffffff : 0;  // near the smallest normal number
        if (data != Data::integer && random.below(2)) bits |= static_cast<std::uint32_t>(random()) & 0xffff;
        set_element(tile, i / 16, i % 16, bits);
    }
}

constexpr Path kPaths[] = {Path::scalar, Path::avx2, Path::avx512};
constexpr const char* kPathNames[] = {"scalar", "avx2", "avx512"};

void check_bf16() {
    Random random{4};
    for (const Data data :
         {Data::integer, Data::gaussian, Data::wide, Data::tiny, Data::huge, Data::special, Data::bits}) {
        const char* name = kDataNames[static_cast<int>(data)];
        for (unsigned trial = 0; trial < 40; ++trial) {
            Shape shape{16, 16, 16};
            if (trial % 2) shape = {1 + random.below(16), 1 + random.below(16), 1 + random.below(16)};
            Tile dest, a, b;
            fill_dest(dest, data, random);
            fill(a, data, random);
            fill(b, data, random);
            const Tile expected = oracle_bf16(dest, a, b, shape);
            for (const Path path : kPaths) {
                if (!path_available(path)) continue;
                Tile actual = dest;
                const unsigned mxcsr = 0x1f80 | (static_cast<unsigned>(random()) & 0xe040);
                _mm_setcsr(mxcsr);
                tdpbf16ps(actual, a, b, shape, path);
                const bool untouched = _mm_getcsr() == mxcsr;
                _mm_setcsr(0x1f80);
                check(untouched, "%s changes MXCSR", kPathNames[static_cast<int>(path)]);
                check(same(actual, expected, false), "%s on %s, %u x %u x %u", kPathNames[static_cast<int>(path)], name,
                      shape.rows, shape.depth, shape.columns);
            }
            Tile actual = dest;
            _mm_setcsr(0x1f80 | (static_cast<unsigned>(random()) & 0xe040));
            multiply_in_tiles(product_bf16, actual, a, b, shape);
            _mm_setcsr(0x1f80);
            for (unsigned i = 0; i < 256; ++i) {  // what the store left alone
                if (i / 16 >= shape.rows || i % 16 >= shape.columns) set_element(actual, i / 16, i % 16, 0);
            }
            check(same(actual, expected), "tdpbf16ps on %s, %u x %u x %u", name, shape.rows, shape.depth,
                  shape.columns);

            if (data == Data::integer || data == Data::gaussian) {  // and the oracle against plain fp64
                double worst = 0;
                for (unsigned m = 0; m < shape.rows; ++m) {
                    for (unsigned n = 0; n < shape.columns; ++n) {
                        double sum = std::bit_cast<float>(element(dest, m, n)), size = std::fabs(sum);
                        for (unsigned k = 0; k < shape.depth; ++k) {
                            for (const unsigned half : {16u, 0u}) {
                                const double product =
                                    double{std::bit_cast<float>(element(a, m, k) << half & 0xffff0000)} *
                                    std::bit_cast<float>(element(b, k, n) << half & 0xffff0000);
                                sum += product;
                                size += std::fabs(product);
                            }
                        }
                        const double error = std::fabs(std::bit_cast<float>(element(expected, m, n)) - sum);
                        worst = std::max(worst, error / (size + 1e-30));
                    }
                }
                check(worst <= (data == Data::integer ? 0 : 19 * 0x1p-24), "the oracle on %s is %g off fp64", name,
                      worst);
            }
        }
    }

    // Every tile as destination, left and right operand.
    for (unsigned dest = 0; dest < 8; ++dest) {
        for (unsigned left = 0; left < 8; ++left) {
            for (unsigned right = 0; right < 8; ++right) {
                if (dest == left || dest == right || left == right) continue;
                const Shape shape{1 + random.below(16), 1 + random.below(16), 1 + random.below(16)};
                Tile c{}, a, b;
                fill(a, Data::integer, random);
                fill(b, Data::integer, random);
                Tile actual = c;
                multiply_in_tiles(product_bf16, actual, a, b, shape, dest, left, right);
                check(same(actual, oracle_bf16(c, a, b, shape)), "tdpbf16ps tmm%u, tmm%u, tmm%u", dest, left, right);
            }
        }
    }
}

void check_int8() {
    struct Kind {
        const char *name, *product;
        bool a_signed, b_signed;
    };
    const Kind kinds[] = {{"tdpbssd", product_ssd, true, true},
                          {"tdpbsud", product_sud, true, false},
                          {"tdpbusd", product_usd, false, true},
                          {"tdpbuud", product_uud, false, false}};
    Random random{5};
    for (const Kind& kind : kinds) {
        for (unsigned trial = 0; trial < 100; ++trial) {
            Shape shape{16, 16, 16};
            if (trial % 2) shape = {1 + random.below(16), 1 + random.below(16), 1 + random.below(16)};
            Tile dest, a, b;
            random.fill(&dest, sizeof dest);  // large enough to wrap
            random.fill(&a, sizeof a);
            random.fill(&b, sizeof b);
            if (trial < 4) std::memset(&a, trial % 2 ? 0x80 : 0xff, sizeof a);
            if (trial < 4) std::memset(&b, trial / 2 ? 0x80 : 0xff, sizeof b);
            const Tile expected = oracle_int8(dest, a, b, shape, kind.a_signed, kind.b_signed);
            Tile direct = dest, actual = dest;
            tdpb_int8(direct, a, b, shape, kind.a_signed, kind.b_signed);
            check(same_int(direct, expected), "%s as a function", kind.name);
            const unsigned l = 1 + random.below(7), r = 1 + (l + random.below(6)) % 7;
            multiply_in_tiles(kind.product, actual, a, b, shape, 0, l, r);
            for (unsigned i = 0; i < 256; ++i) {
                if (i / 16 >= shape.rows || i % 16 >= shape.columns) set_element(actual, i / 16, i % 16, 0);
            }
            check(same_int(actual, expected), "%s tmm0, tmm%u, tmm%u, %u x %u x %u", kind.name, l, r, shape.rows,
                  shape.depth, shape.columns);
        }
    }
}

// What a compiler makes of intrinsics: 32 x 32 outputs in four tiles. gcc 12's intrinsics name no memory they touch,
// hence the barriers.
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
void matmul_32x32(float* c, const std::uint16_t* a, const std::uint16_t* b, int depth) {
    const Config config = Config::full();
    asm volatile("" : : "r"(&config), "r"(c), "r"(a), "r"(b) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < depth; k += 32) {
        _tile_loadd(4, a + k, 2 * depth);
        _tile_loadd(5, a + 16 * depth + k, 2 * depth);
        _tile_stream_loadd(6, b + k * 32, 128);
        _tile_stream_loadd(7, b + k * 32 + 32, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 16 * 32, 128);
    _tile_stored(3, c + 16 * 32 + 16, 128);
    _tile_release();
    asm volatile("" : : : "memory");
}
#pragma GCC pop_options

// Integers, so that the order of the sums does not matter.
bool matmul_is_right(Random& random) {
    constexpr int kDepth = 96;
    std::vector<std::uint16_t> a(32 * kDepth), b(32 * kDepth);  // b: [depth / 2][32][2]
    std::vector<float> c(32 * 32, -1.0f);
    for (auto& x : a) x = static_cast<std::uint16_t>(draw(Data::integer, random) >> 16);
    for (auto& x : b) x = static_cast<std::uint16_t>(draw(Data::integer, random) >> 16);
    matmul_32x32(c.data(), a.data(), b.data(), kDepth);
    const auto value = [](std::uint16_t x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); };
    for (int m = 0; m < 32; ++m) {
        for (int n = 0; n < 32; ++n) {
            float sum = 0;
            for (int k = 0; k < kDepth; ++k) sum += value(a[m * kDepth + k]) * value(b[(k / 2 * 32 + n) * 2 + k % 2]);
            if (c[m * 32 + n] != sum) return false;
        }
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------
// Checks: registers, threads, counting, refusals
// ---------------------------------------------------------------------------------------------------------------

void check_registers() {
    // check_addressing has compared all registers around loads and stores; here around arithmetic, which uses vectors.
    Random random{6};
    const Arena stack;
    const Shape shape{16, 16, 16};
    for (unsigned trial = 0; trial < 64; ++trial) {
        Tile c, a, b, actual;
        fill_dest(c, Data::tiny, random);
        fill(a, Data::tiny, random);
        fill(b, Data::tiny, random);
        load_config(Config::full());
        load(0, &c);
        load(1, &a);
        load(2, &b);
        Context context = random_context(random);
        // It ends in ret: to snippet_return, by way of the stack.
        extern const char snippet_return_address[] asm("snippet_return");
        const auto back = reinterpret_cast<std::uint64_t>(snippet_return_address);
        std::memcpy(stack.middle(), &back, 8);
        context.gpr[kRsp] = reinterpret_cast<std::uint64_t>(stack.middle());
        Context after = context;
        run_snippet(product_bf16 + 16 * (1 * 8 + 2), &after);
        after.gpr[kRsp] -= 8;
        check(std::memcmp(&after, &context, sizeof context) == 0, "tdpbf16ps changes a register");
        store(0, &actual);
        check(same(actual, oracle_bf16(c, a, b, shape)), "tdpbf16ps depends on MXCSR 0x%x",
              static_cast<unsigned>(context.mxcsr));
    }
    release();
}

std::size_t virtual_pages() {
    std::size_t pages = 0;
    if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
        if (std::fscanf(file, "%zu", &pages) != 1) pages = 0;
        std::fclose(file);
    }
    return pages;
}

void check_threads() {
    constexpr unsigned kThreads = 4;
    std::array<unsigned, kThreads> wrong{};
    std::vector<std::thread> threads;
    for (unsigned number = 0; number < kThreads; ++number) {
        threads.emplace_back([number, &wrong] {
            Random random{100 + number};
            for (unsigned trial = 0; trial < 60; ++trial) {
                const Shape shape{1 + random.below(16), 1 + random.below(16), 1 + random.below(16)};
                Tile dest{}, a, b;
                fill(a, Data::integer, random);
                fill(b, Data::integer, random);
                const Tile expected = oracle_bf16(dest, a, b, shape);
                load_config(Config{}
                                .set(0, shape.rows, 4 * shape.columns)
                                .set(1, shape.rows, 4 * shape.depth)
                                .set(2, shape.depth, 4 * shape.columns));
                sched_yield();
                load(0, &dest);
                sched_yield();
                load(1, &a);
                sched_yield();
                load(2, &b);
                sched_yield();
                multiply(product_bf16, 0, 1, 2);
                sched_yield();
                store(0, &dest);
                if (!same_int(dest, expected)) ++wrong[number];
                if (!matmul_is_right(random)) ++wrong[number];
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (unsigned number = 0; number < kThreads; ++number)
        check(wrong[number] == 0, "thread %u: %u wrong", number, wrong[number]);

    load_config(Config::full());
    std::thread([] {
        const Config other = store_config();
        check(other.palette == 0, "a new thread begins unconfigured");
    }).join();
    check(store_config().palette == 1, "and leaves its parent's tiles alone");
    release();

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they map memory of their own
    const auto touch = [] { std::thread([] { load_config(Config::full()); }).join(); };
    touch();
    const std::size_t before = virtual_pages();
    constexpr unsigned kCount = 600;
    for (unsigned i = 0; i < kCount; ++i) touch();
    check(virtual_pages() < before + kCount, "a thread's tiles are given back when it ends");
#endif
}

void check_count() {
    load_config(Config::full());
    Tile tile{};
    const std::uint64_t before = amx_trap_count();
    errno = 42;
    entry(run_of_eight)(&tile, 64);
    check(errno == 42, "errno changes");
    check(amx_trap_count() - before == (hardware ? 0 : 8), "eight instructions in one trap count as eight");
    release();
}

void check_refusals() {
    static Tile tile{};
    const auto refuses = [](const char* expected, const std::function<void()>& body) {
        const Outcome outcome = in_child([&] {
            body();
            return 0;
        });
        const bool died = outcome.killed_by(SIGILL) || (hardware && outcome.killed_by(SIGSEGV));
        check(died, "not refused: %s", expected);
        if (hardware) return;
        const bool one_line = outcome.errors.find('\n') == outcome.errors.size() - 1;
        check(one_line && outcome.errors.find(expected) != std::string::npos, "expected '%s', got '%s'", expected,
              outcome.errors.c_str());
    };
    const auto with = [](const Config& config, const std::function<void()>& body) {
        return [config, body] {
            load_config(config);
            body();
        };
    };
    const auto nothing = [] {};
    const auto tdp = [] { multiply(product_bf16, 0, 1, 2); };
    Config config;

    refuses("tilezero tmm3", [] { zero(3); });
    refuses("#UD: no tile is configured, ldtilecfg must come first", [] { load(0, &tile); });
    refuses("#UD: no tile is configured", tdp);
    refuses("#UD: no tile is configured", with(Config::full(), [] {
                release();
                store(1, &tile);
            }));
    config = Config::full();
    config.palette = 2;
    refuses("ldtilecfg at 0x", with(config, nothing));
    refuses("#GP: palette 2, there are 0 and 1", with(config, nothing));
    for (const unsigned byte : {2u, 15u, 32u, 47u, 56u, 63u}) {
        config = Config::full();
        reinterpret_cast<std::uint8_t*>(&config)[byte] = 1;
        refuses("#GP: bytes 2-15, 32-47 and 56-63 of the configuration must be zero", with(config, nothing));
    }
    refuses("#GP: tmm7 has 17 rows of 64 bytes", with(Config::full().set(7, 17, 64), nothing));
    refuses("#GP: tmm0 has 16 rows of 65 bytes", with(Config::full().set(0, 16, 65), nothing));
    refuses("#GP: tmm4 has 0 rows of 64 bytes: both must be zero, or neither",
            with(Config::full().set(4, 0, 64), nothing));
    refuses("#GP: tmm4 has 3 rows of 0 bytes", with(Config::full().set(4, 3, 0), nothing));
    refuses("tileloadd tmm2 at 0x", with(Config::full().set(2, 0, 0), [] { load(2, &tile); }));
    refuses("#UD: tmm2 has no rows", with(Config::full().set(2, 0, 0), [] { zero(2); }));
    refuses("#UD: rows of tmm1 have 7 bytes, no multiple of 4",
            with(Config::full().set(1, 5, 7), [] { store(1, &tile); }));
    config = Config::full();
    config.start_row = 16;
    refuses("#UD: start_row is 16, tmm0 has 16 rows", with(config, [] { load(0, &tile); }));
    refuses("#UD: the address must be encoded with a SIB byte", with(Config::full(), [] { entry(no_sib)(&tile, 0); }));
    for (unsigned number = 0; number < 5; ++number) {
        const Outcome outcome = in_child([number] {
            load_config(Config::full());
            entry(malformed, number)(&tile, 64);
            return 0;
        });
        check(outcome.killed_by(SIGILL) && outcome.errors.empty(), "malformed instruction %u is no AMX", number);
    }
    refuses("#UD: there is no tmm8", with(Config::full(), [] { entry(tmm_eight)(&tile, 0); }));
    refuses("tdpbf16ps tmm0, tmm0, tmm1 at 0x", with(Config::full(), [] { entry(same_tile_twice)(nullptr, 0); }));
    refuses("#UD: its three tiles must differ", with(Config::full(), [] { entry(same_tile_twice)(nullptr, 0); }));
    refuses("#UD: tmm0 has 16 rows, tmm1 has 8: they must be equal", with(Config::full().set(1, 8, 64), tdp));
    refuses("#UD: rows of tmm1 have 8 4-byte elements, tmm2 has 16 rows", with(Config::full().set(1, 16, 32), tdp));
    refuses("#UD: rows of tmm0 have 32 bytes, of tmm2 64", with(Config::full().set(0, 16, 32), tdp));
    refuses("#UD: rows of tmm2 have 30 bytes, no multiple of 4", with(Config::full().set(2, 16, 30), tdp));
    refuses("tdpbsud tmm5, tmm6, tmm7 at 0x",
            with(Config::full().set(6, 1, 64), [] { multiply(product_sud, 5, 6, 7); }));
}

// ---------------------------------------------------------------------------------------------------------------
// Timing
// ---------------------------------------------------------------------------------------------------------------

// Median of seven runs, in nanoseconds per call.
double measure(unsigned calls, const std::function<void()>& body) {
    std::vector<double> runs;
    for (unsigned run = 0; run < 7; ++run) {
        const auto start = std::chrono::steady_clock::now();
        for (unsigned call = 0; call < calls; ++call) body();
        runs.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() /
                       calls);
    }
    std::sort(runs.begin(), runs.end());
    return runs[runs.size() / 2];
}

void bench() {
    Random random{7};
    Tile a, b, c{};
    fill(a, Data::gaussian, random);
    fill(b, Data::gaussian, random);
    const Shape shape{16, 16, 16};
    constexpr unsigned kCalls = 5000;
    std::printf("ns per instruction, 16 rows of 64 bytes, one trap each unless said otherwise%s\n",
                hardware ? " (this CPU has AMX: nothing is emulated)" : "");
    const auto report = [](const char* what, double ns) { std::printf("%-34s %9.1f\n", what, ns); };

    // The price of the trap itself: an illegal instruction and a handler that does nothing but step over it.
    struct sigaction action{}, emulator;
    action.sa_sigaction = [](int, siginfo_t*, void* context) {
        static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] += 2;
    };
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &emulator);
    report("ud2 with an empty handler", measure(kCalls, [] { entry(illegal_ret)(nullptr, 0); }));
    sigaction(SIGILL, &emulator, nullptr);

    load_config(Config::full());
    report("tilezero", measure(kCalls, [] { zero(0); }));
    report("tileloadd", measure(kCalls, [&] { load(1, &a); }));
    report("tilestored", measure(kCalls, [&] { store(0, &c); }));
    load(1, &a);
    load(2, &b);
    report("tdpbf16ps", measure(kCalls, [] { multiply(product_bf16, 0, 1, 2); }));
    report("tdpbssd", measure(kCalls, [] { multiply(product_ssd, 3, 1, 2); }));
    report("4 tileloadd, 4 tdpbf16ps, 1 trap", measure(kCalls, [&] { entry(run_of_eight)(&a, 64); }) / 8);
    release();
    std::printf("arithmetic alone\n");
    for (const Path path : kPaths) {
        if (!path_available(path)) continue;
        const std::string name = std::string("tdpbf16ps, ") + kPathNames[static_cast<int>(path)];
        report(name.c_str(), measure(path == Path::scalar ? 200 : kCalls, [&] { tdpbf16ps(c, a, b, shape, path); }));
    }
    report("tdpbssd, sse2", measure(kCalls, [&] { tdpb_int8(c, a, b, shape, true, true); }));
}

int main(int argc, char** argv) {
    hardware = request_hardware_amx();
    vector_level = __builtin_cpu_supports("avx512bw") ? 2 : __builtin_cpu_supports("avx") ? 1 : 0;
    const bool only_bench = argc > 1 && std::strcmp(argv[1], "--bench") == 0;
    if (!only_bench) check_installation();
    check(amx_trap_install() && amx_trap_installed(), "the emulator installs");
    if (only_bench) {
        bench();
        return 0;
    }
    check_configuration();
    check_addressing();
    check_moves();
    check_bf16();
    check_int8();
    Random random{8};
    for (unsigned trial = 0; trial < 20; ++trial)
        check(matmul_is_right(random), "a 32 x 32 x 96 product by intrinsics");
    check_registers();
    check_threads();
    check_count();
    check_refusals();
    std::printf("%s\n%d passed, %d failed\n", hardware ? "on AMX hardware" : "by emulation", passed, failed);
    return failed == 0 ? 0 : 1;
}
