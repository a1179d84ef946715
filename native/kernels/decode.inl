// Blocks of codes that are decoded in registers: what all kernels with AVX-512 share. decode_fp32.inl has the blocks of
// each format for products of fp32, decode_bf16.inl for products of bf16.

// ---- FP8: bf16 by code, as low and as high bytes, for each scale

struct ByteTable {
    alignas(64) std::uint8_t low[128], high[128];
};
// bf16 in the upper half of each lane; of no NaN.
KTV_INLINE U rounded_in_place(const F& value) {
    const U b = bits_as<std::uint32_t>(value);
    return b + ((b >> 16) & 1u) + 0x7fffu;
}
// The products of the 128 magnitudes of e4m3 and a scale that fp8_looks_up. A code's exponent, less 1, is added to the
// exponent of its product.
inline void make_fp8_table(float scale, ByteTable& to) {
    using Words = std::uint16_t __attribute__((vector_size(64)));
    // of 0 to 7 without an exponent, of 8 to 15 with the exponent 1
    F multiples;
    for (int i = 0; i < 16; ++i) multiples.part[0][i] = static_cast<float>(i) * 0x1p-9f;
    const U products = rounded_in_place(multiples * scale);
    // words 2 i + 1 of the products: in the first 32 places all of them, then those of 8 to 15
    alignas(64) static constexpr auto places = [] {
        std::array<std::uint16_t, 64> all{};
        for (std::size_t i = 0; i < 64; ++i) all[i] = static_cast<std::uint16_t>(2 * (i < 8 ? i : 8 + i % 8) + 1);
        return all;
    }();
    alignas(64) static constexpr auto exponents = [] {  // less 1, at their place in bf16
        std::array<std::uint16_t, 128> all{};
        for (std::size_t i = 8; i < 128; ++i) all[i] = static_cast<std::uint16_t>((i / 8 - 1) << 7);
        return all;
    }();
    for (int i = 0; i < 4; ++i) {
        const __m512i all = (__m512i)products.part[0], place = _mm512_load_si512(places.data() + (i == 0 ? 0 : 32));
        const __m512i words = _mm512_add_epi16(_mm512_maskz_permutexvar_epi16(~0u, place, all),
                                               _mm512_load_si512(exponents.data() + 32 * i));
        const auto put = [&](std::uint8_t* bytes, __m512i from) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + 32 * i), _mm512_maskz_cvtepi16_epi8(~0u, from));
        };
        put(to.low, words);
        put(to.high, (__m512i)((Words)words >> 8));
    }
}

// Two instructions of AVX-512 VBMI, as asm because the files are compiled without it. Their operands are registers: gcc keeps
// sums in memory beside asm that reads memory.
// Bytes of a table of 128, by the lower seven bits of each code.
KTV_INLINE __m512i look_up(const std::uint8_t* table, __m512i codes) {
    const __m512i lower = _mm512_load_si512(table), upper = _mm512_load_si512(table + 64);
    asm("vpermi2b %2, %1, %0" : "+v"(codes) : "v"(lower), "v"(upper));
    return codes;
}
KTV_INLINE __m512i bytes_at(__m512i places, __m512i bytes) {
    __m512i found;
    asm("vpermb %2, %1, %0" : "=v"(found) : "v"(places), "v"(bytes));
    return found;
}
// 64 codes -> bf16. The codes' order: eight of `first`, then eight of `second`, in each quarter.
struct Bf16Rows {
    __m512i first, second;
};
KTV_INLINE Bf16Rows fp8_of(__m512i codes, const ByteTable& table) {
    const __m512i low = look_up(table.low, codes), high = look_up(table.high, codes);
    // high | (codes & 0x80)
    const __m512i with_sign = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8);
    return {_mm512_unpacklo_epi8(low, with_sign), _mm512_unpackhi_epi8(low, with_sign)};
}
KTV_INLINE Bf16Rows fp8_rows(const std::uint8_t* codes, const ByteTable& table) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    return fp8_of(_mm512_maskz_permutexvar_epi64(0xff, order, _mm512_loadu_si512(codes)), table);
}

// ---- INT8

