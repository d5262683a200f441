// shoal perplexity: how well the model predicts a text, in llama-perplexity's protocol: chunks of
// -c tokens, the first of each replaced by BOS, the second half scored. And the KL divergence
// against logits saved from another run.
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "launcher/commands.h"
#include "launcher/exit_code.h"
#include "launcher/flags.h"
#include "launcher/read_input.h"
#include "launcher/session.h"

namespace shoal {
namespace {

constexpr int kLeastChunk = 3;  // tokens; one of them is scored

struct PerplexityFlags {
  ModelFlags model;
  std::string file;
  std::string save_logits;
  std::string base_logits;
  int chunks = -1;
  bool quiet = false;
};

// Saved logits: this header, then for each scored position i32 target and f32[vocab] logits.
// Little-endian.
struct LogitsHeader {
  char magic[8] = {'S', 'H', 'O', 'A', 'L', 'L', 'G', '1'};
  int32_t vocab = 0;
  int32_t context = 0;
};
static_assert(sizeof(LogitsHeader) == 16);

// Mean KL divergence of this run's distributions from saved ones, position by position.
class KlDivergence {
 public:
  void Add(const std::vector<float>& base, const std::vector<float>& now) {
    const double base_norm = LogSumExp(base, 1), now_norm = LogSumExp(now, 1);
    double kl = 0;
    size_t best_base = 0, best_now = 0;
    for (size_t i = 0; i < base.size(); ++i) {
      const double lp = base[i] - base_norm, lq = now[i] - now_norm;
      kl += std::exp(lp) * (lp - lq);
      if (base[i] > base[best_base]) best_base = i;
      if (now[i] > now[best_now]) best_now = i;
      max_difference_ = std::max(max_difference_, std::abs(static_cast<double>(base[i]) - now[i]));
    }
    sum_ += kl;
    worst_ = std::max(worst_, kl);
    same_top_ += best_base == best_now ? 1 : 0;
    ++count_;
  }
  void Print() const {
    std::fprintf(stderr,
                 "mean KL divergence %.3e, largest %.3e, same top token %.2f %%, largest logit "
                 "difference %.3e, %lld positions\n",
                 sum_ / static_cast<double>(count_), worst_,
                 100.0 * static_cast<double>(same_top_) / static_cast<double>(count_),
                 max_difference_, static_cast<long long>(count_));
  }
  bool empty() const { return count_ == 0; }

 private:
  double sum_ = 0, worst_ = 0, max_difference_ = 0;
  int64_t same_top_ = 0, count_ = 0;
};

// Written under another name until it is whole: a run that fails leaves nothing behind, and not
// half a file in place of an earlier one.
class LogitsWriter {
 public:
  LogitsWriter() = default;
  LogitsWriter(const LogitsWriter&) = delete;
  LogitsWriter& operator=(const LogitsWriter&) = delete;
  ~LogitsWriter() {
    if (out_.is_open()) std::remove(part_.c_str());
  }

  absl::Status Create(const std::string& path, int vocab, int context) {
    std::error_code error;
    const std::filesystem::file_status there = std::filesystem::status(path, error);
    if (std::filesystem::exists(there) && !std::filesystem::is_regular_file(there))
      return UsageError(absl::StrCat("--save-logits ", path, ": this is not a file"));
    path_ = path;
    part_ = path + ".part";
    out_.open(part_, std::ios::binary | std::ios::trunc);
    if (!out_) {
      return absl::NotFoundError(
          absl::StrCat("cannot write --save-logits ", path, ": ", std::strerror(errno)));
    }
    LogitsHeader h;
    h.vocab = vocab;
    h.context = context;
    out_.write(reinterpret_cast<const char*>(&h), sizeof h);
    return Checked();
  }
  absl::Status Write(int32_t target, const std::vector<float>& logits) {
    out_.write(reinterpret_cast<const char*>(&target), sizeof target);
    out_.write(reinterpret_cast<const char*>(logits.data()),
               static_cast<std::streamsize>(logits.size() * sizeof(float)));
    return Checked();
  }
  absl::Status Finish() {
    out_.flush();
    SHOAL_RETURN_IF_ERROR(Checked());
    if (std::rename(part_.c_str(), path_.c_str()) != 0)
      return absl::ErrnoToStatus(errno, absl::StrCat("cannot write ", path_));
    out_.close();
    return absl::OkStatus();
  }

