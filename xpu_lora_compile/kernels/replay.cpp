// Ops whose Python launches kernels, without the Python: what a call has launched once is launched again for operands
// of the same shapes, strides, dtypes and alignment. The recording is made by replay.py, whose `Tape` has its format.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

// Tests build it for a CPU, with a driver of their own.
#ifndef REPLAY_KEY
#define REPLAY_KEY CUDA
#define REPLAY_DRIVER "libcuda.so.1"
#define REPLAY_TORCH "libtorch_cuda.so"
#define REPLAY_OPS "add_lora", "linear_with_lora", "route_tiles", "shrink", "expand", "expand_slice"
#endif

namespace {

using Words = std::vector<int64_t>;

// Of cuda.h, which need not be here.
struct LaunchAttribute {
    int id;
    char padding[4];
    union {
        char size[64];
        int allowed;
    } value;
};
struct LaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    void* stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};
constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

struct Driver {
    int (*launch)(const LaunchConfig*, void*, void**, void**) = nullptr;
    int (*is_capturing)(void*, int*) = nullptr;
    int (*parameter)(void*, size_t, size_t*, size_t*) = nullptr;
    int (*stream)(int32_t, void**) = nullptr;

    Driver() {
        void* driver = dlopen(REPLAY_DRIVER, RTLD_LAZY);
        void* torch = dlopen(REPLAY_TORCH, RTLD_LAZY);
        if (driver == nullptr || torch == nullptr) {
            return;
        }
        launch = reinterpret_cast<decltype(launch)>(dlsym(driver, "cuLaunchKernelEx"));
        is_capturing = reinterpret_cast<decltype(is_capturing)>(dlsym(driver, "cuStreamIsCapturing"));
        parameter = reinterpret_cast<decltype(parameter)>(dlsym(driver, "cuFuncGetParamInfo"));
        stream = reinterpret_cast<decltype(stream)>(dlsym(torch, "aoti_torch_get_current_cuda_stream"));
    }
    bool is_complete() const { return launch && is_capturing && parameter && stream; }
};

const Driver& driver() {
    static const Driver found;
    return found;
}

struct Parameter {
    // The tensor that it points into, `value` bytes from its first element; -1 for a value.
    int64_t tensor;
    int64_t value;
};

struct Step {
    enum Kind { EMPTY, LINEAR, ADD_PRODUCT, LAUNCH } kind;
    at::ScalarType dtype;
    Words sizes;
    // Positions among the tensors of the call, then those made by steps: input, weight, bias (-1: none), output.
    int64_t input, weight, bias, output;
    void* function;
    LaunchConfig config;
    std::vector<Parameter> parameters;
};

struct Recording {
    std::vector<Step> steps;
    // Positions of what the op returns; `returns_list` tells a list of one tensor from a tensor.
    Words results;
    bool returns_list;
};

struct Hash {
    size_t operator()(const Words& words) const {
        uint64_t hash = 0xcbf29ce484222325u;
        for (int64_t word : words) {
            hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u;
            hash ^= hash >> 29;
        }
        return hash;
    }
};

std::shared_mutex lock;
std::unordered_map<Words, std::shared_ptr<const Recording>, Hash> recordings;
// A model meets a handful of shapes for each number of rows; a recording takes about 2 KB.
constexpr size_t MOST_RECORDINGS = 4096;
// How many of Python's blocks want no call to be played.
const int32_t* pauses = nullptr;
// What the call that Python runs on this thread is to be kept under.
thread_local const Words* pending = nullptr;

class Reader {
  public:
    Reader(const int64_t* words, int64_t count) : at_(words), end_(words + count) {}
    int64_t next() {
        TORCH_CHECK(at_ < end_, "xpu_lora: a recording ends too early");
        return *at_++;
    }
    Words list() {
        Words words(next());
        for (int64_t& word : words) {
            word = next();
        }
        return words;
    }

  private:
    const int64_t* at_;
    const int64_t* end_;
};

Step step_of(Reader& reader) {
    Step step{};
    step.kind = static_cast<Step::Kind>(reader.next());
    switch (step.kind) {
        case Step::EMPTY:
            step.dtype = static_cast<at::ScalarType>(reader.next());
            step.sizes = reader.list();
            break;
        case Step::LINEAR:
            step.input = reader.next();
            step.weight = reader.next();
            step.bias = reader.next();
            break;
        case Step::ADD_PRODUCT:
            step.output = reader.next();
            step.input = reader.next();
            step.weight = reader.next();
            break;
        case Step::LAUNCH:
            step.function = reinterpret_cast<void*>(reader.next());
            for (unsigned& length : step.config.grid) {
                length = reader.next();
            }
            step.config.block[0] = reader.next();
            step.config.block[1] = step.config.block[2] = 1;
            step.config.shared_bytes = reader.next();
            step.config.attribute_count = reader.next();
            step.parameters.resize(reader.next());
            for (Parameter& parameter : step.parameters) {
                parameter.tensor = reader.next();
                parameter.value = reader.next();
            }
            break;
    }
    return step;
}

