// A deformable operator: threads, tiles and tensors around the sums. What tells one operator from
// another is its geometry, which says where points lie:
//
//   struct Geometry {
//     template <class A> struct Placer {
//       Placer(const Geometry&, int64_t groups, int64_t positions);  // of tiles, at most
//       template <bool kGradients> void set(const Tile&, Points<A>&) const;
//       void differentiate(const Tile&, Points<A>&) const;
//       OneMap or ManyMaps maps() const;
//     };
//   };
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <memory>
#include <numeric>
#include <tuple>

#include "sampling.h"

namespace omnipretrain {

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
  const int64_t columns = std::max<int64_t>(1, shape.columns);
  return at::divup(columns, at::divup(columns, fitting));
}

template <class T, class S>
struct Inputs {
  const T* values;
  const S *place, *weight;
};

template <class T, class S>
struct Gradients {
  const T* upstream;
  T* values;
  S *place, *weight;
};

// out (images, rows, columns, groups * depth): each a sum over points of weight times sample.
template <class T, class S, class Geometry>
void forward(const Shape& shape, const Geometry& geometry, const Inputs<T, S>& inputs, T* out) {
  using A = Sum<T>;
  const int64_t channels = shape.channels();
  const int64_t positions = tile_positions(shape, shape.groups, 512);
  const int64_t tiles = at::divup(shape.columns, positions);
  const int64_t work = std::max<int64_t>(1, positions * channels * shape.points);
  const int64_t grain = std::max<int64_t>(1, 100'000 / work);
  at::parallel_for(0, shape.images * shape.rows * tiles, grain, [&](int64_t unit, int64_t end) {
    Points<A> points(positions * shape.groups * shape.points);
    typename Geometry::template Placer<A> placer(geometry, shape.groups, positions);
    for (; unit < end; ++unit) {
      const int64_t row = unit / tiles, column = unit % tiles * positions;
      const Tile tile{row / shape.rows, row % shape.rows, column,
                      std::min(positions, shape.columns - column), 0, shape.groups};
      read(shape, tile, inputs.place, inputs.weight, points);
      placer.template set<false>(tile, points);
      by_depth(shape.depth, [&]<int64_t kDepth>() {
        gather_tile<kDepth>(shape, tile, inputs.values + tile.image * shape.pixels * channels,
                            points, placer.maps(),
                            out + (row * shape.columns + column) * channels);
      });
    }
  });
}

// Gradients of the above for one image and some of its groups, in the order of positions. That of
// the values is added up in `sums`, which is the image's own gradient if that has the type of sums.
template <class T, class S, class Geometry>
void backward(const Shape& shape, const Geometry& geometry, Tile tile, int64_t positions,
              const Inputs<T, S>& inputs, const Gradients<T, S>& gradients, Sum<T>* sums) {
  using A = Sum<T>;
  const int64_t channels = shape.channels(), start = tile.image * shape.pixels * channels;
  const int64_t first = tile.first_group * shape.depth, count = tile.groups * shape.depth;
  Points<A> points(positions * tile.groups * shape.points);
  typename Geometry::template Placer<A> placer(geometry, tile.groups, positions);
  for (int64_t pixel = 0; pixel < shape.pixels; ++pixel) {
    std::fill_n(sums + pixel * channels + first, count, A(0));
  }
  for (tile.row = 0; tile.row < shape.rows; ++tile.row) {
    for (tile.column = 0; tile.column < shape.columns; tile.column += positions) {
      tile.positions = std::min(positions, shape.columns - tile.column);
      const int64_t at = (tile.image * shape.rows + tile.row) * shape.columns + tile.column;
      read(shape, tile, inputs.place, inputs.weight, points);
      placer.template set<true>(tile, points);
      by_depth(shape.depth, [&]<int64_t kDepth>() {
        scatter_tile<kDepth>(shape, tile, gradients.upstream + at * channels,
                             inputs.values + start, points, placer.maps(), sums);
      });
      placer.differentiate(tile, points);
      write(shape, tile, points, gradients.place, gradients.weight);
    }
  }
  if constexpr (!std::is_same_v<T, A>) {
    for (int64_t at = first; at < shape.pixels * channels; at += channels) {
      convert(sums + at, count, gradients.values + start + at);
    }
  }
}

// Gradients of all images.
//
// Threads share out the groups of images: no two write to the same value, and each sum is taken in
// the same order whatever their number.
template <class T, class S, class Geometry>
void backward(const Shape& shape, const Geometry& geometry, const Inputs<T, S>& inputs,
              const Gradients<T, S>& gradients) {
  constexpr bool kInPlace = std::is_same_v<T, Sum<T>>;
  const int64_t threads = at::get_num_threads(), size = shape.pixels * shape.channels();
  const int64_t blocks =
      std::clamp<int64_t>(threads / std::gcd(shape.images, threads), 1, shape.groups);
  const int64_t positions = tile_positions(shape, at::divup(shape.groups, blocks), 256);
  // Sums of few images at a time, where they need memory of their own.
  const int64_t together = kInPlace ? shape.images : std::min(shape.images, threads);
  const std::unique_ptr<Sum<T>[]> scratch(kInPlace ? nullptr : new Sum<T>[together * size]);
  for (int64_t start = 0; start < shape.images; start += together) {
    const int64_t images = std::min(together, shape.images - start);
    at::parallel_for(0, images * blocks, 1, [&](int64_t unit, int64_t end) {
      for (; unit < end; ++unit) {
        const int64_t slot = unit / blocks, block = unit % blocks;
        const int64_t first = block * shape.groups / blocks;
        const int64_t groups = (block + 1) * shape.groups / blocks - first;
        Sum<T>* sums = scratch.get() + slot * size;
        if constexpr (kInPlace) sums = gradients.values + (start + slot) * size;
        backward(shape, geometry, Tile{start + slot, 0, 0, 0, first, groups}, positions, inputs,
                 gradients, sums);
      }
    });
  }
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

template <class T, class S>
Inputs<T, S> inputs_of(const at::Tensor& value, const at::Tensor& place, const at::Tensor& weight) {
  return {value.const_data_ptr<T>(), place.const_data_ptr<S>(), weight.const_data_ptr<S>()};
}

// `forward` for tensors, which are contiguous, and of shapes that the caller has checked.
template <class Geometry>
at::Tensor sum_of_samples(const Shape& shape, const Geometry& geometry, const at::Tensor& value,
                          const at::Tensor& place, const at::Tensor& weight,
                          at::IntArrayRef size) {
  at::Tensor out = at::empty(size, value.options());
  by_types(value, place, [&]<class T, class S>() {
    forward(shape, geometry, inputs_of<T, S>(value, place, weight), out.mutable_data_ptr<T>());
  });
  return out;
}

// `backward` for tensors: gradients of value, place and weight.
template <class Geometry>
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients_of_sum(
    const Shape& shape, const Geometry& geometry, const at::Tensor& gradient,
    const at::Tensor& value, const at::Tensor& place, const at::Tensor& weight) {
  at::Tensor of_value = at::empty_like(value), of_place = at::empty_like(place);
  at::Tensor of_weight = at::empty_like(weight);
  by_types(value, place, [&]<class T, class S>() {
    backward(shape, geometry, inputs_of<T, S>(value, place, weight),
             Gradients<T, S>{gradient.const_data_ptr<T>(), of_value.mutable_data_ptr<T>(),
                             of_place.mutable_data_ptr<S>(), of_weight.mutable_data_ptr<S>()});
  });
  return {of_value, of_place, of_weight};
}

}  // namespace omnipretrain
