#include "launcher/reasoning.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "absl/strings/str_cat.h"
#include "launcher/json_text.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

// Where a thought begins and ends, and what may stand around the answer behind it.
struct Marks {
  ReasoningFormat format;
  std::string_view begin, end;
  bool are_control_tokens;
  std::array<std::string_view, 4> around;  // empty: none
};
// The first whose marks a template speaks of is what its model writes.
constexpr std::array<Marks, 5> kMarks = {{
    {ReasoningFormat::kCohere,
     "<|START_THINKING|>",
     "<|END_THINKING|>",
     true,
     {"<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"}},
    {ReasoningFormat::kSeed, "<seed:think>", "</seed:think>", true, {}},
    {ReasoningFormat::kMistral, "[THINK]", "[/THINK]", true, {}},
    {ReasoningFormat::kHunyuan,
     "<think>",
     "</think>",
     false,
     {"<answer>\n", "\n</answer>", "<answer>", "</answer>"}},
    {ReasoningFormat::kThink, "<think>", "</think>", false, {}},
}};
constexpr std::string_view kChannel = "<|channel|>";
constexpr std::string_view kMessage = "<|message|>";
constexpr std::string_view kStart = "<|start|>";
// What ends a message; the last two begin the next one's header.
constexpr std::array<std::string_view, 5> kMessageEnds = {"<|end|>", "<|return|>", "<|call|>",
                                                          kStart, kChannel};
constexpr std::string_view kSpace = " \t\r\n";
constexpr std::string_view kFunctions = "functions.";
constexpr size_t kHeaderMax = 1024;  // bytes; a longer one is none

const Marks& MarksOf(ReasoningFormat format) {
  return *std::find_if(kMarks.begin(), kMarks.end() - 1,
                       [format](const Marks& m) { return m.format == format; });
}

std::vector<std::string_view> AroundAnswers(ReasoningFormat format) {
  std::vector<std::string_view> marks;
  if (format == ReasoningFormat::kNone || format == ReasoningFormat::kHarmony) return marks;
  for (const std::string_view mark : MarksOf(format).around) {
    if (!mark.empty()) marks.push_back(mark);
  }
  return marks;
}

size_t LeadingSpace(std::string_view s) { return std::min(s.find_first_not_of(kSpace), s.size()); }

std::string_view WithoutTrailingSpace(std::string_view s) {
  return s.substr(0, s.find_last_not_of(kSpace) + 1);  // npos + 1 is 0
}

// Bytes at the end of `s` that `mark` may begin with.
size_t MayBeginAtEnd(std::string_view s, std::string_view mark) {
  for (size_t n = std::min(s.size(), mark.size() - 1); n > 0; --n) {
    if (mark.substr(0, n) == s.substr(s.size() - n)) return n;
  }
  return 0;
}

// The word behind `key` in a header: up to space, the next mark or the end.
std::string_view WordBehind(std::string_view header, std::string_view key) {
  const size_t at = header.find(key);
  if (at == header.npos) return {};
  const std::string_view rest = header.substr(at + key.size());
  return rest.substr(0, rest.find_first_of(" \t\r\n<"));
}

}  // namespace

ReasoningFormat ReasoningFormatOf(std::string_view chat_template) {
  const auto has = [&](std::string_view mark) { return chat_template.find(mark) != mark.npos; };
  if (has(kChannel) && has(kMessage)) return ReasoningFormat::kHarmony;
  for (const Marks& m : kMarks) {
    const bool around = m.format != ReasoningFormat::kHunyuan || has(m.around[3]);
    if (has(m.end) && around) return m.format;
  }
  return ReasoningFormat::kNone;
}

bool NeedsMarks(ReasoningFormat format) {
  return format == ReasoningFormat::kHarmony ||
         (format != ReasoningFormat::kNone && MarksOf(format).are_control_tokens);
}

bool EndsInThought(ReasoningFormat format, std::string_view prompt) {
  prompt = WithoutTrailingSpace(prompt);
  if (format == ReasoningFormat::kNone || format == ReasoningFormat::kHarmony) return false;
  const std::string_view begin = MarksOf(format).begin;
  return prompt.size() >= begin.size() && prompt.substr(prompt.size() - begin.size()) == begin;
}

ReasoningSplitter::ReasoningSplitter(ReasoningFormat format, bool in_thought)
    : format_(format),
      state_(format == ReasoningFormat::kNone ? State::kAnswer
             : in_thought                     ? State::kThought
                                              : State::kStart) {}

ReasoningSplitter::Text ReasoningSplitter::Push(std::string_view text) {
  held_ += text;
  Text out;
  while (!held_.empty() && Advance(&out)) {
  }
  return out;
}

ReasoningSplitter::Text ReasoningSplitter::Finish() {
  Text out;
  switch (state_) {
    case State::kThought:
      out.reasoning = WithoutTrailingSpace(held_);
      break;
    case State::kMessage:
      Emit(held_, &out);
      EndMessage(&out);
      break;
    case State::kHeader:  // of a message that never came
    case State::kBehindThought:
      break;
    default:
      out.content = held_;
  }
  held_.clear();
  return out;
}

