// What OpenCheckpoint does with good and bad files.
#include "shard/gguf.h"

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "shard/checkpoint.h"
#include "shard/model_config.h"
#include "shard/shard_plan.h"
#include "shard/weight_layout.h"
#include "tests/shard/gguf_writer.h"
#include "tests/shard/temp_dir.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenBytes(const std::string& bytes) {
  std::vector<std::unique_ptr<ByteSource>> parts;
  parts.push_back(MakeMemorySource(
      "test.gguf",
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size())));
  return OpenGguf(std::move(parts));
}

void ExpectRefused(const absl::Status& status, absl::StatusCode code, const std::string& text) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(text));
}

void ExpectMalformed(const GgufWriter& w, const std::string& text) {
  ExpectRefused(OpenBytes(w.Bytes()).status(), absl::StatusCode::kInvalidArgument, text);
}

// Two rows of four floats, 0..7.
GgufWriter OneTensor() {
  GgufWriter w;
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += GgufWriter::Pod(static_cast<float>(i));
  w.Tensor("x", DType::kF32, {4, 2}, bytes);
  return w;
}

void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

TEST(Gguf, ReadsEveryKindOfMetadata) {
  GgufWriter w = OneTensor();
  w.Pair("u8", 0, GgufWriter::Pod(uint8_t{200}));
  w.Pair("i8", 1, GgufWriter::Pod(int8_t{-3}));
  w.U16("u16", 60000);
  w.Pair("i16", 3, GgufWriter::Pod(int16_t{-300}));
  w.U32("u32", 4000000000u);
  w.I32("i32", -5);
  w.F32("f32", 1.5f);
  w.Bool("bool", true);
  w.String("string", "text");
  w.U64("u64", 1ull << 63);
  w.Pair("i64", 11, GgufWriter::Pod(int64_t{-1} << 40));
  w.Pair("f64", 12, GgufWriter::Pod(2.5));
  w.Strings("strings", {"a", "", "b"});
  w.F32s("floats", {1, 2});
  w.I32s("ints", {-1, 2});
  w.Array("bools", 7, 2, std::string("\0\1", 2));
  for (const uint32_t version : {2u, 3u}) {
    w.version = version;
    const auto c = OpenBytes(w.Bytes());
    ASSERT_TRUE(c.ok()) << c.status();
    EXPECT_EQ((*c)->MetadataKeys().size(), 16u);
    const auto get = [&](const char* key) { return *(*c)->FindMetadata(key); };
    EXPECT_EQ(get("u8"), MetadataValue(uint64_t{200}));
    EXPECT_EQ(get("i8"), MetadataValue(int64_t{-3}));
    EXPECT_EQ(get("u16"), MetadataValue(uint64_t{60000}));
    EXPECT_EQ(get("i16"), MetadataValue(int64_t{-300}));
    EXPECT_EQ(get("u32"), MetadataValue(uint64_t{4000000000}));
    EXPECT_EQ(get("i32"), MetadataValue(int64_t{-5}));
    EXPECT_EQ(get("f32"), MetadataValue(1.5));
    EXPECT_EQ(get("bool"), MetadataValue(true));
    EXPECT_EQ(get("string"), MetadataValue(std::string("text")));
    EXPECT_EQ(get("u64"), MetadataValue(uint64_t{1} << 63));
    EXPECT_EQ(get("i64"), MetadataValue(int64_t{-1} << 40));
    EXPECT_EQ(get("f64"), MetadataValue(2.5));
    EXPECT_EQ(get("strings"), MetadataValue(std::vector<std::string>{"a", "", "b"}));
    EXPECT_EQ(get("floats"), MetadataValue(std::vector<double>{1, 2}));
    EXPECT_EQ(get("ints"), MetadataValue(std::vector<int64_t>{-1, 2}));
    EXPECT_EQ(get("bools"), MetadataValue(std::vector<int64_t>{0, 1}));
    EXPECT_EQ((*c)->FindMetadata("absent"), nullptr);
  }
}

