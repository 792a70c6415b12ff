// Serve an artifact of xlc.export in a program without Python:
//
//     xpu_lora::Served served("served.pt2");
//     served.load("pirate", "adapters/pirate");                            // a folder of PEFT's
//     auto outputs = served.run({tokens}, {"pirate", std::nullopt});      // an adapter, or none, for each sequence
//
// The numbers are those of the model compiled in Python, with as many threads (OMP_NUM_THREADS). On a GPU, inputs and
// outputs are there, `run` computes on the calling thread's current stream, and returns before the GPU is done.
//
// All that cannot be served is a std::runtime_error: of the adapter's files by the rules of adapters/ in Python, from
// which this differs in refusing what it would need the model for (ensure_weight_tying, copies of base weights, names of
// former times) and what std::regex may read otherwise. C++17, or C++20 from torch 2.15 on. Link torch, torch_cpu and c10,
// and for CUDA torch_cuda and c10_cuda, which the linker would leave out without -Wl,--no-as-needed.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <sys/utsname.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <regex>
#include <set>
#include <shared_mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace xpu_lora {

// As `FORMAT` in artifacts/manifest.py.
constexpr int FORMAT = 2;

[[noreturn]] inline void refuse(const std::string& where, const std::string& wanted, const std::string& got,
                                const std::string& remedy = "") {
    std::string more = remedy.empty() ? "" : " " + remedy;
    throw std::runtime_error(where + ": wanted " + wanted + "; got " + got + "." + more);
}

constexpr const char* COPY_AGAIN = "Copy or download the file again; it is damaged, or not what PEFT wrote.";
constexpr const char* COPY_ARTIFACT = "Copy the file again, or export the model again.";
constexpr const char* EXPORT_AGAIN =
    "Export the model again, with the versions and on a machine of the kind that it is to be served with.";
constexpr const char* WRITE_FIELD =
    "Write such a value into the field, or save the adapter again where it was trained.";

// What torch and the standard library throw becomes an error as of `refuse`.
template <typename Work>
auto guarded(const std::string& where, const std::string& wanted, const std::string& remedy, Work work)
    -> decltype(work()) {
    try {
        return work();
    } catch (const c10::Error& error) {
        refuse(where, wanted, error.what_without_backtrace(), remedy);
    } catch (const std::runtime_error&) {
        throw;
    } catch (const std::exception& error) {
        refuse(where, wanted, error.what(), remedy);
    }
}

// ---- JSON, with the order of names kept: of patterns the first that matches counts.

struct Json {
    enum Kind { NOTHING, FALSE, TRUE, INTEGER, NUMBER, TEXT, LIST, OBJECT } kind = NOTHING;
    std::string text;  // Of a number as it was written.
    std::vector<std::string> names;
    std::vector<Json> items;

    const Json& at(const std::string& name) const {
        static const Json nothing;
        for (size_t i = 0; i < names.size(); i++)
            if (names[i] == name) return items[i];
        return nothing;
    }
    int64_t integer() const { return std::strtoll(text.c_str(), nullptr, 10); }
    double number() const { return std::strtod(text.c_str(), nullptr); }
    // As Python asks.
    bool is_true() const {
        if (kind == INTEGER || kind == NUMBER) return number() != 0;
        return kind == TRUE || (kind == TEXT && !text.empty()) || !items.empty();
    }
    // As it was written, cut short.
    std::string shown() const {
        static const char* const words[] = {"null", "false", "true", "", "", "", "a list", "an object"};
        if (kind == TEXT) return "\"" + text.substr(0, 100) + "\"";
        return kind == INTEGER || kind == NUMBER ? text.substr(0, 100) : words[kind];
    }
    bool is_list_of(Kind wanted) const {
        auto fits = [&](const Json& item) { return item.kind == wanted; };
        return kind == LIST && std::all_of(items.begin(), items.end(), fits);
    }
    std::vector<std::string> texts() const {
        std::vector<std::string> found;
        for (const Json& item : items) found.push_back(item.text);
        return found;
    }
    std::vector<int64_t> integers() const {
        std::vector<int64_t> found;
        for (const Json& item : items) found.push_back(item.integer());
        return found;
    }
    bool has(const std::string& text_of_item) const {
        for (const Json& item : items)
            if (item.text == text_of_item) return true;
        return false;
    }

    static Json parse(const std::string& source, const std::string& where) {
        const char *place = source.data(), *end = place + source.size();
        Json found = value(place, end, where, 0);
        next(place, end);
        if (place != end) refuse(where, "JSON", "more after its end", COPY_AGAIN);
        return found;
    }