// False: more text is needed.
bool ReasoningSplitter::Advance(Text* out) {
  switch (state_) {
    case State::kStart:
      return AdvanceStart();
    case State::kThought:
      return AdvanceThought(out);
    case State::kBehindThought:
      held_.erase(0, LeadingSpace(held_));
      if (!held_.empty()) state_ = State::kAnswer;
      return true;
    case State::kAnswer:
      return AdvanceAnswer(out);
    case State::kHeader:
      return AdvanceHeader(out);
    case State::kMessage:
      return AdvanceMessage(out);
  }
  return false;
}

bool ReasoningSplitter::AdvanceStart() {
  const std::string_view text = std::string_view(held_).substr(LeadingSpace(held_));
  const auto begins = [&](std::string_view mark) { return text.substr(0, mark.size()) == mark; };
  const auto may_begin = [&](std::string_view mark) {
    return MayBeginAtEnd(text, mark) == text.size();
  };
  if (format_ == ReasoningFormat::kHarmony) {
    if (may_begin(kChannel) || may_begin(kStart)) return false;
    state_ = begins(kChannel) || begins(kStart) ? State::kHeader : State::kAnswer;
    return true;
  }
  const std::string_view mark = MarksOf(format_).begin;
  if (may_begin(mark)) return false;
  state_ = begins(mark) ? State::kThought : State::kAnswer;
  if (state_ == State::kThought) held_.erase(0, held_.size() - text.size() + mark.size());
  return true;
}

bool ReasoningSplitter::AdvanceThought(Text* out) {
  if (out->reasoning.empty() && !thinks_) held_.erase(0, LeadingSpace(held_));
  const std::string_view mark = MarksOf(format_).end;
  const size_t end = held_.find(mark);
  const bool ends = end != held_.npos;
  // Space at the end may be the thought's, or what stands before its mark.
  const std::string_view certain = WithoutTrailingSpace(
      std::string_view(held_).substr(0, ends ? end : held_.size() - MayBeginAtEnd(held_, mark)));
  thinks_ = thinks_ || !certain.empty();
  out->reasoning += certain;
  held_.erase(0, ends ? end + mark.size() : certain.size());
  if (ends) state_ = State::kBehindThought;
  return ends;
}

bool ReasoningSplitter::AdvanceAnswer(Text* out) {
  size_t certain = held_.size(), skipped = 0;
  for (const std::string_view mark : AroundAnswers(format_)) {
    const size_t at = held_.find(mark);
    if (at < certain) {
      certain = at;
      skipped = mark.size();
    } else if (const size_t n = MayBeginAtEnd(held_, mark); held_.size() - n < certain) {
      certain = held_.size() - n;
      skipped = 0;
    }
  }
  out->content.append(held_, 0, certain);
  held_.erase(0, certain + skipped);
  return skipped > 0;
}

bool ReasoningSplitter::AdvanceHeader(Text* out) {
  const size_t end = held_.find(kMessage);
  if (end == held_.npos && held_.size() < kHeaderMax + kMessage.size()) return false;
  if (end > kHeaderMax) {  // also where there is none
    state_ = State::kAnswer;
    return true;
  }
  const std::string_view header = std::string_view(held_).substr(0, end);
  thinks_ = WordBehind(header, kChannel) == "analysis";
  called_.clear();
  arguments_.clear();
  const std::string_view recipient = WordBehind(header, "to=");
  if (recipient.substr(0, kFunctions.size()) == kFunctions) {
    called_ = recipient.substr(kFunctions.size());
  } else if (!thinks_ && has_content_) {
    out->content += "\n\n";
  }
  held_.erase(0, end + kMessage.size());
  state_ = State::kMessage;
  return true;
}

bool ReasoningSplitter::AdvanceMessage(Text* out) {
  size_t end = held_.npos, begin_next = 0, may_begin = 0;
  for (size_t i = 0; i < kMessageEnds.size(); ++i) {
    const std::string_view mark = kMessageEnds[i];
    may_begin = std::max(may_begin, MayBeginAtEnd(held_, mark));
    const size_t at = held_.find(mark);
    if (at >= end) continue;
    end = at;
    begin_next = i < 3 ? at + mark.size() : at;
  }
  const bool ends = end != held_.npos;
  const size_t certain = ends ? end : held_.size() - may_begin;
  Emit(std::string_view(held_).substr(0, certain), out);
  held_.erase(0, ends ? begin_next : certain);
  if (!ends) return false;
  EndMessage(out);
  state_ = State::kHeader;
  return true;
}

// Text of the harmony message at hand.
void ReasoningSplitter::Emit(std::string_view text, Text* out) {
  if (!called_.empty()) {
    arguments_ += text;
  } else if (thinks_) {
    out->reasoning += text;
  } else {
    has_content_ = has_content_ || !text.empty();
    out->content += text;
  }
}

void ReasoningSplitter::EndMessage(Text* out) {
  if (called_.empty()) return;
  nlohmann::ordered_json call = {{"name", called_}, {"arguments", arguments_}};
  absl::StrAppend(&out->content, "<tool_call>", DumpJson(call), "</tool_call>");
  called_.clear();
}

}  // namespace shoal
