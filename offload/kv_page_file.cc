#include "offload/kv_page_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/buffer.h"
#include "kernels/status_macros.h"
#include "offload/folder_lock.h"

namespace shoal {
namespace {

// Of any model: bounds what is believed of a file before its checksums are seen.
constexpr uint32_t kLayersMax = 1 << 16;
constexpr int64_t kBlockBytesMax = int64_t{1} << 30;

absl::Status FileError(const std::string& what, const std::string& path, int error) {
  const std::string text = absl::StrCat(what, " ", path, ": ", strerror(error));
  if (error == EACCES || error == EPERM || error == EROFS) return absl::PermissionDeniedError(text);
  if (error == ENOSPC || error == EDQUOT) return absl::ResourceExhaustedError(text);
  return absl::UnavailableError(text);
}

uint64_t HeaderChecksum(const KvFileHeader& h) {
  return XXH3_64bits(&h, offsetof(KvFileHeader, checksum));
}

KvFileHeader MakeHeader(const KvFileOptions& o) {
  KvFileHeader h = {};
  memcpy(h.magic, kKvFileMagic, sizeof h.magic);
  h.version = kKvFileVersion;
  h.layers = static_cast<uint32_t>(o.shape.layers);
  h.block_bytes = o.shape.block_bytes;
  h.key = o.key;
  h.checksum = HeaderChecksum(h);
  return h;
}

// Empty when the file is this key's, or new; else what is wrong with it.
std::string CheckHeader(int fd, const KvFileOptions& o) {
  KvFileHeader there = {};
  const ssize_t n = pread(fd, &there, sizeof there, 0);
  if (n == 0) return "";
  const KvFileHeader wanted = MakeHeader(o);
  if (n == sizeof there && memcmp(&there, &wanted, sizeof there) == 0) return "";
  if (n != sizeof there || memcmp(there.magic, kKvFileMagic, sizeof there.magic) != 0) {
    return "is not a file of KV pages";
  }
  if (there.version != kKvFileVersion) {
    return absl::StrCat("has format version ", there.version, ", this shoal writes ",
                        kKvFileVersion);
  }
  return "has a damaged header or is another model's";
}

absl::Status WriteHeader(int fd, const std::string& path, const KvFileOptions& o) {
  std::vector<uint8_t> block(kKvFileHeaderBytes);
  const KvFileHeader h = MakeHeader(o);
  memcpy(block.data(), &h, sizeof h);
  if (ftruncate(fd, 0) != 0) return FileError("cannot empty", path, errno);
  const ssize_t n = pwrite(fd, block.data(), block.size(), 0);
  if (n == kKvFileHeaderBytes) return absl::OkStatus();
  return FileError("cannot write", path, n < 0 ? errno : ENOSPC);
}

// A file of our own that leaves nothing behind.
absl::StatusOr<int> OpenUnnamed(const std::string& dir, std::string* path) {
  *path = absl::StrCat(dir, "/shoal-kv-XXXXXX");
  const int fd = mkostemp(path->data(), O_CLOEXEC);
  if (fd < 0) return FileError("cannot make a file for KV pages in", dir, errno);
  return fd;
}

// The named file, locked; -1 when another process has it.
absl::StatusOr<int> OpenNamed(const std::string& dir, const std::string& path) {
  // Whoever takes pages from files that nobody uses is done when this is ours.
  SHOAL_ASSIGN_OR_RETURN(const FolderLock folder, FolderLock::Take(dir));
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return FileError("cannot open", path, errno);
  if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
    futimens(fd, nullptr);  // used now: a hint for who makes room
    return fd;
  }
  const int error = errno;
  close(fd);
  if (error == EWOULDBLOCK) return -1;
  return FileError("cannot lock", path, error);
}

absl::Status Scan(const KvFileOptions& o, KvPageFile* f) {
  const int64_t header = o.shape.header_bytes();
  const int64_t there = (f->file->size() - kKvFileHeaderBytes) / o.shape.record_bytes();
  const int records = static_cast<int>(std::clamp<int64_t>(there, 0, o.records));
  f->found.resize(records);
  const int batch = static_cast<int>(std::clamp<int64_t>((2 << 20) / header, 1, kIoDepthMax));
  // At least 2 MiB: such buffers are aligned for direct reads.
  SHOAL_ASSIGN_OR_RETURN(Buffer buffer,
                         Buffer::Allocate(std::max<int64_t>(batch * header, 2 << 20)));
  for (int begin = 0; begin < records; begin += batch) {
    for (int r = begin; r < std::min(records, begin + batch); r++) {
      f->file->Submit({false, o.shape.record_offset(r), buffer.data() + (r - begin) * header,
                       header, static_cast<uint64_t>(r)});
    }
    std::vector<IoDone> done;
    while (f->file->in_flight() > 0) f->file->Wait(&done);
    for (const IoDone& d : done) {
      KvRecord& record = f->found[d.tag];
      const uint8_t* bytes = buffer.data() + (d.tag - begin) * header;
      if (!d.status.ok() || !DecodeKvRecord(bytes, o.shape, o.key, &record)) record = {};
    }
  }
  return absl::OkStatus();
}

}  // namespace

