// What a torch without CUDA needs to trace and differentiate fake CUDA tensors: hooks that say that there is one device,
// and a device guard that does nothing. Loaded before torch itself, which asks for hooks once.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace at {

struct OneDevice : CUDAHooksInterface {
  explicit OneDevice(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, OneDevice)

}  // namespace at

namespace {

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard);

}  // namespace
