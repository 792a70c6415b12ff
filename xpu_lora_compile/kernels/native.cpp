// The kernels of native_kernels.h as ops of PyTorch: a call costs as little as one of PyTorch's own. Schemas are in
// ops/internal.py; whoever calls has checked shapes, and knows that no two slices write to the same columns.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "native_kernels.h"

namespace {

int64_t dtype_of(const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kFloat:
            return 0;
        case at::kBFloat16:
            return 1;
        case at::kHalf:
            return 2;
        default:
            TORCH_CHECK(false, "xpu_lora: the native kernel takes float32, bfloat16 and float16, not ", tensor.dtype());
    }
}

// [K, rows, columns], or with vLLM's 1 in second place.
Weights weights_of(const at::Tensor& tensor) {
    int64_t rows = tensor.dim() - 2;
    return {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(rows),
            tensor.stride(rows + 1)};
}

at::Tensor with_columns_side_by_side(const at::Tensor& matrix) {
    return matrix.stride(1) == 1 || matrix.size(1) <= 1 ? matrix : matrix.contiguous();
}

// What keeps a kernel inside its operands; the public ops have said it in better words.
void check(const at::Tensor& output, const at::Tensor& inputs, const at::Tensor& weights, const at::Tensor& indices,
           bool columns_fit) {
    TORCH_CHECK(columns_fit && output.dim() == 2 && inputs.dim() == 2 && indices.dim() == 1 && weights.dim() >= 3 &&
                    output.size(0) == indices.size(0) && inputs.size(0) == indices.size(0) &&
                    inputs.size(1) == weights.size(-1) && (weights.dim() == 3 || weights.size(1) == 1),
                "xpu_lora: operands that do not fit together");
    TORCH_CHECK(indices.scalar_type() == at::kInt || indices.scalar_type() == at::kLong,
                "xpu_lora: indices of int32 or int64, not ", indices.dtype());
}

void set_output(Slice& slice, const at::Tensor& output, int64_t offset) {
    slice.output = static_cast<char*>(output.mutable_data_ptr()) + offset * output.element_size();
    slice.output_dtype = dtype_of(output);
    slice.output_stride = output.stride(0);
}

using Kernel = void (*)(const Batch&, const Slice*);

void run(Kernel kernel, const at::Tensor& inputs, const at::Tensor& indices, int64_t slots,
         const std::vector<Slice>& slices, double scaling, bool add) {
    at::Tensor x = with_columns_side_by_side(inputs), index = indices.contiguous();
    int64_t work = 0;
    for (const Slice& slice : slices) work += slice.rank * ((slice.a.data ? x.size(1) : 0) + slice.width);
    // What is worth a thread of its own: some 10 us of multiplications, against the 3 us that waking it takes.
    int64_t threads = smaller(at::get_num_threads(), 1 + x.size(0) * work / (1 << 16));
    Batch batch{x.size(0),
                x.size(1),
                slots,
                int64_t(slices.size()),
                threads,
                add,
                index.const_data_ptr(),
                int64_t(index.element_size()),
                x.const_data_ptr(),
                dtype_of(x),
                x.stride(0),
                scaling};
    kernel(batch, slices.data());
}

void add_lora(at::TensorList outputs, const at::Tensor& inputs, at::TensorList lora_a, at::TensorList lora_b,
              const at::Tensor& indices, at::IntArrayRef slice_outputs, c10::SymIntArrayRef slice_offsets,
              double scaling) {
    std::vector<at::Tensor> targets;
    for (const at::Tensor& output : outputs) targets.push_back(with_columns_side_by_side(output));
    std::vector<Slice> slices(lora_a.size());
    TORCH_CHECK(!slices.empty() && lora_b.size() == slices.size() && slice_outputs.size() == slices.size() &&
                    slice_offsets.size() == slices.size(),
                "xpu_lora: as many A, B, outputs and offsets as slices");
    for (size_t s = 0; s < slices.size(); s++) {
        const at::Tensor& target = targets.at(slice_outputs[s]);
        int64_t offset = slice_offsets[s].guard_int(__FILE__, __LINE__);
        check(target, inputs, lora_a[s], indices, offset >= 0 && offset + lora_b[s].size(-2) <= target.size(1));
        TORCH_CHECK(lora_b[s].size(-1) == lora_a[s].size(-2) && lora_b[s].size(0) == lora_a[0].size(0) &&
                        lora_a[s].size(0) == lora_a[0].size(0),
                    "xpu_lora: A and B of one rank and one number of slots");
        slices[s].a = weights_of(lora_a[s]);
        slices[s].b = weights_of(lora_b[s]);
        slices[s].rank = lora_b[s].size(-1);
        slices[s].width = lora_b[s].size(-2);
        set_output(slices[s], target, offset);
    }
    run(add_slices, inputs, indices, lora_a[0].size(0), slices, scaling, true);
    for (size_t n = 0; n < targets.size(); n++)
        if (!targets[n].is_same(outputs[n])) outputs[n].copy_(targets[n]);
}

// Of one stack of weights: A and the first columns of the output, or B and all of them.
void run_one(Kernel kernel, const at::Tensor& output, const at::Tensor& inputs, const at::Tensor& weights,
             const at::Tensor& indices, double scaling, bool add) {
    bool shrinks = kernel == shrink_slice;
    check(output, inputs, weights, indices, weights.size(-2) <= output.size(1));
    at::Tensor columns = output.narrow(1, 0, weights.size(-2)), target = with_columns_side_by_side(columns);
    std::vector<Slice> slices(1);
    (shrinks ? slices[0].a : slices[0].b) = weights_of(weights);
    slices[0].rank = weights.size(shrinks ? -2 : -1);
    slices[0].width = shrinks ? 0 : weights.size(-2);
    set_output(slices[0], target, 0);
    run(kernel, inputs, indices, weights.size(0), slices, scaling, add);
    if (!target.is_same(columns)) columns.copy_(target);
}

void shrink(const at::Tensor& output, const at::Tensor& inputs, const at::Tensor& weights, const at::Tensor& indices,
            double scaling) {
    run_one(shrink_slice, output, inputs, weights, indices, scaling, false);
}

void expand(const at::Tensor& output, const at::Tensor& inputs, const at::Tensor& weights, const at::Tensor& indices,
            bool add) {
    run_one(expand_slice, output, inputs, weights, indices, 1.0, add);
}

}  // namespace

TORCH_LIBRARY_IMPL(xpu_lora, CPU, library) {
    library.impl("native_add_lora", add_lora);
    library.impl("native_shrink", shrink);
    library.impl("native_expand", expand);
}
