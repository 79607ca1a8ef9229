// DCNv3 on the CPU: the geometry of its points, and the operators that Python calls.
#include <torch/library.h>

#include "operator.h"

namespace omnipretrain {
namespace {

struct Dcnv3 {
  int64_t height, width, channels;
  at::IntArrayRef stride, origin;      // vertical, horizontal; origin: place of the first centre
  at::IntArrayRef steps_y, steps_x;    // of the kernel's points from its centre
  double scale;

  // Puts points where `origin + stride * position + scale * (step + offset)` says.
  template <class A>
  class Placer {
   public:
    Placer(const Dcnv3& geometry, int64_t groups, int64_t positions)
        : geometry_(geometry), each_(groups * geometry.steps_x.size()) {
      for (auto* table : {&position_x_, &step_x_, &step_y_}) table->reserve(positions * each_);
      for (int64_t position = 0; position < positions; ++position) {
        for (int64_t i = 0; i < each_; ++i) {
          const int64_t point = i % geometry.steps_x.size();
          position_x_.push_back(position * geometry.stride[1]);
          step_x_.push_back(geometry.steps_x[point]);
          step_y_.push_back(geometry.steps_y[point]);
        }
      }
    }

    template <bool kGradients>
    void set(const Tile& tile, Points<A>& points) const {
      const A from_x = tile.column * geometry_.stride[1] + geometry_.origin[1];
      const A from_y = tile.row * geometry_.stride[0] + geometry_.origin[0];
      const A scale = geometry_.scale;
      const int32_t height = geometry_.height, width = geometry_.width;
      const A *position_x = position_x_.data(), *step_x = step_x_.data(), *step_y = step_y_.data();
      const int64_t count = tile.positions * each_;
#pragma omp simd
      for (int64_t q = 0; q < count; ++q) {
        const A x = from_x + position_x[q] + scale * (step_x[q] + points.place[2 * q]);
        const A y = from_y + scale * (step_y[q] + points.place[2 * q + 1]);
        points.template set<kGradients>(q, x, y, height, width, 0);
      }
    }

    void differentiate(const Tile& tile, Points<A>& points) const {
      const A scale = geometry_.scale;
      const int64_t count = tile.positions * each_;
#pragma omp simd
      for (int64_t q = 0; q < count; ++q) points.differentiate(q, scale, scale);
    }

    OneMap maps() const {
      const auto& g = geometry_;
      return {g.width > 1 ? g.channels : 0, g.height > 1 ? g.width * g.channels : 0};
    }

   private:
    const Dcnv3& geometry_;
    int64_t each_;
    std::vector<A> position_x_, step_x_, step_y_;
  };
};

struct Call {
  Shape shape;
  Dcnv3 geometry;
};

Call described(const at::Tensor& value, at::IntArrayRef size, at::IntArrayRef steps_y,
               at::IntArrayRef steps_x, at::IntArrayRef stride, at::IntArrayRef origin,
               int64_t groups, double scale) {
  const int64_t height = value.size(1), width = value.size(2), channels = value.size(3);
  TORCH_CHECK(height * width <= kMostPixels, "dcnv3: an image of ", height, " x ", width,
              " has too many pixels for the C++ kernel; use backend='torch'");
  const int64_t points = steps_x.size();
  return {{value.size(0), size[0], size[1], groups, points, channels / groups, height * width},
          {height, width, channels, stride, origin, steps_y, steps_x, scale}};
}

at::Tensor dcnv3_forward(const at::Tensor& value, const at::Tensor& offset, const at::Tensor& mask,
                         at::IntArrayRef size, at::IntArrayRef steps_y, at::IntArrayRef steps_x,
                         at::IntArrayRef stride, at::IntArrayRef origin, int64_t groups,
                         double scale) {
  const Call call = described(value, size, steps_y, steps_x, stride, origin, groups, scale);
  return sum_of_samples(call.shape, call.geometry, value, offset, mask,
                        {value.size(0), size[0], size[1], value.size(3)});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dcnv3_backward(
    const at::Tensor& gradient, const at::Tensor& value, const at::Tensor& offset,
    const at::Tensor& mask, at::IntArrayRef size, at::IntArrayRef steps_y, at::IntArrayRef steps_x,
    at::IntArrayRef stride, at::IntArrayRef origin, int64_t groups, double scale) {
  const Call call = described(value, size, steps_y, steps_x, stride, origin, groups, scale);
  return gradients_of_sum(call.shape, call.geometry, gradient, value, offset, mask);
}

}  // namespace
}  // namespace omnipretrain

TORCH_LIBRARY_FRAGMENT(omnipretrain, library) {
  library.def(
      "dcnv3_cpu_forward(Tensor value, Tensor offset, Tensor mask, int[] size, int[] steps_y, "
      "int[] steps_x, int[] stride, int[] origin, int groups, float scale) -> Tensor");
  library.def(
      "dcnv3_cpu_backward(Tensor gradient, Tensor value, Tensor offset, Tensor mask, int[] size, "
      "int[] steps_y, int[] steps_x, int[] stride, int[] origin, int groups, float scale) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(omnipretrain, CPU, library) {
  library.impl("dcnv3_cpu_forward", &omnipretrain::dcnv3_forward);
  library.impl("dcnv3_cpu_backward", &omnipretrain::dcnv3_backward);
}
