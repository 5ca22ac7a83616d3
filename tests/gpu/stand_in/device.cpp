// A simulated CUDA device: torch's CUDA tensors in host memory, computed by torch's CPU kernels, with CUDA's rules.
//
//     operator      its CUDA tensors are viewed as CPU tensors of the same memory, the CPU kernel runs, and its results
//                   become CUDA tensors. Mixing CPU and CUDA tensors is an error, as on a real device.
//     stream        everything runs at once, but vector clocks track the order that a real device guarantees: a stream
//                   is ordered after operations of other streams, and the host after those of any stream, only if it
//                   waited for them. An access that depends on an earlier one without such a wait is noted as misuse.
//     pinned        a copy to pinned memory arrives when the host waits for it; until then all bits there are ones,
//                   which is NaN. What a copy from pinned memory may still have to read must not change before that.
//     memory        is counted, runs out at a limit, is NaN at first, and must not be returned to the allocator of its
//                   stream while a different stream may still use it.
//     random        numbers are drawn from the device's own generator.
//     context       a thread other than the first has none before its first matrix product, and torch warns.
//
// Shows control flow, devices, types, values, allocations, waits and missing waits; nothing about time, CUDA's kernels
// or fragmentation. Streams that use different elements of the same memory are noted as misuse, too, and copies that
// overlap in pinned memory are distinguished only by their start addresses.

#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/histc.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <vector>

using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::Stream;
using Lock = std::lock_guard<std::recursive_mutex>;

static const Device GPU(DeviceType::CUDA, 0);
static std::recursive_mutex mutex;  // autograd runs a device's backward pass in a separate thread

// ---- streams

using Clock = std::vector<uint64_t>;  // by stream: how many of its operations have been waited for

static std::vector<Clock> clocks(1, Clock(1, 0));  // by stream
static Clock host_clock;
static thread_local int current = 0;
static bool tells_waits = false;
static std::vector<std::string> misuse;

static uint64_t seen(const Clock& clock, int stream) { return stream < (int)clock.size() ? clock[stream] : 0; }

static void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); i++) clock[i] = std::max(clock[i], other[i]);
}

static void tick(int stream) {  // queue an operation, after all that the host has waited for
  Lock lock(mutex);
  join(clocks[stream], host_clock);
  if ((int)clocks[stream].size() <= stream) clocks[stream].resize(stream + 1, 0);
  clocks[stream][stream]++;
}

static Clock now() {  // clock of the current stream
  Lock lock(mutex);
  return clocks[current];
}

static uint64_t stamp() { return seen(now(), current); }

static void note(const std::string& text) {
  Lock lock(mutex);
  if (misuse.size() < 100) misuse.push_back(text);
}

// ---- memory

struct Access {
  uint64_t clock;
  std::string by;
};

struct Block {  // accesses to a storage's memory, or to a part of pinned memory that was copied
  size_t nbytes = 0;
  int home = 0;                 // the stream whose allocator it belongs to
  int writer = -1;
  Access written;
  std::map<int, Access> read;   // by stream
  std::set<int> recorded;       // Tensor.record_stream
  c10::Storage memory;
};

static size_t allocated = 0, peak = 0, total = size_t(1) << 30, most = total;

static void touch(Block& block, bool writes, const std::string& by) {
  Lock lock(mutex);
  auto& clock = clocks[current];
  auto found = [&](const Access& other, int stream, const char* did) {
    if (stream == current || seen(clock, stream) >= other.clock) return;
    auto does = writes ? " writes" : " reads";
    note(by + does + " what another stream " + did + " (" + other.by + "), without waiting");
  };
  if (block.writer >= 0) found(block.written, block.writer, "wrote");
  if (!writes) {
    block.read[current] = {seen(clock, current), by};
    return;
  }
  for (auto& [stream, other] : block.read) found(other, stream, "reads");
  block.read.clear();
  block.writer = current;
  block.written = {seen(clock, current), by};
}

