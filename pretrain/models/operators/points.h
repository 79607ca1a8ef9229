// Where samples lie on a map, and what follows from it: worked out for many points at a time.
//
// A sample reads two by two neighbouring pixels that always lie inside of the map. A corner outside
// has no weight: at the border the pair moves inwards, and what is left of the weights moves along.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "lanes.h"

namespace omnipretrain {

// Pixels of an image are counted in 32 bits, values in 64.
constexpr int64_t kMostPixels = std::numeric_limits<int32_t>::max();

// Along one axis: the first of two pixels, their weights, and how these change with the coordinate.
template <class A>
struct Pair {
  int32_t first;
  A low, high, low_slope, high_slope;
};

// Coordinate 0 is the centre of the first of `size` pixels; a point that is not `near` has no pair.
template <class A>
[[gnu::always_inline]] inline Pair<A> pair_at(A coordinate, int32_t size, bool near) {
  const A place = near ? coordinate : A(0);
  const A below = std::floor(place);
  const A fraction = place - below;
  const int32_t pixel = static_cast<int32_t>(below);
  const int32_t first = std::max(std::min(pixel, size - 2), 0);
  const A one = near ? A(1) : A(0);
  const A second = size > 1 ? one : A(0);
  const bool inside = pixel == first, before = pixel < first;
  return {
      first,
      inside ? (1 - fraction) * one : before ? fraction * one : A(0),
      inside ? fraction * second : before ? A(0) : (1 - fraction) * one,
      inside ? -one : before ? one : A(0),
      inside ? second : before ? A(0) : -one,
  };
}

// Arrays [position][group][point] of some positions.
template <class A>
class Points {
 public:
  explicit Points(int64_t capacity) : numbers_(22 * capacity), pixel_(capacity) {
    A* next = numbers_.data();
    const auto take = [&](int64_t each) { return std::exchange(next, next + each * capacity); };
    for (A*& array : corner) array = take(1);
    for (auto* axis : {&x, &y, &x_slope, &y_slope}) (*axis)[0] = take(1), (*axis)[1] = take(1);
    products = take(4);
    place_gradient = take(2);
    weight_gradient = take(1);
    place_scratch = take(2);
    weight_scratch = take(1);
    pixel = pixel_.data();
  }

  // Point `q` lies at (at_x, at_y) on a map of height x width pixels that begins at pixel `start`.
  template <bool kGradients>
  [[gnu::always_inline]] void set(int64_t q, A at_x, A at_y, int32_t height, int32_t width,
                                  int32_t start) {
    const bool near = (at_x > -1) & (at_x < A(width)) & (at_y > -1) & (at_y < A(height));
    const Pair<A> across = pair_at(at_x, width, near), down = pair_at(at_y, height, near);
    const A upper = weight[q] * down.low, lower = weight[q] * down.high;
    pixel[q] = start + down.first * width + across.first;
    corner[0][q] = upper * across.low;
    corner[1][q] = upper * across.high;
    corner[2][q] = lower * across.low;
    corner[3][q] = lower * across.high;
    if constexpr (kGradients) {
      x[0][q] = across.low, x[1][q] = across.high;
      y[0][q] = down.low, y[1][q] = down.high;
      x_slope[0][q] = across.low_slope, x_slope[1][q] = across.high_slope;
      y_slope[0][q] = down.low_slope, y_slope[1][q] = down.high_slope;
    }
  }

  // The gradients of point `q`, from `products`; a pixel is x_scale units of its x coordinate.
  [[gnu::always_inline]] void differentiate(int64_t q, A x_scale, A y_scale) {
    const A* product = products + 4 * q;
    const A upper = x[0][q] * product[0] + x[1][q] * product[1];
    const A lower = x[0][q] * product[2] + x[1][q] * product[3];
    const A upper_slope = x_slope[0][q] * product[0] + x_slope[1][q] * product[1];
    const A lower_slope = x_slope[0][q] * product[2] + x_slope[1][q] * product[3];
    const A by_x = y[0][q] * upper_slope + y[1][q] * lower_slope;
    const A by_y = y_slope[0][q] * upper + y_slope[1][q] * lower;
    place_gradient[2 * q] = x_scale * weight[q] * by_x;
    place_gradient[2 * q + 1] = y_scale * weight[q] * by_y;
    weight_gradient[q] = y[0][q] * upper + y[1][q] * lower;
  }

  const A *place, *weight;  // the caller's coordinates [point][x, y] and weights
  int32_t* pixel;           // the first of the four, counted from the image's first
  A* corner[4];             // weights of the four, with that of the point
  A *x[2], *y[2], *x_slope[2], *y_slope[2];
  A* products;  // [point][corner]: gradient of the sum times values of the pixel
  A *place_gradient, *weight_gradient;
  A *place_scratch, *weight_scratch;

 private:
  std::vector<A> numbers_;
  std::vector<int32_t> pixel_;
};

}  // namespace omnipretrain
