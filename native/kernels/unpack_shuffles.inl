// Blocks of codes to bf16 by instructions on 256 bits. A row of 32 codes is looked up: the low and the high bytes of sixteen
// bf16 are two registers, and a byte shuffle takes 32 of each. Only int8 has too many values.

// bf16 in the upper half of each lane; of no NaN.
KTV_INLINE __m256i rounded(__m256 value) {
    const __m256i b = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(b, odd), _mm256_set1_epi32(0x7fff));
}
KTV_INLINE __m256i twice(__m128i half) {
    return _mm256_broadcastsi128_si256(half);
}

// Sixteen bf16 by place: their low and their high bytes, each in both halves.
struct Lookup {
    __m256i low, high;
    KTV_INLINE __m256i lows(__m256i places) const { return _mm256_shuffle_epi8(low, places); }
    KTV_INLINE __m256i highs(__m256i places) const { return _mm256_shuffle_epi8(high, places); }
};

// Of places 0 to 7 and 8 to 15, in the upper halves of lanes.
KTV_INLINE Lookup lookup_of(__m256i first, __m256i second) {
    constexpr char none = -128;
    const __m256i to_first =
        twice(_mm_setr_epi8(2, 6, 10, 14, 3, 7, 11, 15, none, none, none, none, none, none, none, none));
    const __m256i to_second =
        twice(_mm_setr_epi8(none, none, none, none, none, none, none, none, 2, 6, 10, 14, 3, 7, 11, 15));
    // in each half, of four places: low bytes, high bytes, and the same of the places 8 further on
    const __m256i bytes = _mm256_or_si256(_mm256_shuffle_epi8(first, to_first), _mm256_shuffle_epi8(second, to_second));
    return {_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6)),
            _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(1, 5, 3, 7, 1, 5, 3, 7))};
}

// 32 bf16 of their low and high bytes, with `more` added: [0] of elements 0 to 7 and 16 to 23, [1] of the others.
KTV_INLINE void store_joined(__m256i low, __m256i high, const __m256i* more, bf16* out) {
    __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
    if (more) {
        a = _mm256_add_epi16(a, more[0]);
        b = _mm256_add_epi16(b, more[1]);
    }
    const auto store = [&](int at, __m128i eight) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at), eight); };
    store(0, _mm256_castsi256_si128(a));
    store(8, _mm256_castsi256_si128(b));
    store(16, _mm256_extracti128_si256(a, 1));
    store(24, _mm256_extracti128_si256(b, 1));
}

// e4m3 is looked up by its three bits of mantissa: in places 0 to 7 without an exponent, in 8 to 15 with one. Another
// exponent adds the same to the result's, if neither product is subnormal or infinite: `looks_up`.
KTV_INLINE bool fp8_looks_up(float scale) {
    return scale >= 0x1p-120f && scale < 0x1p119f;
}
KTV_INLINE Lookup fp8_lookup(float scale) {
    const __m256 step = _mm256_set1_ps(0x1p-9f), all = _mm256_set1_ps(scale);
    const auto products = [&](__m256 multiples) { return rounded(_mm256_mul_ps(_mm256_mul_ps(multiples, step), all)); };
    const __m256i first = products(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)),
                  second = products(_mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15));
    // less the exponent 1, which a code adds
    return lookup_of(first, _mm256_sub_epi32(second, _mm256_set1_epi32(1 << 23)));
}
KTV_INLINE void fp8_row(const std::uint8_t* codes, const Lookup& lookup, bf16* out) {
    const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi8(0x7f));
    // the mantissa where there is no exponent, otherwise the mantissa and 8
    const __m256i place =
        _mm256_min_epu8(magnitude, _mm256_or_si256(_mm256_and_si256(code, _mm256_set1_epi8(7)), _mm256_set1_epi8(8)));
    // sign and exponent at their places in bf16
    const auto upper = [](__m256i code_above_zero) {
        return _mm256_and_si256(_mm256_srai_epi16(code_above_zero, 4), _mm256_set1_epi16(static_cast<short>(0x8780)));
    };
    const __m256i zero = _mm256_setzero_si256();
    const __m256i more[] = {upper(_mm256_unpacklo_epi8(zero, code)), upper(_mm256_unpackhi_epi8(zero, code))};
    store_joined(lookup.lows(place), lookup.highs(place), more, out);
}
inline void unpack_fp8(const std::uint8_t* codes, const float* scales, const std::int8_t*, const std::uint8_t* ahead,
                       bf16* out) {
    float scale = scales[0];
    bool looks_up = fp8_looks_up(scale);
    Lookup lookup = fp8_lookup(scale);
    rows_of_block<8>(codes, ahead, out, [&](int n, const std::uint8_t* from, bf16* to) __attribute__((always_inline)) {
        if (scales[n] != scale) {
            scale = scales[n];
            looks_up = fp8_looks_up(scale);
            lookup = fp8_lookup(scale);
        }
        looks_up ? fp8_row(from, lookup, to) : fp8_row(from, scale, to);
    });
}