static void free_block(void* context) {
  Lock lock(mutex);
  auto block = (Block*)context;
  auto home = clocks[block->home];
  join(home, host_clock);
  auto check = [&](const Access& other, int stream) {
    if (stream != block->home && !block->recorded.count(stream) && seen(home, stream) < other.clock)
      note("memory is free for its stream while another one may still use it (" + other.by + ")");
  };
  if (block->writer >= 0) check(block->written, block->writer);
  for (auto& [stream, other] : block->read) check(other, stream);
  allocated -= block->nbytes;
  delete block;
}

static c10::Storage storage_of(c10::DataPtr pointer, size_t nbytes) {
  return {c10::Storage::use_byte_size_t(), nbytes, std::move(pointer), c10::GetAllocator(DeviceType::CPU), true};
}

static c10::Storage on_gpu(const c10::Storage& memory, const std::string& by, bool is_new) {
  Lock lock(mutex);
  size_t nbytes = (memory.nbytes() + 511) / 512 * 512;
  if (nbytes && allocated + nbytes > most)
    C10_THROW_ERROR(OutOfMemoryError, c10::str("CUDA out of memory. Tried to allocate ", nbytes, " bytes."));
  auto block = new Block;
  block->nbytes = nbytes, block->home = block->writer = current, block->memory = memory;
  block->written = {stamp(), by};
  peak = std::max(peak, allocated += nbytes);
  if (is_new) std::memset(memory.mutable_data(), 0xFF, memory.nbytes());
  return storage_of({memory.mutable_data(), block, &free_block, GPU}, memory.nbytes());
}

static Block* block_of(const c10::Storage& storage) {
  auto& pointer = storage.data_ptr();
  return pointer.get_deleter() == &free_block ? (Block*)pointer.get_context() : nullptr;
}

// ---- pinned memory

struct Pending {  // a copy that the host has not waited for yet
  int stream;
  uint64_t clock;
  bool arrives;             // in pinned memory; otherwise it reads there
  char* place;
  std::vector<char> bytes;  // what it writes there, or has read there
};

static std::deque<Pending> pending;
static std::map<char*, size_t> pinned;
static std::map<char*, Block> copied;  // parts of pinned memory, by the start address of a copy

static bool overlap(const Pending& copy, const char* place, size_t nbytes) {
  return copy.place < place + nbytes && place < copy.place + copy.bytes.size();
}

static void settle(const Pending& copy) {
  auto is_unknown = [](char byte) { return byte == (char)0xFF; };
  if (copy.arrives) {
    if (!std::all_of(copy.place, copy.place + copy.bytes.size(), is_unknown))
      note("pinned memory was written while a copy might still have had to arrive there");
    std::memcpy(copy.place, copy.bytes.data(), copy.bytes.size());
  } else if (std::memcmp(copy.place, copy.bytes.data(), copy.bytes.size()))
    note("pinned memory changed while a copy might still have had to read it");
}

template <class Which>
static void settle_where(Which which, bool may_arrive = true) {
  Lock lock(mutex);
  for (auto copy = pending.begin(); copy != pending.end();) {
    if (!which(*copy)) { ++copy; continue; }
    if (may_arrive || !copy->arrives) settle(*copy);
    copy = pending.erase(copy);
  }
}

static void wait(Clock clock) {  // let the host wait for all operations in a stream's clock
  if (tells_waits) TORCH_WARN("called a synchronizing CUDA operation");
  Lock lock(mutex);
  join(host_clock, clock);
  settle_where([](const Pending& copy) { return seen(host_clock, copy.stream) >= copy.clock; });
}

static void wait_for_all() {
  Lock lock(mutex);
  Clock all;
  for (auto& clock : clocks) join(all, clock);
  wait(all);
}

static bool is_pinned(const void* pointer) {
  Lock lock(mutex);
  auto after = pinned.upper_bound((char*)pointer);
  return after != pinned.begin() && (char*)pointer < std::prev(after)->first + std::prev(after)->second;
}

