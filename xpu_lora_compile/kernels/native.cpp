// The kernels of native_kernels.h as ops of PyTorch: a call costs as little as one of PyTorch's own. Schemas are in
// native.py, which hands them to the compiler as XPU_LORA_SCHEMAS. Each op checks all that the contract asks for before it touches memory, so that eager calls need no other
// check; one that returns false has done nothing, and the caller says what is wrong in better words.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "native_backward.h"

namespace {

// Whether there is memory to read: a storage may have been freed since, as FSDP does.
bool is_dense(const at::Tensor& tensor) {
    return tensor.is_cpu() && tensor.layout() == at::kStrided &&
           (tensor.numel() == 0 || tensor.storage().data() != nullptr);
}

bool is_dense_float(const at::Tensor& tensor) {
    at::ScalarType dtype = tensor.scalar_type();
    return is_dense(tensor) && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
}

bool are_indices(const at::Tensor& tensor) {
    at::ScalarType dtype = tensor.scalar_type();
    return is_dense(tensor) && tensor.dim() == 1 && (dtype == at::kInt || dtype == at::kLong);
}

// [T, M] each
bool are_factors(const at::Tensor& factors, const at::Tensor& indices) {
    at::ScalarType dtype = indices.scalar_type();
    return is_dense(indices) && indices.dim() == 2 && (dtype == at::kInt || dtype == at::kLong) &&
           is_dense_float(factors) && factors.sizes() == indices.sizes() && indices.size(1) >= 1;
}

// [T, columns]
bool are_rows(const at::Tensor& tensor, const at::Tensor& indices) {
    return is_dense_float(tensor) && tensor.dim() == 2 && tensor.size(0) == indices.size(0);
}

// Rows whose elements each have their own memory, as those of an expanded tensor do not.
bool are_writable_rows(const at::Tensor& tensor, const at::Tensor& indices) {
    return are_rows(tensor, indices) && (tensor.stride(0) != 0 || tensor.size(0) <= 1) &&
           (tensor.stride(1) != 0 || tensor.size(1) <= 1);
}

// Whether columns from `offset` on are there; of numbers so large that their sum would not be one, too.
bool has_columns(const at::Tensor& rows, int64_t offset, int64_t columns) {
    return offset >= 0 && columns >= 0 && columns <= rows.size(1) && offset <= rows.size(1) - columns;
}

// [K, rows, columns], or with vLLM's 1 in second place.
bool are_weights(const at::Tensor& tensor, int64_t columns) {
    return is_dense_float(tensor) && (tensor.dim() == 3 || (tensor.dim() == 4 && tensor.size(1) == 1)) &&
           tensor.size(0) >= 1 && tensor.size(-1) == columns;
}

// [K], a factor of each slot.
bool are_factors(const at::Tensor& tensor, int64_t slots) {
    return is_dense(tensor) && tensor.scalar_type() == at::kFloat && tensor.dim() == 1 && tensor.size(0) == slots &&
           tensor.is_contiguous();
}

int64_t dtype_of(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kFloat ? 0 : tensor.scalar_type() == at::kBFloat16 ? 1 : 2;
}

Weights weights_of(const at::Tensor& tensor) {
    int64_t rows = tensor.dim() - 2;
    return {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(rows),
            tensor.stride(rows + 1)};
}

at::Tensor with_columns_side_by_side(const at::Tensor& matrix) {
    return matrix.stride(1) == 1 || matrix.size(1) <= 1 ? matrix : matrix.contiguous();
}

// Columns of an output that a call writes to: the output's own, or a copy that is copied back.
class Target {
   public:
    explicit Target(const at::Tensor& output) : output_(output), rows_(with_columns_side_by_side(output)) {
        TORCH_CHECK(!output.is_inference() || c10::InferenceMode::is_enabled(),
                    "xpu_lora: an inference tensor can be changed within torch.inference_mode() alone");
    }

    void give_to(Slice& slice, int64_t offset) const {
        slice.output = static_cast<char*>(rows_.mutable_data_ptr()) + offset * rows_.element_size();
        slice.output_dtype = dtype_of(rows_);
        slice.output_stride = rows_.stride(0);
    }

