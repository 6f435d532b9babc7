// The runtime's side of launching: errors in words, the driver's functions, what a device can do; and what
// `python -m fastattn info` asks about this object.
#include <array>
#include <mutex>
#include <stdexcept>

#include "cuda/launch.cuh"

namespace fastattn {
namespace cuda {
namespace {

std::string described(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, and not by the next call as well
  throw std::runtime_error("fastattn: " + what + ": " + described(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "CUDA device " + std::to_string(device));
  return value;
}

}  // namespace

void raise_launch_error(const char* kernel, const LaunchConfig& config, cudaError_t error) {
  const std::string grid = std::to_string(config.blocks_x) + " x " + std::to_string(config.blocks_y) + " x " +
                           std::to_string(config.blocks_z) + " blocks of " + std::to_string(config.threads) +
                           " threads, " + std::to_string(config.shared) +
                           " bytes of dynamic shared memory, clusters of " + std::to_string(config.cluster);
  check(error, std::string(kernel) + ": launch of " + grid + " failed");
  throw std::logic_error("raise_launch_error without an error");
}

void* driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const std::string what = std::string("the driver's ") + name;
  check(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found), what);
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("fastattn: " + what + " is not in this driver; CUDA " + std::to_string(version / 1000) +
                             "." + std::to_string(version % 1000 / 10) + " has it");
  }
  return function;
}

const DeviceFacts& device_facts(int device) {
  constexpr int kMostDevices = 64;
  static std::array<DeviceFacts, kMostDevices> facts;
  static std::array<std::once_flag, kMostDevices> known;
  if (device < 0 || device >= kMostDevices) {
    throw std::runtime_error("fastattn: CUDA device " + std::to_string(device) + " is beyond the first " +
                             std::to_string(kMostDevices));
  }
  std::call_once(known[device], [device] {
    facts[device] = {10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                         attribute(cudaDevAttrComputeCapabilityMinor, device),
                     attribute(cudaDevAttrMultiProcessorCount, device),
                     attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  });
  return facts[device];
}

}  // namespace cuda
}  // namespace fastattn

#pragma GCC visibility push(default)
extern "C" {

// The architectures that the object holds machine code for, as setup.py was asked.
const char* fastattn_cuda_architectures() { return FASTATTN_CUDA_ARCHS; }

// Empty where a device can be used, else why none can.
const char* fastattn_cuda_obstacle() {
  static const std::string obstacle = [] {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    cudaGetLastError();
    if (error != cudaSuccess) return fastattn::cuda::described(error);
    return std::string(count > 0 ? "" : "no CUDA device");
  }();
  return obstacle.c_str();
}

}  // extern "C"
#pragma GCC visibility pop