   private:
    static char next(const char*& place, const char* end) {
        while (place < end && std::strchr(" \t\r\n", *place) && *place) place++;
        return place < end ? *place : 0;
    }
    static void expect(const char*& place, const char* end, const char* word, const std::string& where) {
        size_t length = std::strlen(word);
        if (size_t(end - place) < length || std::strncmp(place, word, length) != 0)
            refuse(where, "JSON", "something else at " + std::string(place, std::min<size_t>(20, end - place)),
                   COPY_AGAIN);
        place += length;
    }
    static Json value(const char*& place, const char* end, const std::string& where, int depth) {
        Json found;
        char first = next(place, end);
        if (depth > 64) refuse(where, "JSON of 64 levels at most", "more");
        if (first == '{' || first == '[') {
            bool is_object = first == '{';
            char last = is_object ? '}' : ']';
            found.kind = is_object ? OBJECT : LIST;
            std::set<std::string> seen;
            for (place++; next(place, end) != last;) {
                if (!found.items.empty()) expect(place, end, ",", where), next(place, end);
                if (is_object) {
                    std::string name = quoted(place, end, where);
                    if (!seen.insert(name).second) refuse(where, "each name once", name + " twice", COPY_AGAIN);
                    found.names.push_back(name);
                    next(place, end), expect(place, end, ":", where);
                }
                found.items.push_back(value(place, end, where, depth + 1));
            }
            place++;
        } else if (first == '"') {
            found.kind = TEXT, found.text = quoted(place, end, where);
        } else if (first == 't' || first == 'f' || first == 'n') {
            expect(place, end, first == 't' ? "true" : first == 'f' ? "false" : "null", where);
            found.kind = first == 't' ? TRUE : first == 'f' ? FALSE : NOTHING;
        } else {
            found = numeral(place, end, where);
        }
        return found;
    }
    static Json numeral(const char*& place, const char* end, const std::string& where) {
        const char* start = place;
        bool well = true, whole = true;
        auto digits = [&] {
            const char* first = place;
            while (place < end && *place >= '0' && *place <= '9') place++;
            well = well && place > first;
            return first;
        };
        if (place < end && *place == '-') place++;
        const char* first = digits();
        well = well && (*first != '0' || place == first + 1);
        if (place < end && *place == '.') place++, whole = false, digits();
        if (place < end && (*place == 'e' || *place == 'E')) {
            place++, whole = false;
            if (place < end && (*place == '+' || *place == '-')) place++;
            digits();
        }
        if (!well)
            refuse(where, "JSON", "something else at " + std::string(start, std::min<size_t>(20, end - start)),
                   COPY_AGAIN);
        Json found;
        found.text = std::string(start, place), found.kind = whole ? INTEGER : NUMBER;
        return found;
    }
    // How many bytes of UTF-8 the next character has; 0 where they are none.
    static int length_of(const char* place, const char* end) {
        auto byte = [&](int at) { return static_cast<unsigned char>(place[at]); };
        int first = byte(0);
        int length = first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
        if (end - place < length) return 0;
        for (int i = 1; i < length; i++)
            if (byte(i) >> 6 != 2) return 0;
        bool well = !((byte(0) == 0xe0 && byte(1) < 0xa0) || (byte(0) == 0xed && byte(1) > 0x9f) ||
                      (byte(0) == 0xf0 && byte(1) < 0x90) || (byte(0) == 0xf4 && byte(1) > 0x8f));
        return length < 2 || well ? length : 0;
    }
    static std::string quoted(const char*& place, const char* end, const std::string& where) {
        expect(place, end, "\"", where);
        std::string found;
        while (place < end && *place != '"') {
            if (*place != '\\') {
                int length = length_of(place, end);
                if (length == 0 || static_cast<unsigned char>(*place) < 0x20)
                    refuse(where, "JSON", "a byte that cannot be in a text, after " + found.substr(0, 100), COPY_AGAIN);
                found.append(place, length), place += length;
                continue;
            }
            if (++place >= end) break;
            char escaped = *place++;
            if (escaped != 'u') {
                static const char names[] = "bfnrt\"\\/", values[] = "\b\f\n\r\t\"\\/";
                const char* known = std::strchr(names, escaped);
                if (!escaped || !known) refuse(where, "JSON", std::string("the escape \\") + escaped, COPY_AGAIN);
                found += values[known - names];
                continue;
            }
            uint32_t code = hexadecimal(place, end, where);
            if (code >= 0xd800 && code < 0xe000) {
                bool is_pair = code < 0xdc00 && end - place > 1 && place[0] == '\\' && place[1] == 'u';
                uint32_t low = is_pair ? hexadecimal(place += 2, end, where) : 0;
                if (low < 0xdc00 || low >= 0xe000) refuse(where, "JSON", "half of a pair of surrogates", COPY_AGAIN);
                code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
            }
            if (code < 0x80) found += char(code);
            if (code >= 0x80) found += char(code < 0x800 ? 0xc0 | code >> 6 : code < 0x10000 ? 0xe0 | code >> 12 : 0xf0 | code >> 18);
            if (code >= 0x10000) found += char(0x80 | (code >> 12 & 0x3f));
            if (code >= 0x800) found += char(0x80 | (code >> 6 & 0x3f));
            if (code >= 0x80) found += char(0x80 | (code & 0x3f));
        }
        expect(place, end, "\"", where);
        return found;
    }
    static uint32_t hexadecimal(const char*& place, const char* end, const std::string& where) {
        if (end - place < 4 || !std::all_of(place, place + 4, [](unsigned char digit) { return std::isxdigit(digit); }))
            refuse(where, "JSON", "an escape \\u without four hexadecimal digits", COPY_AGAIN);
        uint32_t code = std::strtoul(std::string(place, 4).c_str(), nullptr, 16);
        place += 4;
        return code;
    }
};

inline std::string read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!std::filesystem::is_regular_file(path) || !file) refuse(path, "a file that can be read", "none");
    std::ostringstream content;
    content << file.rdbuf();
    return content.str();
}

// ---- Checksums: torch reads an archive without looking at them.

// CRC-32 as of zip, of bytes that follow others.
inline uint32_t crc32(const unsigned char* bytes, size_t size, uint32_t before = 0) {
    using Tables = std::array<std::array<uint32_t, 256>, 8>;
    static const Tables tables = [] {
        Tables made{};
        for (uint32_t i = 0; i < 256; i++) {
            made[0][i] = i;
            for (int bit = 0; bit < 8; bit++) made[0][i] = made[0][i] >> 1 ^ (made[0][i] & 1 ? 0xedb88320u : 0);
        }
        for (int back = 1; back < 8; back++)
            for (uint32_t i = 0; i < 256; i++)
                made[back][i] = made[back - 1][i] >> 8 ^ made[0][made[back - 1][i] & 255];
        return made;
    }();
    uint32_t sum = ~before;
    for (; size >= 8; size -= 8, bytes += 8) {
        uint32_t mixed = sum ^ (bytes[0] | bytes[1] << 8 | bytes[2] << 16 | uint32_t(bytes[3]) << 24);
        sum = tables[7][mixed & 255] ^ tables[6][mixed >> 8 & 255] ^ tables[5][mixed >> 16 & 255] ^
              tables[4][mixed >> 24] ^ tables[3][bytes[4]] ^ tables[2][bytes[5]] ^ tables[1][bytes[6]] ^
              tables[0][bytes[7]];
    }
    for (; size; size--) sum = sum >> 8 ^ tables[0][(sum ^ *bytes++) & 255];
    return ~sum;
}

// Compare each record of an archive with the checksum beside it, which stands before the bytes, or after them.
inline void check_sums(caffe2::serialize::PyTorchStreamReader& archive, const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<unsigned char> part(1 << 20);
    auto read = [&](uint64_t at, size_t size) {
        file.seekg(std::streamoff(at));
        if (!file.read(reinterpret_cast<char*>(part.data()), std::streamsize(size)))
            refuse(path, "a whole file", "an end before it", COPY_ARTIFACT);
    };
    auto number = [&](size_t at, int bytes) {
        uint32_t found = 0;
        while (bytes-- > 0) found = found << 8 | part[at + size_t(bytes)];
        return found;
    };
    for (const std::string& name : archive.getAllRecords()) {
        uint64_t start = archive.getRecordOffset(name), left = archive.getRecordSize(name), at = start;
        read(archive.getRecordHeaderOffset(name), 30);
        bool follows = number(6, 2) & 8, is_stored = number(8, 2) == 0;
        uint32_t wanted = number(14, 4), sum = 0;
        if (!is_stored) refuse(path + ": " + name, "a record as it is, not compressed", "another", COPY_ARTIFACT);
        for (size_t size; left; left -= size, at += size) {
            size = size_t(std::min<uint64_t>(left, part.size()));
            read(at, size);
            sum = crc32(part.data(), size, sum);
        }
        if (follows) {
            read(at, 8);
            wanted = number(0, 4) == 0x08074b50 ? number(4, 4) : number(0, 4);
        }
        if (sum != wanted)
            refuse(path + ": " + name, "the bytes that were written", "others: the checksum differs", COPY_ARTIFACT);
    }
}