// Whether no product of a code and one of 32 scales, nor 65,536 times it, is subnormal or overflows.
inline bool int8_scales_are_plain(const float* scales) {
    const auto fit = [&](int n) {
        const __m512 some = _mm512_loadu_ps(scales + n);
        return _mm512_cmp_ps_mask(some, _mm512_set1_ps(0x1p-100f), _CMP_GE_OQ) &
               _mm512_cmp_ps_mask(some, _mm512_set1_ps(0x1p80f), _CMP_LT_OQ);
    };
    return (fit(0) & fit(16)) == 0xffff;
}

// ---- INT4

// bf16(q (1 + m / 128)) for q from `first` on. With 2^e, that is every product with a scale in bf16, but for scales that are
// subnormal or so large that a product may overflow.
template <int first, std::size_t count>
constexpr auto products_of() {
    std::array<std::array<float, count>, 128> all{};
    for (int m = 0; m < 128; ++m) {
        for (int i = 0; i < static_cast<int>(count); ++i) {
            const int q = first + i, exact = (q < 0 ? -q : q) * (128 + m);
            int unit = 1;
            while (exact >= 256 * unit) unit *= 2;
            const int rest = exact % unit;
            int steps = exact / unit;
            steps += 2 * rest > unit || (2 * rest == unit && steps % 2 == 1);
            const float value = static_cast<float>(steps * unit) / 128;
            all[static_cast<std::size_t>(m)][static_cast<std::size_t>(i)] = q < 0 ? -value : value;
        }
    }
    return all;
}
// Whether 32 scales are normal and so small that no product overflows; with `zero`, or 0.
inline bool int4_scales_are_plain(const bf16* scales, bool zero) {
    const __m512i all = _mm512_loadu_si512(scales);
    const __mmask32 normal = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(all, _mm512_set1_epi16(0x80)),
                                                     _mm512_set1_epi16(static_cast<short>((250 << 7) - 0x80)));
    return (zero ? normal | _mm512_testn_epi16_mask(all, all) : normal) == 0xffffffffu;
}

// ---- blocks of any format

// The codes of a block that comes, and of one further on. A block prefetches those of its rows n and n + 1 in both, because
// some prefetches are dropped: on AMD Zen 4 a forward of one token in FP8 took 2.05 ms with the first alone and 1.64 with
// both, in INT4 1.85 and 1.80 (8 experts, 2048 x 1408).
struct CodesAhead {
    const std::uint8_t *first, *second;
    KTV_INLINE CodesAhead operator+(std::size_t bytes) const { return {first + bytes, second + bytes}; }
    KTV_INLINE void prefetch_bytes(int n) const { prefetch_line(n * kBlock); }
    KTV_INLINE void prefetch_halves(int n) const {
        if (n % 4 == 0) prefetch_line(n * kBlock / 2);
    }
    KTV_INLINE void prefetch_line(int at) const {
        prefetch<2>(first + at);
        prefetch<2>(second + at);
    }
};
// For callers that know one address only: its lines are prefetched twice.
inline CodesAhead single(const std::uint8_t* codes) {
    return {codes, codes};
}

// What blocks of 4-bit codes make of the scales and zero points of their 32 rows.
struct RowFacts {
    alignas(64) std::uint32_t exponents[kBlock];  // at their place in bf16, twice in a lane
    alignas(64) std::uint16_t offsets[kBlock];    // bytes into a table
};
inline constexpr int kAtOnce = 8;  // most blocks that are decoded at once
struct DecodeScratch {
    ByteTable tables[kAtOnce];
    float first_scale = -1;  // of tables[0]; -1 before there is one
    RowFacts facts[kAtOnce];
    alignas(64) bf16 unpacked[kAtOnce * kBlockSize];
};

// Up to kAtOnce blocks side by side, or one below the other.
struct CodedRun {
    const CodedBlocks& from;
    CodedBlocks::Place at;
    int count;
    bool down = false;
    CodedBlocks::Place place(int i) const { return {at.n + (down ? i : 0), at.k + (down ? 0 : i)}; }
};

// What follows blocks side by side in memory. Of the last in a row, that is the next row of blocks.
inline CodesAhead next_codes_of_row(const CodedRun& run) {
    const auto place = [&](int runs) { return CodedBlocks::Place{run.at.n, run.at.k + runs * run.count}; };
    return {run.from.prefetch_scales(place(1), run.count), run.from.codes_at(place(2))};
}

