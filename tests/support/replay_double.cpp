// A double of CUDA's driver that runs "kernels" of its own on the CPU: what replay.cpp asks of libcuda, and of torch.

#include <cstddef>
#include <cstdint>

struct LaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    void* stream;
    void* attributes;
    unsigned attribute_count;
};

static int launches = 0, capturing = 0;

extern "C" {

// output[i] += scale * input[i] for grid[0] blocks of block[0] elements, of which `count` are there.
void add_scaled(void** parameters, const LaunchConfig* config) {
    float* output = *static_cast<float**>(parameters[0]);
    const float* input = *static_cast<const float**>(parameters[1]);
    int32_t count = *static_cast<int32_t*>(parameters[2]);
    float scale = *static_cast<float*>(parameters[3]);
    for (unsigned i = 0; i < config->grid[0] * config->block[0]; i++) {
        if (static_cast<int32_t>(i) < count) {
            output[i] += scale * input[i];
        }
    }
}

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void**) {
    launches++;
    reinterpret_cast<void (*)(void**, const LaunchConfig*)>(function)(parameters, config);
    return 0;
}

int cuStreamIsCapturing(void*, int* answer) {
    *answer = capturing;
    return 0;
}

// Two pointers, an int, a float, and two pointers of Triton's own.
int cuFuncGetParamInfo(void*, size_t index, size_t*, size_t* bytes) {
    constexpr size_t sizes[] = {8, 8, 4, 4, 8, 8};
    if (index >= 6) {
        return 1;
    }
    *bytes = sizes[index];
    return 0;
}

int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}

int launch_count() { return launches; }
void set_capturing(int answer) { capturing = answer; }
}
