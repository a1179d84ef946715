// 16 lanes of 32 bits as one, two or four vectors of the instruction set. elementwise.inl includes this file. The
// compiler's own vectors of 64 bytes would do, but where the instruction set has none it takes some operations on them
// apart into single lanes (comparisons, selections, shuffles): on an Intel Xeon silu_mul_grad took 13.8 ns an element with
// 256 bits and 13.1 with 128, now 3.0 and 5.5.

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif
inline constexpr int kParts = 16 / kLanes;

#define KTV_INLINE [[gnu::always_inline]] inline

template <typename T>
struct Lanes {
    typedef T Part
        __attribute__((vector_size(kLanes * 4)));  // not by using: that ignores the size where T is a parameter
    Part part[kParts];
};
using F = Lanes<float>;
using U = Lanes<std::uint32_t>;
using S = Lanes<std::int32_t>;

// op(part) for each part. Without a loop, so that the parts stay in registers.
template <typename T, typename Op>
KTV_INLINE Lanes<T> each_part(const Op& op) {
    if constexpr (kParts == 1) {
        return {{op(0)}};
    } else if constexpr (kParts == 2) {
        return {{op(0), op(1)}};
    } else {
        return {{op(0), op(1), op(2), op(3)}};
    }
}

// Lane by lane, with the other operand's lanes or with one number for all.
#define KTV_LANES_OPERATOR(op)                                                       \
    template <typename T>                                                            \
    KTV_INLINE Lanes<T> operator op(const Lanes<T>& a, const Lanes<T>& b) {          \
        return each_part<T>([&](int i) KTV_PART { return a.part[i] op b.part[i]; }); \
    }                                                                                \
    template <typename T>                                                            \
    KTV_INLINE Lanes<T> operator op(const Lanes<T>& a, std::type_identity_t<T> b) {  \
        return each_part<T>([&](int i) KTV_PART { return a.part[i] op b; });         \
    }
#define KTV_PART __attribute__((always_inline))
KTV_LANES_OPERATOR(+)
KTV_LANES_OPERATOR(-)
KTV_LANES_OPERATOR(*)
KTV_LANES_OPERATOR(/)
KTV_LANES_OPERATOR(&)
KTV_LANES_OPERATOR(|)
KTV_LANES_OPERATOR(<<)
KTV_LANES_OPERATOR(>>)
#undef KTV_LANES_OPERATOR

template <typename T>
KTV_INLINE Lanes<T>& operator+=(Lanes<T>& a, const Lanes<T>& b) {
    return a = a + b;
}
KTV_INLINE F operator-(const F& v) {
    return each_part<float>([&](int i) KTV_PART { return -v.part[i]; });
}
// All bits of a lane where a > b, else none.
template <typename T>
KTV_INLINE S greater(const Lanes<T>& a, T b) {
    return each_part<std::int32_t>([&](int i) KTV_PART { return a.part[i] > b; });
}
template <typename T>
KTV_INLINE Lanes<T> select(const S& where, const Lanes<T>& a, const Lanes<T>& b) {
    return each_part<T>([&](int i) KTV_PART { return where.part[i] ? a.part[i] : b.part[i]; });
}
// The same bits as lanes of another type.
template <typename To, typename From>
KTV_INLINE Lanes<To> bits_as(const Lanes<From>& v) {
    return each_part<To>([&](int i) KTV_PART { return (typename Lanes<To>::Part)v.part[i]; });
}

// Part by part: memcpy of a whole one goes through the stack in other pieces than it is read.
KTV_INLINE F load(const void* from) {
    const char* p = static_cast<const char*>(from);
    return each_part<float>([&](int i) KTV_PART {
        F::Part v;
        __builtin_memcpy(&v, p + i * kLanes * 4, sizeof v);
        return v;
    });
}
template <typename T>
KTV_INLINE void store(void* to, const Lanes<T>& v) {
    char* p = static_cast<char*>(to);
    __builtin_memcpy(p, &v.part[0], sizeof v.part[0]);
    if constexpr (kParts > 1) __builtin_memcpy(p + kLanes * 4, &v.part[1], sizeof v.part[1]);
    if constexpr (kParts > 2) {
        __builtin_memcpy(p + kLanes * 8, &v.part[2], sizeof v.part[2]);
        __builtin_memcpy(p + kLanes * 12, &v.part[3], sizeof v.part[3]);
    }
}
KTV_INLINE F splat(float v) {
    return F{} + v;
}
// Adds halves: 16 lanes, 8, 4, 2, 1.
KTV_INLINE float sum_of_lanes(const F& v) {
    float lane[16];
    store(lane, v);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
}
// The low halves of the lanes.
KTV_INLINE void store_halves(std::uint16_t* p, const U& v) {
    using Half = std::uint16_t __attribute__((vector_size(kLanes * 2)));
    for (int i = 0; i < kParts; ++i) {
        const Half half = __builtin_convertvector(v.part[i], Half);
        __builtin_memcpy(p + i * kLanes, &half, sizeof half);
    }
}

// Swaps a's lanes with bit `distance` of their number set for b's without it: one round of a transposition.
template <int distance, int... lane>
KTV_INLINE void swap_lanes(F& a, F& b, std::integer_sequence<int, lane...>) {
    if constexpr (distance >= kLanes) {
        constexpr int apart = distance / kLanes;
        for (int i = 0; i < kParts; ++i) {
            if (!(i & apart)) continue;
            const F::Part was = a.part[i];
            a.part[i] = b.part[i ^ apart];
            b.part[i ^ apart] = was;
        }
    } else {
        const F was = a, other = b;
        constexpr S::Part low = {((lane & distance) ? kLanes + lane - distance : lane)...};
        constexpr S::Part high = {((lane & distance) ? kLanes + lane : lane + distance)...};
        a = each_part<float>([&](int i) KTV_PART { return __builtin_shuffle(was.part[i], other.part[i], low); });
        b = each_part<float>([&](int i) KTV_PART { return __builtin_shuffle(was.part[i], other.part[i], high); });
    }
}
template <int distance>
KTV_INLINE void swap_all(F (&m)[16]) {
    for (int i = 0; i < 16; ++i) {
        if (!(i & distance)) swap_lanes<distance>(m[i], m[i + distance], std::make_integer_sequence<int, kLanes>());
    }
}
// 16 x 16 in place.
KTV_INLINE void transpose_16x16(F (&m)[16]) {
    swap_all<8>(m);
    swap_all<4>(m);
    swap_all<2>(m);
    swap_all<1>(m);
}
#undef KTV_PART
