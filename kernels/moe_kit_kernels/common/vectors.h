// Registers of float32 and what all C++ of this package does with them.
//
// A multiply-add is written as `fused` wherever it occurs, and the compiler contracts none by itself (-ffp-contract=off): which loops
// it contracts depends on the processor (for some AMD ones it leaves out chains of sums), and a column's bits would depend on its loop.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_FMA) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

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

// a number in all lanes
inline Vector every(float number) { return number - Vector{}; }

// a * b + c, rounded once where the processor can
inline Vector fused(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA) && defined(__ARM_NEON)
    float32x4_t parts[3][LANES / 4];
    std::memcpy(parts[0], &a, sizeof a);
    std::memcpy(parts[1], &b, sizeof b);
    std::memcpy(parts[2], &c, sizeof c);
    for (int i = 0; i < LANES / 4; i++) parts[2][i] = vfmaq_f32(parts[2][i], parts[0][i], parts[1][i]);
    std::memcpy(&c, parts[2], sizeof c);
    return c;
#else
    return a * b + c;
#endif
}
inline Vector fused(float a, Vector b, Vector c) { return fused(every(a), b, c); }

// the same for one number: what a column gets must not depend on which loop it falls into
inline float fused(float a, float b, float c) {
#if defined(__AVX512F__) || defined(__FMA__) || (defined(__ARM_FEATURE_FMA) && defined(__ARM_NEON))
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