// Appends what a kernel's code and arguments depend on; false for a tensor that is to be left to Python.
bool describe(const at::Tensor& tensor, bool is_grad_enabled, Words& words, std::vector<const at::Tensor*>& tensors) {
    if (!tensor.defined() || tensor.layout() != at::kStrided || (is_grad_enabled && tensor.requires_grad())) {
        return false;
    }
    words.push_back(static_cast<int64_t>(tensor.scalar_type()) << 32 | tensor.dim() << 16 |
                    (tensor.device().index() & 0xff) << 8 | static_cast<int64_t>(tensor.device().type()));
    words.push_back(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) & 15);
    words.insert(words.end(), tensor.sizes().begin(), tensor.sizes().end());
    words.insert(words.end(), tensor.strides().begin(), tensor.strides().end());
    // A recording that was made of one tensor in two places is for no other call.
    size_t first = 0;
    while (first < tensors.size() && !tensors[first]->is_same(tensor)) {
        first++;
    }
    words.push_back(first);
    tensors.push_back(&tensor);
    return true;
}

bool describe(const c10::IValue& value, bool is_grad_enabled, Words& words, std::vector<const at::Tensor*>& tensors) {
    if (value.isTensor()) {
        words.push_back(1);
        return describe(value.toTensor(), is_grad_enabled, words, tensors);
    }
    if (value.isInt() || value.isBool() || value.isDouble()) {
        double number = value.isDouble() ? value.toDouble() : 0.0;
        int64_t word = value.isInt() ? value.toInt() : value.isBool() ? value.toBool() : 0;
        if (value.isDouble()) {
            std::memcpy(&word, &number, sizeof word);
        }
        words.push_back(2);
        words.push_back(word);
        return true;
    }
    if (value.isNone()) {
        words.push_back(3);
        return true;
    }
    if (!value.isList()) {
        return false;
    }
    c10::ArrayRef<c10::IValue> elements = value.toListRef();
    words.push_back(4);
    words.push_back(elements.size());
    for (const c10::IValue& element : elements) {
        if (!describe(element, is_grad_enabled, words, tensors)) {
            return false;
        }
    }
    return true;
}

// `weight.t()` without the dispatcher, which takes as long as a launch.
at::Tensor transposed(const at::Tensor& weight) {
    at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(weight.storage()),
                                                              weight.key_set(), weight.dtype());
    view.unsafeGetTensorImpl()->set_storage_offset(weight.storage_offset());
    int64_t sizes[] = {weight.size(1), weight.size(0)}, strides[] = {weight.stride(1), weight.stride(0)};
    view.unsafeGetTensorImpl()->set_sizes_and_strides(c10::IntArrayRef(sizes), c10::IntArrayRef(strides));
    return view;
}

void launch(const Step& step, const std::vector<const at::Tensor*>& tensors, void* stream) {
    constexpr size_t MOST = 256;
    int64_t values[MOST];
    void* pointers[MOST];
    for (size_t p = 0; p < step.parameters.size(); p++) {
        const Parameter& parameter = step.parameters[p];
        values[p] = parameter.value;
        if (parameter.tensor >= 0) {
            values[p] += reinterpret_cast<int64_t>(tensors[parameter.tensor]->const_data_ptr());
        }
        pointers[p] = &values[p];
    }
    LaunchAttribute overlap{};
    overlap.id = PROGRAMMATIC_STREAM_SERIALIZATION;
    overlap.value.allowed = 1;
    LaunchConfig config = step.config;
    config.stream = stream;
    config.attributes = &overlap;
    int error = driver().launch(&config, step.function, pointers, nullptr);
    TORCH_CHECK(error == 0, "xpu_lora: CUDA's driver refused a launch with error ", error);
}

void play(const Recording& recording, std::vector<const at::Tensor*>& tensors, at::Device device, void* stream,
          torch::jit::Stack& results) {
    at::AutoDispatchBelowADInplaceOrView no_gradients;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    std::vector<at::Tensor> made;
    // Their addresses are kept.
    made.reserve(recording.steps.size());
    for (const Step& step : recording.steps) {
        switch (step.kind) {
            case Step::EMPTY:
                made.push_back(at::empty(step.sizes, at::TensorOptions().dtype(step.dtype).device(device)));
                tensors.push_back(&made.back());
                break;
            case Step::LINEAR: {
                at::Tensor weight = transposed(*tensors[step.weight]);
                const at::Tensor& input = *tensors[step.input];
                made.push_back(step.bias < 0 ? at::mm(input, weight) : at::addmm(*tensors[step.bias], input, weight));
                tensors.push_back(&made.back());
                break;
            }
            case Step::ADD_PRODUCT: {
                at::Tensor output = *tensors[step.output];
                at::addmm_out(output, output, *tensors[step.input], transposed(*tensors[step.weight]));
                break;
            }
            case Step::LAUNCH:
                launch(step, tensors, stream);
                break;
        }
    }
    if (recording.returns_list) {
        c10::List<at::Tensor> list;
        for (int64_t position : recording.results) {
            list.push_back(*tensors[position]);
        }
        results.emplace_back(std::move(list));
    } else {
        for (int64_t position : recording.results) {
            results.emplace_back(*tensors[position]);
        }
    }
}

