// Tile instructions in every form: configuration, addresses, moves, products. None may change another register.
// The checks are also valid on a CPU with AMX: there they test the oracle.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>

#include "amx_trap_testing.hpp"

Context random_context(Random& random) {
    Context context{};
    random.fill(context.gpr, sizeof context.gpr);
    // Of the flags: carry, parity, adjust, zero, sign, direction, overflow; interrupts are always on, bit 1 always set.
    context.flags = (random() & 0xcd5) | 0x202;
    // Any rounding mode, denormal mode and recorded exceptions; exceptions are masked, because loads would raise them.
    const std::uint32_t mxcsr = 0x1f80 | (static_cast<std::uint32_t>(random()) & 0xe07f);
    std::memcpy(context.vectors + 24, &mxcsr, sizeof mxcsr);
    random.fill(context.vectors + 160, 256);
    std::uint32_t states, high;
    asm("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
    states &= kVectorStates;
    std::memcpy(context.vectors + 512, &states, sizeof states);
    for (const unsigned state : {2u, 5u, 6u, 7u}) {
        unsigned size, offset, c, d;
        __cpuid_count(0xd, state, size, offset, c, d);
        if (states >> state & 1) random.fill(context.vectors + offset, size);
    }
    run_snippet(snippet_return, &context);  // XSAVE also stores which bits of MXCSR exist
    return context;
}
std::uint64_t address_of(const void* memory) {
    return reinterpret_cast<std::uint64_t>(memory);
}

// Whether every register is the same after the code ran.
bool run_undisturbed(const void* code, const Context& context) {
    Context after = context;
    run_snippet(code, &after);
    return same_bytes(after, context);
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
    Config config, zeros, initial;
    for (unsigned tile = 0; tile < 8; ++tile) config.set(tile, 1 + 2 * tile, 64 - 4 * tile);
    zeros.palette = initial.palette = 0;
    initial.rows[0] = 99;  // only the palette counts
    load_config(config);
    check(same_bytes(store_config(), config), "sttilecfg stores what ldtilecfg loaded");
    release();
    check(same_bytes(store_config(), zeros), "sttilecfg stores zeros after tilerelease");
    load_config(config);
    load_config(initial);
    check(same_bytes(store_config(), zeros), "palette 0 is the initial state");

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
    check(same_bytes(tile, Tile{}), "ldtilecfg zeroes the tiles");

    // start_row, as an interrupted load leaves it: rows before it keep their values, and it ends at zero.
    config = Config::full();
    config.start_row = 5;
    load_config(config);
    load(2, &ones);
    check(store_config().start_row == 0, "tileloadd ends with start_row 0");
    store(2, &tile);
    Tile expected = ones;
    std::memset(&expected, 0, 5 * 64);
    check(same_bytes(tile, expected), "tileloadd begins at start_row");
    config.start_row = 3;
    load_config(config);
    std::memset(&tile, 9, sizeof tile);
    store(0, &tile);
    expected = Tile{};
    std::memset(&expected, 9, 3 * 64);
    check(same_bytes(tile, expected) && store_config().start_row == 0, "tilestored begins at start_row");
    release();

    // Every base register, with each displacement and with an index.
    const Arena arena, stack;
    for (unsigned base = 0; base < 16; ++base) {
        for (unsigned form = 0; form < 6; ++form) {
            const std::int32_t displacement = form < 5 ? kDisplacements[form] : 0x1240;
            if (base == kRsp && displacement < 0) continue;  // the signal frame is written below the stack pointer
            const unsigned slot = 32 * (6 * base + form);
            Context context = random_context(random);
            context.gpr[kRsp] = address_of(stack.middle());
            const std::uint64_t index = form < 5 ? 0 : 0x30;
            if (form == 5) context.gpr[base == 8 ? 9 : 8] = index;
            std::uint8_t* target = arena.middle();
            context.gpr[base] = address_of(target) - static_cast<std::uint64_t>(displacement) - 4 * index;
            config = Config{};
            for (unsigned number = 0; number < 8; ++number)
                config.set(number, 1 + random.below(16), 1 + random.below(64));
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
                         bool is_store) {
        std::uint8_t* const target = arena.middle();
        const bool one_row = base == index;
        const unsigned rows = one_row ? 1 : 1 + random.below(16);
        const unsigned colsb = 4 * (1 + random.below(16));
        std::int64_t stride = 8 * static_cast<std::int64_t>(random.below(200));
        if (base != kRsp && random.below(2)) stride = -stride;
        if (is_store && index != kRsp) stride = stride < 0 ? stride - 64 : stride + 64;  // rows apart
        Context context = random_context(random);
        context.gpr[kRsp] = address_of(stack.middle());
        if (index != kRsp) context.gpr[index] = static_cast<std::uint64_t>(stride) >> scale;
        if (index != kRsp && stride < 0) context.gpr[index] |= ~(~std::uint64_t{0} >> scale);
        context.gpr[base] = address_of(target) - static_cast<std::uint64_t>(displacement);
        if (one_row || index == kRsp) stride = 0;  // one register for both: only row 0 has a known address

        load_config(Config{}.set(kTile, rows, colsb));
        Tile content, in_memory{}, expected{};
        random.fill(&content, sizeof content);
        if (is_store) load(kTile, &content);
        const bool good = run_undisturbed(code, context);
        if (!is_store) {
            content = Tile{};
            store(kTile, &content);
        }
        for (unsigned row = 0; row < rows; ++row) {
            // Of rows stored at one address, the last one is left.
            const unsigned kept = is_store && stride == 0 ? rows - 1 : row;
            std::memcpy(in_memory.bytes[row], target + row * stride, colsb);
            std::memcpy(expected.bytes[row], content.bytes[kept], colsb);
        }
        const char* what = is_store ? "tilestored" : "tileloadd";
        check(good, "%s base %u index %u scale %u displacement %d: registers changed", what, base, index, 1 << scale,
              displacement);
        check(same_bytes(in_memory, expected), "%s base %u index %u scale %u displacement %d: wrong rows", what, base,
              index, 1 << scale, displacement);
    };

    unsigned slot = 0;
    for (unsigned base = 0; base < 16; ++base) {
        for (unsigned index = 0; index < 16; ++index) {
            for (unsigned scale = 0; scale < 4; ++scale) {
                for (const std::int32_t displacement : kDisplacements) {
                    const unsigned at = 32 * slot++;
                    if (base == kRsp && displacement < 0) continue;  // as in check_configuration
                    run(load_forms + at, base, index, scale, displacement, false);
                    run(store_forms + at, base, index, scale, displacement, true);
                }
            }
        }
    }
    const auto run_absolute = [&](const char* code, unsigned index, unsigned scale) {
        Context context = random_context(random);
        context.gpr[kRsp] = address_of(stack.middle());
        if (index != kRsp) context.gpr[index] = 24;
        load_config(Config{}.set(kTile, 16, 64));
        const bool good = run_undisturbed(code, context);
        store(kTile, &actual);
        const unsigned stride = index == kRsp ? 0 : 24u << scale;
        for (unsigned row = 0; row < 16; ++row) std::memcpy(expected.bytes[row], absolute.memory + row * stride, 64);
        check(good && same_bytes(actual, expected), "tileloadd without base, index %u scale %u", index, 1 << scale);
    };
    for (unsigned index = 0; index < 16; ++index) {
        for (unsigned scale = 0; scale < 4; ++scale)
            run_absolute(absolute_forms + 32 * (4 * index + scale), index, scale);
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
                for (unsigned row = 0; row < rows; ++row)
                    std::memcpy(&expected[kBefore + row * kStride], &source[row * kStride], colsb);
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
                each == tile ? same_bytes(content, Tile{}) : std::memcmp(&content, source.data(), 1024) == 0;
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
        const Operands given(Data::tiny, random);
        load_config(Config::full());
        load(0, &given.dest);
        load(1, &given.a);
        load(2, &given.b);
        Context context = random_context(random);
        const std::uint64_t back = address_of(snippet_return);  // the code ends in ret
        std::memcpy(stack.middle(), &back, 8);
        context.gpr[kRsp] = address_of(stack.middle());
        Context after = context;
        run_snippet(product_bf16 + 16 * (1 * 8 + 2), &after);
        after.gpr[kRsp] -= 8;
        check(same_bytes(after, context), "tdpbf16ps changes a register");
        Tile actual;
        store(0, &actual);
        check(same(actual, oracle_bf16(given.dest, given.a, given.b, shape)), "tdpbf16ps depends on MXCSR");
    }
    release();
}

// tdpbf16ps, as a function and as an instruction, against the oracle.
void check_products() {
    Random random{4};
    for (const Data data :
         {Data::integer, Data::gaussian, Data::wide, Data::tiny, Data::huge, Data::special, Data::bits}) {
        const char* name = kDataNames[static_cast<int>(data)];
        for (unsigned trial = 0; trial < 40; ++trial) {
            const Shape shape = trial % 2 ? random_shape(random) : Shape{16, 16, 16};
            const auto [dest, a, b] = Operands(data, random);
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
            multiply_in_tiles(actual, a, b, shape);
            _mm_setcsr(0x1f80);
            for (unsigned i = 0; i < 256; ++i) {  // elements that the store did not write
                if (i / 16 >= shape.rows || i % 16 >= shape.columns) set_element(actual, i / 16, i % 16, 0);
            }
            check(same(actual, expected), "tdpbf16ps on %s, %u x %u x %u", name, shape.rows, shape.depth,
                  shape.columns);

            if (data == Data::integer || data == Data::gaussian) {  // also the oracle against fp64
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
                const Shape shape = random_shape(random);
                const auto [c, a, b] = Operands(Data::integer, random);
                Tile actual = c;
                multiply_in_tiles(actual, a, b, shape, dest, left, right);
                check(same(actual, oracle_bf16(c, a, b, shape)), "tdpbf16ps tmm%u, tmm%u, tmm%u", dest, left, right);
            }
        }
    }
    for (unsigned trial = 0; trial < 20; ++trial)
        check(matmul_is_right(random), "a 32 x 32 x 96 product by intrinsics");
}

int main() {
    begin();
    check_configuration();
    check_addressing();
    check_moves();
    check_registers();
    check_products();
    return finish_amx();
}
