// Tile instructions in every form: configuration, addresses, moves. No instruction may change another register.
// The checks are also valid on a CPU with AMX: there they test the oracle.
#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "amx_trap_data.hpp"

Context random_context(Random& random) {
    Context context;
    std::memset(static_cast<void*>(&context), 0, sizeof context);
    random.fill(context.gpr, sizeof context.gpr);
    // Of the flags: carry, parity, adjust, zero, sign, direction, overflow; interrupts are always on, bit 1 always set.
    context.flags = (random() & 0xcd5) | 0x202;
    // Any rounding mode, denormal mode and recorded exceptions; exceptions are masked, because loads would raise them.
    context.mxcsr = 0x1f80 | (random() & 0xe07f);
    const unsigned width = 16u << vector_level;
    for (unsigned v = 0; v < (vector_level == 2 ? 32 : 16); ++v) random.fill(context.vector[v], width);
    if (vector_level == 2) random.fill(context.mask, sizeof context.mask);
    return context;
}

// Whether every register is the same after the code ran.
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
    check(std::memcmp(&stored, &config, 64) == 0, "sttilecfg stores what ldtilecfg loaded");
    release();
    stored = store_config();
    const std::uint8_t zeros[64] = {};
    check(std::memcmp(&stored, zeros, 64) == 0, "sttilecfg stores zeros after tilerelease");
    load_config(config);
    Config initial;
    initial.palette = 0;
    initial.rows[0] = 99;  // only the palette counts
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

    // start_row, as an interrupted load leaves it: rows before it keep their values, and it ends at zero.
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
            if (base == kRsp && displacement < 0) continue;  // the signal frame is written below the stack pointer
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

// Every base, index, scale and displacement, with register contents that lead to known rows.
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
        if (one_row || index == kRsp) stride = 0;  // one register for both: only row 0 has a known address

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
                const unsigned kept = stride == 0 ? rows - 1 : row;  // the last row overwrites the others
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
                    if (base == kRsp && displacement < 0)
                        continue;  // the signal frame is written below the stack pointer
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
    check(std::memcmp(&actual, arena.memory, sizeof actual) == 0, "tileloadd after segment prefixes without effect");
    release();
}

// Each tile alone, in every size, with sentinels around the stored bytes.
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

void check_registers() {
    // check_addressing compares all registers around loads and stores; this one around arithmetic, which uses vectors.
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
        // The code ends in ret: the stack leads it to snippet_return.
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

int main() {
    begin();
    check_configuration();
    check_addressing();
    check_moves();
    check_registers();
    return finish_amx();
}
