#include "model/weights_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "backend/tensor.h"
#include "model/dequantize.h"

namespace merf {
namespace {

constexpr int64_t kStretchElements = int64_t{1} << 20;

// A region of a file in memory.
class Mapping {
 public:
  explicit Mapping(const TensorSource& source) {
    const int file = open(source.path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) {
      const bool missing = errno == ENOENT || errno == ENOTDIR;
      throw Error(missing ? "FILE_NOT_FOUND" : "MALFORMED_FILE",
                  "Could not open " + source.path + ": " + std::strerror(errno));
    }
    struct stat status {};
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
      close(file);
      throw Error("MALFORMED_FILE", "Expected a file at " + source.path + " but found something else");
    }
    if (source.offset > status.st_size || source.byte_length > status.st_size - source.offset) {
      close(file);
      throw Error("MALFORMED_FILE", "Expected bytes " + std::to_string(source.offset) + " to " +
                                        std::to_string(source.offset + source.byte_length) + " of " +
                                        source.path + " for " + source.name + " but the file has " +
                                        std::to_string(status.st_size) + " bytes");
    }
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t before = source.offset % page;
    bytes_ = static_cast<size_t>(source.byte_length + before);
    base_ = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, source.offset - before);
    const int reason = errno;
    close(file);
    if (base_ == MAP_FAILED) {
      throw Error("OUT_OF_MEMORY", "Could not map " + source.path + " into memory: " + std::strerror(reason));
    }
    madvise(base_, bytes_, MADV_SEQUENTIAL);
    data_ = static_cast<const char*>(base_) + before;
  }
  ~Mapping() { munmap(base_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const char* data() const { return data_; }

 private:
  void* base_ = nullptr;
  size_t bytes_ = 0;
  const char* data_ = nullptr;
};

}  // namespace

void read_tensor(
    const TensorSource& source,
    const std::function<void(const float* data, int64_t first_element, int64_t elements)>& consume) {
  const std::optional<Encoding> encoding = encoding_by_name(source.encoding);
  if (!encoding) {
    throw Error("UNSUPPORTED",
                "Expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K for the encoding of " + source.name +
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
  const Mapping mapping(source);
  std::vector<float> stretch;
  if (rows == 1) {
    const int64_t most = kStretchElements / block * block;
    for (int64_t first = 0; first < elements; first += most) {
      const int64_t count = std::min(most, elements - first);
      stretch.resize(static_cast<size_t>(count));
      dequantize(*encoding, mapping.data() + first / block * block_bytes(*encoding), count, stretch.data());
      consume(stretch.data(), first, count);
    }
    return;
  }
  const int64_t half = permuted ? rows / source.permuted_heads / 2 : 0;
  const auto source_row = [&](int64_t row) {
    if (!permuted) return row;
    // Row (head, half, i) lies in the file at (head, i, half).
    const int64_t head = row / (2 * half), in_head = row % (2 * half);
    return head * 2 * half + 2 * (in_head % half) + in_head / half;
  };
  const int64_t most = std::max<int64_t>(1, kStretchElements / row_elements);
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    stretch.resize(static_cast<size_t>(count * row_elements));
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < count; ++row) {
      dequantize(*encoding, mapping.data() + source_row(first + row) * row_bytes, row_elements,
                 stretch.data() + row * row_elements);
    }
    consume(stretch.data(), first * row_elements, count * row_elements);
  }
}

}  // namespace merf
