// A GPU that is made of ordinary memory: tensors say that they live on cuda:0, and every operation on them runs on CPU.
//
// What it is good for stands in __init__.py. All of it is of the process: there is one device, and one stream.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;

const Device kDevice(DeviceType::CUDA, 0);

// ---- memory ----------------------------------------------------------------------------------------------------------

std::atomic<int64_t> held{0}, peak{0}, limit{0};

struct Block {
  void* data;
  int64_t bytes;
};

void count(int64_t bytes) {
  const int64_t now = held += bytes;
  int64_t before = peak.load();
  while (now > before && !peak.compare_exchange_weak(before, now)) {
  }
}

void give_back(void* context) {
  auto* block = static_cast<Block*>(context);
  count(-block->bytes);
  std::free(block->data);
  delete block;
}

c10::DataPtr take(size_t bytes) {
  if (bytes == 0) {
    return {nullptr, kDevice};
  }
  // In steps of 512, as torch's allocator for GPUs counts.
  const auto counted = static_cast<int64_t>((bytes + 511) / 512 * 512);
  TORCH_CHECK_WITH(
      OutOfMemoryError, limit == 0 || held + counted <= limit, "CUDA out of memory. Tried to allocate ", counted,
      " bytes of the simulated GPU's ", limit.load());
  auto* block = new Block{std::malloc(bytes), counted};
  count(block->bytes);
  return {block->data, block, &give_back, kDevice};
}

struct DeviceAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return take(bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

DeviceAllocator allocator;
REGISTER_ALLOCATOR(DeviceType::CUDA, &allocator);

// ---- what autograd and torch ask of a device -------------------------------------------------------------------------

c10::Stream the_stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const noexcept override { return the_stream(); }
  c10::Stream getDefaultStream(Device) const override { return the_stream(); }
  c10::Stream getNewStream(Device, int) const override { return the_stream(); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override { return the_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return the_stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

} // namespace

namespace at {

// The name is the one under which torch looks for it.
struct CUDAHooks final : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

} // namespace at

namespace {

// ---- operations ------------------------------------------------------------------------------------------------------

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == DeviceType::CUDA; }

// The same bytes as a tensor of the CPU; it keeps them alive.
Tensor as_host(const Tensor& tensor) {
  if (!on_device(tensor)) {
    return tensor;
  }
  auto* owner = new c10::Storage(tensor.storage());
  c10::DataPtr data(
      owner->mutable_data_ptr().get(), owner, [](void* context) { delete static_cast<c10::Storage*>(context); },
      c10::Device(DeviceType::CPU));
  // Resizable, because operations that write into an operand may give it another size (`adopt`).
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data), c10::GetAllocator(DeviceType::CPU), true);
  auto host = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  host.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return host;
}

Tensor on_storage(c10::Storage storage, const Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), like.dtype());
  tensor.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return tensor;
}

// A result of the CPU as one of the device: of the operand whose bytes it shares, or of memory of its own.
Tensor as_device(const Tensor& host, const std::vector<Tensor>& operands) {
  if (!host.defined() || on_device(host)) {
    return host;
  }
  const void* begin = host.storage().data();
  for (const Tensor& operand : operands) {
    if (on_device(operand) && begin != nullptr && operand.storage().data() == begin) {
      return on_storage(operand.storage(), host);
    }
  }
  auto data = take(host.storage().nbytes());
  if (host.storage().nbytes()) {
    std::memcpy(data.get(), begin, host.storage().nbytes());
  }
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), host.storage().nbytes(), std::move(data), &allocator, true);
  return on_storage(std::move(storage), host);
}

