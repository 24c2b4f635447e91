// Registers of float32 and what all C++ of this package does with them.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
// 32 registers of 16 numbers
constexpr int LANES = 16;
#else
// 16 registers of 8 numbers
constexpr int LANES = 8;
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
// the same at any address of a float
typedef float Loose __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float)), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, Vector v) { *reinterpret_cast<Loose*>(to) = v; }

// a number of rows that is known while compiling
template <int R>
using Number = std::integral_constant<int, R>;

// a * b + c, rounded as in the loops over registers: what a column gets must not depend on which loop it falls into
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// sum of N neighbouring numbers, by halves
template <int N>
inline float sum_of(const float* v) {
    if constexpr (N == 1) {
        return *v;
    } else {
        typedef float Half __attribute__((vector_size(N / 2 * sizeof(float)), aligned(alignof(float)), may_alias));
        const Half s = *reinterpret_cast<const Half*>(v) + *reinterpret_cast<const Half*>(v + N / 2);
        float halves[N / 2];
        std::memcpy(halves, &s, sizeof halves);
        return sum_of<N / 2>(halves);
    }
}

inline float sum_of(Vector v) {
    float numbers[LANES];
    std::memcpy(numbers, &v, sizeof numbers);
    return sum_of<LANES>(numbers);
}

}  // namespace
