// The word patterns that models were trained with, as their tokenizer.json files give them (and,
// for pre-tokenizers that are not regular expressions there, as an equal one).
//
// White space is spelled out: PCRE2's \s also takes U+180E, which Unicode took out of White_Space.
#include <map>

#include "absl/strings/str_cat.h"
#include "launcher/pre_tokenizer.h"

#define WS   \
  "\\t-\\r " \
  "\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"
#define SPACE "[" WS "]"
#define NOT_SPACE "[^" WS "]"
#define CONTRACTION "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
// Letters, digits and other signs each in their own word, a space before them included.
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" WS "\\p{L}\\p{N}]+|" TRAILING
// White space up to, but not including, the one that goes with the next word.
#define TRAILING SPACE "+(?!" NOT_SPACE ")|" SPACE "+"
#define LINES SPACE "*[\\r\\n]+"
// OpenAI's cl100k pattern and its descendants, which differ in how many digits make a word.
#define CL100K(contraction, digits)                                                                \
  contraction "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits "| ?[^" WS "\\p{L}\\p{N}]+[\\r\\n]*|" LINES \
              "|" TRAILING
// o200k: a word changes where lower case turns to upper case.
#define O200K(suffix, digits)                                                                     \
  "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*"                                   \
  "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+" suffix                                                         \
  "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+"                                  \
  "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*" suffix "|" digits "| ?[^" WS "\\p{L}\\p{N}]+[\\r\\n/]*|" LINES \
  "|" TRAILING
#define CJK_AND_KANA "[\\x{4E00}-\\x{9FA5}\\x{3040}-\\x{309F}\\x{30A0}-\\x{30FF}]+"
// DeepSeek's first models name CJK by these ranges.
#define DEEPSEEK_CJK "[\\x{4E00}-\\x{9FA5}\\x{800}-\\x{4E00}\\x{AC00}-\\x{D7FF}]+"