// Takes over the size that an operation gave to the host's view of an operand.
void adopt(const Tensor& tensor, const Tensor& host) {
  if (!on_device(tensor)) {
    return;
  }
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  if (host.storage().data() != storage->data()) {
    const size_t bytes = host.storage().nbytes();
    auto data = take(bytes);
    if (bytes) {
      std::memcpy(data.get(), host.storage().data(), bytes);
    }
    storage->set_data_ptr(std::move(data));
    storage->set_nbytes(bytes);
  }
  if (tensor.sizes() != host.sizes() || tensor.strides() != host.strides()) {
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides());
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t arguments = schema.arguments().size();
  const size_t first = stack->size() - arguments;
  std::vector<Tensor> operands;
  std::vector<c10::IValue> given(stack->begin() + static_cast<ptrdiff_t>(first), stack->end());
  const bool collective = schema.name().rfind("c10d::", 0) == 0;
  bool device = false;
  const Tensor* host_operand = nullptr;
  std::vector<std::pair<Tensor, Tensor>> written;
  auto see = [&](const Tensor& tensor) {
    operands.push_back(tensor);
    device = device || on_device(tensor);
  };
  for (size_t i = 0; i < arguments; ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      see(value.toTensor());
      const Tensor host = as_host(value.toTensor());
      const auto* alias = schema.arguments()[i].alias_info();
      if (alias != nullptr && alias->isWrite()) {
        written.emplace_back(value.toTensor(), host);
      }
      value = host;
    } else if (value.isTensorList()) {
      c10::List<Tensor> hosts;
      for (const Tensor& tensor : value.toTensorVector()) {
        see(tensor);
        hosts.push_back(as_host(tensor));
      }
      value = hosts;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> hosts;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList().vec()) {
        if (tensor.has_value()) {
          see(*tensor);
          hosts.push_back(as_host(*tensor));
        } else {
          hosts.push_back(std::nullopt);
        }
      }
      value = hosts;
    } else if (value.isList() && value.toListRef().size() && value.toListRef()[0].isTensorList()) {
      c10::impl::GenericList lists(value.toList().elementType());
      for (const c10::IValue& inner : value.toListRef()) {
        c10::List<Tensor> hosts;
        for (const Tensor& tensor : inner.toTensorVector()) {
          see(tensor);
          hosts.push_back(as_host(tensor));
        }
        lists.push_back(hosts);
      }
      value = lists;
    } else if (value.isDevice()) {
      value = c10::Device(DeviceType::CPU);
    }
  }
  // Indices may be of the host, as on a real GPU; numbers without dimensions too, except in collectives.
  static const std::set<std::string> with_indices = {
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  const bool indexes = with_indices.count(schema.name()) > 0;
  if (device && !indexes) {
    for (const Tensor& operand : operands) {
      if (operand.defined() && !on_device(operand) && (operand.dim() > 0 || collective)) {
        host_operand = &operand;
      }
    }
    TORCH_CHECK(
        host_operand == nullptr, "Expected all tensors to be on the same device, but ", schema.name(),
        " got one on cuda:0 and one of shape ", host_operand == nullptr ? c10::IntArrayRef() : host_operand->sizes(),
        " on cpu");
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const auto& [tensor, host] : written) {
    adopt(tensor, host);
  }
  const size_t returns = schema.returns().size();
  const size_t begin = stack->size() - returns;
  for (size_t i = 0; i < returns; ++i) {
    c10::IValue& value = (*stack)[begin + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      // In place: the operand itself.
      bool found = false;
      for (size_t j = 0; j < arguments && !found; ++j) {
        const auto* other = schema.arguments()[j].alias_info();
        if (other != nullptr && *other == *alias) {
          value = given[j];
          found = true;
        }
      }
      TORCH_CHECK(found, schema.name(), ": no operand is written");
    } else if (value.isTensor()) {
      value = as_device(value.toTensor(), operands);
    } else if (value.isTensorList()) {
      c10::List<Tensor> results;
      for (const Tensor& tensor : value.toTensorVector()) {
        results.push_back(as_device(tensor, operands));
      }
      value = results;
    }
  }
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout, std::optional<Device> device, std::optional<bool> pin) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  as_host(self).copy_(as_host(from));
  return self;
}

at::Scalar local_scalar(const Tensor& self) {
  return at::_local_scalar_dense(as_host(self));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  impl->set_sizes_contiguous(sizes);
  const size_t needed = static_cast<size_t>(impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (needed > self.storage().nbytes()) {
    auto data = take(needed);
    if (self.storage().nbytes()) {
      std::memcpy(data.get(), self.storage().data(), self.storage().nbytes());
    }
    self.storage().unsafeGetStorageImpl()->set_data_ptr(std::move(data));
    self.storage().unsafeGetStorageImpl()->set_nbytes(needed);
  }
  return self;
}

// Gives a storage another size; what it held stays, as far as it fits.
void resize_storage(const Tensor& holder, int64_t bytes) {
  auto* storage = holder.storage().unsafeGetStorageImpl();
  auto data = take(static_cast<size_t>(bytes));
  const size_t kept = std::min<size_t>(storage->nbytes(), static_cast<size_t>(bytes));
  if (kept) {
    std::memcpy(data.get(), storage->data(), kept);
  }
  storage->set_data_ptr(std::move(data));
  storage->set_nbytes(static_cast<size_t>(bytes));
}

Tensor& set_source(Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  self.unsafeGetTensorImpl()->set_storage_offset(offset.expect_int());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

Tensor& set_whole(Tensor& self, c10::Storage source) {
  const int64_t n = static_cast<int64_t>(source.nbytes() / self.itemsize());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  self.unsafeGetTensorImpl()->set_storage_offset(0);
  self.unsafeGetTensorImpl()->set_sizes_contiguous({n});
  return self;
}

} // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_source);
  m.impl("set_.source_Storage", set_whole);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
}

TORCH_LIBRARY(simulated, m) {
  m.def("resize_storage(Tensor holder, int bytes) -> ()");
  m.def("held() -> int", []() { return held.load(); });
  m.def("peak() -> int", []() { return peak.load(); });
  m.def("reset_peak() -> ()", []() { peak = held.load(); });
  m.def("set_limit(int bytes) -> ()", [](int64_t bytes) { limit = bytes; });
}

TORCH_LIBRARY_IMPL(simulated, CUDA, m) {
  m.impl("resize_storage", resize_storage);
}

// Collectives have kernels of their own for GPUs, which would look for a backend of NCCL.
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name :
       {"allreduce_", "allreduce_coalesced_", "broadcast_", "reduce_", "allgather_", "_allgather_base_",
        "allgather_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "gather_", "scatter_", "alltoall_", "alltoall_base_", "send", "recv_",
        "recv_any_source_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}
