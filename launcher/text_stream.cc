#include "launcher/text_stream.h"

#include <algorithm>
#include <string_view>
#include <utility>

namespace shoal {
namespace {

// Bytes at the end of `text` that are the beginning of `stop`.
size_t Overlap(std::string_view text, std::string_view stop) {
  for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
    if (text.substr(text.size() - n) == stop.substr(0, n)) return n;
  }
  return 0;
}

}  // namespace

TextStream::TextStream(const Tokenizer& tokenizer, std::vector<std::string> stops,
                       bool render_special)
    : tokenizer_(tokenizer), stops_(std::move(stops)), render_special_(render_special) {}

std::string TextStream::Push(int32_t token) {
  if (stopped_ || tokenizer_.IsEndOfGeneration(token)) return "";
  return Cut(utf8_.Push(tokenizer_.TokenBytes(token, render_special_)));
}

std::string TextStream::Finish() {
  if (stopped_) return "";
  const std::string text = Cut(utf8_.Finish());
  return text + std::exchange(held_, "");
}

std::string TextStream::Cut(const std::string& text) {
  held_ += text;
  size_t first = std::string::npos;
  size_t hold = 0;
  for (const std::string& stop : stops_) {
    first = std::min(first, held_.find(stop));
    hold = std::max(hold, Overlap(held_, stop));
  }
  if (first != std::string::npos) {
    stopped_ = true;
    held_.resize(first);
    return std::exchange(held_, "");
  }
  std::string shown = held_.substr(0, held_.size() - hold);
  held_.erase(0, shown.size());
  return shown;
}

}  // namespace shoal