TEST(Gguf, ReadsTensorData) {
  GgufWriter w = OneTensor();
  w.Tensor("y", DType::kQ8_0, {32, 1, 3}, std::string(3 * 34, 'q'));
  const std::string bytes = w.Bytes();  // outlives the checkpoint
  const auto c = OpenBytes(bytes);
  ASSERT_TRUE(c.ok()) << c.status();
  const TensorInfo* x = (*c)->FindTensor("x");
  ASSERT_NE(x, nullptr);
  EXPECT_EQ(x->cols(), 4);
  EXPECT_EQ(x->rows(), 2);
  EXPECT_EQ(x->matrices(), 1);
  float values[3];
  ASSERT_TRUE((*c)->Read(*x, 8, 12, reinterpret_cast<uint8_t*>(values)).ok());
  EXPECT_THAT(values, ::testing::ElementsAre(2, 3, 4));
  const TensorInfo* y = (*c)->FindTensor("y");
  ASSERT_NE(y, nullptr);
  EXPECT_EQ(y->type, DType::kQ8_0);
  EXPECT_EQ(y->bytes, 102);
  EXPECT_EQ(y->matrices(), 3);
  EXPECT_EQ((*c)->TotalBytes(), 32 + 102);
  EXPECT_FALSE((*c)->Read(*y, 100, 3, reinterpret_cast<uint8_t*>(values)).ok());
  EXPECT_EQ((*c)->FindTensor("z"), nullptr);
}

TEST(Gguf, TypedMetadataNamesKeyFoundAndExpected) {
  GgufWriter w = OneTensor();
  w.U32("n", 70);
  w.String("s", "text");
  w.F32("nan", NAN);
  const std::string bytes = w.Bytes();
  const auto c = OpenBytes(bytes);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(*MetadataInt(**c, "n", 1, 100), 70);
  EXPECT_EQ(*MetadataFloat(**c, "n"), 70.0);
  EXPECT_EQ(*MetadataString(**c, "s"), "text");
  const auto refused = [](const absl::Status& s, const std::string& text) {
    ExpectRefused(s, absl::StatusCode::kInvalidArgument, text);
  };
  refused(MetadataInt(**c, "n", 1, 64).status(), "'n' is 70, expected an integer from 1 to 64");
  refused(MetadataInt(**c, "s", 1, 64).status(), "'s' holds a string, expected an integer");
  refused(MetadataInt(**c, "gone", 1, 64).status(), "'gone' is missing");
  refused(MetadataString(**c, "n").status(), "expected a string");
  refused(MetadataFloat(**c, "nan").status(), "finite");
}

TEST(GgufBadInput, FilesThatCannotBeRead) {
  TempDir dir;
  ExpectRefused(OpenCheckpoint(dir.File("none.gguf")).status(), absl::StatusCode::kNotFound,
                "none.gguf");
  ExpectRefused(OpenCheckpoint(dir.path()).status(), absl::StatusCode::kFailedPrecondition,
                "no shard directory");
  const std::string fifo = dir.File("fifo");
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  ExpectRefused(OpenCheckpoint(fifo).status(), absl::StatusCode::kFailedPrecondition,
                "no regular file");
  const std::string empty = dir.File("empty.gguf");
  WriteFile(empty, "");
  ExpectRefused(OpenCheckpoint(empty).status(), absl::StatusCode::kInvalidArgument, "empty");
  const std::string secret = dir.File("secret.gguf");
  WriteFile(secret, OneTensor().Bytes());
  ASSERT_EQ(chmod(secret.c_str(), 0), 0);
  if (geteuid() != 0) {  // root reads everything
    ExpectRefused(OpenCheckpoint(secret).status(), absl::StatusCode::kPermissionDenied, "secret");
  }
}

TEST(GgufBadInput, NoGguf) {
  ExpectRefused(OpenBytes("PK\3\4 something else").status(), absl::StatusCode::kInvalidArgument,
                "is no GGUF");
  GgufWriter w = OneTensor();
  w.version = 1;
  ExpectRefused(OpenBytes(w.Bytes()).status(), absl::StatusCode::kUnimplemented, "version 1");
  w.version = 0x03000000;
  ExpectRefused(OpenBytes(w.Bytes()).status(), absl::StatusCode::kUnimplemented, "big-endian");
}