static void free_pinned(void* pointer) {
  Lock lock(mutex);
  auto start = (char*)pointer, end = start + pinned[start];
  settle_where([=](const Pending& copy) { return overlap(copy, start, end - start); }, false);
  copied.erase(copied.lower_bound(start), copied.lower_bound(end));
  pinned.erase(start);
  std::free(pointer);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    Lock lock(mutex);
    size_t whole = (std::max<size_t>(nbytes, 1) + 4095) / 4096 * 4096;
    auto pointer = (char*)std::aligned_alloc(4096, whole);
    if (!pointer) C10_THROW_ERROR(OutOfMemoryError, "CUDA error: out of memory");
    std::memset(pointer, 0xFF, whole);
    pinned[pointer] = whole;
    return {pointer, pointer, &free_pinned, Device(DeviceType::CPU)};
  }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    std::memcpy(target, source, nbytes);
  }
};
static PinnedAllocator pinned_allocator;

// ---- torch's interface to a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const override { return stream(current); }
  Stream getDefaultStream(Device) const override { return stream(0); }
  Stream exchangeStream(Stream next) const override {
    auto before = current;
    current = (int)next.id();
    return stream(before);
  }
  void record(void** event, const Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    Lock lock(mutex);
    delete (Clock*)*event;
    *event = new Clock(clocks[on.id()]);
  }
  void block(void* event, const Stream& on) const override {
    Lock lock(mutex);
    if (event) join(clocks[on.id()], *(Clock*)event);
  }
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete (Clock*)event; }
  void synchronizeEvent(void* event) const override { if (event) wait(*(Clock*)event); }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const Stream& on) const override {
    Lock lock(mutex);
    if (pointer.get_deleter() == &free_block) ((Block*)pointer.get_context())->recorded.insert((int)on.id());
  }
  static Stream stream(int id) { return Stream(Stream::UNSAFE, GPU, id); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

static at::Generator& generator() {
  static auto made = at::detail::createCPUGenerator();
  return made;
}

struct Hooks final : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize(c10::DeviceIndex) const override { wait_for_all(); }
};
namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks);
}

// ---- operators

static at::Tensor tensor_like(const at::Tensor& other, c10::Storage storage, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), other.dtype());
  auto impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
  impl->_set_conj(other.is_conj());
  impl->_set_neg(other.is_neg());
  if (!other.dim()) impl->set_wrapped_number(other.unsafeGetTensorImpl()->is_wrapped_number());
  return made;
}

static c10::Storage seen_from_host(const c10::Storage& gpu) {
  return storage_of({gpu.mutable_data(), Device(DeviceType::CPU)}, gpu.nbytes());
}

class Views {  // CPU views of the device's tensors, and back, for one call of a CPU kernel
 public:
  explicit Views(std::string by) : by(std::move(by)) {}