    void finish() const {
        if (!rows_.is_same(output_)) output_.copy_(rows_);
        // Whoever has saved the output for a backward pass must notice.
        if (!output_.is_inference()) output_.unsafeGetTensorImpl()->bump_version();
    }

   private:
    at::Tensor output_, rows_;
};

// A view of some columns, so that no others are copied where they have to be.
at::Tensor columns_of(const at::Tensor& output, int64_t offset, int64_t columns) {
    return offset == 0 && columns == output.size(1) ? output : output.narrow(1, offset, columns);
}

using Kernel = void (*)(const Batch&, const Slice*);

void run(Kernel kernel, const at::Tensor& inputs, const at::Tensor& indices, int64_t slots, const Slice* slices,
         int64_t count, double scaling, bool add, const float* scalings = nullptr,
         const at::Tensor* factors = nullptr) {
    at::Tensor x = with_columns_side_by_side(inputs), index = indices.contiguous();
    Batch batch{x.size(0),
                x.size(1),
                slots,
                count,
                at::get_num_threads(),
                add,
                index.const_data_ptr(),
                int64_t(index.element_size()),
                x.const_data_ptr(),
                dtype_of(x),
                x.stride(0),
                scaling,
                scalings};
    at::Tensor each;
    if (factors) {
        each = factors->to(at::kFloat).contiguous();
        batch.per_row = index.size(1);
        batch.factors = each.const_data_ptr<float>();
    }
    kernel(batch, slices);
}

// With factors both they and the indices are [T, M]. Scalings are of the slots, [K].
bool add_lora(at::TensorList outputs, const at::Tensor& inputs, at::TensorList lora_a, at::TensorList lora_b,
              const at::Tensor& indices, at::IntArrayRef slice_outputs, at::IntArrayRef slice_offsets, double scaling,
              const at::Tensor* factors, const at::Tensor* scalings) {
    size_t count = lora_a.size();
    if (count == 0 || lora_b.size() != count || slice_outputs.size() != count || slice_offsets.size() != count ||
        !(factors ? are_factors(*factors, indices) : are_indices(indices)) || !are_rows(inputs, indices))
        return false;
    for (const at::Tensor& output : outputs)
        if (!are_writable_rows(output, indices)) return false;
    std::vector<Slice> slices(count);
    for (size_t s = 0; s < count; s++) {
        const at::Tensor &a = lora_a[s], &b = lora_b[s];
        if (!are_weights(a, inputs.size(1)) || !are_weights(b, a.size(-2)) || a.size(0) != lora_a[0].size(0) ||
            b.size(0) != lora_a[0].size(0) || slice_outputs[s] < 0 || slice_outputs[s] >= int64_t(outputs.size()) ||
            !has_columns(outputs[slice_outputs[s]], slice_offsets[s], b.size(-2)))
            return false;
        // Columns that two slices share would have to be rounded once, after both.
        for (size_t other = 0; other < s; other++)
            if (slice_outputs[s] == slice_outputs[other] && slice_offsets[s] < slice_offsets[other] + slices[other].width &&
                slice_offsets[other] < slice_offsets[s] + b.size(-2))
                return false;
        slices[s] = {weights_of(a), weights_of(b), a.size(-2), b.size(-2), nullptr, 0, 0};
    }
    if (scalings && !are_factors(*scalings, lora_a[0].size(0))) return false;
    std::vector<Target> targets(outputs.begin(), outputs.end());
    for (size_t s = 0; s < count; s++) targets[slice_outputs[s]].give_to(slices[s], slice_offsets[s]);
    run(factors ? add_several : add_slices, inputs, indices, lora_a[0].size(0), slices.data(), count, scaling, true,
        scalings ? scalings->const_data_ptr<float>() : nullptr, factors);
    for (const Target& target : targets) target.finish();
    return true;
}

bool try_add_lora(at::TensorList outputs, const at::Tensor& inputs, at::TensorList lora_a, at::TensorList lora_b,
                  const at::Tensor& indices, at::IntArrayRef slice_outputs, at::IntArrayRef slice_offsets,
                  double scaling) {
    return add_lora(outputs, inputs, lora_a, lora_b, indices, slice_outputs, slice_offsets, scaling, nullptr, nullptr);
}

bool try_add_several(at::TensorList outputs, const at::Tensor& inputs, at::TensorList lora_a, at::TensorList lora_b,
                     const at::Tensor& indices, at::IntArrayRef slice_outputs, at::IntArrayRef slice_offsets,
                     double scaling, const at::Tensor& factors) {
    return add_lora(outputs, inputs, lora_a, lora_b, indices, slice_outputs, slice_offsets, scaling, &factors, nullptr);
}

void add_several_in_place(at::TensorList outputs, const at::Tensor& inputs, at::TensorList lora_a,
                          at::TensorList lora_b, const at::Tensor& indices, at::IntArrayRef slice_outputs,
                          at::IntArrayRef slice_offsets, double scaling, const at::Tensor& factors) {
    TORCH_CHECK(try_add_several(outputs, inputs, lora_a, lora_b, indices, slice_outputs, slice_offsets, scaling, factors),
                "xpu_lora::native_add_several: operands that do not fit together");
}

bool try_add_scaled(at::TensorList outputs, const at::Tensor& inputs, at::TensorList lora_a, at::TensorList lora_b,
                    const at::Tensor& indices, at::IntArrayRef slice_outputs, at::IntArrayRef slice_offsets,
                    double scaling, const at::Tensor& scalings) {
    return add_lora(outputs, inputs, lora_a, lora_b, indices, slice_outputs, slice_offsets, scaling, nullptr, &scalings);
}

// For each slot, whether any row uses it.
std::vector<bool> used_slots(const at::Tensor& indices, int64_t slots) {
    at::Tensor index = indices.contiguous();
    std::vector<bool> used(slots);
    auto look = [&](auto* place) {
        for (int64_t t = 0; t < index.size(0); t++)
            if (place[t] >= 0 && place[t] < slots) used[place[t]] = true;
    };
    if (index.scalar_type() == at::kLong)
        look(index.const_data_ptr<int64_t>());
    else
        look(index.const_data_ptr<int32_t>());
    return used;
}

// The gradient of each slot of a stack `[K, rows, columns]`, as the kernel wants it: of B, rows and columns change places.
void gradients_of(const at::Tensor& gradient, bool is_b, int64_t slots, Gradient* to) {
    int64_t rows = gradient.dim() - 2;
    for (int64_t k = 0; k < slots; k++) {
        void* data = static_cast<char*>(gradient.mutable_data_ptr()) + k * gradient.stride(0) * gradient.element_size();
        to[k] = is_b ? Gradient{data, dtype_of(gradient), gradient.size(rows + 1), gradient.stride(rows + 1), gradient.stride(rows)}
                     : Gradient{data, dtype_of(gradient), gradient.size(rows), gradient.stride(rows), gradient.stride(rows + 1)};
    }
}

// dX first, if it is wanted; then the gradient of each A, and of each B: of the whole stacks; or of the n slots that are
// trained, of A [n, R, D], and of B turned, [n, R, W].
std::vector<at::Tensor> backward(at::TensorList grads, const at::Tensor& inputs, at::TensorList lora_a,
                                 at::TensorList lora_b, const at::Tensor& indices, at::IntArrayRef slice_outputs,
                                 at::IntArrayRef slice_offsets, double scaling,
                                 const std::optional<at::Tensor>& scalings, const std::optional<at::Tensor>& trained,
                                 bool needs_inputs, bool needs_weights) {
    size_t count = lora_a.size();
    bool fits = count > 0 && lora_b.size() == count && slice_outputs.size() == count && slice_offsets.size() == count &&
                are_indices(indices) && are_rows(inputs, indices) &&
                (!trained || are_indices(*trained));
    int64_t slots = fits ? lora_a[0].size(0) : 0;
    // Rows whose columns lie side by side; of an expanded gradient, too.
    std::vector<at::Tensor> rows;
    for (const at::Tensor& grad : grads) {
        fits = fits && are_rows(grad, indices);
        if (fits) rows.push_back(with_columns_side_by_side(grad));
    }
    std::vector<Slice> slices(count);
    for (size_t s = 0; fits && s < count; s++) {
        const at::Tensor &a = lora_a[s], &b = lora_b[s];
        fits = are_weights(a, inputs.size(1)) && are_weights(b, a.size(-2)) && a.size(0) == slots && b.size(0) == slots &&
               slice_outputs[s] >= 0 && slice_outputs[s] < int64_t(rows.size()) &&
               has_columns(rows[slice_outputs[s]], slice_offsets[s], b.size(-2));
        if (!fits) break;
        const at::Tensor& grad = rows[slice_outputs[s]];
        slices[s] = {weights_of(a), weights_of(b), a.size(-2), b.size(-2), nullptr, dtype_of(grad), grad.stride(0)};
        slices[s].output = static_cast<char*>(const_cast<void*>(grad.const_data_ptr())) +
                           slice_offsets[s] * grad.element_size();
    }
    std::vector<int64_t> chosen;
    if (fits && trained) {
        at::Tensor numbers = trained->to(at::kLong).contiguous();
        chosen.assign(numbers.const_data_ptr<int64_t>(), numbers.const_data_ptr<int64_t>() + numbers.numel());
    }
    for (int64_t slot : chosen) fits = fits && slot >= 0 && slot < slots;
    fits = fits && (!scalings || are_factors(*scalings, slots));
    TORCH_CHECK(fits, "xpu_lora::native_backward: operands that do not fit together");

    std::vector<at::Tensor> results;
    if (needs_inputs) results.push_back(at::empty(inputs.sizes(), inputs.options()));
    std::vector<Gradient> of_a, of_b;
    if (needs_weights) {
        std::vector<bool> used = used_slots(indices, slots);
        of_a.resize(count * slots);
        of_b.resize(count * slots);
        for (bool is_b : {false, true}) {
            for (size_t s = 0; trained && s < count; s++) {
                const at::Tensor& all = (is_b ? lora_b : lora_a)[s];
                int64_t length = all.size(is_b ? -2 : -1), ranks = slices[s].rank;
                at::Tensor made = at::empty({int64_t(chosen.size()), ranks, length}, all.options());
                for (size_t j = 0; j < chosen.size(); j++) {
                    at::Tensor mine = made[j];
                    if (!used[chosen[j]]) mine.zero_();
                    (is_b ? of_b : of_a)[s * slots + chosen[j]] = {mine.mutable_data_ptr(), dtype_of(made), ranks, length, 1};
                }
                results.push_back(made);
            }
            if (trained) continue;
            bool all_used = std::find(used.begin(), used.end(), false) == used.end();
            for (size_t s = 0; s < count; s++) {
                at::Tensor made = at::empty_like(is_b ? lora_b[s] : lora_a[s]);
                if (!all_used) made.zero_();
                gradients_of(made, is_b, slots, (is_b ? of_b : of_a).data() + s * slots);
                results.push_back(made);
            }
        }
    }
    at::Tensor x = with_columns_side_by_side(inputs), index = indices.contiguous();
    Batch batch{x.size(0), x.size(1), slots, int64_t(count), at::get_num_threads(), false, index.const_data_ptr(),
                int64_t(index.element_size()), x.const_data_ptr(), dtype_of(x), x.stride(0), scaling,
                scalings ? scalings->const_data_ptr<float>() : nullptr};
    void* of_inputs = needs_inputs ? results[0].mutable_data_ptr() : nullptr;
    Backward(batch, slices.data(), needs_weights ? of_a.data() : nullptr, of_b.data(), of_inputs,
             needs_inputs ? dtype_of(results[0]) : 0, inputs.size(1))
        .run();
    return results;
}

bool are_all_negative(const at::Tensor& indices, int64_t count) {
    const char* place = static_cast<const char*>(indices.const_data_ptr());
    int64_t step = indices.stride(0) * int64_t(indices.element_size());
    bool is_long = indices.scalar_type() == at::kLong;
    for (int64_t t = 0; t < count; t++, place += step) {
        int64_t index = is_long ? *reinterpret_cast<const int64_t*>(place) : *reinterpret_cast<const int32_t*>(place);
        if (index >= 0) return false;
    }
    return true;
}

// T. There may be more indices, of which the first T count: a view of them would be one more thing to make for each call.
int64_t rows_with(const at::Tensor& indices, const at::Tensor& inputs) {
    bool fits = inputs.dim() == 2 && are_indices(indices) && indices.size(0) >= inputs.size(0);
    TORCH_CHECK(fits, "xpu_lora: an index for each row of the inputs is wanted");
    return inputs.size(0);
}

at::Tensor first(const at::Tensor& indices, int64_t rows) {
    return indices.size(0) == rows ? indices : indices.narrow(0, 0, rows);
}

// One to three slices, each to an output of its own or to the first, handed over one by one: to unpack a list takes
// longer than to unpack what is in it.
void add_slices_in_place(const at::Tensor& output, const std::optional<at::Tensor>& output_1,
                         const std::optional<at::Tensor>& output_2, const at::Tensor& inputs, const at::Tensor& a,
                         const at::Tensor& b, const std::optional<at::Tensor>& a_1,
                         const std::optional<at::Tensor>& b_1, const std::optional<at::Tensor>& a_2,
                         const std::optional<at::Tensor>& b_2, const at::Tensor& indices, int64_t offset,
                         int64_t offset_1, int64_t offset_2, double scaling) {
    int64_t rows = rows_with(indices, inputs);
    // Looking at the operands takes longer than all else, as nothing of them is in the caches.
    if (are_all_negative(indices, rows)) return;
    c10::SmallVector<at::Tensor, 3> outputs{output}, lora_a{a}, lora_b{b};
    c10::SmallVector<int64_t, 3> slice_outputs{0}, slice_offsets{offset};
    auto add = [&](const auto& its_output, const auto& its_a, const auto& its_b, int64_t its_offset) {
        if (!its_a || !its_b) return;
        slice_outputs.push_back(its_output ? int64_t(outputs.size()) : 0);
        if (its_output) outputs.push_back(*its_output);
        lora_a.push_back(*its_a);
        lora_b.push_back(*its_b);
        slice_offsets.push_back(its_offset);
    };
    add(output_1, a_1, b_1, offset_1);
    add(output_2, a_2, b_2, offset_2);
    TORCH_CHECK(
        try_add_lora(outputs, inputs, lora_a, lora_b, first(indices, rows), slice_outputs, slice_offsets, scaling),
        "xpu_lora::native_add_slices: operands that do not fit together");
}

// One to three slices of one output, side by side from its first column on, whose A and B are the columns of one tensor.
void add_packed_in_place(const at::Tensor& output, const at::Tensor& inputs, const at::Tensor& packed,
                         const at::Tensor& indices, int64_t width, int64_t width_1, int64_t width_2, double scaling) {
    int64_t rows = rows_with(indices, inputs);
    if (are_all_negative(indices, rows)) return;
    at::Tensor its_indices = first(indices, rows);
    int64_t widths[] = {width, width_1, width_2}, features = inputs.size(1), count = 1 + (width_1 > 0) + (width_2 > 0);
    bool fits = are_rows(inputs, its_indices) && are_writable_rows(output, its_indices) && width > 0 &&
                (width_1 > 0 || width_2 == 0);
    // One by one, since the sum of large numbers would not be one.
    int64_t total = 0;
    for (int64_t s = 0; fits && s < 3; total += widths[s++]) fits = has_columns(output, total, widths[s]);
    TORCH_CHECK(fits && are_weights(packed, count * features + total),
                "xpu_lora::native_add_packed: operands that do not fit together");
    Weights all = weights_of(packed);
    auto from = [&](int64_t column) {
        Weights part = all;
        part.data = static_cast<const char*>(all.data) + column * all.column_stride * packed.element_size();
        return part;
    };
    Target target(output);
    Slice slices[3];
    for (int64_t s = 0, offset = 0; s < count; offset += widths[s++]) {
        Weights b = from(count * features + offset);
        std::swap(b.row_stride, b.column_stride);
        slices[s] = {from(s * features), b, packed.size(-2), widths[s], nullptr, 0, 0};
        target.give_to(slices[s], offset);
    }
    run(add_slices, inputs, its_indices, packed.size(0), slices, count, scaling, true);
    target.finish();
}

bool try_shrink(const at::Tensor& output, const at::Tensor& inputs, const at::Tensor& weights,
                const at::Tensor& indices, double scaling) {
    if (!are_indices(indices) || !are_rows(inputs, indices) || !are_writable_rows(output, indices) ||
        !are_weights(weights, inputs.size(1)) || weights.size(-2) > output.size(1))
        return false;
    Slice slice{weights_of(weights), {}, weights.size(-2), 0, nullptr, 0, 0};
    Target target(columns_of(output, 0, slice.rank));
    target.give_to(slice, 0);
    run(shrink_slice, inputs, indices, weights.size(0), &slice, 1, scaling, false);
    target.finish();
    return true;
}

// Into the columns from `offset` on; as many as B has rows, or those of them for which the output has columns.
bool try_expand(const at::Tensor& output, const at::Tensor& inputs, const at::Tensor& weights,
                const at::Tensor& indices, int64_t offset, int64_t columns, bool add) {
    if (!are_indices(indices) || !are_rows(inputs, indices) || !are_writable_rows(output, indices) ||
        !are_weights(weights, inputs.size(1)) || columns > weights.size(-2) || !has_columns(output, offset, columns))
        return false;
    Slice slice{{}, weights_of(weights), weights.size(-1), columns, nullptr, 0, 0};
    Target target(columns_of(output, offset, columns));
    target.give_to(slice, 0);
    run(expand_slice, inputs, indices, weights.size(0), &slice, 1, 1.0, add);
    target.finish();
    return true;
}

void shrink(const at::Tensor& output, const at::Tensor& inputs, const at::Tensor& weights, const at::Tensor& indices,
            double scaling) {
    TORCH_CHECK(try_shrink(output, inputs, weights, first(indices, rows_with(indices, inputs)), scaling),
                "xpu_lora::native_shrink: operands that do not fit together");
}

void expand(const at::Tensor& output, const at::Tensor& inputs, const at::Tensor& weights, const at::Tensor& indices,
            int64_t offset, int64_t columns, bool add) {
    TORCH_CHECK(try_expand(output, inputs, weights, first(indices, rows_with(indices, inputs)), offset, columns, add),
                "xpu_lora::native_expand: operands that do not fit together");
}

bool has_kernels(const char* schema) {
    auto name = "xpu_lora::" + std::string(schema, std::strchr(schema, '('));
    auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op && op->hasKernelForDispatchKey(c10::DispatchKey::CPU);
}

// Defines the ops where Python has not, and gives them their kernels; nothing where a copy of this library has done so.
torch::Library* registered() {
    const char* schemas[] = {XPU_LORA_SCHEMAS};
    if (has_kernels(schemas[0])) return nullptr;
    auto* library = new torch::Library(torch::Library::FRAGMENT, "xpu_lora", std::nullopt, __FILE__, __LINE__);
    for (const char* schema : schemas) {
        std::string name(schema, std::strchr(schema, '('));
        if (c10::Dispatcher::singleton().findSchema({"xpu_lora::" + name, ""})) continue;
        // As in native.py.
        library->def(schema, {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
        library->impl(name.c_str(), torch::dispatch(c10::DispatchKey::Autograd, torch::CppFunction::makeFallthrough()));
    }
    auto on_cpu = [&](const char* name, auto kernel) {
        library->impl(name, torch::dispatch(c10::DispatchKey::CPU, kernel));
    };
    on_cpu("native_add_slices", add_slices_in_place);
    on_cpu("native_add_packed", add_packed_in_place);
    on_cpu("native_try_add_lora", try_add_lora);
    on_cpu("native_try_add_scaled", try_add_scaled);
    on_cpu("native_backward", backward);
    on_cpu("native_try_shrink", try_shrink);
    on_cpu("native_try_expand", try_expand);
    on_cpu("native_shrink", shrink);
    on_cpu("native_expand", expand);
    on_cpu("native_try_add_several", try_add_several);
    on_cpu("native_add_several", add_several_in_place);
    return library;
}

const torch::Library* const LIBRARY = registered();

}  // namespace