// About ten kilobytes, and two ranks can share it.
TinyModel SmallModel() {
  TinyModel m;
  m.dim = 32;
  m.heads = m.kv_heads = 2;
  m.head_dim = 32;
  m.ffn = 64;
  m.vocab = 20;
  m.layers = 1;
  m.tied = true;
  m.type = DType::kQ4_0;
  return m;
}

TEST(GgufBadInput, EveryPrefixIsRefused) {
  const TinyModel m = SmallModel();
  const std::string bytes = TinyModelGguf(m).Bytes();
  ASSERT_TRUE(OpenBytes(bytes).ok());
  for (size_t n = 0; n < bytes.size(); ++n) {
    const absl::Status s = OpenBytes(bytes.substr(0, n)).status();
    ASSERT_EQ(s.code(), absl::StatusCode::kInvalidArgument) << n << ": " << s;
  }
}

// Whatever a flipped byte makes of a file: never a crash, and what still opens can be loaded.
TEST(GgufBadInput, FlippedBytesNeverCrash) {
  const TinyModel m = SmallModel();
  const GgufWriter w = TinyModelGguf(m);
  const std::string good = w.Bytes();
  const size_t header = w.Header().size();
  std::mt19937 random(7);
  int refused = 0, loaded = 0;
  for (size_t at = 0; at < header; ++at) {
    for (int k = 0; k < 2; ++k) {
      std::string bytes = good;
      bytes[at] = static_cast<char>(k == 0 ? 0xFF : bytes[at] ^ (1 << (random() % 8)));
      const auto c = OpenBytes(bytes);
      if (!c.ok()) {
        ++refused;
        continue;
      }
      const auto config = ReadModelConfig(**c);
      if (!config.ok()) {
        ++refused;
        continue;
      }
      const auto plan = MakeShardPlan(*config, **c, {.tp = 2});
      if (!plan.ok()) continue;
      const auto layout = MakeWeightLayout(**c, *config, plan->ranks[1]);
      ASSERT_TRUE(layout.ok()) << layout.status();
      std::vector<uint8_t> out(layout->bytes);
      ASSERT_TRUE(LoadAll(**c, *layout, 1, out.data(), nullptr).ok());
      ++loaded;
    }
  }
  EXPECT_GT(refused, 500);
  EXPECT_GT(loaded, 50);
}

TEST(GgufBadInput, HugeDimensions) {
  for (const uint64_t dim : {uint64_t{1} << 63, UINT64_MAX, uint64_t{0}, uint64_t{1} << 41}) {
    GgufWriter w = OneTensor();
    w.entries[0].dims = {4, dim};
    ExpectMalformed(w, "dimension 1 is");
  }
  GgufWriter w = OneTensor();
  w.entries[0].dims = {uint64_t{1} << 30, uint64_t{1} << 30, uint64_t{1} << 30};
  ExpectMalformed(w, "overflows");
  w.entries[0].dims = {uint64_t{1} << 31, uint64_t{1} << 31};
  ExpectMalformed(w, "overflows");
  w.entries[0].dims = {uint64_t{1} << 30, uint64_t{1} << 30};
  ExpectMalformed(w, "too short");
  w.entries[0].dims = {4, 1, 1, 2};
  ExpectMalformed(w, "fourth dimension");
  w.entries[0].dims = {};
  ExpectMalformed(w, "has 0 dimensions");
  w.entries[0].dims = {1, 1, 1, 1, 1};
  ExpectMalformed(w, "has 5 dimensions");
}

TEST(GgufBadInput, HugeCountsAndLengths) {
  const std::string head = "GGUF" + GgufWriter::Pod(uint32_t{3});
  const auto refused = [](const std::string& bytes, const std::string& text) {
    ExpectRefused(OpenBytes(bytes).status(), absl::StatusCode::kInvalidArgument, text);
  };
  const std::string huge = GgufWriter::Pod(uint64_t{1} << 63);
  const std::string zero = GgufWriter::Pod(uint64_t{0});
  const std::string one = GgufWriter::Pod(uint64_t{1});
  const std::string padding(64, '\0');
  refused(head + huge + zero + padding, "number of tensors");
  refused(head + zero + huge + padding, "number of metadata pairs");
  refused(head + GgufWriter::Pod(uint64_t{1000}) + zero + padding, "too short");
  refused(head + zero + one + huge + padding, "metadata key");
  GgufWriter string;
  string.Pair("k", 8, huge);
  ExpectMalformed(string, "a string");
  GgufWriter array;
  array.Array("k", 4, uint64_t{1} << 62, "");
  ExpectMalformed(array, "length of an array");
  GgufWriter strings;
  strings.Array("k", 8, 1000000, std::string(100, '\0'));
  ExpectMalformed(strings, "too short");
}

