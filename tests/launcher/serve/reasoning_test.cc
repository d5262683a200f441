#include "launcher/reasoning.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "launcher/tool_calls.h"

namespace shoal {
namespace {

using Text = ReasoningSplitter::Text;

Text InPieces(ReasoningSplitter splitter, const std::string& answer, size_t piece) {
  Text all;
  const auto add = [&](const Text& t) {
    all.reasoning += t.reasoning;
    all.content += t.content;
  };
  for (size_t i = 0; i < answer.size(); i += piece) add(splitter.Push(answer.substr(i, piece)));
  add(splitter.Finish());
  return all;
}

// However the answer is cut into pieces.
void Expect(ReasoningFormat format, bool in_thought, const std::string& answer,
            const std::string& reasoning, const std::string& content) {
  for (size_t piece = 1; piece <= answer.size() + 1; ++piece) {
    const Text t = InPieces(ReasoningSplitter(format, in_thought), answer, piece);
    EXPECT_EQ(t.reasoning, reasoning) << answer << " in pieces of " << piece;
    EXPECT_EQ(t.content, content) << answer << " in pieces of " << piece;
  }
}

TEST(Reasoning, FormatsAreThoseThatTemplatesSpeakOf) {
  EXPECT_EQ(ReasoningFormatOf("{{ content.split('</think>')[-1] }}"), ReasoningFormat::kThink);
  EXPECT_EQ(ReasoningFormatOf("<|start|>assistant<|channel|>final<|message|>"),
            ReasoningFormat::kHarmony);
  EXPECT_EQ(ReasoningFormatOf("<|START_THINKING|><|END_THINKING|>"), ReasoningFormat::kCohere);
  EXPECT_EQ(ReasoningFormatOf("<|im_start|>assistant"), ReasoningFormat::kNone);
  EXPECT_TRUE(EndsInThought(ReasoningFormat::kCohere, "<|CHATBOT_TOKEN|><|START_THINKING|>"));
  EXPECT_FALSE(EndsInThought(ReasoningFormat::kCohere, "<|START_THINKING|><|END_THINKING|>"));
  EXPECT_TRUE(EndsInThought(ReasoningFormat::kThink, "<|assistant|>\n<think>\n"));
  EXPECT_FALSE(EndsInThought(ReasoningFormat::kThink, "<think>\n\n</think>\n\n"));
  EXPECT_FALSE(EndsInThought(ReasoningFormat::kNone, "<think>"));
}

TEST(Reasoning, ThoughtsBetweenMarks) {
  constexpr auto kThink = ReasoningFormat::kThink;
  Expect(kThink, false, "<think>\nTwo and two.\n\n</think>\n\nFour.", "Two and two.", "Four.");
  Expect(kThink, true, "\nTwo and\n two.</think>Four. ", "Two and\n two.", "Four. ");
  Expect(kThink, false, "<think>\n\n</think>\n\nFour.", "", "Four.");
  Expect(kThink, false, "Four, <think> is a mark.</think>", "", "Four, <think> is a mark.</think>");
  Expect(kThink, false, "  {\"a\": 4}", "", "  {\"a\": 4}");
  Expect(kThink, false, "<thin", "", "<thin");
  Expect(kThink, true, "cut off </thi", "cut off </thi", "");
  Expect(ReasoningFormat::kNone, false, "<think>text</think>", "", "<think>text</think>");
}

TEST(Reasoning, CoheresMarks) {
  constexpr auto kCohere = ReasoningFormat::kCohere;
  Expect(kCohere, false,
         "<|START_THINKING|>Two <|and two.<|END_THINKING|><|START_RESPONSE|>Four <|.\n"
         "<|END_RESPONSE|>",
         "Two <|and two.", "Four <|.\n");
  Expect(kCohere, true, "Hm.<|END_THINKING|><|START_TEXT|>Four.<|END_TEXT|>", "Hm.", "Four.");
  Expect(kCohere, false, "<|START_RESPONSE|>Four.<|END_RES", "", "Four.<|END_RES");
  Expect(kCohere, false, "Four. ", "", "Four. ");
  Expect(kCohere, false,
         "<|START_THINKING|>Ask.<|END_THINKING|><|START_ACTION|>[{\"tool_name\": \"f\"}]"
         "<|END_ACTION|>",
         "Ask.", "<|START_ACTION|>[{\"tool_name\": \"f\"}]<|END_ACTION|>");
}

TEST(Reasoning, OtherMarksAroundThoughts) {
  EXPECT_EQ(ReasoningFormatOf("[THINK]{{ x }}[/THINK]"), ReasoningFormat::kMistral);
  EXPECT_EQ(ReasoningFormatOf("<seed:think>{{ x }}</seed:think>"), ReasoningFormat::kSeed);
  EXPECT_EQ(ReasoningFormatOf("<think></think><answer></answer>"), ReasoningFormat::kHunyuan);
  EXPECT_TRUE(NeedsMarks(ReasoningFormat::kMistral));
  EXPECT_FALSE(NeedsMarks(ReasoningFormat::kHunyuan));
  EXPECT_FALSE(NeedsMarks(ReasoningFormat::kNone));
  Expect(ReasoningFormat::kMistral, false, "[THINK]Two.[/THINK]Four.", "Two.", "Four.");
  Expect(ReasoningFormat::kSeed, false, "<seed:think>Two.</seed:think>\nFour.", "Two.", "Four.");
  Expect(ReasoningFormat::kHunyuan, false, "<think>\nTwo.\n</think>\n<answer>\nFour.\n</answer>",
         "Two.", "Four.");
  Expect(ReasoningFormat::kHunyuan, true, "Two.</think><answer>Four.</answer>", "Two.", "Four.");
}

TEST(Reasoning, HarmonysChannels) {
  constexpr auto kHarmony = ReasoningFormat::kHarmony;
  Expect(kHarmony, false,
         "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final"
         "<|message|>Four < five.",
         "Two and two.", "Four < five.");
  Expect(kHarmony, false, "<|channel|>final<|message|>Four.<|return|>", "", "Four.");
  Expect(kHarmony, false, "<|channel|>analysis<|message|>cut of", "cut of", "");
  Expect(kHarmony, false, "<|channel|>analysis<|message|>a<|end|><|start|>assist", "a", "");
  Expect(kHarmony, false, "{\"a\": 4}", "", "{\"a\": 4}");
  Expect(kHarmony, false,
         "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final"
         "<|message|>Rain.",
         "", "I look.\n\nRain.");
}

TEST(Reasoning, HarmonysCallsAreToolCalls) {
  const Text t =
      InPieces(ReasoningSplitter(ReasoningFormat::kHarmony),
               "<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant<|channel|>commentary "
               "to=functions.weather <|constrain|>json<|message|>{\"city\": \"Ghent\"}<|call|>",
               7);
  EXPECT_EQ(t.reasoning, "Ask.");
  const ParsedAnswer answer = ParseToolCalls(t.content, {{"weather", {}}});
  ASSERT_EQ(answer.calls.size(), 1u);
  EXPECT_EQ(answer.calls[0].name, "weather");
  EXPECT_EQ(answer.calls[0].arguments, "{\"city\": \"Ghent\"}");
  EXPECT_EQ(answer.content, "");
}

TEST(Reasoning, AHeaderWithoutEndIsText) {
  const std::string endless = "<|channel|>" + std::string(5000, 'x');
  const Text t = InPieces(ReasoningSplitter(ReasoningFormat::kHarmony), endless, 100);
  EXPECT_EQ(t.content, endless);
  // The end of a long header may come with the same piece or with another.
  for (const size_t length : {1024, 1025}) {
    const std::string header = "<|channel|>" + std::string(length - 11, 'x');
    Expect(ReasoningFormat::kHarmony, false, header + "<|message|>Four.", "",
           length == 1024 ? "Four." : header + "<|message|>Four.");
  }
}

}  // namespace
}  // namespace shoal