// Rounds eight fp32 to bf16 by Veltkamp's splitting with 2^16 + 1: three operations, one fewer than rounded() has. It
// rounds ties to even, as all 2^23 mantissas show, and takes products that neither are subnormal nor overflow.
KTV_INLINE __m256i split_off(__m256 value) {
    const __m256 shifted = _mm256_mul_ps(value, _mm256_set1_ps(65537));
    return _mm256_castps_si256(_mm256_add_ps(shifted, _mm256_sub_ps(value, shifted)));
}
KTV_INLINE bool int8_splits_off(float scale) {
    return scale >= 0x1p-126f && scale < 0x1p103f;
}
KTV_INLINE void int8_half_row(const std::uint8_t* codes, float scale, bf16* out) {
    // even elements, then the odd ones: so a pair of results is a lane
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i sorted = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), order);
    const auto products = [&](__m128i eight) {
        return split_off(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), _mm256_set1_ps(scale)));
    };
    const __m256i even = products(sorted), odd = products(_mm_unpackhi_epi64(sorted, sorted));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa));
}
inline void unpack_int8(const std::uint8_t* codes, const float* scales, const std::int8_t*, const std::uint8_t* ahead,
                        bf16* out) {
    rows_of_block<8>(codes, ahead, out, [&](int n, const std::uint8_t* from, bf16* to) __attribute__((always_inline)) {
        const float scale = scales[n];
        if (!int8_splits_off(scale)) return int8_row(from, scale, to);
        for (int half = 0; half < kBlock; half += kBlock / 2) int8_half_row(from + half, scale, to + half);
    });
}

// Codes of 4 bits are places. A byte of two codes, h and l, becomes 16 bits; those four bits higher are or-ed to it.
KTV_INLINE void halves_row(const std::uint8_t* codes, const Lookup& lookup, bf16* out) {
    const __m256i two = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i place = _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi16(two, 4)), _mm256_set1_epi8(15));
    store_joined(lookup.lows(place), lookup.highs(place), nullptr, out);
}
// Of eight magnitudes and a sign: place[code] of a magnitude, negative for 0; sign[code] is -128 or 0.
KTV_INLINE Lookup signed_lookup(__m256 magnitudes, float scale, __m128i place, __m128i sign) {
    const __m256i products = rounded(_mm256_mul_ps(magnitudes, _mm256_set1_ps(scale)));
    const __m256i split =
        _mm256_shuffle_epi8(products, twice(_mm_setr_epi8(2, 6, 10, 14, 3, 7, 11, 15, 2, 6, 10, 14, 3, 7, 11, 15)));
    const __m256i bytes = _mm256_permutevar8x32_epi32(split, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    const __m256i low = twice(place), high = _mm256_add_epi8(low, _mm256_set1_epi8(8));
    return {_mm256_shuffle_epi8(bytes, low), _mm256_xor_si256(_mm256_shuffle_epi8(bytes, high), twice(sign))};
}
inline void unpack_int4(const std::uint8_t* codes, const float* scales, const std::int8_t* zeros,
                        const std::uint8_t* ahead, bf16* out) {
    if (!zeros) {
        rows_of_block<4>(
            codes, ahead, out, [&](int n, const std::uint8_t* from, bf16* to) __attribute__((always_inline)) {
                constexpr char none = -128, minus = -128;
                const __m128i place = _mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, none, 0, 1, 2, 3, 4, 5, 6);
                const __m128i sign =
                    _mm_setr_epi8(minus, minus, minus, minus, minus, minus, minus, minus, 0, 0, 0, 0, 0, 0, 0, 0);
                halves_row(from, signed_lookup(_mm256_setr_ps(1, 2, 3, 4, 5, 6, 7, 8), scales[n], place, sign), to);
            });
        return;
    }
    rows_of_block<4>(codes, ahead, out, [&](int n, const std::uint8_t* from, bf16* to) __attribute__((always_inline)) {
        const __m256 zero = _mm256_set1_ps(static_cast<float>(zeros[n])), scale = _mm256_set1_ps(scales[n]);
        const auto products = [&](__m256 q) { return rounded(_mm256_mul_ps(_mm256_sub_ps(q, zero), scale)); };
        halves_row(from,
                   lookup_of(products(_mm256_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1)),
                             products(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7))),
                   to);
    });
}
inline void unpack_mxfp4(const std::uint8_t* codes, const float* scales, const std::int8_t*, const std::uint8_t* ahead,
                         bf16* out) {
    rows_of_block<4>(codes, ahead, out, [&](int n, const std::uint8_t* from, bf16* to) __attribute__((always_inline)) {
        constexpr char minus = -128;
        const __m128i place = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
        const __m128i sign =
            _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, minus, minus, minus, minus, minus, minus, minus, minus);
        halves_row(from, signed_lookup(_mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6), scales[n], place, sign), to);
    });
}