TEST(GgufBadInput, OddMetadata) {
  GgufWriter nested;
  nested.Array("k", 9, 1, "");
  ExpectMalformed(nested, "array of arrays");
  GgufWriter type;
  type.Pair("k", 13, "");
  ExpectMalformed(type, "value type 13");
  GgufWriter element;
  element.Array("k", 99, 1, "");
  ExpectMalformed(element, "element type 99");
  GgufWriter twice;
  twice.U32("k", 1);
  twice.U32("k", 1);
  ExpectMalformed(twice, "'k' stands twice");
  GgufWriter empty;
  empty.U32("", 1);
  ExpectMalformed(empty, "empty metadata key");
  GgufWriter boolean;
  boolean.Pair("k", 7, "\2");
  ExpectMalformed(boolean, "bool");
  GgufWriter wide;
  wide.Array("k", 10, 1, GgufWriter::Pod(UINT64_MAX));
  ExpectMalformed(wide, "63 bits");
  for (const uint32_t alignment : {0u, 3u, 1u << 31}) {
    GgufWriter w = OneTensor();
    w.U32("general.alignment", alignment);
    ExpectMalformed(w, "general.alignment must be a power of two");
  }
}

TEST(GgufBadInput, Tensors) {
  GgufWriter w = OneTensor();
  w.entries.push_back(w.entries[0]);
  ExpectMalformed(w, "'x' stands twice");
  w.entries[1].name = "y";
  ExpectMalformed(w, "overlap");
  w.entries[1].offset = 7;
  ExpectMalformed(w, "no multiple of 32");
  w.entries[1].offset = UINT64_MAX - 31;
  ExpectMalformed(w, "offset");
  w.entries[1].offset = uint64_t{INT64_MAX} - 31;
  ExpectMalformed(w, "too short");
  w.entries[1].offset = 32;
  ExpectMalformed(w, "too short");
  w.entries.pop_back();
  w.entries[0].name = "";
  ExpectMalformed(w, "empty tensor name");
  w.entries[0].name = std::string(300, 'n');
  ExpectMalformed(w, "a tensor name is 300");
  w.entries[0].name = "x";
  w.entries[0].type = Info(DType::kQ4_0).ggml_id;
  ExpectMalformed(w, "no multiple of 32, the block of q4_0");
}

TEST(GgufBadInput, UnknownTypeIsNamedWithWhatIsKnown) {
  GgufWriter w = OneTensor();
  w.entries[0].type = 40;
  const absl::Status s = OpenBytes(w.Bytes()).status();
  ExpectRefused(s, absl::StatusCode::kUnimplemented, "nvfp4 (id 40)");
  ExpectRefused(s, absl::StatusCode::kUnimplemented, KnownDTypes());
  w.entries[0].type = 12345;
  ExpectRefused(OpenBytes(w.Bytes()).status(), absl::StatusCode::kUnimplemented, "12345");
}

TEST(GgufBadInput, ControlCharactersDoNotReachTheTerminal) {
  GgufWriter w;
  w.U32("\x1b[2Jkey", 1);
  w.U32("\x1b[2Jkey", 1);
  const absl::Status s = OpenBytes(w.Bytes()).status();
  EXPECT_EQ(std::string(s.message()).find('\x1b'), std::string::npos) << s;
}

TEST(GgufBadInput, FileThatShrinksWhileOpen) {
  TempDir dir;
  const std::string path = dir.File("m.gguf");
  GgufWriter w;
  w.Tensor("x", DType::kF32, {1024, 64}, std::string(4 * 1024 * 64, 'x'));
  w.WriteTo(path);
  const auto c = OpenCheckpoint(path);
  ASSERT_TRUE(c.ok()) << c.status();
  const TensorInfo& x = (*c)->tensors()[0];
  std::vector<uint8_t> out(x.bytes);
  ASSERT_TRUE((*c)->Read(x, 0, x.bytes, out.data()).ok());
  ASSERT_EQ(truncate(path.c_str(), 5000), 0);
  ExpectRefused((*c)->Read(x, 0, x.bytes, out.data()), absl::StatusCode::kDataLoss, "cut");
}