inline at::ScalarType dtype_of(const std::string& name) {
    static const std::map<std::string, at::ScalarType> known = {
        {"bool", at::kBool},     {"BOOL", at::kBool},       {"uint8", at::kByte},    {"U8", at::kByte},
        {"int8", at::kChar},     {"I8", at::kChar},         {"int16", at::kShort},   {"I16", at::kShort},
        {"int32", at::kInt},     {"I32", at::kInt},         {"int64", at::kLong},    {"I64", at::kLong},
        {"float16", at::kHalf},  {"F16", at::kHalf},        {"bfloat16", at::kBFloat16}, {"BF16", at::kBFloat16},
        {"float32", at::kFloat}, {"F32", at::kFloat},       {"float64", at::kDouble},    {"F64", at::kDouble},
    };
    auto found = known.find(name);
    if (found == known.end()) refuse("dtype", "one that PyTorch has", name);
    return found->second;
}

// ---- safetensors: tensors by name.

struct Tensors {
    std::map<std::string, at::Tensor> named;

    explicit Tensors(const std::filesystem::path& path) : Tensors(read_file(path), path) {}

    Tensors(const std::string& content, const std::filesystem::path& path) {
        uint64_t length = 0;
        if (content.size() >= 8) std::memcpy(&length, content.data(), 8);
        if (content.size() < 8 || length > (32u << 20) || length > content.size() - 8)
            refuse(path, "a well-formed safetensors file", "a header of " + std::to_string(length) + " bytes",
                   COPY_AGAIN);
        Json header = Json::parse(content.substr(8, length), path);
        if (header.kind != Json::OBJECT) refuse(path, "a header that is a JSON object", header.shown(), COPY_AGAIN);
        const char* data = content.data() + 8 + length;
        int64_t size = int64_t(content.size() - 8 - length), end = 0;
        std::map<std::pair<int64_t, int64_t>, std::string> spans;
        for (size_t i = 0; i < header.names.size(); i++) {
            if (header.names[i] == "__metadata__") continue;
            const std::string &name = header.names[i], where = path.string() + ": " + name;
            const Json &given = header.items[i], &sizes = given.at("shape"), &offsets = given.at("data_offsets");
            if (given.at("dtype").kind != Json::TEXT || !is_list_of_sizes(sizes) || !is_list_of_sizes(offsets) ||
                offsets.items.size() != 2)
                refuse(where, "a dtype, a shape and two data_offsets, of whole numbers", "something else", COPY_AGAIN);
            at::ScalarType dtype = dtype_of(given.at("dtype").text);
            std::vector<int64_t> shape = sizes.integers(), span = offsets.integers();
            double bytes = double(at::elementSize(dtype));
            for (int64_t extent : shape) bytes *= double(extent);
            if (span[1] < span[0] || span[1] > size || double(span[1] - span[0]) != bytes)
                refuse(where, "data inside of the file, as long as the shape says", "other data_offsets", COPY_AGAIN);
            if (bytes > 0 && !spans.emplace(std::pair(span[0], span[1]), name).second)
                refuse(where, "data of its own", "that of another tensor", COPY_AGAIN);
            // A copy, since what lies in the file need not be aligned.
            at::Tensor tensor =
                guarded(where, "a shape that a tensor can have", COPY_AGAIN, [&] { return at::empty(shape, dtype); });
            if (bytes > 0) std::memcpy(tensor.data_ptr(), data + span[0], size_t(bytes));
            named[name] = tensor;
        }
        for (const auto& [span, name] : spans) {
            if (span.first != end)
                refuse(path.string() + ": " + name, "data from byte " + std::to_string(end) + ", where the last end",
                       "data from byte " + std::to_string(span.first), COPY_AGAIN);
            end = span.second;
        }
        if (end != size)
            refuse(path, "data up to the end, byte " + std::to_string(size), "data up to byte " + std::to_string(end),
                   COPY_AGAIN);
    }

   private:
    static bool is_list_of_sizes(const Json& value) {
        auto fits = [](const Json& item) { return item.text[0] != '-' && item.text.size() < 19; };
        return value.is_list_of(Json::INTEGER) && std::all_of(value.items.begin(), value.items.end(), fits);
    }
};

// ---- adapter_config.json: which modules, how strongly.

// Whether Python and std::regex read a pattern alike: known forms do, and nothing else is let through.
inline bool is_read_alike(const std::string& pattern) {
    if (pattern.size() > 10000) return false;
    size_t at = 0, depth = 0;
    bool repeatable = false;
    auto peek = [&](size_t further = 0) { return at + further < pattern.size() ? pattern[at + further] : '\0'; };
    auto is_digit = [](char letter) { return letter >= '0' && letter <= '9'; };
    // A character after a backslash: of a class like \d, or a sign that stands for itself.
    auto is_class = [&](char letter) { return letter && std::strchr("dDwWsS", letter); };
    auto is_sign = [](char letter) { return letter > 0 && std::ispunct(static_cast<unsigned char>(letter)); };
    auto bracket = [&] {
        if (peek() == '^') at++;
        // The last one: 0 for none, 1 for one that a range can begin with, 2 for a class or the end of a range.
        for (int last = 0, count = 0;; count++) {
            char letter = peek();
            if (!letter || letter == '[' || (letter == ']' && count == 0)) return false;
            at++;
            if (letter == ']') return true;
            if (letter == '-' && count > 0 && peek() != ']') {
                bool is_escaped = peek() == '\\';
                if (last != 1 || !peek() || std::strchr("-[", peek())) return false;
                if (is_escaped && !is_sign(peek(1))) return false;
                at += is_escaped ? 2 : 1;
                last = 2;
                continue;
            }
            // Python warns of these, twice in a row: a later one may give them a meaning.
            if (std::strchr("&~|-", letter) && peek() == letter) return false;
            last = letter == '-' ? 2 : 1;
            if (letter != '\\') continue;
            if (!is_class(peek()) && !is_sign(peek())) return false;
            last = is_class(peek()) ? 2 : 1;
            at++;
        }
    };
    auto quantifier = [&](char letter) {
        if (!repeatable) return false;
        if (letter == '{') {
            size_t first = at;
            while (is_digit(peek())) at++;
            if (at == first || at - first > 4) return false;
            if (peek() == ',')
                for (at++, first = at; is_digit(peek()); at++)
                    if (at - first > 3) return false;
            if (peek() != '}') return false;
            at++;
        }
        if (peek() == '?') at++;
        repeatable = false;
        return true;
    };
    while (at < pattern.size()) {
        char letter = pattern[at++];
        if (letter <= 0 || letter == '}' || letter == ']') return false;
        if (std::strchr("*+?{", letter)) {
            if (!quantifier(letter)) return false;
            continue;
        }
        repeatable = letter != '|' && letter != '^' && letter != '$' && letter != '(';
        if (letter == '(') {
            if (++depth > 100) return false;
            if (peek() == '?' && peek(1) != ':') return false;
            at += peek() == '?' ? 2 : 0;
        } else if (letter == ')') {
            if (depth-- == 0) return false;
        } else if (letter == '[') {
            if (!bracket()) return false;
        } else if (letter == '\\') {
            char following = peek();
            bool is_edge = following == 'b' || following == 'B';
            if (!is_edge && !is_class(following) && !is_sign(following)) return false;
            repeatable = !is_edge;
            at++;
        }
    }
    return depth == 0;
}

