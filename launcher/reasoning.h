// What a model thinks before it answers, apart from the answer: clients see it as
// reasoning_content, as vLLM's and llama.cpp's do.
#pragma once

#include <string>
#include <string_view>

namespace shoal {

enum class ReasoningFormat {
  kNone,
  kThink,    // <think>...</think> at the answer's begin (Qwen3, GLM-4.5, DeepSeek-R1)
  kHunyuan,  // the same, then <answer>...</answer>
  kSeed,     // <seed:think>...</seed:think> (Seed-OSS)
  kMistral,  // [THINK]...[/THINK] (Magistral, Ministral 3)
  kHarmony,  // <|channel|>analysis<|message|>... (gpt-oss; github.com/openai/harmony)
  // <|START_THINKING|>...<|END_THINKING|>, then <|START_RESPONSE|>... or <|START_ACTION|>...
  // (Command R7B, Command A; docs.cohere.com)
  kCohere,
};

// As a chat template makes its models write.
ReasoningFormat ReasoningFormatOf(std::string_view chat_template);
// Whether marks of a format are control tokens, which answers must then be given with.
bool NeedsMarks(ReasoningFormat format);
// Whether a rendered prompt ends inside a thought, which the answer then begins with.
bool EndsInThought(ReasoningFormat format, std::string_view prompt);

// One answer has one object. Text that may yet turn out to be a mark is held back. Harmony's calls
// of functions become <tool_call>{"name": ..., "arguments": ...}</tool_call> in the content, which
// ParseToolCalls reads.
class ReasoningSplitter {
 public:
  struct Text {
    std::string reasoning;
    std::string content;
  };
  explicit ReasoningSplitter(ReasoningFormat format = ReasoningFormat::kNone,
                             bool in_thought = false);
  // The next part of the answer, with the marks of special tokens in it.
  Text Push(std::string_view text);
  // The answer ended.
  Text Finish();

 private:
  enum class State { kStart, kThought, kBehindThought, kAnswer, kHeader, kMessage };
  bool Advance(Text* out);
  bool AdvanceStart();
  bool AdvanceThought(Text* out);
  bool AdvanceAnswer(Text* out);
  bool AdvanceHeader(Text* out);
  bool AdvanceMessage(Text* out);
  void Emit(std::string_view text, Text* out);
  void EndMessage(Text* out);

  ReasoningFormat format_;
  State state_;
  std::string held_;
  // Of the harmony message at hand.
  bool thinks_ = false;
  std::string called_;     // the function it calls; empty: none
  std::string arguments_;  // of that call
  bool has_content_ = false;
};

}  // namespace shoal