 private:
  absl::Status Checked() const {
    return out_ ? absl::OkStatus()
                : absl::InternalError(absl::StrCat(part_, ": the disk takes no more"));
  }

  std::string path_, part_;
  std::ofstream out_;
};

class LogitsReader {
 public:
  absl::Status Open(const std::string& path, int vocab, int context) {
    path_ = path;
    in_.open(path, std::ios::binary);
    if (!in_) return absl::NotFoundError(absl::StrCat("cannot read ", path));
    LogitsHeader want, h;
    if (!in_.read(reinterpret_cast<char*>(&h), sizeof h) ||
        std::memcmp(h.magic, want.magic, sizeof h.magic) != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": these are not logits saved by shoal perplexity --save-logits"));
    }
    if (h.vocab != vocab || h.context != context) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": saved with a vocabulary of ", h.vocab,
                                                     " and -c ", h.context, ", but this run has ",
                                                     vocab, " and ", context));
    }
    return absl::OkStatus();
  }
  absl::Status Read(int32_t target, std::vector<float>& logits) {
    int32_t saved = 0;
    in_.read(reinterpret_cast<char*>(&saved), sizeof saved);
    in_.read(reinterpret_cast<char*>(logits.data()),
             static_cast<std::streamsize>(logits.size() * sizeof(float)));
    if (!in_)
      return absl::InvalidArgumentError(absl::StrCat(path_, ": ends before this text does"));
    if (saved != target)
      return absl::InvalidArgumentError(absl::StrCat(path_, ": saved for another text"));
    return absl::OkStatus();
  }

 private:
  std::string path_;
  std::ifstream in_;
};

// What is measured and compared with, opened before the weights are loaded.
struct Work {
  std::vector<int32_t> tokens;
  int chunks = 0;
  LogitsWriter save;
  LogitsReader base;
};

absl::Status OpenWork(const PerplexityFlags& f, const ModelConfig& config,
                      const EngineOptions& options, const Tokenizer& tokenizer, Work& work) {
  if (options.context < kLeastChunk) {
    return UsageError(absl::StrCat("-c ", options.context,
                                   ": the second half of a chunk is scored; ", "choose at least ",
                                   kLeastChunk));
  }
  if (f.chunks < -1 || f.chunks == 0)
    return UsageError(absl::StrCat("--chunks ", f.chunks, ": choose 1 or more, or -1 for all"));
  SHOAL_ASSIGN_OR_RETURN(const std::string text, ReadInput(f.file, "the text"));
  SHOAL_ASSIGN_OR_RETURN(work.tokens, tokenizer.Encode(text, true, false));
  work.chunks = static_cast<int>(work.tokens.size()) / options.context;
  if (f.chunks > 0) work.chunks = std::min(work.chunks, f.chunks);
  if (work.chunks == 0) {
    return UsageError(absl::StrCat(f.file, " has ", work.tokens.size(),
                                   " tokens, fewer than one chunk of -c ", options.context));
  }
  if (!f.base_logits.empty())
    SHOAL_RETURN_IF_ERROR(work.base.Open(f.base_logits, config.vocab, options.context));
  if (f.save_logits.empty()) return absl::OkStatus();
  return work.save.Create(f.save_logits, config.vocab, options.context);
}