inline std::regex expression(const std::string& pattern, const std::string& where) {
    try {
        if (is_read_alike(pattern)) return std::regex(pattern);
    } catch (const std::regex_error&) {
    }
    refuse(where, "a regular expression that std::regex reads as Python does", pattern.substr(0, 200),
           "Write it without what only Python knows, or list the names of the modules.");
}

class Config {
   public:
    Config(const std::filesystem::path& path, const Json& known) : where(path), json(Json::parse(read_file(path), path)) {
        if (json.kind != Json::OBJECT) refuse(where, "a JSON object", json.shown(), COPY_AGAIN);
        if (json.at("peft_type").kind != Json::TEXT || json.at("peft_type").text != "LORA")
            refuse(where, "a plain LoRA adapter", "peft_type=" + json.at("peft_type").shown(), "Serve it with PEFT.");
        for (size_t i = 0; i < json.names.size(); i++) check_field(json.names[i], json.items[i], known);
        target = rule("target_modules"), exclude = rule("exclude_modules");
        if (json.at("target_modules").kind == Json::NOTHING) refuse(where, "target_modules", "null", WRITE_FIELD);
        rank_ = integer("r", json.at("r"), 8);
        alpha_ = number("lora_alpha", json.at("lora_alpha"), 8);
        const Json& rs = json.at("use_rslora");
        if (rs.is_true() && rs.kind != Json::TRUE)
            refuse(where + ": use_rslora", "true or false", rs.shown(), WRITE_FIELD);
        is_rs = rs.is_true();
        if (json.at("ensure_weight_tying").is_true())
            refuse(where, "an adapter without ensure_weight_tying", "one with it", "Load it in Python.");
        for (const char* name : {"rank_pattern", "alpha_pattern"}) {
            const Json& patterns = json.at(name);
            if (patterns.kind != Json::NOTHING && patterns.kind != Json::OBJECT)
                refuse(where + ": " + name, "an object of names and numbers", patterns.shown(), WRITE_FIELD);
            for (size_t i = 0; i < patterns.names.size(); i++) {
                expression(patterns.names[i], where + ": " + name);
                std::regex compiled("(.*\\.)?(" + patterns.names[i] + ")");
                if (name[0] == 'r')
                    ranks.emplace_back(compiled, integer(name, patterns.items[i], 0));
                else
                    alphas.emplace_back(compiled, number(name, patterns.items[i], 0));
            }
        }
        const Json& layers = json.at("layers_to_transform");
        if (layers.kind == Json::INTEGER) {
            chosen.insert(layers.integer());
        } else {
            for (const Json& layer : listed("layers_to_transform", Json::INTEGER, "an integer, or a list of integers"))
                chosen.insert(layer.integer());
        }
        const Json& patterns = json.at("layers_pattern");
        std::vector<std::string> written;
        if (patterns.kind == Json::TEXT && !patterns.text.empty()) {
            written = {patterns.text};
        } else {
            for (const Json& pattern : listed("layers_pattern", Json::TEXT, "a name or a list of names"))
                written.push_back(pattern.text);
        }
        if (!chosen.empty() && json.at("target_modules").kind == Json::TEXT)
            refuse(where + ": layers_to_transform", "no layers, where target_modules is one string", layers.shown(),
                   WRITE_FIELD);
        if (!written.empty() && chosen.empty())
            refuse(where + ": layers_pattern", "no pattern, where layers_to_transform is not set", patterns.shown(),
                   WRITE_FIELD);
        for (const std::string& pattern : written) {
            expression(pattern, where + ": layers_pattern");
            of_layer.emplace_back("(?:^|.*?\\.)" + pattern + "\\.(\\d+)\\.");
        }
        if (written.empty()) of_layer.emplace_back(".*?\\.[^.]*\\.(\\d+)\\.");
    }

    bool targets(const std::string& name, bool plain_linear) const {
        std::string full = part.empty() ? name : part + "." + name;
        const Json& given = json.at("target_modules");
        if (exclude.names(full)) return false;
        std::string lower = given.text;
        for (char& letter : lower) letter = char(std::tolower(static_cast<unsigned char>(letter)));
        if (!(given.kind == Json::TEXT && lower == "all-linear" ? plain_linear : target.names(full))) return false;
        if (chosen.empty() || given.has(full)) return true;
        for (const std::regex& pattern : of_layer) {
            std::smatch match;
            if (std::regex_search(full, match, pattern, std::regex_constants::match_continuous)) {
                std::string index = match[match.size() - 1];
                // Where the pattern has alternatives, one of them may end before the number.
                return !index.empty() && index.size() < 10 && chosen.count(std::stoll(index));
            }
        }
        return false;
    }

    int64_t rank(const std::string& name) const { return first_match(ranks, name, rank_); }

    double scaling(const std::string& name) const {
        double alpha = first_match(alphas, name, alpha_), r = double(rank(name));
        return alpha / (is_rs ? std::sqrt(r) : r);
    }

    // The name that the model has inside of the one that the adapter was trained on.
    std::string part;

   private:
    struct Rule {
        std::vector<std::string> ends;
        std::optional<std::regex> whole;
        bool names(const std::string& name) const {
            if (whole) return std::regex_match(name, *whole);
            for (const std::string& end : ends) {
                std::string tail = "." + end;
                if (name == end || (name.size() > tail.size() && name.compare(name.size() - tail.size(), tail.size(), tail) == 0))
                    return true;
            }
            return false;
        }
    };

    Rule rule(const std::string& name) const {
        const Json& value = json.at(name);
        Rule found;
        if (value.kind == Json::TEXT && !value.text.empty()) {
            found.whole = expression(value.text, where + ": " + name);
            return found;
        }
        for (const Json& item : listed(name, Json::TEXT, "a list of names, or a regular expression"))
            found.ends.push_back(item.text);
        return found;
    }