  c10::Storage host(const c10::Storage& gpu) {
    auto& view = hosts[gpu.unsafeGetStorageImpl()];
    if (!view) view = seen_from_host(gpu), gpus[view.unsafeGetStorageImpl()] = gpu;
    return view;
  }
  at::Tensor host(const at::Tensor& gpu) {
    for (auto& [tensor, view] : tensors) if (tensor.is_same(gpu)) return view;
    tensors.emplace_back(gpu, tensor_like(gpu, host(gpu.storage()), DispatchKey::CPU));
    return tensors.back().second;
  }
  void adopt() {  // sizes and memory that the kernel changed
    for (auto& [tensor, view] : tensors) {
      auto found = gpus.find(view.storage().unsafeGetStorageImpl());
      auto impl = tensor.unsafeGetTensorImpl();
      if (found == gpus.end()) {
        impl->set_storage_keep_dtype(on_gpu(view.storage(), by, false));
      } else if (!found->second.is_alias_of(tensor.storage())) {
        impl->set_storage_keep_dtype(found->second);
      } else if (view.storage().data() != tensor.storage().data()) {
        auto bigger = on_gpu(view.storage(), by, false);
        tensor.storage().set_nbytes(bigger.nbytes());
        tensor.storage().set_data_ptr(std::move(bigger.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
      }
      if (tensor.sizes() != view.sizes() || tensor.strides() != view.strides() ||
          tensor.storage_offset() != view.storage_offset())
        impl->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
    }
  }
  at::Tensor gpu(const at::Tensor& made, bool is_new) {
    if (!made.defined() || !made.is_cpu()) return made;
    for (auto& [tensor, view] : tensors) if (view.is_same(made)) return tensor;
    auto& storage = gpus[made.storage().unsafeGetStorageImpl()];
    if (!storage) storage = on_gpu(made.storage(), by, is_new);
    return tensor_like(made, storage, DispatchKey::CUDA);
  }

 private:
  std::string by;
  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts, gpus;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;
};

using Names = std::set<std::string>;
static const Names NEW{"empty", "empty_strided"};
static const Names WAITING{
    "_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_consecutive"};

static const Names PRODUCTS{"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"};
static const auto first_thread = std::this_thread::get_id();

static void warn_without_context() {  // as CublasHandlePool.cpp does
  static thread_local bool has_context = false;
  if (!std::exchange(has_context, true) && std::this_thread::get_id() != first_thread)
    TORCH_WARN("Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context...");
}

static void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  auto host = at::detail::getDefaultCPUGenerator();
  at::Tensor before;
  if (draws) before = host.get_state(), host.set_state(generator().get_state());
  try {
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  } catch (const c10::Error& error) {
    if (draws) host.set_state(before);
    if (std::string(error.what()).find("DefaultCPUAllocator: can't allocate") == std::string::npos) throw;
    C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory.");
  }
  if (draws) generator().set_state(host.get_state()), host.set_state(before);
}

static void compute(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  auto& schema = op.schema();
  auto name = op.operator_name().name.substr(op.operator_name().name.find("::") + 2);
  auto count = schema.arguments().size(), first = stack->size() - count;
  bool is_view = name == "set_", is_here = false;
  for (auto& argument : schema.arguments()) is_view |= argument.alias_info() && !argument.alias_info()->isWrite();
  Views views(name);
  std::string stranger;
  tick(current);
  auto host = [&](const at::Tensor& tensor, bool writes) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      if (tensor.defined() && tensor.dim()) stranger = c10::str(tensor.sizes());
      return tensor;
    }
    is_here = true;
    auto block = block_of(tensor.storage());
    if (block && !is_view && tensor.numel()) touch(*block, writes, name);
    return views.host(tensor);
  };
  for (size_t i = 0; i < count; i++) {
    auto& value = (*stack)[first + i];
    auto alias = schema.arguments()[i].alias_info();
    bool writes = alias && alias->isWrite();
    if (value.isTensor()) {
      value = host(value.toTensor(), writes);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorList()) list.push_back(host(tensor, writes));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        list.push_back(!tensor ? std::nullopt : std::make_optional(tensor->is_cpu() ? *tensor : host(*tensor, writes)));
      value = list;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = Device(DeviceType::CPU), is_here = true;
    } else if (value.isStorage() && value.toStorage().device().is_cuda()) {
      value = views.host(value.toStorage()), is_here = true;
    }
  }
  TORCH_CHECK(!is_here || stranger.empty(),
              "Expected all tensors to be on the same device, but ", name, " got one of ", stranger, " on the CPU");
  if (is_here && PRODUCTS.count(name)) warn_without_context();
  run(op, stack);
  views.adopt();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size() && is_here; i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = views.gpu(value.toTensor(), NEW.count(name));
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorList()) list.push_back(views.gpu(tensor, false));
      value = list;
    }
  }
  if (WAITING.count(name)) wait(now());
}

