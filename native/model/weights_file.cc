#include "model/weights_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "backend/tensor.h"
#include "model/dequantize.h"

namespace merf {
namespace {

constexpr int64_t kStretchElements = int64_t{1} << 20;
constexpr int64_t kPieceElements = int64_t{1} << 14;

// The bytes of a tensor in its file. They are read rather than mapped: a file that shrinks under a mapping
// ends the process with SIGBUS, while reading says how far the file goes.
class TensorFile {
 public:
  explicit TensorFile(const TensorSource& source) : source_(source) {
    file_ = open(source.path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file_ < 0) {
      const bool missing = errno == ENOENT || errno == ENOTDIR;
      throw Error(missing ? "FILE_NOT_FOUND" : "MALFORMED_FILE",
                  "Could not open " + source.path + ": " + std::strerror(errno));
    }
    struct stat status {};
    if (fstat(file_, &status) != 0 || !S_ISREG(status.st_mode)) {
      close(file_);
      throw Error("MALFORMED_FILE", "Expected a file at " + source.path + " but found something else");
    }
    if (source.offset > status.st_size || source.byte_length > status.st_size - source.offset) {
      close(file_);
      throw Error("MALFORMED_FILE", "Expected bytes " + std::to_string(source.offset) + " to " +
                                        std::to_string(source.offset + source.byte_length) + " of " +
                                        source.path + " for " + source.name + " but the file has " +
                                        std::to_string(status.st_size) + " bytes");
    }
  }
  ~TensorFile() { close(file_); }
  TensorFile(const TensorFile&) = delete;
  TensorFile& operator=(const TensorFile&) = delete;

  // `bytes` bytes from byte `begin` of the tensor on.
  void read(int64_t begin, int64_t bytes, void* destination) const {
    for (int64_t done = 0; done < bytes;) {
      const ssize_t count = pread(file_, static_cast<char*>(destination) + done,
                                  static_cast<size_t>(bytes - done), source_.offset + begin + done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) {
        throw Error("MALFORMED_FILE",
                    "Could not read " + source_.name + " in " + source_.path + ": " + std::strerror(errno));
      }
      if (count == 0) {
        throw Error("MALFORMED_FILE",
                    "Expected bytes up to " + std::to_string(source_.offset + source_.byte_length) + " of " +
                        source_.path + " for " + source_.name + " but the file now ends at byte " +
                        std::to_string(source_.offset + begin + done) +
                        ": it was cut short while it was read");
      }
      done += count;
    }
  }

 private:
  const TensorSource& source_;
  int file_ = -1;
};

bool all_finite(const float* values, int64_t count) {
  uint32_t special = 0;
  for (int64_t i = 0; i < count; ++i) {
    special |= (std::bit_cast<uint32_t>(values[i]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
  }
  return special == 0;
}

// Names the first element of `values`, which begin with element `first` of the tensor, that is not finite.
[[noreturn]] void refuse(const TensorSource& source, const float* values, int64_t first) {
  while (std::isfinite(*values)) ++values, ++first;
  const int64_t columns = source.shape.back();
  const std::string place = source.shape.size() == 1
                                ? std::to_string(first)
                                : std::to_string(first / columns) + ", " + std::to_string(first % columns);
  throw Error("NON_FINITE", "Expected finite numbers for " + source.name + " in " + source.path +
                                " but received " +
                                (std::isnan(*values) ? "NaN"
                                 : *values > 0       ? "Infinity"
                                                     : "-Infinity") +
                                " at [" + place + "]");
}

}  // namespace

void read_tensor(
    const TensorSource& source,
    const std::function<void(const float* data, int64_t first_element, int64_t elements)>& consume) {
  const std::optional<Encoding> encoding = encoding_by_name(source.encoding);
  if (!encoding) {
    throw Error("UNSUPPORTED", "Expected " + encoding_names() + " for the encoding of " + source.name +
                                   " in " + source.path + " but received " + source.encoding);
  }
  int64_t elements = 1;
  for (int64_t extent : source.shape) elements *= extent;
  const int64_t block = block_elements(*encoding);
  const bool permuted = source.permuted_heads > 0;
  // A vector is one row, unless its elements change places.
  const int64_t rows = source.shape.size() == 1 && !permuted ? 1 : source.shape[0];
  const int64_t row_elements = elements / rows;
  if (row_elements % block != 0) {
    throw Error("MALFORMED_FILE", "Expected rows of a multiple of " + std::to_string(block) +
                                      " elements for " + source.name + " in " + source.path + ", which is " +
                                      source.encoding + ", but received rows of " +
                                      std::to_string(row_elements));
  }
  const int64_t row_bytes = row_elements / block * block_bytes(*encoding);
  if (source.byte_length != rows * row_bytes) {
    throw Error("MALFORMED_FILE", "Expected " + std::to_string(rows * row_bytes) + " bytes for " +
                                      source.name + " in " + source.path + " but received " +
                                      std::to_string(source.byte_length));
  }
  if (elements == 0) return;
  if (permuted && rows % (2 * source.permuted_heads) != 0) {
    throw Error("MALFORMED_FILE", "Expected an even number of rows a head for " + source.name + " in " +
                                      source.path + " but received " + std::to_string(rows) + " rows and " +
                                      std::to_string(source.permuted_heads) + " heads");
  }
  const TensorFile file(source);
  // A vector is read in stretches of blocks, a matrix in stretches of rows, those of whole heads where they
  // change places.
  const int64_t unit = rows == 1 ? block : row_elements, units = elements / unit;
  const int64_t unit_bytes = unit / block * block_bytes(*encoding);
  const int64_t head = permuted ? rows / source.permuted_heads : 1;
  const int64_t most = std::max<int64_t>(1, kStretchElements / unit / head) * head;
  // Row (head, half, i) lies in the file at (head, i, half).
  const auto place_of = [&](int64_t row) {
    if (!permuted) return row;
    const int64_t in_head = row % head;
    return row - in_head + 2 * (in_head % (head / 2)) + in_head / (head / 2);
  };
  std::vector<uint8_t> encoded(static_cast<size_t>(std::min(most, units) * unit_bytes));
  std::vector<float> values(static_cast<size_t>(std::min(most, units) * unit));
  for (int64_t first = 0; first < units; first += most) {
    const int64_t count = std::min(most, units - first);
    file.read(first * unit_bytes, count * unit_bytes, encoded.data());
    bool finite = true;
    // A vector's blocks are too small to be shared out one by one.
    const int64_t piece = std::max<int64_t>(1, kPieceElements / unit), pieces = (count + piece - 1) / piece;
#pragma omp parallel for schedule(static) reduction(&& : finite)
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t begin = i * piece, end = std::min(begin + piece, count);
      float* const decoded = values.data() + begin * unit;
      if (permuted) {
        for (int64_t row = begin; row < end; ++row) {
          dequantize(*encoding, encoded.data() + place_of(row) * unit_bytes, unit,
                     values.data() + row * unit);
        }
      } else {
        dequantize(*encoding, encoded.data() + begin * unit_bytes, (end - begin) * unit, decoded);
      }
      finite = finite && all_finite(decoded, (end - begin) * unit);
    }
    if (!finite) refuse(source, values.data(), first * unit);
    consume(values.data(), first * unit, count * unit);
  }
}

}  // namespace merf
