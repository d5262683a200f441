#include "launcher/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "launcher/utf8_stream.h"

namespace shoal {
namespace {

// The patterns are linear in the length of a word; a megabyte of one letter needs about one
// million steps. The limit ends what is not, after a second or so.
constexpr uint32_t kMatchLimit = 200'000'000;
// Single-character repeats need no stack; this is ample for the alternatives around them.
constexpr size_t kJitStackBytes = 1 << 20;

std::string Pcre2Message(int code) {
  unsigned char buffer[256];
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

// PCRE2 takes only well-formed UTF-8. A byte that belongs to no character is shown to it as one
// control character, so that offsets stay those of the text.
std::string WithoutBadBytes(std::string_view text) {
  std::string out(text);
  for (size_t i = 0; i < text.size();) {
    const size_t n = Utf8CharLength(text.substr(i));
    if (n == 0) out[i] = '\x1A';
    i += std::max<size_t>(n, 1);
  }
  return out;
}

// What a match needs besides the pattern; one for each call, as PCRE2 asks of threads.
class Scratch {
 public:
  Scratch()
      : data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)),
        stack_(pcre2_jit_stack_create(32 << 10, kJitStackBytes, nullptr)) {
    SHOAL_CHECK(data_ != nullptr && context_ != nullptr, "out of memory");
    pcre2_set_match_limit(context_, kMatchLimit);
    if (stack_ != nullptr) pcre2_jit_stack_assign(context_, nullptr, stack_);
  }
  ~Scratch() {
    if (stack_ != nullptr) pcre2_jit_stack_free(stack_);
    pcre2_match_context_free(context_);
    pcre2_match_data_free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  pcre2_match_data* data() { return data_; }
  pcre2_match_context* context() { return context_; }

 private:
  pcre2_match_data* data_;
  pcre2_match_context* context_;
  pcre2_jit_stack* stack_;
};

// Cuts text[begin, end) at the matches and appends the pieces' ends.
absl::Status SplitPiece(const pcre2_code* code, const std::string& text, int32_t begin, int32_t end,
                        Scratch* scratch, std::vector<int32_t>* ends) {
  // Each piece is a text of its own: what a pattern looks ahead at ends where the piece ends.
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data() + begin);
  const int32_t size = end - begin;
  int32_t done = 0;
  while (done < size) {
    const int rc = pcre2_match(code, subject, size, done, PCRE2_NO_UTF_CHECK, scratch->data(),
                               scratch->context());
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "pre-tokenizer: a word pattern gave up at byte ", begin + done, ": ", Pcre2Message(rc)));
    }
    const size_t* match = pcre2_get_ovector_pointer(scratch->data());
    const auto from = static_cast<int32_t>(match[0]), to = static_cast<int32_t>(match[1]);
    SHOAL_CHECK(to > from && from >= done, "word patterns match at least one character");
    if (from > done) ends->push_back(begin + from);
    ends->push_back(begin + to);
    done = to;
  }
  if (done < size) ends->push_back(end);
  return absl::OkStatus();
}

}  // namespace

struct PreTokenizer::Compiled {
  pcre2_code* code = nullptr;
  ~Compiled() { pcre2_code_free(code); }
};

PreTokenizer::~PreTokenizer() = default;

absl::StatusOr<std::unique_ptr<PreTokenizer>> PreTokenizer::Create(std::string_view name) {
  const PreTokenizerInfo* info = FindPreTokenizer(name);
  if (info == nullptr) {
    return absl::UnimplementedError(absl::StrCat("pre-tokenizer '", std::string(name),
                                                 "' (tokenizer.ggml.pre) is not known; known are ",
                                                 KnownPreTokenizers()));
  }
  auto result = std::unique_ptr<PreTokenizer>(new PreTokenizer);
  result->info_ = info;
  for (const char* pattern : info->patterns) {
    int error = 0;
    size_t offset = 0;
    auto compiled = std::make_unique<Compiled>();
    compiled->code =
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED,
                      PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
    if (compiled->code == nullptr) {
      return absl::InternalError(absl::StrCat("pre-tokenizer ", std::string(name), ": pattern '",
                                              pattern, "' at ", offset, ": ", Pcre2Message(error)));
    }
    // Without JIT (a hardened kernel, say) the interpreter does the same, slower.
    pcre2_jit_compile(compiled->code, PCRE2_JIT_COMPLETE);
    result->compiled_.push_back(std::move(compiled));
  }
  return result;
}

absl::Status PreTokenizer::Split(std::string_view text, std::vector<int32_t>* ends) const {
  const std::string clean = WithoutBadBytes(text);
  std::vector<int32_t> pieces, next;
  if (!clean.empty()) pieces.push_back(static_cast<int32_t>(clean.size()));
  Scratch scratch;
  for (const auto& compiled : compiled_) {
    next.clear();
    int32_t begin = 0;
    for (const int32_t end : pieces) {
      if (auto s = SplitPiece(compiled->code, clean, begin, end, &scratch, &next); !s.ok()) {
        return s;
      }
      begin = end;
    }
    pieces.swap(next);
  }
  ends->insert(ends->end(), pieces.begin(), pieces.end());
  return absl::OkStatus();
}

}  // namespace shoal