static at::Tensor& copy_(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  Views views("copy");
  tick(current);
  bool to = target.is_cuda(), from = source.is_cuda();
  auto is_late = [&](const at::Tensor& host) {
    return to != from && non_blocking && is_pinned(host.storage().data()) && host.is_non_overlapping_and_dense();
  };
  auto access = [&](const at::Tensor& tensor, bool writes) {
    if (!tensor.numel()) return;
    Lock lock(mutex);
    auto block = tensor.is_cuda() ? block_of(tensor.storage()) : nullptr;
    if (is_late(tensor)) block = &copied[(char*)tensor.data_ptr()];
    if (block) touch(*block, writes, "copy");
  };
  access(source, false);
  access(target, true);
  auto known = now();
  auto behind = [&](const Pending& copy) { return seen(known, copy.stream) >= copy.clock; };
  auto place = (char*)(to ? source : target).data_ptr();
  auto nbytes = (to ? source : target).nbytes();
  if (to && !from)  // copies that were queued earlier arrive before this one reads
    settle_where([&](const Pending& copy) { return copy.arrives && behind(copy) && overlap(copy, place, nbytes); });
  auto result = to ? views.host(target) : target;
  auto given = from ? views.host(source) : source;
  if (from && is_late(target)) {
    settle_where([&](const Pending& copy) { return behind(copy) && overlap(copy, place, nbytes); });
    auto arriving = at::empty_like(result, result.options().pinned_memory(false)).copy_(given);
    auto start = (char*)arriving.data_ptr();
    std::memset(place, 0xFF, nbytes);
    Lock lock(mutex);
    pending.push_back({current, stamp(), true, place, {start, start + nbytes}});
    return target;
  }
  result.copy_(given);
  if (to && !from && is_late(source)) {
    Lock lock(mutex);
    pending.push_back({current, stamp(), false, place, {place, place + nbytes}});
  } else if (to != from && !(to && non_blocking)) {
    wait(known);
  }
  return target;
}

static at::Tensor histc(const at::Tensor& values, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  auto host = values.to(at::kCPU, at::kFloat);  // the CPU's kernel does not accept integers
  return at::histc(host, bins, low, high).to(values.options());
}

static int64_t plain_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // products and a softmax: CUDA's other implementations are missing
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", copy_);
  m.impl("histc", histc);
  m.impl("_fused_sdp_choice", plain_attention);
  for (auto name : {"convolution", "convolution_backward", "_convolution"})  // otherwise CUDA's would be chosen
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute>());
}

// ---- Python's interface

struct Event {
  Clock clock;
};

PYBIND11_MODULE(_device, m) {
  py::class_<Event>(m, "Event")
      .def(py::init<>())
      .def("record", [](Event& event, int stream) { tick(stream); Lock lock(mutex); event.clock = clocks[stream]; })
      .def("block", [](Event& event, int stream) { Lock lock(mutex); join(clocks[stream], event.clock); })
      .def("wait", [](Event& event) { wait(event.clock); });
  m.def("new_stream", [] { Lock lock(mutex); clocks.emplace_back(host_clock); return clocks.size() - 1; });
  m.def("current_stream", [] { return current; });
  m.def("set_stream", [](int stream) { return std::exchange(current, stream); });
  m.def("wait_for", [](int stream) { Lock lock(mutex); wait(clocks[stream]); });
  m.def("wait_for_all", wait_for_all);
  m.def("tell_waits", [](bool tells) { tells_waits = tells; });
  m.def("allocated", [] { return allocated; });
  m.def("peak", [] { return peak; });
  m.def("reset_peak", [] { peak = allocated; });
  m.def("total", [] { return total; });
  m.def("limit", [](size_t nbytes) { most = nbytes; });
  m.def("left", [] { return std::max(most, allocated) - allocated; });
  m.def("generator", [] { return generator(); });
  m.def("record_stream", [](const at::Tensor& tensor, int stream) {
    Lock lock(mutex);
    if (auto block = block_of(tensor.storage())) block->recorded.insert(stream);
  });
  m.def("misuse", [] { Lock lock(mutex); return std::exchange(misuse, {}); });
}
