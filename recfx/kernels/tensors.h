// Tensors as the operators take and return them. torch's stable C++ interface keeps the build at seconds.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// The address of a tensor's first item; the kernel knows the strides of `rows` and `grads`, all others are contiguous.
template <class T>
inline T* strided(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
inline T* flat(const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "recfx: got a strided tensor where the kernel reads a contiguous one.");
  return static_cast<T*>(t.data_ptr());
}

template <class T>
inline std::vector<T*> flat(const Tensors& tensors) {
  std::vector<T*> addresses;
  for (const Tensor& t : tensors) addresses.push_back(flat<T>(t));
  return addresses;
}

// Raises RuntimeError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The address of a tensor that may be absent.
template <class T>
inline T* flat(const std::optional<Tensor>& t) {
  return t ? flat<T>(*t) : nullptr;
}

inline Ints sizes_of(const Tensors& tensors) {
  Ints sizes;
  for (const Tensor& t : tensors) sizes.push_back(t.numel());
  return sizes;
}
