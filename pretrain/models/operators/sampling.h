// Weighted sums of bilinear samples and their gradients, by vectors over the channels of a group.
// Each position of the output has one sum for each group, over the points of that group.
#pragma once

#include "points.h"

namespace omnipretrain {

struct Shape {
  int64_t images, rows, columns;  // positions of the output
  int64_t groups, points, depth;  // depth: channels of a group
  int64_t pixels;                 // of an image's maps together

  int64_t channels() const { return groups * depth; }
};

// Distances in memory from a pixel to its right and lower neighbours, in values.
struct OneMap {
  int64_t right_step, below_step;
  int64_t right(int64_t) const { return right_step; }
  int64_t below(int64_t) const { return below_step; }
};

struct ManyMaps {
  const int32_t *rights, *belows;
  int64_t channels;
  int64_t right(int64_t q) const { return rights[q] * channels; }
  int64_t below(int64_t q) const { return belows[q] * channels; }
};

// N channels of a group in vectors as wide as the machine has them.
template <class A, int N>
struct Block {
  static constexpr int kWidth = std::min<int>(N, kVectorBytes / sizeof(A));
  static constexpr int kVectors = N / kWidth;
  using V = Vector<A, kWidth>;
};

// N channels of the sum over points [q, end) of one group.
template <int N, class T, class Maps>
[[gnu::always_inline]] inline void gather(const T* values, int64_t channels,
                                          const Points<Sum<T>>& points, Maps maps,
                                          int64_t q, int64_t end, T* out) {
  using B = Block<Sum<T>, N>;
  const int32_t* pixel = points.pixel;
  const Sum<T>* weights[4];
  std::copy_n(points.corner, 4, weights);
  // A sum for each corner: one alone would wait for itself.
  typename B::V sums[4][B::kVectors] = {};
  for (; q < end; ++q) {
    const T* first = values + pixel[q] * channels;
    const int64_t right = maps.right(q), below = maps.below(q);
    const T* corners[4] = {first, first + right, first + below, first + right + below};
    for (int c = 0; c < 4; ++c) {
      for (int k = 0; k < B::kVectors; ++k) {
        sums[c][k] += weights[c][q] * load<Sum<T>, B::kWidth>(corners[c] + k * B::kWidth);
      }
    }
  }
  for (int k = 0; k < B::kVectors; ++k) {
    store<Sum<T>, B::kWidth>((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]),
                             out + k * B::kWidth);
  }
}

// The same backwards, for `points.products` (adds to them or sets them) and `value_gradient`.
template <int N, class T, class Maps>
[[gnu::always_inline]] inline void scatter(const T* gradient, const T* values, int64_t channels,
                                           Points<Sum<T>>& points, Maps maps, int64_t q,
                                           int64_t end, bool add, Sum<T>* value_gradient) {
  using A = Sum<T>;
  using B = Block<A, N>;
  typename B::V upstream[B::kVectors];
  for (int k = 0; k < B::kVectors; ++k) {
    upstream[k] = load<A, B::kWidth>(gradient + k * B::kWidth);
  }
  // Copies, or every store to memory would have them loaded again.
  const int32_t* pixel = points.pixel;
  A *weights[4], *sums = points.products;
  std::copy_n(points.corner, 4, weights);
  for (; q < end; ++q) {
    const int64_t first = pixel[q] * channels, right = maps.right(q), below = maps.below(q);
    const int64_t corners[4] = {first, first + right, first + below, first + right + below};
    typename B::V products[4] = {};
    for (int c = 0; c < 4; ++c) {
      const A weight = weights[c][q];
      for (int k = 0; k < B::kVectors; ++k) {
        const int64_t at = corners[c] + k * B::kWidth;
        products[c] += upstream[k] * load<A, B::kWidth>(values + at);
        const auto sum = load<A, B::kWidth>(value_gradient + at) + upstream[k] * weight;
        store<A, B::kWidth>(sum, value_gradient + at);
      }
    }
    put_sums<A, B::kWidth>(products, add, sums + 4 * q);
  }
}

// Calls `work.template operator()<N>(channel)` for blocks of N channels that make up `depth`.
template <class Work>
[[gnu::always_inline]] inline void in_blocks(int64_t depth, const Work& work) {
  int64_t channel = 0;
  for (; channel + 32 <= depth; channel += 32) work.template operator()<32>(channel);
  for (; channel + 16 <= depth; channel += 16) work.template operator()<16>(channel);
  for (; channel + 8 <= depth; channel += 8) work.template operator()<8>(channel);
  for (; channel + 4 <= depth; channel += 4) work.template operator()<4>(channel);
  for (; channel < depth; ++channel) work.template operator()<1>(channel);
}

// Groups [first, first + count) at some positions of a row.
struct Tile {
  int64_t image, row, column, positions, first_group, groups;
};

// Sums of a tile. A known depth makes the loops over channels straight code.
template <int64_t kDepth, class T, class Maps>
[[gnu::noinline]] void gather_tile(const Shape& shape, const Tile& tile, const T* values,
                                   const Points<Sum<T>>& points, const Maps& maps, T* out) {
  const int64_t depth = kDepth ? kDepth : shape.depth, channels = shape.channels();
  int64_t q = 0;
  for (int64_t position = 0; position < tile.positions; ++position) {
    for (int64_t group = 0; group < tile.groups; ++group, q += shape.points) {
      const int64_t first = (tile.first_group + group) * depth;
      in_blocks(depth, [&]<int N>(int64_t channel) {
        gather<N>(values + first + channel, channels, points, maps, q, q + shape.points,
                  out + position * channels + first + channel);
      });
    }
  }
}

template <int64_t kDepth, class T, class Maps>
[[gnu::noinline]] void scatter_tile(const Shape& shape, const Tile& tile, const T* gradient,
                                    const T* values, Points<Sum<T>>& points, const Maps& maps,
                                    Sum<T>* value_gradient) {
  const int64_t depth = kDepth ? kDepth : shape.depth, channels = shape.channels();
  int64_t q = 0;
  for (int64_t position = 0; position < tile.positions; ++position) {
    for (int64_t group = 0; group < tile.groups; ++group, q += shape.points) {
      const int64_t first = (tile.first_group + group) * depth;
      in_blocks(depth, [&]<int N>(int64_t channel) {
        scatter<N>(gradient + position * channels + first + channel, values + first + channel,
                   channels, points, maps, q, q + shape.points, channel > 0,
                   value_gradient + first + channel);
      });
    }
  }
}

// Calls `work` with the depths that have code of their own, or with 0.
template <class Work>
inline void by_depth(int64_t depth, const Work& work) {
  if (depth == 16) {
    work.template operator()<16>();
  } else if (depth == 32) {
    work.template operator()<32>();
  } else {
    work.template operator()<0>();
  }
}

}  // namespace omnipretrain