    // The items of a field that is a list, or is not set.
    std::vector<Json> listed(const std::string& name, Json::Kind kind, const std::string& wanted) const {
        const Json& value = json.at(name);
        if (!value.is_true() && value.kind != Json::INTEGER) return {};
        if (!value.is_list_of(kind)) refuse(where + ": " + name, wanted, value.shown(), WRITE_FIELD);
        return value.items;
    }

    void check_field(const std::string& name, const Json& value, const Json& known) const {
        std::string lower = value.text;
        for (char& letter : lower) letter = char(std::tolower(static_cast<unsigned char>(letter)));
        bool fine = known.at("read").has(name) || known.at("ignored").has(name) || is_unset(value);
        if (known.at("refused").has(name)) fine = !value.is_true();
        if (name == "bias") fine = !value.is_true() || value.text == "none";
        if (name == "init_lora_weights")
            fine = !value.is_true() || value.kind == Json::TRUE || (value.kind == Json::TEXT && known.at("inits").has(lower));
        if (!fine)
            refuse(where, "a plain LoRA adapter", "one with " + name.substr(0, 100) + "=" + value.shown(),
                   "Train the adapter without it, or merge it with PEFT; xlc.load_artifact in Python says more.");
    }

    static bool is_unset(const Json& value) {
        if (value.kind == Json::TEXT) return value.text.empty() || value.text == "none" || value.text == "null";
        if (value.kind == Json::INTEGER || value.kind == Json::NUMBER || value.kind == Json::TRUE) return false;
        return std::all_of(value.items.begin(), value.items.end(), is_unset);
    }

    int64_t integer(const std::string& name, const Json& value, int64_t otherwise) const {
        if (value.kind == Json::NOTHING && otherwise && !std::count(json.names.begin(), json.names.end(), name)) return otherwise;
        if (value.kind != Json::INTEGER || value.integer() < 1 || value.integer() >= (int64_t(1) << 31))
            refuse(where + ": " + name, "an integer of at least 1", value.shown(), WRITE_FIELD);
        return value.integer();
    }

    double number(const std::string& name, const Json& value, double otherwise) const {
        if (value.kind == Json::NOTHING && otherwise && !std::count(json.names.begin(), json.names.end(), name)) return otherwise;
        if ((value.kind != Json::INTEGER && value.kind != Json::NUMBER) || !(std::abs(value.number()) < 1e300))
            refuse(where + ": " + name, "a finite number", value.shown(), WRITE_FIELD);
        return value.number();
    }

    template <typename T>
    T first_match(const std::vector<std::pair<std::regex, T>>& patterns, const std::string& name, T otherwise) const {
        std::string full = part.empty() ? name : part + "." + name;
        for (const auto& [pattern, value] : patterns)
            if (std::regex_match(full, pattern)) return value;
        return otherwise;
    }

    std::string where;
    Json json;
    Rule target, exclude;
    int64_t rank_ = 0;
    double alpha_ = 0;
    bool is_rs = false;
    std::vector<std::pair<std::regex, int64_t>> ranks;
    std::vector<std::pair<std::regex, double>> alphas;
    std::set<int64_t> chosen;
    std::vector<std::regex> of_layer;
};

// ---- The artifact.

// An adapter, or none, for each sequence.
using Names = std::vector<std::optional<std::string>>;

// Of a part of the model; and how many rows each sequence has there, where they are packed in one row.
struct Part {
    Names adapters;
    std::vector<int64_t> lengths;
};

class Served {
   public:
    // Calls run at the same time as far as there are runners; each has memory of its own for what it computes.
    explicit Served(const std::string& path, size_t runners = 1) : where(path) {
        guarded(path, "a file that xlc.export wrote", COPY_ARTIFACT, [&] { open(path, runners); });
    }

    // Put the adapter of a PEFT folder into a free slot, beside calls that are running: none of them reads that slot. All
    // that can be wrong is found before anything is written. Returns when all of it is there, on a GPU too.
    void load(const std::string& name, const std::filesystem::path& folder) {
        { std::lock_guard writing(writers); free_slot(name); }
        auto pairs = guarded(folder, "an adapter that can be read", COPY_AGAIN, [&] { return read(folder); });
        std::lock_guard writing(writers);
        size_t slot = free_slot(name);
        int64_t rank = 0;
        for (auto& [module_name, module] : modules) {
            module.a[slot].zero_(), module.b[slot].zero_();
            auto found = pairs.find(module_name);
            if (found == pairs.end()) continue;
            at::Tensor a = module.is_embedding ? found->second.first.t() : found->second.first, b = found->second.second;
            module.a[slot].narrow(0, 0, a.size(0)).narrow(1, 0, a.size(1)).copy_(a);
            module.b[slot].narrow(0, 0, b.size(0)).narrow(1, 0, b.size(1)).copy_(b);
            rank = std::max(rank, b.size(1));
        }
        if (ranks.defined()) ranks[slot].fill_(rank);
        wait_for_this_stream();
        std::lock_guard entering(entrance);
        std::unique_lock lock(mutex);
        slots[slot] = name;
    }

    // Empty the slot of an adapter, when no call is running, and a GPU is done with those that have returned; calls that
    // come meanwhile wait.
    void drop(const std::string& name) {
        std::lock_guard writing(writers);
        std::lock_guard entering(entrance);
        std::unique_lock lock(mutex);
        size_t slot = slot_of(name);
        wait();
        slots[slot].reset();
    }

