// Blocks of codes to bf16: bf16(q * scale), the product in fp32, both rounded to nearest even. elementwise.inl includes
// this file. Loops of plain integers and floats for any CPU; unpack_shuffles.inl has the same by instructions, for
// a file that defines KTV_BYTE_SHUFFLES.

KTV_INLINE bf16 rounded(float value) {  // of no NaN: to_bf16 without its branch
    const auto b = __builtin_bit_cast(std::uint32_t, value);
    return static_cast<bf16>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

// A sign and a magnitude of `mantissa` bits after the exponent, whose least normal number is 2^least. Magnitudes without
// an exponent are multiples of the least normal number's last bit.
template <int mantissa, int least>
KTV_INLINE float minifloat(std::uint32_t sign, std::uint32_t magnitude) {
    constexpr std::uint32_t bias = static_cast<std::uint32_t>(127 + least - 1) << 23;
    constexpr float step = __builtin_bit_cast(float, static_cast<std::uint32_t>(127 + least - mantissa) << 23);
    const float normal = __builtin_bit_cast(float, (magnitude << (23 - mantissa)) + bias);
    const float tiny = static_cast<float>(static_cast<std::int32_t>(magnitude)) * step;
    const float value = magnitude < (1u << mantissa) ? tiny : normal;
    return __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, value) | sign << 31);
}
KTV_INLINE float of_e4m3(std::uint32_t code) {
    return minifloat<3, -6>(code >> 7, code & 0x7f);
}
KTV_INLINE float of_e2m1(std::uint32_t code) {
    return minifloat<1, 0>(code >> 3, code & 7);
}

// One row of a block.
inline void fp8_row(const std::uint8_t* codes, float scale, bf16* out) {
    for (int k = 0; k < kBlock; ++k) out[k] = rounded(of_e4m3(codes[k]) * scale);
}
inline void int8_row(const std::uint8_t* codes, float scale, bf16* out) {
    for (int k = 0; k < kBlock; ++k) out[k] = rounded(static_cast<float>(static_cast<std::int8_t>(codes[k])) * scale);
}

// Calls row(n, codes, out) for the rows of a block, and prefetches one line of `ahead` after the other meanwhile.
template <int bits, typename Row>
KTV_INLINE void rows_of_block(const std::uint8_t* codes, const std::uint8_t* ahead, bf16* out, const Row& row) {
    constexpr int bytes = kBlock * bits / 8, line = 64 / bytes;
    for (int n = 0; n < kBlock; ++n) {
        if (n % line == 0) __builtin_prefetch(ahead + n * bytes, 0, 2);
        row(n, codes + n * bytes, out + n * kBlock);
    }
}

#ifdef KTV_BYTE_SHUFFLES
#include "unpack_shuffles.inl"
#else
inline void unpack_fp8(const std::uint8_t* codes, const float* scales, const std::int8_t*, const std::uint8_t* ahead,
                       bf16* out) {
    rows_of_block<8>(codes, ahead, out, [=](int n, const auto* from, bf16* to) { fp8_row(from, scales[n], to); });
}
inline void unpack_int8(const std::uint8_t* codes, const float* scales, const std::int8_t*, const std::uint8_t* ahead,
                        bf16* out) {
    rows_of_block<8>(codes, ahead, out, [=](int n, const auto* from, bf16* to) { int8_row(from, scales[n], to); });
}

// Codes of 4 bits: element 2 j in the low half of byte j. value(code) is exact.
template <typename Value>
KTV_INLINE void unpack_halves(const std::uint8_t* codes, float scale, bf16* out, const Value& value) {
    for (int j = 0; j < kBlock / 2; ++j) {
        const std::uint32_t two = codes[j];
        out[2 * j] = rounded(value(two & 15) * scale);
        out[2 * j + 1] = rounded(value(two >> 4) * scale);
    }
}
inline void unpack_int4(const std::uint8_t* codes, const float* scales, const std::int8_t* zeros,
                        const std::uint8_t* ahead, bf16* out) {
    rows_of_block<4>(codes, ahead, out, [=](int n, const auto* from, bf16* to) {
        const std::int32_t zero = 8 + (zeros ? zeros[n] : 0);
        unpack_halves(from, scales[n], to, [zero](std::uint32_t code) {
            return static_cast<float>(static_cast<std::int32_t>(code) - zero);
        });
    });
}
inline void unpack_mxfp4(const std::uint8_t* codes, const float* scales, const std::int8_t*, const std::uint8_t* ahead,
                         bf16* out) {
    rows_of_block<4>(codes, ahead, out,
                     [=](int n, const auto* from, bf16* to) { unpack_halves(from, scales[n], to, of_e2m1); });
}
#endif
