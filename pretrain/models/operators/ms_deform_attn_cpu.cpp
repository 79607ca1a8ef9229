// Multi-scale deformable attention on the CPU: points of a query lie on maps of several sizes.
#include <torch/library.h>

#include "operator.h"

namespace omnipretrain {
namespace {

struct MultiScale {
  at::IntArrayRef heights, widths;  // of the maps, which follow each other in memory
  int64_t points;                   // of a query and head, on each map
  int64_t channels;

  // Puts points where `location * size - 0.5` says, on the map that each belongs to.
  template <class A>
  class Placer {
   public:
    Placer(const MultiScale& geometry, int64_t heads, int64_t queries)
        : channels_(geometry.channels),
          each_(heads * geometry.points * geometry.widths.size()) {
      for (auto* table : {&height_, &width_, &start_, &right_, &below_}) {
        table->reserve(queries * each_);
      }
      for (int64_t i = 0; i < queries * heads; ++i) {
        int64_t start = 0;
        for (size_t map = 0; map < geometry.widths.size(); ++map) {
          const int64_t height = geometry.heights[map], width = geometry.widths[map];
          height_.insert(height_.end(), geometry.points, height);
          width_.insert(width_.end(), geometry.points, width);
          start_.insert(start_.end(), geometry.points, start);
          right_.insert(right_.end(), geometry.points, width > 1 ? 1 : 0);
          below_.insert(below_.end(), geometry.points, height > 1 ? width : 0);
          start += height * width;
        }
      }
    }

    template <bool kGradients>
    void set(const Tile& tile, Points<A>& points) const {
      const int32_t *height = height_.data(), *width = width_.data(), *start = start_.data();
      const int64_t count = tile.positions * each_;
#pragma omp simd
      for (int64_t q = 0; q < count; ++q) {
        const A x = points.place[2 * q] * A(width[q]) - A(0.5);
        const A y = points.place[2 * q + 1] * A(height[q]) - A(0.5);
        points.template set<kGradients>(q, x, y, height[q], width[q], start[q]);
      }
    }

    void differentiate(const Tile& tile, Points<A>& points) const {
      const int32_t *height = height_.data(), *width = width_.data();
      const int64_t count = tile.positions * each_;
#pragma omp simd
      for (int64_t q = 0; q < count; ++q) points.differentiate(q, width[q], height[q]);
    }

    ManyMaps maps() const { return {right_.data(), below_.data(), channels_}; }

   private:
    int64_t channels_, each_;
    std::vector<int32_t> height_, width_, start_, right_, below_;
  };
};

struct Call {
  Shape shape;
  MultiScale geometry;
};

Call described(const at::Tensor& value, const at::Tensor& weights, at::IntArrayRef heights,
               at::IntArrayRef widths) {
  const int64_t heads = value.size(2), depth = value.size(3), points = weights.size(4);
  TORCH_CHECK(value.size(1) <= kMostPixels, "ms_deform_attn: maps of ", value.size(1),
              " pixels are too large for the C++ kernel; use backend='torch'");
  const int64_t maps = widths.size();
  return {{value.size(0), 1, weights.size(1), heads, maps * points, depth, value.size(1)},
          {heights, widths, points, heads * depth}};
}

at::Tensor ms_deform_attn_forward(const at::Tensor& value, const at::Tensor& locations,
                                  const at::Tensor& weights, at::IntArrayRef heights,
                                  at::IntArrayRef widths) {
  const Call call = described(value, weights, heights, widths);
  return sum_of_samples(call.shape, call.geometry, value, locations, weights,
                        {value.size(0), weights.size(1), call.geometry.channels});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& gradient, const at::Tensor& value, const at::Tensor& locations,
    const at::Tensor& weights, at::IntArrayRef heights, at::IntArrayRef widths) {
  const Call call = described(value, weights, heights, widths);
  return gradients_of_sum(call.shape, call.geometry, gradient, value, locations, weights);
}

}  // namespace
}  // namespace omnipretrain

TORCH_LIBRARY_FRAGMENT(omnipretrain, library) {
  library.def(
      "ms_deform_attn_cpu_forward(Tensor value, Tensor locations, Tensor weights, int[] heights, "
      "int[] widths) -> Tensor");
  library.def(
      "ms_deform_attn_cpu_backward(Tensor gradient, Tensor value, Tensor locations, "
      "Tensor weights, int[] heights, int[] widths) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(omnipretrain, CPU, library) {
  library.impl("ms_deform_attn_cpu_forward", &omnipretrain::ms_deform_attn_forward);
  library.impl("ms_deform_attn_cpu_backward", &omnipretrain::ms_deform_attn_backward);
}