absl::Status Measure(const PerplexityFlags& f, Work& work, Session& session) {
  const Tokenizer& tokenizer = *session.tokenizer;
  const std::vector<int32_t>& tokens = work.tokens;
  const int context = session.options.context, chunks = work.chunks;
  const bool logits = !f.save_logits.empty() || !f.base_logits.empty();
  double nll = 0, nll_squared = 0;
  int64_t count = 0;
  KlDivergence kl;
  std::vector<float> reference(f.base_logits.empty() ? 0 : session.config.vocab);
  for (int c = 0; c < chunks; ++c) {
    std::vector<int32_t> chunk(tokens.begin() + int64_t{c} * context,
                               tokens.begin() + int64_t{c + 1} * context);
    if (tokenizer.adds_bos()) chunk[0] = tokenizer.bos();
    const int first = context / 2 + 1;
    SHOAL_ASSIGN_OR_RETURN(const std::vector<Engine::Score> scores,
                           session.engine.ScoreText(chunk, first, logits));
    for (size_t i = 0; i < scores.size(); ++i) {
      nll -= scores[i].logprob;
      nll_squared += static_cast<double>(scores[i].logprob) * scores[i].logprob;
      ++count;
      const int32_t target = chunk[first + i];
      if (!f.save_logits.empty()) SHOAL_RETURN_IF_ERROR(work.save.Write(target, scores[i].logits));
      if (f.base_logits.empty()) continue;
      SHOAL_RETURN_IF_ERROR(work.base.Read(target, reference));
      kl.Add(reference, scores[i].logits);
    }
    if (!f.quiet)
      std::fprintf(stderr, "[%d/%d] %.4f\n", c + 1, chunks,
                   std::exp(nll / static_cast<double>(count)));
  }
  if (!f.save_logits.empty()) SHOAL_RETURN_IF_ERROR(work.save.Finish());
  const double n = static_cast<double>(count), mean = nll / n;
  const double error =
      count > 1 ? std::sqrt(std::max(0.0, nll_squared / n - mean * mean) / (n - 1)) * std::exp(mean)
                : 0;
  if (!kl.empty()) kl.Print();
  if (f.quiet) {
    std::printf("%.4f\n", std::exp(mean));
  } else {
    std::printf("perplexity %.4f +/- %.4f over %d chunks of %d tokens\n", std::exp(mean), error,
                chunks, context);
  }
  return absl::OkStatus();
}

}  // namespace

void AddPerplexityCommand(CLI::App& app, CommandLine& line) {
  auto flags = std::make_shared<PerplexityFlags>();
  CLI::App* cmd = app.add_subcommand("perplexity", "how well a model predicts a text");
  AddModelFlags(*cmd, flags->model);
  cmd->add_option("-f,--file", flags->file, "the text")->required();
  cmd->add_option("--chunks", flags->chunks, "score only so many chunks; -1: all");
  cmd->add_option("--save-logits", flags->save_logits, "write every scored logit row to this file");
  cmd->add_option("--kl-divergence", flags->base_logits, "compare with logits from --save-logits");
  cmd->add_flag("-q,--quiet", flags->quiet, "only the final value");
  cmd->callback([flags, cmd, &line] {
    flags->model.context_given = cmd->get_option("--ctx-size")->count() > 0;
    SessionOptions options;
    options.argc = line.argc;
    options.argv = line.argv;
    options.quiet = flags->quiet;
    options.prefix_cache = false;
    options.adjust = [flags](const Checkpoint&, const ModelConfig& config, EngineOptions& o) {
      if (o.context == 0) o.context = std::min(512, config.context);
      return absl::OkStatus();
    };
    Work work;
    options.prepare = [flags, &work](const ModelConfig& config, const EngineOptions& resolved,
                                     const Tokenizer* tokenizer) {
      return OpenWork(*flags, config, resolved, *tokenizer, work);
    };
    line.exit_code = RunSession(
        flags->model, options, [flags, &work](Session& s) { return Measure(*flags, work, s); },
        nullptr);
  });
}

}  // namespace shoal
