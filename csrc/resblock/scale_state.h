// The gradient scale of a resblock from one step to the next (section 2.4, appendix D).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dalle_fast {

constexpr float kScaleGrowth = 1.0006933874625807f;   // 2^(1/1000), factor after a step without Inf and NaN
constexpr float kScaleBackOff = 1.4142135623730951f;  // sqrt(2), divisor after a step with them
constexpr int32_t kScaleWindow = 125;                 // fewest steps between two divisions
constexpr float kSmallestScale = 128.0f;              // 2^7, for each data-parallel replica
constexpr float kLargestScale = 16777216.0f;          // 2^24, likewise

struct ScaleState {
  float scale;
  int32_t since_division;  // steps, skipped ones included; kScaleWindow also stands for longer
};

DF_HOST_DEVICE inline ScaleState next_scale(ScaleState state, bool nonfinite, float replicas) {
  if (state.since_division < kScaleWindow) ++state.since_division;
  if (!nonfinite) {
    state.scale *= kScaleGrowth;
  } else if (state.since_division >= kScaleWindow) {
    state = {state.scale / kScaleBackOff, 0};
  }
  const float smallest = kSmallestScale * replicas, largest = kLargestScale * replicas;
  state.scale = state.scale < smallest ? smallest : state.scale > largest ? largest : state.scale;
  return state;
}

}  // namespace dalle_fast