// Calls use(blocks) with the blocks of a run as Kinds has them, and prefetches as many codes, with the same distances, at
// `ahead`. Where a scale is too small or too large, a part begins inside a block, or the processor lacks an instruction,
// they are unpacked to bf16 first.
template <typename Kinds, typename Use>
KTV_INLINE void decode_blocks(const CodedRun& run, const CodesAhead& ahead, DecodeScratch& scratch, const Use& use) {
    const CodedBlocks& from = run.from;
    struct Part {
        const std::uint8_t* codes;
        CodesAhead later;
        const std::byte* scales;
        const std::int8_t* zeros;
    } parts[kAtOnce];
    const std::uint8_t* first = from.codes_at(run.at);
    const std::size_t step = run.down ? from.row_bytes : from.block_bytes;
    const bool whole = from.whole && Kinds::decodes(from.format);
    if (whole) {
        const int of_group = from.group / kBlock, begin = from.into_group / kBlock + run.at.k;  // blocks
        std::size_t group = from.scales_of(run.at.n, of_group > 0 ? begin / of_group : 0);
        int left = of_group > 0 && !run.down ? of_group - begin % of_group : run.count;
        for (int i = 0; i < run.count; ++i, --left) {
            if (left == 0) ++group, left = of_group;
            parts[i] = {first + i * step, ahead + i * step, from.scales + group * from.scale_bytes,
                        from.zeros ? from.zeros + group * kBlock : nullptr};
            if (run.down) group += from.groups;
        }
    }
    const auto bf16s = [&](int i) { return reinterpret_cast<const bf16*>(parts[i].scales); };
    const auto floats = [&](int i) { return reinterpret_cast<const float*>(parts[i].scales); };
    const auto bytes = [&](int i) { return reinterpret_cast<const std::uint8_t*>(parts[i].scales); };
    const auto all = [&](const auto& good) __attribute__((always_inline)) {
        bool every = whole;
        for (int i = 0; i < run.count && every; ++i) every = good(i);
        return every;
    };
    const auto use_all = [&](const auto& block) __attribute__((always_inline)) {
        std::remove_cvref_t<decltype(block(0))> blocks[kAtOnce];
        for (int i = 0; i < run.count; ++i) blocks[i] = block(i);
        use(blocks);
    };
    if (from.format == Format::fp8) {
        if (all([&](int i) { return fp8_looks_up(*floats(i)); })) {
            int last = 0;
            return use_all([&](int i) {
                const float scale = *floats(i);
                if (scale != (i > 0 ? *floats(i - 1) : scratch.first_scale))
                    make_fp8_table(scale, scratch.tables[last = i]);
                if (i == 0) scratch.first_scale = scale;
                return typename Kinds::Fp8{parts[i].codes, parts[i].later, &scratch.tables[last]};
            });
        }
    } else if (from.format == Format::int8) {
        if (all([&](int i) { return int8_scales_are_plain(floats(i)); }))
            return use_all([&](int i) { return typename Kinds::Int8{parts[i].codes, parts[i].later, floats(i)}; });
    } else if (from.format == Format::int4) {
        if (all([&](int i) { return int4_scales_are_plain(bf16s(i), Kinds::int4_takes_0); })) {
            const auto use_int4 = [&](auto with_zeros) __attribute__((always_inline)) {
                using Int4 = typename Kinds::template Int4<decltype(with_zeros)::value>;
                use_all([&](int i) {
                    return Int4(parts[i].codes, parts[i].later, bf16s(i), parts[i].zeros, scratch.facts[i]);
                });
            };
            return from.zeros ? use_int4(std::true_type()) : use_int4(std::false_type());
        }
    } else if (from.format == Format::mxfp4 && all([&](int i) { return Kinds::Mxfp4::scales_are_plain(bytes(i)); })) {
        return use_all(
            [&](int i) { return typename Kinds::Mxfp4(parts[i].codes, parts[i].later, bytes(i), scratch.facts[i]); });
    }
    for (int i = 0; i < run.count; i += run.down ? 1 : run.count)
        from.unpack(run.place(i), run.down ? 1 : run.count, ahead.first + i * step, scratch.unpacked + i * kBlockSize);
    use_all([&](int i) {
        const bf16* block = scratch.unpacked + i * kBlockSize;
        return typename Kinds::Plain{block, block};
    });
}
