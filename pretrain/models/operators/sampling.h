// Weighted sums of bilinear samples, and their gradients: what the deformable operators share.
//
// An operator is a geometry: it says where the points of a position lie (`Placer`). Each position
// and group has a sum over its points; vectors are over the channels of a group.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <numeric>
#include <tuple>

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
                                          const Points<Sum<T>>& points, const Maps& maps,
                                          int64_t q, int64_t end, T* out) {
  using B = Block<Sum<T>, N>;
  // A sum for each corner: one alone would wait for itself.
  typename B::V sums[4][B::kVectors] = {};
  for (; q < end; ++q) {
    const T* first = values + points.pixel[q] * channels;
    const int64_t right = maps.right(q), below = maps.below(q);
    const T* corners[4] = {first, first + right, first + below, first + right + below};
    for (int c = 0; c < 4; ++c) {
      const Sum<T> weight = points.corner[c][q];
      for (int k = 0; k < B::kVectors; ++k) {
        sums[c][k] += weight * load<Sum<T>, B::kWidth>(corners[c] + k * B::kWidth);
      }
    }
  }
  for (int k = 0; k < B::kVectors; ++k) {
    store<Sum<T>, B::kWidth>((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]),
                             out + k * B::kWidth);
  }
}

// The same backwards: adds to `points.products` and, for these channels, to `value_gradient`.
template <int N, class T, class Maps>
[[gnu::always_inline]] inline void scatter(const T* gradient, const T* values, int64_t channels,
                                           Points<Sum<T>>& points, const Maps& maps, int64_t q,
                                           int64_t end, Sum<T>* value_gradient) {
  using A = Sum<T>;
  using B = Block<A, N>;
  typename B::V upstream[B::kVectors];
  for (int k = 0; k < B::kVectors; ++k) {
    upstream[k] = load<A, B::kWidth>(gradient + k * B::kWidth);
  }
  for (; q < end; ++q) {
    const int64_t first = points.pixel[q] * channels;
    const int64_t right = maps.right(q), below = maps.below(q);
    const int64_t corners[4] = {first, first + right, first + below, first + right + below};
    typename B::V products[4] = {};
    for (int c = 0; c < 4; ++c) {
      const A weight = points.corner[c][q];
      for (int k = 0; k < B::kVectors; ++k) {
        const int64_t at = corners[c] + k * B::kWidth;
        products[c] += upstream[k] * load<A, B::kWidth>(values + at);
        const auto sum = load<A, B::kWidth>(value_gradient + at) + upstream[k] * weight;
        store<A, B::kWidth>(sum, value_gradient + at);
      }
    }
    add_sums<A, B::kWidth>(products, points.products + 4 * q);
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
  std::fill_n(points.products, 4 * tile.positions * tile.groups * shape.points, Sum<T>(0));
  int64_t q = 0;
  for (int64_t position = 0; position < tile.positions; ++position) {
    for (int64_t group = 0; group < tile.groups; ++group, q += shape.points) {
      const int64_t first = (tile.first_group + group) * depth;
      in_blocks(depth, [&]<int N>(int64_t channel) {
        scatter<N>(gradient + position * channels + first + channel, values + first + channel,
                   channels, points, maps, q, q + shape.points, value_gradient + first + channel);
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

// Coordinates and weights of a tile, as A, into `points`.
template <class A, class S>
void read(const Shape& shape, const Tile& tile, const S* place, const S* weight,
          Points<A>& points) {
  const int64_t all = shape.groups * shape.points, some = tile.groups * shape.points;
  const int64_t row = (tile.image * shape.rows + tile.row) * shape.columns + tile.column;
  const int64_t first = row * all + tile.first_group * shape.points;
  if (all == some) {
    const int64_t count = tile.positions * all;
    points.place = widened(place + 2 * first, 2 * count, points.place_scratch);
    points.weight = widened(weight + first, count, points.weight_scratch);
    return;
  }
  for (int64_t t = 0; t < tile.positions; ++t) {
    convert(place + 2 * (first + t * all), 2 * some, points.place_scratch + 2 * t * some);
    convert(weight + first + t * all, some, points.weight_scratch + t * some);
  }
  points.place = points.place_scratch, points.weight = points.weight_scratch;
}

// The opposite of `read`, for gradients.
template <class A, class S>
void write(const Shape& shape, const Tile& tile, const Points<A>& points, S* place, S* weight) {
  const int64_t all = shape.groups * shape.points, some = tile.groups * shape.points;
  const int64_t row = (tile.image * shape.rows + tile.row) * shape.columns + tile.column;
  const int64_t first = row * all + tile.first_group * shape.points;
  for (int64_t t = 0; t < tile.positions; ++t) {
    convert(points.place_gradient + 2 * t * some, 2 * some, place + 2 * (first + t * all));
    convert(points.weight_gradient + t * some, some, weight + first + t * all);
  }
}

// Positions of a tile: enough points for vectors, few enough to stay in the first cache.
inline int64_t tile_positions(const Shape& shape, int64_t groups, int64_t most_points) {
  const int64_t fitting = std::max<int64_t>(1, most_points / (groups * shape.points));
  const int64_t tiles = at::divup(shape.columns, fitting);
  return at::divup(shape.columns, tiles);
}

// out (images, rows, columns, groups * depth): each a sum over points of weight times sample.
template <class T, class S, class Geometry>
void forward(const Shape& shape, const Geometry& geometry, const T* values, const S* place,
             const S* weight, T* out) {
  using A = Sum<T>;
  const int64_t channels = shape.channels();
  const int64_t positions = tile_positions(shape, shape.groups, 512);
  const int64_t tiles = at::divup(shape.columns, positions);
  const int64_t work = positions * channels * shape.points;
  const int64_t grain = std::max<int64_t>(1, 100'000 / work);
  at::parallel_for(0, shape.images * shape.rows * tiles, grain, [&](int64_t unit, int64_t end) {
    Points<A> points(positions * shape.groups * shape.points);
    typename Geometry::template Placer<A> placer(geometry, shape.groups, positions);
    for (; unit < end; ++unit) {
      const int64_t row = unit / tiles, column = unit % tiles * positions;
      const Tile tile{row / shape.rows, row % shape.rows, column,
                      std::min(positions, shape.columns - column), 0, shape.groups};
      read(shape, tile, place, weight, points);
      placer.template set<false>(tile, points);
      by_depth(shape.depth, [&]<int64_t kDepth>() {
        gather_tile<kDepth>(shape, tile, values + tile.image * shape.pixels * channels, points,
                            placer.maps(), out + (row * shape.columns + column) * channels);
      });
    }
  });
}

// Gradients of the above; `value_gradient` begins with zeros.
//
// Threads share out the groups of images: no two write to the same value, and each sum is taken in
// the same order whatever their number.
template <class T, class S, class Geometry>
void backward(const Shape& shape, const Geometry& geometry, const T* gradient, const T* values,
              const S* place, const S* weight, Sum<T>* value_gradient, S* place_gradient,
              S* weight_gradient) {
  using A = Sum<T>;
  const int64_t channels = shape.channels(), threads = at::get_num_threads();
  const int64_t blocks =
      std::clamp<int64_t>(threads / std::gcd(shape.images, threads), 1, shape.groups);
  at::parallel_for(0, shape.images * blocks, 1, [&](int64_t unit, int64_t end) {
    const int64_t most_groups = at::divup(shape.groups, blocks);
    const int64_t positions = tile_positions(shape, most_groups, 256);
    Points<A> points(positions * most_groups * shape.points);
    for (; unit < end; ++unit) {
      const int64_t image = unit / blocks, block = unit % blocks;
      const int64_t first_group = block * shape.groups / blocks;
      const int64_t groups = (block + 1) * shape.groups / blocks - first_group;
      const int64_t image_start = image * shape.pixels * channels;
      typename Geometry::template Placer<A> placer(geometry, groups, positions);
      for (int64_t row = 0; row < shape.rows; ++row) {
        for (int64_t column = 0; column < shape.columns; column += positions) {
          const Tile tile{image,  row, column, std::min(positions, shape.columns - column),
                          first_group, groups};
          const int64_t at = (image * shape.rows + row) * shape.columns + column;
          read(shape, tile, place, weight, points);
          placer.template set<true>(tile, points);
          by_depth(shape.depth, [&]<int64_t kDepth>() {
            scatter_tile<kDepth>(shape, tile, gradient + at * channels, values + image_start,
                                 points, placer.maps(), value_gradient + image_start);
          });
          placer.differentiate(tile, points);
          write(shape, tile, points, place_gradient, weight_gradient);
        }
      }
    }
  });
}

// Calls `work` with the types of the values, and of the places and weights.
template <class Work>
void by_types(const at::Tensor& value, const at::Tensor& place, const Work& work) {
  const bool same = value.scalar_type() == place.scalar_type();
  const auto with = [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, Sum<T>>) {
      if (!same) return work.template operator()<T, Sum<T>>();
    }
    work.template operator()<T, T>();
  };
  switch (value.scalar_type()) {
    case at::kFloat: return with(float());
    case at::kDouble: return with(double());
    case at::kBFloat16: return with(c10::BFloat16());
    case at::kHalf: return with(c10::Half());
    default: TORCH_CHECK(false, "no kernel for ", value.scalar_type());
  }
}

// Checks and memory around `forward`; tensors are contiguous, the caller has checked their shapes.
template <class Geometry>
at::Tensor sum_of_samples(const Shape& shape, const Geometry& geometry, const at::Tensor& value,
                          const at::Tensor& place, const at::Tensor& weight,
                          at::IntArrayRef size) {
  at::Tensor out = at::empty(size, value.options());
  by_types(value, place, [&]<class T, class S>() {
    forward(shape, geometry, value.const_data_ptr<T>(), place.const_data_ptr<S>(),
            weight.const_data_ptr<S>(), out.mutable_data_ptr<T>());
  });
  return out;
}

// The same around `backward`: gradients of value, place and weight.
template <class Geometry>
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients_of_sum(
    const Shape& shape, const Geometry& geometry, const at::Tensor& gradient,
    const at::Tensor& value, const at::Tensor& place, const at::Tensor& weight) {
  at::Tensor of_value, of_place = at::empty_like(place), of_weight = at::empty_like(weight);
  by_types(value, place, [&]<class T, class S>() {
    of_value = at::zeros(value.sizes(), value.options().dtype(c10::CppTypeToScalarType<Sum<T>>()));
    backward(shape, geometry, gradient.const_data_ptr<T>(), value.const_data_ptr<T>(),
             place.const_data_ptr<S>(), weight.const_data_ptr<S>(),
             of_value.mutable_data_ptr<Sum<T>>(), of_place.mutable_data_ptr<S>(),
             of_weight.mutable_data_ptr<S>());
  });
  return {of_value.to(value.scalar_type()), of_place, of_weight};
}

}  // namespace omnipretrain
