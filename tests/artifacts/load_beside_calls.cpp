// load_beside_calls artifact folder tensors: loads and drops an adapter while two threads call without a pause, each with
// rows of its own, and on a GPU on a stream of its own.
//
// The tensors are the inputs of one batch, by their names in the artifact. Each thread stops after MOST calls: exits with 1
// if the loads are not done by then, and with 2 if something is refused.

#include <atomic>
#include <iostream>
#include <thread>

#include "xpu_lora_served.h"

constexpr int LOADS = 100, MOST = 1500;

int main(int, char** arguments) {
    try {
        xpu_lora::Served served(arguments[1], 2);
        xpu_lora::Tensors tensors(arguments[3]);
        std::vector<at::Tensor> inputs;
        for (const xpu_lora::Json& input : served.asked())
            inputs.push_back(tensors.named.at(input.at("name").text).to(served.device));
        served.load("stays", arguments[2]);
        std::atomic<bool> is_done = false;
        std::atomic<int> late = 0, wrong = 0, calls = 0;
        auto call = [&](xpu_lora::Names rows) {
            c10::impl::VirtualGuardImpl guard(served.device.type());
            if (!served.device.is_cpu()) guard.exchangeStream(guard.getStreamFromGlobalPool(served.device));
            at::Tensor expected = served.run(inputs, rows)[0].cpu();
            for (int i = 0; !is_done; i += 3) {
                if (i >= MOST) {
                    late++;
                    return;
                }
                std::vector<at::Tensor> answers;
                for (int at = 0; at < 3; at++) answers.push_back(served.run(inputs, rows)[0]), calls++;
                for (const at::Tensor& answer : answers) wrong += !at::equal(answer.cpu(), expected);
            }
        };
        size_t batch = size_t(inputs[0].size(0));
        xpu_lora::Names all(batch, "stays"), some = all;
        some[0] = std::nullopt;
        bool are_same = at::equal(served.run(inputs, all)[0], served.run(inputs, some)[0]);
        std::thread first(call, all), second(call, some);
        while (calls < 12) std::this_thread::yield();
        for (int i = 0; i < LOADS; i++) served.load("comes", arguments[2]), served.drop("comes");
        is_done = true;
        first.join(), second.join();
        std::cout << LOADS << " loads beside " << calls << " calls, " << late << " threads were done before, " << wrong
                  << " wrong" << (are_same ? ", of threads that asked for the same" : "") << std::endl;
        return late || wrong || are_same ? 1 : 0;
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 2;
    }
}