    // The outputs, for inputs in the order of `asked`, with the adapter of each sequence. Lengths and parts are those that
    // `use` has in Python, for a model that was exported in a block with some; parts by their whole names.
    std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs, const Names& adapters,
                                const std::vector<int64_t>& lengths = {}, std::map<std::string, Part> parts = {}) {
        auto sizes = checked_sizes(inputs);
        parts[""] = {adapters, lengths};
        std::vector<Names> rows = checked_rows(std::move(parts), sizes);
        std::shared_lock<std::shared_mutex> lock;
        {
            // Calls that come while a load or a drop waits let it go first.
            std::lock_guard entering(entrance);
            lock = std::shared_lock(mutex);
        }
        std::vector<at::Tensor> given;
        for (const Names& names : rows) {
            at::Tensor found = at::empty({int64_t(names.size())}, at::kInt);
            for (size_t row = 0; row < names.size(); row++)
                found.data_ptr<int32_t>()[row] = names[row] ? int32_t(slot_of(*names[row])) : -1;
            // A GPU has read them by the time that this returns, and does not wait for what it was given before.
            given.push_back(device.is_cpu() ? found : found.to(device, at::kInt, /*non_blocking=*/true));
            if (given.size() == 1 && ranks.defined()) given.push_back(ranks);
        }
        for (const at::Tensor& input : inputs) given.push_back(input.contiguous());
        return loader->run(given);
    }

    // Wait until the GPU has done all that it was given, on any stream; on a CPU nothing is left to wait for.
    void wait() const {
        if (!device.is_cpu()) c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
    }

    // What the manifest says of the inputs that `run` takes: its first ones are those that `run` adds.
    std::vector<Json> asked() const {
        const auto& listed = manifest.at("inputs").items;
        return {listed.begin() + std::ptrdiff_t(manifest.at("rows").items.size() + ranks.defined()), listed.end()};
    }

    Json manifest;

    // Where inputs have to be.
    at::Device device = at::kCPU;

   private:
    struct Module {
        bool is_embedding, is_padded;
        int64_t in_features, out_features;
        at::Tensor a, b;
    };
    using Pair = std::pair<at::Tensor, at::Tensor>;

    void open(const std::string& path, size_t runners) {
        caffe2::serialize::PyTorchStreamReader archive(path);
        auto record = [&](const std::string& name) {
            auto [data, size] = archive.getRecord("xpu_lora/" + name);
            return std::string(static_cast<const char*>(data.get()), size);
        };
        if (!archive.hasRecord("xpu_lora/manifest.json"))
            refuse(where, "a file that xlc.export wrote", "another", COPY_ARTIFACT);
        // Before anything of it is run.
        check_sums(archive, path);
        manifest = Json::parse(record("manifest.json"), where);
        check_versions();
        device = found_device();
        check_capability();
        // Before the code, which looks its ops up as it is loaded.
        if (manifest.at("library").kind == Json::TEXT) load_library(record(manifest.at("library").text));
        loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path, "model", false, runners, device.index());
        slots.resize(manifest.at("slots").integer());
        if (manifest.at("ranks").is_true()) ranks = at::zeros({int64_t(slots.size())}, at::TensorOptions(at::kInt).device(device));
        std::unordered_map<std::string, at::Tensor> constants;
        const Json &listed = manifest.at("modules"), &aliases = manifest.at("aliases");
        for (auto& [name, tensor] : Tensors(record("weights.safetensors"), path).named) {
            const Json& strides = manifest.at("strides").at(name);
            if (strides.kind == Json::LIST)
                tensor = at::empty_strided(tensor.sizes(), strides.integers(), tensor.options()).copy_(tensor);
            constants[name] = weights[name] = tensor.to(device);
        }
        for (size_t i = 0; i < aliases.names.size(); i++)
            constants[aliases.names[i]] = weights[aliases.names[i]] = weights.at(aliases.items[i].text);
        for (size_t i = 0; i < listed.names.size(); i++) {
            const Json& site = listed.items[i];
            at::ScalarType dtype = dtype_of(site.at("dtype").text);
            Module module{site.at("kind").text == "embedding", site.at("padded").is_true(),
                          site.at("in_features").integer(),    site.at("out_features").integer(),
                          stack(site.at("a"), dtype, constants), stack(site.at("b"), dtype, constants)};
            if (narrowest != at::kHalf && dtype != at::kFloat) narrowest = dtype;
            modules.emplace(listed.names[i], module);
        }
        // The code reads this memory: to load an adapter is to write there.
        loader->load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
    }

    void check_versions() const {
        if (manifest.at("format").integer() != FORMAT)
            refuse(where, "an artifact of format " + std::to_string(FORMAT), "one of format " + manifest.at("format").text,
                   EXPORT_AGAIN);
        std::string made = manifest.at("torch").text;
        if (made.substr(0, made.find('+')) != std::string(TORCH_VERSION).substr(0, std::string(TORCH_VERSION).find('+')))
            refuse(where, std::string("an artifact for torch ") + TORCH_VERSION, "one made with torch " + made, EXPORT_AGAIN);
        utsname here{};
        if (uname(&here) == 0 && manifest.at("machine").text != here.machine)
            refuse(where, std::string("an artifact for machine ") + here.machine,
                   "one made with machine " + manifest.at("machine").text, EXPORT_AGAIN);
        std::ifstream file("/proc/cpuinfo");
        for (std::string line; std::getline(file, line);) {
            if (line.rfind("flags", 0) && line.rfind("Features", 0)) continue;
            std::istringstream words(line);
            std::set<std::string> has{std::istream_iterator<std::string>(words), {}};
            for (const std::string& needed : manifest.at("instructions").texts())
                if (!has.count(needed))
                    refuse(where, "an artifact for this processor", "one that needs " + needed, EXPORT_AGAIN);
            break;
        }
    }

    // The current one of its type: that on which the code runs.
    at::Device found_device() const {
        at::Device type(manifest.at("device").text);
        if (type.is_cpu()) return type;
        if (!c10::impl::hasDeviceGuardImpl(type.type()))
            refuse(where, "a program with torch's library for " + type.str(), "one that is linked without it",
                   "Link torch_" + type.str() + " and c10_" + type.str() + ", with -Wl,--no-as-needed.");
        c10::impl::VirtualGuardImpl guard(type.type());
        if (guard.deviceCount() == 0)
            refuse(where, "a machine with a device for " + type.str(), "none",
                   "Load the file where there is one, or export the model on a CPU.");
        return guard.getDevice();
    }

    void check_capability() const {
        std::string made = manifest.at("capability").text, here = device.is_cuda() ? capability() : "";
        if (made != here)
            refuse(where, "an artifact for " + (here.empty() ? device.str() : "the compute capability " + here),
                   "one made for " + (made.empty() ? "none" : "the compute capability " + made),
                   "Export the model again on such a GPU, or make a GPU of that capability the current one.");
    }

    // Of CUDA's driver, whose headers need not be here.
    std::string capability() const {
        void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
        auto find = [&](const char* name) { return driver ? dlsym(driver, name) : nullptr; };
        auto number = reinterpret_cast<int (*)(int*, int)>(find("cuDeviceGet"));
        auto attribute = reinterpret_cast<int (*)(int*, int, int)>(find("cuDeviceGetAttribute"));
        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
        int gpu = 0, major = 0, minor = 0;
        if (!number || !attribute || number(&gpu, device.index()) || attribute(&major, 75, gpu) || attribute(&minor, 76, gpu))
            refuse(where, "a driver that tells the compute capability of " + device.str(), "none",
                   "Install the driver of the GPU, so that libcuda.so.1 is found.");
        return std::to_string(major) + "." + std::to_string(minor);
    }

    void wait_for_this_stream() const {
        if (device.is_cpu()) return;
        c10::impl::VirtualGuardImpl guard(device.type());
        guard.synchronizeStream(guard.getStream(device));
    }

    static void load_library(const std::string& content) {
        std::string path = std::filesystem::temp_directory_path() / "xpu-lora-XXXXXX";
        int file = mkstemp(path.data());
        bool written = file >= 0 && write(file, content.data(), content.size()) == ssize_t(content.size());
        if (file >= 0) close(file);
        void* library = written ? dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) : nullptr;
        std::string why = library ? "" : written ? dlerror() : "no room there";
        if (file >= 0) unlink(path.c_str());
        if (!library) refuse(path, "the library of the artifact", why);
    }

    at::Tensor stack(const Json& given, at::ScalarType dtype, std::unordered_map<std::string, at::Tensor>& constants) const {
        auto options = at::TensorOptions(dtype).device(device);
        at::Tensor made = at::empty_strided(given.at("shape").integers(), given.at("stride").integers(), options).zero_();
        return constants[given.at("constant").text] = made;
    }

    size_t free_slot(const std::string& name) const {
        if (name.empty()) refuse("load", "a name for the adapter", "none");
        size_t found = slots.size();
        for (size_t slot = slots.size(); slot-- > 0;) {
            if (!slots[slot]) found = slot;
            if (slots[slot] == name) refuse("load " + name, "a name that is free", "one of an adapter that is loaded");
        }
        if (found == slots.size()) refuse("load " + name, "a free slot", std::to_string(found) + ", all taken");
        return found;
    }

    size_t slot_of(const std::string& name) const {
        for (size_t slot = 0; slot < slots.size(); slot++)
            if (slots[slot] == name) return slot;
        refuse("adapter " + name, "one that is loaded", "another");
    }

    // The values of the sizes that are no numbers; the code itself checks nothing.
    std::map<std::string, int64_t> checked_sizes(const std::vector<at::Tensor>& given) const {
        const std::vector<Json> wanted = asked();
        if (given.size() != wanted.size()) refuse("inputs", std::to_string(wanted.size()), std::to_string(given.size()));
        std::map<std::string, int64_t> sizes;
        for (size_t i = 0; i < given.size(); i++) {
            const Json& input = wanted[i];
            const auto& shape = input.at("shape").items;
            if (given[i].device() != device)
                refuse(input.at("name").text, "a tensor on " + device.str(), "one on " + given[i].device().str(),
                       "Move it: tensor.to(device).");
            bool fits = given[i].scalar_type() == dtype_of(input.at("dtype").text) && given[i].dim() == int64_t(shape.size());
            for (size_t d = 0; fits && d < shape.size(); d++) {
                int64_t size = given[i].size(d);
                if (shape[d].kind == Json::INTEGER) {
                    fits = size == shape[d].integer();
                    continue;
                }
                fits = is_allowed(shape[d].text, size) && sizes.emplace(shape[d].text, size).first->second == size;
            }
            std::ostringstream got;
            if (!fits) got << given[i].dtype() << " of shape " << given[i].sizes();
            if (!fits) refuse(input.at("name").text, "the dtype and shape that the manifest says", got.str());
        }
        return sizes;
    }

    bool is_allowed(const std::string& name, int64_t size) const {
        const auto& limits = manifest.at("sizes").at(name).items;
        return size >= limits[0].integer() && (limits[1].kind == Json::NOTHING || size <= limits[1].integer());
    }

    // The adapter of each row: of the model, and of each part whose slots are an input, in that order.
    std::vector<Names> checked_rows(std::map<std::string, Part> given, const std::map<std::string, int64_t>& sizes) const {
        const Json& wanted = manifest.at("rows");
        std::vector<Names> found;
        for (size_t i = 0; i < wanted.names.size(); i++) {
            const std::string &part = wanted.names[i], name = part.empty() ? "adapters" : "parts[\"" + part + "\"]";
            auto named = given.find(part);
            if (named == given.end()) refuse(name, "names for its rows", "none", "Pass them in `parts`.");
            const auto& [names, lengths] = named->second;
            bool is_packed = wanted.items[i].is_true();
            bool are_positive = std::all_of(lengths.begin(), lengths.end(), [](int64_t length) { return length > 0; });
            if (lengths.size() != (is_packed ? names.size() : 0) || !are_positive)
                refuse(name, is_packed ? "a length of at least 1 for each name" : "names without lengths",
                       std::to_string(lengths.size()) + " lengths for " + std::to_string(names.size()) + " names",
                       "Pass lengths where the model was exported with some, and only there.");
            found.push_back(is_packed ? Names() : names);
            for (size_t at = 0; at < lengths.size(); at++) found.back().insert(found.back().end(), size_t(lengths[at]), names[at]);
            // The second input is the ranks, if any is.
            const Json& batch = manifest.at("inputs").items[i + (i && ranks.defined())].at("shape").items[0];
            int64_t count = int64_t(found.back().size()), size = batch.kind == Json::INTEGER ? batch.integer() : count;
            if (auto known = sizes.find(batch.text); known != sizes.end()) size = known->second;
            if (count != size || (batch.kind == Json::TEXT && !is_allowed(batch.text, count)))
                refuse(name, "one name for each sequence", std::to_string(count) + " for a batch of " + std::to_string(size),
                       "Name an adapter, or none, for every sequence of the batch. Lengths have to add up to its size.");
            given.erase(named);
        }
        if (!given.empty())
            refuse("parts", "parts that the model was exported with", given.begin()->first, "Leave it out, or export with it.");
        return found;
    }

    // What a key means: A or B of a module, or, without a part, another weight of the model.
    struct Key {
        std::string module, part, adapter;
    };

    static Key parse_key(const std::string& key, const std::string& file) {
        static const std::set<std::string> wrappers = {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module",
                                                       "_checkpoint_wrapped_module", "_forward_module"};
        static const std::string prefix = "base_model.model.";
        std::string name;
        // Empty words are kept, so that no dot goes unseen.
        for (size_t start = 0, end = 0, kept = 0; end != std::string::npos; start = end + 1) {
            end = key.find('.', start);
            std::string word = key.substr(start, end == std::string::npos ? end : end - start);
            if (!wrappers.count(word)) name += (kept++ ? "." : "") + word;
        }
        while (name.rfind("module.", 0) == 0 && name.find(prefix) != std::string::npos) name.erase(0, 7);
        if (name.rfind(prefix, 0) != 0 || name.size() > 1000) refuse(file, "keys that begin with " + prefix, key);
        static const std::regex form(
            R"((.+?)\.(?:(lora_[AB])(?:\.([^.]+))?\.weight|(lora_embedding_[AB])(?:\.([^.]+))?))");
        std::smatch match;
        name.erase(0, prefix.size());
        if (!std::regex_match(name, match, form)) return {name, "", ""};
        return {match[1], match[2].matched ? match[2].str() + ".weight" : match[4].str(),
                match[3].matched ? match[3].str() : match[5].str()};
    }

    bool knows(const std::string& name) const {
        return modules.count(name) || std::count(manifest.at("base").at("others").names.begin(), manifest.at("base").at("others").names.end(), name);
    }

    std::string module_of(std::string name, const std::string& file) const {
        if (knows(name)) return name;
        for (bool more = true; more;) {
            more = false;
            for (const std::string start : {"base_model.model.", "module."})
                if (name.rfind(start, 0) == 0) name.erase(0, start.size()), more = true;
        }
        if (knows(name)) return name;
        std::string prefix = manifest.at("base").at("prefix").text + ".";
        bool has_prefix = prefix == ".";
        for (const auto& [other, module] : modules) has_prefix = has_prefix || other.rfind(prefix, 0) == 0;
        if (!has_prefix && name.rfind(prefix, 0) == 0 && knows(name.substr(prefix.size()))) return name.substr(prefix.size());
        refuse(file, "names of modules that the model has", "LoRA on " + name);
    }

    std::map<std::string, Pair> read(const std::filesystem::path& folder) const {
        Config config(folder / "adapter_config.json", manifest.at("fields"));
        std::string file = folder / "adapter_model.safetensors";
        Tensors tensors(file);
        std::string whole = manifest.at("base").at("prefix").text + ".", adapter;
        std::map<std::string, std::map<std::string, at::Tensor>> found;
        for (const auto& [text, tensor] : tensors.named) {
            Key key = parse_key(text, file);
            if (key.part.empty()) {
                check_copy(key.module, tensor, file);
                continue;
            }
            std::string name = module_of(key.module, file), end = whole + name;
            if (whole != "." && name.rfind(whole, 0) != 0 && key.module.size() >= end.size() &&
                key.module.compare(key.module.size() - end.size(), end.size(), end) == 0)
                config.part = whole.substr(0, whole.size() - 1);
            if (!key.adapter.empty() && !adapter.empty() && adapter != key.adapter)
                refuse(file, "the weights of one adapter", "those of " + adapter + " and " + key.adapter);
            adapter = key.adapter.empty() ? adapter : key.adapter;
            if (!found[name].emplace(key.part, tensor).second) refuse(file, "one tensor for " + name, text);
        }
        std::map<std::string, Pair> pairs;
        for (const auto& [name, module] : modules) {
            if (!config.targets(name, !module.is_embedding && !module.is_padded)) continue;
            std::string at = file + ": " + name, kind = module.is_embedding ? "lora_embedding_" : "lora_";
            std::string end = module.is_embedding ? "" : ".weight";
            auto parts = found.find(name);
            if (parts == found.end() || !parts->second.count(kind + "A" + end) || !parts->second.count(kind + "B" + end))
                refuse(at, "A and B for every targeted module", "a file without them");
            if (parts->second.size() != 2) refuse(at, "A and B alone", "more");
            int64_t rank = config.rank(name), most = manifest.at("max_rank").integer();
            if (rank > most) refuse(at, "a rank of at most " + std::to_string(most), std::to_string(rank));
            at::Tensor a = parts->second.at(kind + "A" + end), b = parts->second.at(kind + "B" + end);
            bool tokens_in_a = module.is_embedding && module.is_padded, tokens_in_b = !module.is_embedding && module.is_padded;
            check_shape(at + " A", a, rank, module.in_features, 0, tokens_in_a ? 1 : -1);
            check_shape(at + " B", b, module.out_features, rank, 1, tokens_in_b ? 0 : -1);
            pairs[name] = {finite(at + " A", a, 1), finite(at + " B", b, config.scaling(name))};
            found.erase(parts);
        }
        if (pairs.empty()) refuse(file, "an adapter for modules of this artifact", "one for none of them");
        if (!found.empty()) refuse(file, "only modules that the adapter targets and the artifact covers", found.begin()->first);
        return pairs;
    }

    // PEFT saves copies of the embeddings along with LoRA on them: they must be the model's own.
    void check_copy(const std::string& name, const at::Tensor& copy, const std::string& file) const {
        std::string whole = name;
        if (size_t at = whole.find("base_layer."); at != std::string::npos) whole.erase(at, 11);
        const Json& base = manifest.at("base");
        auto own = weights.find(base.at("constants").text + whole);
        for (const Json& names : base.at("tied").items)
            for (const Json& other : names.items)
                if (own == weights.end() && whole.size() > 7 && names.has(whole.substr(0, whole.size() - 7)))
                    own = weights.find(base.at("constants").text + other.text + ".weight");
        if (own == weights.end()) refuse(file, "only lora_A and lora_B of modules", name);
        at::Tensor wanted = own->second.cpu(), got = copy;
        bool fits = got.dim() == wanted.dim() && got.dim() > 0 && got.size(0) <= wanted.size(0) &&
                    got.sizes().slice(1) == wanted.sizes().slice(1);
        if (fits) wanted = wanted.narrow(0, 0, got.size(0));
        // Either may have been rounded to the other's dtype.
        if (!fits || !(at::equal(got.to(wanted.scalar_type()), wanted) || at::equal(got, wanted.to(got.scalar_type()))))
            refuse(file + ": " + name, "a copy of the model's own weight", "other values, or another size");
    }

    static void check_shape(const std::string& at, const at::Tensor& tensor, int64_t rows, int64_t columns, int rank_axis, int token_axis) {
        bool fits = tensor.dim() == 2 && (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16 ||
                                          tensor.scalar_type() == at::kHalf);
        for (int axis = 0; fits && axis < 2; axis++) {
            int64_t size = tensor.size(axis), wanted = axis ? columns : rows;
            fits = size == wanted || (axis == token_axis && axis != rank_axis && size > 0 && size < wanted);
        }
        std::ostringstream wanted, got;
        wanted << "F32, BF16 or F16 of shape [" << rows << ", " << columns << "]" << (token_axis < 0 ? "" : " at most");
        got << tensor.dtype() << " of shape " << tensor.sizes();
        if (!fits) refuse(at, wanted.str(), got.str());
    }

    at::Tensor finite(const std::string& at, const at::Tensor& tensor, double scaling) const {
        at::Tensor values = tensor.to(at::kFloat, false, true);
        if (!at::isfinite(values).all().item<bool>()) refuse(at, "finite values", "NaN or infinity");
        values.mul_(scaling);
        if (!at::isfinite(values.to(narrowest)).all().item<bool>())
            refuse(at, std::string("values that the artifact's dtype can hold"), "infinity after scaling");
        return values;
    }

    std::string where;
    // The highest rank of each slot's adapter, if the code asks.
    at::Tensor ranks;
    std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader;
    std::map<std::string, Module> modules;
    std::map<std::string, at::Tensor> weights;
    std::vector<std::optional<std::string>> slots;
    at::ScalarType narrowest = at::kFloat;
    // Of the names of the slots, and of who may change them.
    std::shared_mutex mutex;
    std::mutex writers, entrance;
};

}  // namespace xpu_lora