void EncodeKvRecord(const KvRecord& record, const KvPageShape& shape, const KvName& key,
                    uint8_t* out) {
  memset(out, 0, shape.header_bytes());
  KvRecordHeader h = {};
  h.stamp = record.stamp;
  h.blocks = static_cast<uint32_t>(record.blocks());
  std::copy(record.prefix.begin(), record.prefix.end(), h.prefix);
  h.layers = static_cast<uint32_t>(shape.layers);
  const size_t sums = shape.layers * sizeof(uint64_t);
  memcpy(out, &h, sizeof h);
  memcpy(out + sizeof h, record.checksums.data(), sums);
  h.checksum = XXH3_64bits_withSeed(out + sizeof h.checksum, sizeof h - sizeof h.checksum + sums,
                                    key.low ^ key.high);
  memcpy(out, &h.checksum, sizeof h.checksum);
}

bool DecodeKvRecord(const uint8_t* bytes, const KvPageShape& shape, const KvName& key,
                    KvRecord* record) {
  KvRecordHeader h;
  memcpy(&h, bytes, sizeof h);
  const size_t sums = shape.layers * sizeof(uint64_t);
  if (h.checksum != XXH3_64bits_withSeed(bytes + sizeof h.checksum,
                                         sizeof h - sizeof h.checksum + sums, key.low ^ key.high)) {
    return false;
  }
  if (h.layers != static_cast<uint32_t>(shape.layers) || h.blocks < 1 || h.blocks > kKvPageBlocks) {
    return false;
  }
  record->prefix.assign(h.prefix, h.prefix + h.blocks);
  record->stamp = h.stamp;
  record->checksums.resize(shape.layers);
  memcpy(record->checksums.data(), bytes + sizeof h, sums);
  return true;
}

absl::StatusOr<KvPageIndex> ReadKvPageIndex(int fd) {
  KvFileHeader h;
  struct stat st = {};
  if (fstat(fd, &st) != 0 || pread(fd, &h, sizeof h, 0) != ssize_t{sizeof h} ||
      memcmp(h.magic, kKvFileMagic, sizeof h.magic) != 0 || h.version != kKvFileVersion ||
      h.checksum != HeaderChecksum(h) || h.layers == 0 || h.layers > kLayersMax ||
      h.block_bytes <= 0 || h.block_bytes > kBlockBytesMax) {
    return absl::DataLossError("not a file of KV pages");
  }
  KvPageIndex index;
  index.shape = {static_cast<int>(h.layers), h.block_bytes};
  const int64_t records = (st.st_size - kKvFileHeaderBytes) / index.shape.record_bytes();
  index.records.resize(std::max<int64_t>(0, records));
  std::vector<uint8_t> header(index.shape.header_bytes());
  for (size_t r = 0; r < index.records.size(); r++) {
    const int64_t at = index.shape.record_offset(static_cast<int>(r));
    if (pread(fd, header.data(), header.size(), at) != static_cast<ssize_t>(header.size()) ||
        !DecodeKvRecord(header.data(), index.shape, h.key, &index.records[r])) {
      index.records[r] = {};
    }
  }
  return index;
}

KvPageFile::~KvPageFile() {
  file.reset();
  if (lock_fd >= 0) close(lock_fd);
}

absl::StatusOr<std::unique_ptr<KvPageFile>> OpenKvPageFile(const KvFileOptions& o) {
  auto f = std::make_unique<KvPageFile>();
  std::error_code error;
  std::filesystem::create_directories(o.dir, error);
  if (error) return FileError("cannot make the folder", o.dir, error.value());
  std::string path =
      absl::StrCat(o.dir, "/kv-", absl::StrFormat("%016x%016x", o.key.high, o.key.low), ".pages");
  if (o.keep) {
    SHOAL_ASSIGN_OR_RETURN(f->lock_fd, OpenNamed(o.dir, path));
    if (f->lock_fd < 0) {
      f->note = absl::StrCat(path,
                             " is in use by another process: the KV pages of this run are "
                             "not kept, nor those of earlier runs used");
    }
  }
  const bool named = f->lock_fd >= 0;
  if (!named) {
    SHOAL_ASSIGN_OR_RETURN(f->lock_fd, OpenUnnamed(o.dir, &path));
  }
  absl::Status status;
  if (std::string wrong = CheckHeader(f->lock_fd, o); !wrong.empty()) {
    f->note = absl::StrCat(path, " ", wrong, ": it is started anew, what was kept in it is lost");
    status = WriteHeader(f->lock_fd, path, o);
  } else {
    struct stat st = {};
    if (fstat(f->lock_fd, &st) != 0) return FileError("cannot read", path, errno);
    const int64_t limit = o.shape.record_offset(o.records);
    if (st.st_size == 0) {
      status = WriteHeader(f->lock_fd, path, o);
    } else if (st.st_size > limit && ftruncate(f->lock_fd, limit) != 0) {
      return FileError("cannot shorten", path, errno);
    }
  }
  if (status.ok()) {
    AsyncFile::Options options;
    options.write = true;
    options.engine = o.engine;
    options.fault = o.fault;
    absl::StatusOr<std::unique_ptr<AsyncFile>> file = AsyncFile::Open(path, options);
    status = file.status();
    if (file.ok()) f->file = *std::move(file);
  }
  if (!named) unlink(path.c_str());
  SHOAL_RETURN_IF_ERROR(status);
  if (o.reserve) SHOAL_RETURN_IF_ERROR(f->file->Reserve(0, o.shape.record_offset(o.records)));
  if (named) SHOAL_RETURN_IF_ERROR(Scan(o, f.get()));
  return f;
}

}  // namespace shoal