// A model over three files; any part opens it.
class SplitGguf : public ::testing::Test {
 protected:
  void SetUp() override {
    for (uint16_t i = 0; i < 3; ++i) {
      GgufWriter& w = parts_[i];
      if (i == 0) w.String("general.name", "split");
      w.U16("split.no", i);
      w.U16("split.count", 3);
      w.I32("split.tensors.count", 3);
      w.Tensor(absl::StrCat("t", i), DType::kF32, {1}, GgufWriter::Pod(static_cast<float>(i)));
      w.WriteTo(Part(i));
    }
  }
  std::string Part(int i) { return dir_.File(absl::StrCat("m-0000", i + 1, "-of-00003.gguf")); }

  TempDir dir_;
  GgufWriter parts_[3];
};

TEST_F(SplitGguf, OpensFromAnyPart) {
  for (int i = 0; i < 3; ++i) {
    const auto c = OpenCheckpoint(Part(i));
    ASSERT_TRUE(c.ok()) << c.status();
    EXPECT_EQ((*c)->Files().size(), 3u);
    EXPECT_NE((*c)->FindMetadata("general.name"), nullptr);
    for (int t = 0; t < 3; ++t) {
      const TensorInfo* info = (*c)->FindTensor("t" + std::to_string(t));
      ASSERT_NE(info, nullptr);
      float value = -1;
      ASSERT_TRUE((*c)->Read(*info, 0, 4, reinterpret_cast<uint8_t*>(&value)).ok());
      EXPECT_EQ(value, static_cast<float>(t));
    }
  }
}

TEST_F(SplitGguf, MissingPartIsNamed) {
  ASSERT_EQ(unlink(Part(1).c_str()), 0);
  ExpectRefused(OpenCheckpoint(Part(0)).status(), absl::StatusCode::kNotFound,
                "m-00002-of-00003.gguf");
}

TEST_F(SplitGguf, SwappedPartsAreRefused) {
  parts_[1].WriteTo(Part(2));
  parts_[2].WriteTo(Part(1));
  ExpectRefused(OpenCheckpoint(Part(0)).status(), absl::StatusCode::kInvalidArgument,
                "part 3 of 3, expected part 2 of 3");
}

TEST_F(SplitGguf, TensorInTwoPartsIsRefused) {
  parts_[2].entries[0].name = "t1";
  parts_[2].WriteTo(Part(2));
  ExpectRefused(OpenCheckpoint(Part(0)).status(), absl::StatusCode::kInvalidArgument,
                "earlier part");
}

TEST_F(SplitGguf, MissingTensorsAreNoticed) {
  parts_[2].entries.clear();
  parts_[2].WriteTo(Part(2));
  ExpectRefused(OpenCheckpoint(Part(0)).status(), absl::StatusCode::kInvalidArgument,
                "split.tensors.count is 3, the parts hold 2");
}

TEST_F(SplitGguf, RenamedPartSaysWhatToDo) {
  parts_[0].WriteTo(dir_.File("model.gguf"));
  ExpectRefused(OpenCheckpoint(dir_.File("model.gguf")).status(),
                absl::StatusCode::kInvalidArgument, "keep the parts together");
}

TEST(Gguf, VocabularyOnlyOpensButHasNoModel) {
  GgufWriter w;
  w.String("general.architecture", "llama");
  w.U32("llama.block_count", 2);
  w.U32("llama.embedding_length", 64);
  w.U32("llama.context_length", 64);
  w.U32("llama.attention.head_count", 2);
  w.U32("llama.feed_forward_length", 64);
  w.Strings("tokenizer.ggml.tokens", {"a", "b"});
  const std::string bytes = w.Bytes();
  const auto c = OpenBytes(bytes);
  ASSERT_TRUE(c.ok()) << c.status();
  ExpectRefused(ReadModelConfig(**c).status(), absl::StatusCode::kInvalidArgument,
                "vocabulary only");
}

}  // namespace
}  // namespace shoal
