// load_beside_calls artifact folder tensors: loads and drops an adapter while two threads call without a pause.
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
        size_t own = served.manifest.at("ranks").is_true() ? 2 : 1;
        const auto& listed = served.manifest.at("inputs").items;
        std::vector<at::Tensor> inputs;
        for (size_t i = own; i < listed.size(); i++)
            inputs.push_back(tensors.named.at(listed[i].at("name").text).to(served.device));
        served.load("stays", arguments[2]);
        std::vector<std::optional<std::string>> rows(size_t(inputs[0].size(0)), "stays");
        at::Tensor expected = served.run(inputs, rows)[0].cpu();
        std::atomic<bool> is_done = false;
        std::atomic<int> late = 0, wrong = 0, calls = 0;
        auto call = [&] {
            for (int i = 0; !is_done; i++) {
                if (i == MOST) {
                    late++;
                    return;
                }
                wrong += !at::equal(served.run(inputs, rows)[0].cpu(), expected);
                calls++;
            }
        };
        std::thread first(call), second(call);
        while (calls < 10) std::this_thread::yield();
        for (int i = 0; i < LOADS; i++) served.load("comes", arguments[2]), served.drop("comes");
        is_done = true;
        first.join(), second.join();
        std::cout << LOADS << " loads beside " << calls << " calls, " << late << " threads were done before, " << wrong
                  << " wrong" << std::endl;
        return late || wrong ? 1 : 0;
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 2;
    }
}
