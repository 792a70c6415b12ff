// Serves an artifact of xlc.export without Python: adapters come and go, and each row of a batch has its own.
//
//     serve_pt2 served.pt2 plan.json tensors.safetensors
//
// plan.json is a list of steps, in the order in which a server would be asked:
//     {"load": ["pirate", "adapters/pirate"]}        a PEFT folder, under a name
//     {"drop": "pirate"}
//     {"refused": ["x", "adapters/x"]}               a folder that must not load; prints why it does not
//     {"rows": ["pirate", null, "terse"]}            a batch, with the adapter of each row; where sequences are packed,
//                                                    "lengths": [5, 2, 7], too; where a part of the model has rows of
//                                                    its own, "parts": {"vision_tower": ["pirate", null]}
// The inputs of batch n are the tensors "n.<input>", by the names in the artifact. Where there are tensors "n.<output>",
// the answers must equal them bit for bit: whoever wrote them computed them in Python. Prints how many rows do not, and
// how long a batch took; exits with 1 if any row is wrong, and with 2 if a step was refused.
//
// examples/serve_pt2.py compiles and runs this.

#include <chrono>
#include <cstdio>
#include <iostream>

#include "xpu_lora_served.h"

namespace {

xpu_lora::Names names_in(const xpu_lora::Json& list) {
    xpu_lora::Names names;
    for (const xpu_lora::Json& name : list.items)
        names.push_back(name.kind == xpu_lora::Json::NOTHING ? std::nullopt : std::make_optional(name.text));
    return names;
}

// How many rows of the batch are not the same numbers, to the bit.
int64_t wrong_rows(const at::Tensor& got, const at::Tensor& wanted) {
    if (got.sizes() != wanted.sizes() || got.dtype() != wanted.dtype()) return wanted.size(0);
    int64_t wrong = 0, bytes = wanted[0].nbytes();
    at::Tensor mine = got.cpu().contiguous();
    for (int64_t row = 0; row < wanted.size(0); row++) {
        auto of = [&](const at::Tensor& tensor) { return static_cast<const char*>(tensor.data_ptr()) + row * bytes; };
        wrong += std::memcmp(of(mine), of(wanted), bytes) != 0;
    }
    return wrong;
}

class Server {
   public:
    Server(const char* artifact, const char* tensors) : served(artifact), tensors(tensors) {}

    void take(const xpu_lora::Json& step) {
        if (step.at("load").items.size() == 2) {
            auto start = std::chrono::steady_clock::now();
            served.load(step.at("load").items[0].text, step.at("load").items[1].text);
            loads.push_back(microseconds_since(start));
        } else if (step.at("refused").items.size() == 2) {
            refuse(step.at("refused").items[0].text, step.at("refused").items[1].text);
        } else if (step.at("drop").kind == xpu_lora::Json::TEXT) {
            served.drop(step.at("drop").text);
        } else {
            answer(step);
        }
    }

    int report() const {
        std::printf("%ld loads, %ld batches, %ld of %ld rows wrong, median %.1f us a batch and %.1f us a load\n",
                    long(loads.size()), long(batches.size()), long(wrong), long(rows), median(batches), median(loads));
        return wrong ? 1 : 0;
    }

   private:
    void refuse(const std::string& name, const std::string& folder) {
        try {
            served.load(name, folder);
        } catch (const std::runtime_error& error) {
            std::cout << error.what() << std::endl;
            return;
        }
        throw std::runtime_error(folder + ": wanted an adapter that is refused; got one that loads.");
    }

    void answer(const xpu_lora::Json& step) {
        xpu_lora::Names adapters = names_in(step.at("rows"));
        std::map<std::string, xpu_lora::Part> parts;
        for (size_t i = 0; i < step.at("parts").names.size(); i++)
            parts[step.at("parts").names[i]].adapters = names_in(step.at("parts").items[i]);
        std::string number = std::to_string(batches.size()) + ".";
        std::vector<at::Tensor> inputs;
        for (const xpu_lora::Json& input : served.asked())
            inputs.push_back(tensors.named.at(number + input.at("name").text).to(served.device));
        auto start = std::chrono::steady_clock::now();
        std::vector<at::Tensor> outputs = served.run(inputs, adapters, step.at("lengths").integers(), parts);
        served.wait();
        batches.push_back(microseconds_since(start));
        rows += int64_t(adapters.size());
        auto names = served.manifest.at("outputs").texts();
        for (size_t i = 0; i < names.size(); i++)
            if (auto wanted = tensors.named.find(number + names[i]); wanted != tensors.named.end())
                wrong += wrong_rows(outputs[i], wanted->second);
    }

    static double microseconds_since(std::chrono::steady_clock::time_point start) {
        return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
    }

    static double median(std::vector<double> sorted) {
        std::sort(sorted.begin(), sorted.end());
        return sorted.empty() ? 0 : sorted[sorted.size() / 2];
    }

    xpu_lora::Served served;
    xpu_lora::Tensors tensors;
    // How long each took, in microseconds.
    std::vector<double> batches, loads;
    int64_t rows = 0, wrong = 0;
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) {
        std::cerr << "serve_pt2 served.pt2 plan.json tensors.safetensors\n";
        return 2;
    }
    try {
        Server server(arguments[1], arguments[3]);
        for (const xpu_lora::Json& step : xpu_lora::Json::parse(xpu_lora::read_file(arguments[2]), arguments[2]).items)
            server.take(step);
        return server.report();
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 2;
    }
}
