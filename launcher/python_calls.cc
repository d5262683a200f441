#include "launcher/python_calls.h"

#include <cctype>
#include <cmath>
#include <cstdint>

#include "absl/strings/numbers.h"

namespace shoal {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMaxDepth = 64;
constexpr std::string_view kSpace = " \t\r\n";  // JSON's, as around the other kinds of calls

// Each method takes what it is named for from the front, or says no.
class Reader {
 public:
  explicit Reader(std::string_view text) : left_(text) {}

  bool Calls(std::vector<PythonCall>* calls) {
    if (!Take('[')) return false;
    do {
      calls->emplace_back();
      if (!Call(&calls->back())) return false;
    } while (Take(','));
    return Take(']') && AtEnd();
  }

 private:
  void SkipSpace() {
    while (!left_.empty() && kSpace.find(left_[0]) != kSpace.npos) left_.remove_prefix(1);
  }
  bool AtEnd() {
    SkipSpace();
    return left_.empty();
  }
  bool Next(char c) {
    SkipSpace();
    return !left_.empty() && left_[0] == c;
  }
  bool Take(char c) {
    if (!Next(c)) return false;
    left_.remove_prefix(1);
    return true;
  }

  bool Name(std::string* name, bool dotted) {
    SkipSpace();
    size_t n = 0;
    while (n < left_.size() && (std::isalnum(static_cast<unsigned char>(left_[n])) != 0 ||
                                left_[n] == '_' || (dotted && left_[n] == '.'))) {
      ++n;
    }
    name->assign(left_.substr(0, n));
    left_.remove_prefix(n);
    return n > 0;
  }

  bool Call(PythonCall* call) {
    call->arguments = Json::object();
    if (!Name(&call->name, /*dotted=*/true) || !Take('(')) return false;
    while (!Next(')')) {
      std::string key;
      if (!Name(&key, /*dotted=*/false) || !Take('=')) return false;
      if (!Value(&call->arguments[key], kMaxDepth)) return false;
      if (!Take(',')) break;
    }
    return Take(')');
  }

  bool Value(Json* value, int depth) {
    if (depth == 0) return false;
    if (Next('[') || Next('(')) return List(value, depth);
    if (Next('{')) return Dict(value, depth);
    if (Next('"') || Next('\'')) return Text(value);
    return Word(value);
  }

  bool List(Json* value, int depth) {
    const char end = Next('[') ? ']' : ')';
    left_.remove_prefix(1);
    *value = Json::array();
    while (!Next(end)) {
      value->emplace_back();
      if (!Value(&value->back(), depth - 1)) return false;
      if (!Take(',')) break;
    }
    return Take(end);
  }

  bool Dict(Json* value, int depth) {
    left_.remove_prefix(1);
    *value = Json::object();
    while (!Next('}')) {
      Json key;
      if (!(Next('"') || Next('\'')) || !Text(&key) || !Take(':')) return false;
      if (!Value(&(*value)[key.get<std::string>()], depth - 1)) return false;
      if (!Take(',')) break;
    }
    return Take('}');
  }

  bool Text(Json* value) {
    const char quote = left_[0];
    std::string text;
    for (size_t i = 1; i < left_.size(); ++i) {
      if (left_[i] == quote) {
        left_.remove_prefix(i + 1);
        *value = std::move(text);
        return true;
      }
      if (left_[i] != '\\' || i + 1 == left_.size()) {
        text += left_[i];
        continue;
      }
      const char c = left_[++i];
      const size_t at = std::string_view("ntr").find(c);
      if (at == std::string_view::npos && c != '\\' && c != '\'' && c != '"') text += '\\';
      text += at == std::string_view::npos ? c : "\n\t\r"[at];
    }
    return false;
  }

  bool Word(Json* value) {
    SkipSpace();
    const std::string_view word = left_.substr(0, left_.find_first_of(",)]} \t\r\n"));
    left_.remove_prefix(word.size());
    int64_t whole = 0;
    double number = 0;
    if (word == "True" || word == "False") {
      *value = word == "True";
    } else if (word == "None") {
      *value = nullptr;
    } else if (absl::SimpleAtoi(absl::string_view(word.data(), word.size()), &whole)) {
      *value = whole;
    } else if (!word.empty() && std::string_view("+-.0123456789").find(word[0]) != word.npos &&
               absl::SimpleAtod(absl::string_view(word.data(), word.size()), &number) &&
               std::isfinite(number)) {
      *value = number;
    } else {
      return false;
    }
    return true;
  }

  std::string_view left_;
};

}  // namespace

std::optional<std::vector<PythonCall>> ReadPythonCalls(std::string_view text) {
  std::vector<PythonCall> calls;
  if (!Reader(text).Calls(&calls)) return std::nullopt;
  return calls;
}

}  // namespace shoal