namespace shoal {
namespace {

// deepseek-llm lists the cased letters range by range, as of the Unicode version of its day.
constexpr char kDeepseekLetters[] = SPACE
    "?["
    "A-Za-z\\x{B5}\\x{C0}-\\x{D6}\\x{D8}-\\x{F6}\\x{F8}-\\x{1BA}\\x{1BC}-\\x{1BF}"
    "\\x{1C4}-\\x{293}\\x{295}-\\x{2AF}\\x{370}-\\x{373}\\x{376}\\x{377}\\x{37B}-\\x{37D}"
    "\\x{37F}\\x{386}\\x{388}-\\x{38A}\\x{38C}\\x{38E}-\\x{3A1}\\x{3A3}-\\x{3F5}"
    "\\x{3F7}-\\x{481}\\x{48A}-\\x{52F}\\x{531}-\\x{556}\\x{10A0}-\\x{10C5}"
    "\\x{13A0}-\\x{13F5}\\x{13F8}-\\x{13FD}\\x{1C90}-\\x{1CBA}\\x{1CBD}-\\x{1CBF}"
    "\\x{1D00}-\\x{1D2B}\\x{1D6B}-\\x{1D77}\\x{1D79}-\\x{1D9A}\\x{1E00}-\\x{1F15}"
    "\\x{1F18}-\\x{1F1D}\\x{1F20}-\\x{1F45}\\x{1F48}-\\x{1F4D}\\x{1F50}-\\x{1F57}\\x{1F59}"
    "\\x{1F5B}\\x{1F5D}\\x{1F5F}-\\x{1F7D}\\x{1F80}-\\x{1FB4}\\x{1FB6}-\\x{1FBC}\\x{1FBE}"
    "\\x{1FC2}-\\x{1FC4}\\x{1FC6}-\\x{1FCC}\\x{1FD0}-\\x{1FD3}\\x{1FD6}-\\x{1FDB}"
    "\\x{1FE0}-\\x{1FEC}\\x{1FF2}-\\x{1FF4}\\x{1FF6}-\\x{1FFC}\\x{2102}\\x{2107}"
    "\\x{210A}-\\x{2113}\\x{2115}\\x{2119}-\\x{211D}\\x{2124}\\x{2126}\\x{2128}"
    "\\x{212A}-\\x{212D}\\x{212F}-\\x{2134}\\x{2139}\\x{213C}-\\x{213F}\\x{2145}-\\x{2149}"
    "\\x{214E}\\x{2183}\\x{2184}\\x{2C00}-\\x{2C7B}\\x{2C7E}-\\x{2CE4}\\x{2CEB}-\\x{2CEE}"
    "\\x{2CF2}\\x{2CF3}\\x{A640}-\\x{A66D}\\x{A680}-\\x{A69B}\\x{A722}-\\x{A76F}"
    "\\x{A771}-\\x{A787}\\x{A78B}-\\x{A78E}\\x{AB70}-\\x{ABBF}\\x{FB00}-\\x{FB06}"
    "\\x{FB13}-\\x{FB17}\\x{FF21}-\\x{FF3A}\\x{FF41}-\\x{FF5A}\\x{10400}-\\x{1044F}"
    "\\x{104B0}-\\x{104D3}\\x{104D8}-\\x{104FB}\\x{10C80}-\\x{10CB2}\\x{10CC0}-\\x{10CF2}"
    "\\x{118A0}-\\x{118DF}\\x{1E900}-\\x{1E943}"
    "]+";
// Any run of ASCII signs, full-width signs, quotation marks or CJK full stops.
constexpr char kDeepseekSigns[] =
    SPACE "?[!-/:-~\\x{FF01}-\\x{FF0F}\\x{FF1A}-\\x{FF5E}\\x{2018}-\\x{201F}\\x{3000}-\\x{3002}]+";
constexpr char kDeepseekV3Words[] =
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|" LINES "|" TRAILING;
constexpr char kBloomWords[] = " ?[^(" WS "|.,!?…。，、।۔،)]+";
constexpr char kYoutuBlocks[] =
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" CJK_AND_KANA;

const std::map<std::string_view, PreTokenizerInfo>& Table() {
  static const auto* const table = [] {
    auto* t = new std::map<std::string_view, PreTokenizerInfo>;
    const auto add = [t](std::initializer_list<const char*> names, const PreTokenizerInfo& info) {
      for (const char* name : names) t->emplace(name, info);
    };
    add({"default"}, {{"[\\p{P}$+<=>^~|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"}});
    add({"gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0",
         "mellum", "modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"},
        {{GPT2}});
    add({"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b",
         "mellum2"},
        {{"\\p{N}", GPT2}});
    add({"falcon"}, {{"[\\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"}});
    add({"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
         "jina-v5-nano"},
        {{CL100K(CONTRACTION, "\\p{N}{1,3}")}, /*whole_words=*/true, /*add_bos=*/true});
    add({"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"}, {{CL100K(CONTRACTION, "\\p{N}{1,3}")}});
    add({"minicpm5"}, {{"\\p{N}{1,3}", CL100K(CONTRACTION, "\\p{N}+")}, /*whole_words=*/true});
    add({"qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan",
         "solar-open", "grok-2"},
        {{CL100K(CONTRACTION, "\\p{N}")}});
    add({"qwen35"}, {{CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^" WS
                                  "\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|" LINES "|" TRAILING}});
    add({"seed-coder"}, {{CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^" WS
                                      "\\p{L}\\p{N}\\r\\n]+|" LINES "|" TRAILING}});
    add({"bailingmoe", "bailingmoe2", "llada-moe"},
        {{"'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}| ?[^" WS
          "\\p{L}\\p{N}]++[\\r\\n]*|" SPACE "*[\\r\\n]|" TRAILING}});
    add({"deepseek-llm"},
        {{"[\\r\\n]", kDeepseekLetters, kDeepseekSigns, SPACE "+\\z", DEEPSEEK_CJK, "\\p{N}+"}});
    add({"deepseek-coder"},
        {{"[\\r\\n]", SPACE "?\\p{L}+", SPACE "?\\p{P}+", DEEPSEEK_CJK, "\\p{N}"}});
    add({"deepseek-v3", "hunyuan-dense", "joyai-llm"},
        {{"\\p{N}{1,3}", CJK_AND_KANA, kDeepseekV3Words}});
    add({"youtu"}, {{kYoutuBlocks, O200K(CONTRACTION "?", "\\p{N}")}, /*whole_words=*/true});
    add({"gpt-4o", "llama4", "kanana2", "minimax-m2"}, {{O200K(CONTRACTION "?", "\\p{N}{1,3}")}});
    add({"tekken"}, {{O200K("", "\\p{N}")}, /*whole_words=*/true, /*add_bos=*/true});
    add({"bloom", "gpt3-finnish", "poro-chat"}, {{kBloomWords}});
    add({"viking"}, {{kBloomWords, "\\p{N}"}});
    return t;
  }();
  return *table;
}

}  // namespace

const PreTokenizerInfo* FindPreTokenizer(std::string_view name) {
  const auto found = Table().find(name);
  return found == Table().end() ? nullptr : &found->second;
}

std::string KnownPreTokenizers() {
  std::string names;
  for (const auto& [name, info] : Table()) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", std::string(name));
  }
  return names;
}

}  // namespace shoal
