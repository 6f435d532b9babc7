// For tests/test_cuda_build.py: what a launch and a look-up in the driver say where neither can work.
#include <cstdio>
#include <stdexcept>

#include "cuda/launch.cuh"

__global__ void doubled(float* x, int n) {
  if (static_cast<int>(threadIdx.x) < n) x[threadIdx.x] *= 2;
}

template <class F>
void report(F&& f) {
  try {
    f();
    std::puts("no error");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}

int main() {
  using namespace fastattn::cuda;
  const StreamLaunch launch{nullptr};
  float* x = nullptr;
  report([&] { launch("doubled", doubled, LaunchConfig{3, 64}, x, 0); });
  report([&] { launch("doubled", doubled, LaunchConfig{4, 128, 100 << 10, 2, 1, 4}, x, 0); });
  report([&] { driver_function("cuTensorMapEncodeTiled", 12000); });
  report([&] { device_facts(0); });
  report([&] { device_facts(1000); });
}