// Runs the Python that the op has for every device, which is what the table has for one without a kernel of its own:
// `key` is what the recording, if it makes one, is kept under.
void run_python(const c10::OperatorHandle& op, torch::jit::Stack* stack, const Words* key = nullptr) {
    struct Pending {
        explicit Pending(const Words* key) { pending = key; }
        ~Pending() { pending = nullptr; }
    } until_it_returns(key);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), stack);
}

void replay(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    thread_local Words scratch;
    size_t count = op.schema().arguments().size();
    c10::ArrayRef<c10::IValue> arguments(stack->data() + stack->size() - count, count);
    std::vector<const at::Tensor*> tensors;
    tensors.reserve(32);
    scratch.clear();
    scratch.push_back(reinterpret_cast<int64_t>(&op.operator_name()));
    bool is_grad_enabled = at::GradMode::is_enabled();
    bool can_be_kept = pauses != nullptr && *static_cast<const volatile int32_t*>(pauses) == 0;
    for (size_t a = 0; can_be_kept && a < count; a++) {
        can_be_kept = describe(arguments[a], is_grad_enabled, scratch, tensors);
    }
    can_be_kept = can_be_kept && !tensors.empty();
    if (!can_be_kept) {
        run_python(op, stack);
        return;
    }
    at::Device device = tensors.front()->device();
    c10::DeviceGuard on_device(device);
    void* stream = nullptr;
    int is_capturing = 0;
    if (driver().stream(device.index(), &stream) != 0 || driver().is_capturing(stream, &is_capturing) != 0 ||
        is_capturing != 0) {
        // In a captured graph Python takes other ways, whose time costs nothing there.
        run_python(op, stack);
        return;
    }
    std::shared_ptr<const Recording> found;
    {
        std::shared_lock reading(lock);
        auto at = recordings.find(scratch);
        if (at != recordings.end()) {
            found = at->second;
        }
    }
    if (found == nullptr || found->steps.empty()) {
        // Asked for once; a call that cannot be recorded is kept as one without steps.
        Words key = scratch;
        run_python(op, stack, found == nullptr ? &key : nullptr);
        return;
    }
    torch::jit::Stack results;
    play(*found, tensors, device, stream, results);
    stack->erase(stack->end() - static_cast<int64_t>(count), stack->end());
    for (c10::IValue& result : results) {
        stack->push_back(std::move(result));
    }
}

}  // namespace

extern "C" {

int xpu_lora_can_replay() { return driver().is_complete(); }

// Whether the call that runs on this thread is to be recorded.
int xpu_lora_is_wanted() { return pending != nullptr; }

void xpu_lora_pauses(const int32_t* count) { pauses = count; }

void xpu_lora_forget() {
    std::unique_lock writing(lock);
    recordings.clear();
}

int64_t xpu_lora_count() {
    std::shared_lock reading(lock);
    int64_t count = 0;
    for (const auto& [key, recording] : recordings) {
        count += !recording->steps.empty();
    }
    return count;
}

// How many bytes parameter `index` of a kernel has; 0 if it has no such parameter.
int64_t xpu_lora_parameter_bytes(void* function, int64_t index) {
    size_t offset = 0, bytes = 0;
    return driver().parameter(function, index, &offset, &bytes) == 0 ? static_cast<int64_t>(bytes) : 0;
}

// Keeps a recording for the call that runs on this thread; without words, that it cannot be recorded. 1 if done.
int xpu_lora_keep(const int64_t* words, int64_t count) {
    if (pending == nullptr) {
        return 0;
    }
    auto recording = std::make_shared<Recording>();
    try {
        if (count > 0) {
            Reader reader(words, count);
            recording->steps.resize(reader.next());
            for (Step& step : recording->steps) {
                step = step_of(reader);
            }
            recording->returns_list = reader.next();
            recording->results = reader.list();
        }
    } catch (const std::exception&) {
        return 0;
    }
    std::unique_lock writing(lock);
    if (recordings.size() >= MOST_RECORDINGS) {
        recordings.clear();
    }
    recordings[*pending] = recording;
    pending = nullptr;
    return 1;
}

}

TORCH_LIBRARY_IMPL(xpu_lora, REPLAY_KEY, library) {
    for (const char* name : {REPLAY_OPS}) {
        library.impl(name, torch::CppFunction::makeFromBoxedFunction<&replay>());
    }
}
