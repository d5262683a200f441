// fuzz_seeds DIR: writes small valid GGUF files into DIR, where the fuzzers start from.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include "tests/shard/gguf_writer.h"

namespace shoal {
namespace {

// A few kilobytes each: small inputs are mutated and run faster.
TinyModel Smallest(const std::string& architecture) {
  TinyModel m;
  m.architecture = architecture;
  m.layers = 1;
  m.dim = 32;
  m.heads = 2;
  m.kv_heads = 1;
  m.head_dim = 16;
  m.ffn = 32;
  m.vocab = 20;
  return m;
}

void WriteSeeds(const std::string& dir) {
  const auto write = [&](const std::string& name, const TinyModel& m) {
    TinyModelGguf(m).WriteTo(dir + "/" + name + ".gguf");
  };
  for (const char* architecture :
       {"llama", "qwen2", "qwen3", "qwen3moe", "gpt-oss", "glm4moe", "command-r", "cohere2",
        "minimax-m2", "llama4", "mistral3", "seed_oss", "dots1", "hunyuan-moe", "qwen3vlmoe",
        "bailingmoe2", "gemma3", "glm4"}) {
    TinyModel m = Smallest(architecture);
    if (m.architecture == "qwen3moe" || m.architecture == "gpt-oss" ||
        m.architecture == "glm4moe" || m.architecture == "minimax-m2" ||
        m.architecture == "llama4" || m.architecture == "dots1" ||
        m.architecture == "hunyuan-moe" || m.architecture == "qwen3vlmoe") {
      m.experts = 2;
    }
    if (m.architecture == "bailingmoe2") {
      m.experts = 4;
      m.expert_groups = 2;
    }
    if (m.architecture == "mistral3") m.rope_scaling = "yarn";
    if (m.architecture == "gpt-oss" || m.architecture == "cohere2" || m.architecture == "gemma3") {
      m.window = 16;
    }
    m.head_norms = m.architecture == "command-r";
    if (m.architecture == "llama4") m.experts_used = 1;
    m.type = DType::kQ4_0;
    write(architecture, m);
  }
  TinyModel m = Smallest("llama");
  m.window = 8;
  m.rope_factors = m.attention_biases = m.tied = true;
  m.rope_scaling = "yarn";
  write("llama-options", m);
  m = Smallest("llama");
  m.experts = 2;
  m.separate_experts = true;
  write("mixtral-old", m);
  for (int i = 0; i < kNumDTypes; ++i) {
    const auto type = static_cast<DType>(i);
    m = Smallest("llama");
    m.type = type;
    m.tied = true;
    if (Info(type).block_elems == 256) {  // K-quants need long rows
      m.type_of = [type](const std::string& name) {
        return name.find("ffn_down") != std::string::npos ? type : DType::kQ8_0;
      };
      m.ffn = 256;
    }
    write(std::string("type-") + Info(type).name, m);
  }
  GgufWriter vocabulary;
  vocabulary.String("general.architecture", "llama");
  vocabulary.Strings("tokenizer.ggml.tokens", {"<unk>", "a", "b"});
  vocabulary.F32s("tokenizer.ggml.scores", {0, -1, -2});
  vocabulary.WriteTo(dir + "/vocabulary.gguf");
  // Two parts behind each other, as fuzz_gguf cuts them apart.
  std::string parts;
  for (uint16_t i = 0; i < 2; ++i) {
    GgufWriter split;
    split.U16("split.no", i);
    split.U16("split.count", 2);
    split.I32("split.tensors.count", 2);
    split.Tensor(i == 0 ? "a" : "b", DType::kF32, {2}, std::string(8, '\0'));
    parts += split.Bytes();
  }
  std::ofstream(dir + "/split.gguf", std::ios::binary) << parts;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: fuzz_seeds DIR\n");
    return 2;
  }
  std::error_code error;
  std::filesystem::create_directories(argv[1], error);
  if (error) {
    std::fprintf(stderr, "%s: cannot make the folder: %s\n", argv[1], error.message().c_str());
    return 66;
  }
  shoal::WriteSeeds(argv[1]);
  return 0;
}
