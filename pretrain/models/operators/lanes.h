// Vectors of channels: loaded from any floating point type, computed in float or double.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#endif

namespace omnipretrain {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// What values of type T are added up in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A, int W>
struct VectorOf;
#define OMNIPRETRAIN_VECTOR(A, W)                               \
  template <>                                                   \
  struct VectorOf<A, W> {                                       \
    typedef A type __attribute__((vector_size(W * sizeof(A)))); \
  }
OMNIPRETRAIN_VECTOR(float, 4);
OMNIPRETRAIN_VECTOR(float, 8);
OMNIPRETRAIN_VECTOR(float, 16);
OMNIPRETRAIN_VECTOR(double, 2);
OMNIPRETRAIN_VECTOR(double, 4);
OMNIPRETRAIN_VECTOR(double, 8);
OMNIPRETRAIN_VECTOR(uint16_t, 4);
OMNIPRETRAIN_VECTOR(uint16_t, 8);
OMNIPRETRAIN_VECTOR(uint16_t, 16);
OMNIPRETRAIN_VECTOR(uint32_t, 4);
OMNIPRETRAIN_VECTOR(uint32_t, 8);
OMNIPRETRAIN_VECTOR(uint32_t, 16);
#undef OMNIPRETRAIN_VECTOR
template <class A>
struct VectorOf<A, 1> {
  typedef A type;
};

template <class A, int W>
using Vector = typename VectorOf<A, W>::type;

// W values from memory, as A.
template <class A, int W, class T>
inline Vector<A, W> load(const T* from) {
  if constexpr (W == 1) {
    return static_cast<A>(*from);
  } else if constexpr (std::is_same_v<T, A>) {
    Vector<A, W> values;
    std::memcpy(&values, from, sizeof(values));
    return values;
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    Vector<uint16_t, W> bits;
    std::memcpy(&bits, from, sizeof(bits));
    return (Vector<A, W>)(__builtin_convertvector(bits, Vector<uint32_t, W>) << 16);
  } else {
#if defined(__F16C__)
    if constexpr (W == 4) {
      int64_t bits;
      std::memcpy(&bits, from, sizeof(bits));
      return (Vector<A, W>)_mm_cvtph_ps(_mm_cvtsi64_si128(bits));
    }
    if constexpr (W == 8) {
      return (Vector<A, W>)_mm256_cvtph_ps(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
#endif
#if defined(__AVX512F__)
    if constexpr (W == 16) {
      return (Vector<A, W>)_mm512_cvtph_ps(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
#endif
    Vector<A, W> values;
    for (int i = 0; i < W; ++i) values[i] = static_cast<A>(from[i]);
    return values;
  }
}

// The inverse of `load`, rounding to nearest even.
template <class A, int W, class T>
inline void store(Vector<A, W> values, T* to) {
  if constexpr (W == 1) {
    *to = static_cast<T>(values);
  } else if constexpr (std::is_same_v<T, A>) {
    std::memcpy(to, &values, sizeof(values));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto bits = (Vector<uint32_t, W>)values;
    const auto rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    // Rounding would carry a NaN over into an infinity.
    const auto nan = (Vector<uint32_t, W>)(values != values);
    const auto chosen = (nan & 0x7fc00000u) | (~nan & rounded);
    const auto high = __builtin_convertvector(chosen >> 16, Vector<uint16_t, W>);
    std::memcpy(to, &high, sizeof(high));
  } else {
#if defined(__AVX512F__)
    if constexpr (W == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
#if defined(__F16C__)
    if constexpr (W == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                       _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
    for (int i = 0; i < W; ++i) to[i] = static_cast<T>(values[i]);
  }
}

// Puts the sum of each of four vectors into to[0], to[1], to[2], to[3], or adds it to these.
template <class A, int W>
inline void put_sums(const Vector<A, W> (&of)[4], bool add, A* to) {
#if defined(__AVX__)
  if constexpr (std::is_same_v<A, float> && (W == 8 || W == 16)) {
    // Lane by lane: the halves of two vectors at a time, then the quarters of all four.
    __m256 four;
#if defined(__AVX512F__)
    if constexpr (W == 16) {
      const __m512 a = (__m512)of[0], b = (__m512)of[1], c = (__m512)of[2], d = (__m512)of[3];
      const __m512d ab = _mm512_castps_pd(
          _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
      const __m512d cd = _mm512_castps_pd(
          _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
      const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                         _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
      const __m512d pairs = _mm512_castps_pd(lanes);
      four = _mm256_add_ps(_mm512_castps512_ps256(lanes),
                           _mm256_castpd_ps(_mm512_extractf64x4_pd(pairs, 1)));
    }
#endif
    if constexpr (W == 8) {
      const __m256 a = (__m256)of[0], b = (__m256)of[1], c = (__m256)of[2], d = (__m256)of[3];
      const __m256d ab = _mm256_castps_pd(
          _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
      const __m256d cd = _mm256_castps_pd(
          _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
      four = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
                           _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    }
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
    _mm_storeu_ps(to, add ? _mm_add_ps(_mm_loadu_ps(to), sums) : sums);
    return;
  }
#endif
  for (int corner = 0; corner < 4; ++corner) {
    A sum = add ? to[corner] : A(0);
    if constexpr (W == 1) {
      sum += of[corner];
    } else {
      for (int i = 0; i < W; ++i) sum += of[corner][i];
    }
    to[corner] = sum;
  }
}

// Copies `count` values to another type; one of the two is float or double.
template <class From, class To>
inline void convert(const From* from, int64_t count, To* to) {
  using A = std::conditional_t<std::is_same_v<Sum<From>, From>, From, To>;
  constexpr int kWidth = kVectorBytes / sizeof(A);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store<A, kWidth>(load<A, kWidth>(from + i), to + i);
  for (; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// `count` values as A: where they are if they are of that type, else copied to `scratch`.
template <class A, class T>
inline const A* widened(const T* from, int64_t count, A* scratch) {
  if constexpr (std::is_same_v<A, T>) {
    return from;
  } else {
    convert(from, count, scratch);
    return scratch;
  }
}

}  // namespace omnipretrain
