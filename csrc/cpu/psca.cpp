#include <tuple>
#include <vector>

#include "common.h"
#include "krylov.h"
#include "team.h"

namespace lvtp::cpu {
namespace {

// A = sigmoid(features) of one image, centred, without padding and tokens that are not finite.
template <class T, class Present>
class CentredSigmoid {
 public:
  CentredSigmoid(Team& team, const T* x, int64_t n, int64_t d, bool over_features, const Present& present)
      : x_(x), n_(n), d_(d), over_features_(over_features), present_(present) {
    if (!over_features) find_token_means(team);
  }

  int64_t stride() const { return strips(d_) * kTile; }

  // Rows first, ..., first + kTile - 1 of A -> block [kTile][stride()]; zero where there is no token or it has no part
  // in any component. usable[i], unless it is null: row i is not zero. Returns the largest magnitude.
  float rows(int64_t first, float* block, char* usable) const {
    float largest = 0.0f;
    for (int64_t i = first; i < first + kTile; ++i) {
      float* row = block + (i - first) * stride();
      double sum;
      float any = 0.0f;
      if (i < n_ && sigmoid(i, row, &sum)) {
        any = over_features_ ? simd().centre(row, d_, static_cast<float>(sum / static_cast<double>(d_)))
                             : simd().centre_each(row, d_, token_mean_.data());
      }
      std::fill(any > 0.0f ? row + d_ : row, row + stride(), 0.0f);
      if (i < n_ && usable) usable[i] = any > 0.0f;
      largest = std::max(largest, any);
    }
    return largest;
  }

 private:
  bool sigmoid(int64_t i, float* row, double* sum) const {
    if (!present_(i)) return false;
    to_float(x_ + i * d_, d_, row);
    std::fill(row + d_, row + stride(), 0.0f);
    return simd().sigmoid(row, stride(), d_, sum);
  }

  // Sums over the tokens in double and in a fixed order, so that the mean of equal values is exactly that value.
  void find_token_means(Team& team) {
    const int64_t pieces = std::min<int64_t>(strips(n_), 16);
    std::vector<double> sums(pieces * d_);
    std::vector<int64_t> counted(pieces);
    team.run(pieces, [&](int64_t piece) {
      const Array<float> row(stride());
      double unused;
      for (int64_t i = n_ * piece / pieces; i < n_ * (piece + 1) / pieces; ++i) {
        if (!sigmoid(i, row.get(), &unused)) continue;
        ++counted[piece];
        simd().accumulate(row.get(), d_, sums.data() + piece * d_);
      }
    });
    token_mean_.resize(d_);
    int64_t tokens = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) tokens += counted[piece];
    for (int64_t c = 0; c < d_; ++c) {
      double sum = 0.0;
      for (int64_t piece = 0; piece < pieces; ++piece) sum += sums[piece * d_ + c];
      token_mean_[c] = static_cast<float>(sum / static_cast<double>(tokens));
    }
  }

  const T* x_;
  int64_t n_, d_;
  bool over_features_;
  const Present& present_;
  std::vector<float> token_mean_;
};

// fp32 keeps the groups of the leading components; those far down lie too close together for it (0.84 of the tokens
// as by double at G = 144 on a photograph). The matrix itself is fp32 either way: enough where neighbouring eigenvalues
// differ by 1e-7 of the largest or more.
constexpr int64_t kGroupsInFloat = 48;

// Below, the whole Gram matrix costs less than the few products with A that iteration takes.
constexpr int64_t kWorthIterating = 320;

// With more groups than one in so many rows, what iteration wins where it converges is less than it loses where it
// does not: at 576 rows and 48 groups 2 ms of 6 on a photograph, and 3 on top of 6 where groups outnumber clusters.
constexpr int64_t kRowsPerGroup = 16;

// V [rows, groups]: the eigenvectors of panels panels^T with the largest eigenvalues. Iteration finds those that stand
// apart, as the first ones of real images do, in a fraction of the time of the direct way (576 tokens, two threads:
// 1.5 instead of 5 ms for 16 groups of a photograph), which finds all others.
Eigenvectors<float> components(Team& team, const Panels& panels, int64_t groups) {
  const bool few = groups <= kGroupsInFloat && groups * kRowsPerGroup <= panels.rows;
  if (few && panels.rows >= kWorthIterating) {
    const int64_t most = std::min(panels.rows / 3, groups + 96);
    if (auto v = leading_eigenvectors_of_gram(team, panels, groups, most)) return std::move(*v);
  }
  const auto matrix = gram(team, panels);
  if (groups <= kGroupsInFloat) return leading_eigenvectors(team, matrix, groups);
  const Tiles<double> exact(matrix.rows);
  std::copy_n(matrix.values.get(), matrix.size, exact.values.get());
  auto vectors = leading_eigenvectors(team, exact, groups);
  Eigenvectors<float> out(vectors.rows, groups);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < vectors.rows; ++i) out(i, g) = static_cast<float>(vectors(i, g));
  }
  return out;
}

// Sigmoids of very negative features are tiny, and squares of their squares leave fp32: brought to a largest value in
// [1, 2), by a power of two, which rounds nothing and changes no eigenvector.
void bring_into_range(Team& team, const Panels& panels, float largest) {
  if (largest == 0.0f || largest >= 0x1p-20f) return;
  const int exponent = -std::ilogb(largest);
  team.run(strips(panels.rows), [&](int64_t s) {
    float* strip = panels.strip(s);
    for (int64_t i = 0; i < panels.depth * kTile; ++i) strip[i] = std::ldexp(strip[i], exponent);
  });
}

}  // namespace

// The square of a column of A U over that of the first, below which the column says nothing: beyond the rank of A it is
// what rounding leaves, most of it along the first one, and brought to length 1 it would take tokens from that.
constexpr double kRank = 1e-9;

// V = A U, columns of length 1; zero beyond the rank.
template <class Rows>
static Eigenvectors<float> project(Team& team, const Rows& a, int64_t n, int64_t d, Eigenvectors<float>& u) {
  constexpr int64_t kLanes = Eigenvectors<float>::kLanes;
  static_assert(kLanes == kTile, "a product of a panel and a block is a tile");
  Eigenvectors<float> v(n, u.count);
  team.run(strips(n), [&](int64_t s) {
    const Array<float> block(kTile * a.stride()), panel(kTile * d);
    float product[kTile * kTile];
    a.rows(s * kTile, block.get(), nullptr);
    simd().transpose(block.get(), a.stride(), d, panel.get());
    for (int64_t b = 0; b < v.blocks(); ++b) {
      simd().cross(panel.get(), u.block(b), d, product);
      std::copy_n(product, (std::min(n, (s + 1) * kTile) - s * kTile) * kLanes, v.block(b) + s * kTile * kLanes);
    }
  });
  double largest = 0.0;
  for (int64_t g = 0; g < u.count; ++g) {
    double square = 0.0;
    for (int64_t i = 0; i < n; ++i) square += static_cast<double>(v(i, g)) * v(i, g);
    largest = std::max(largest, square);
    const auto scale = square > kRank * largest ? static_cast<float>(1.0 / std::sqrt(square)) : 0.0f;
    for (int64_t i = 0; i < n; ++i) v(i, g) *= scale;
  }
  return v;
}

// One image: the principal component on which each token loads most.
template <class T, class Present>
static void psca_image(
    Team& team, const T* x, int64_t n, int64_t d, int64_t groups, bool over_features, const Present& present,
    int64_t* labels, float* loadings) {
  const CentredSigmoid<T, Present> a(team, x, n, d, over_features, present);
  std::vector<char> usable(n);
  // Where tokens outnumber features, the small matrix is A^T A, and V = A U up to length. Groups beyond the rank have
  // no vector there, and so no token; as many groups as tokens are a whole basis, of which every token has its part.
  const bool transposed = n > d && groups < n;
  if (transposed) groups = std::min(groups, d);
  const Panels panels(transposed ? d : n, transposed ? n : d);
  std::vector<float> largest(strips(n));
  team.run(strips(n), [&](int64_t s) {
    const Array<float> block(kTile * a.stride());
    largest[s] = a.rows(s * kTile, block.get(), usable.data());
    if (!transposed) return simd().transpose(block.get(), a.stride(), d, panels.strip(s));
    for (int64_t f = 0; f < strips(d); ++f) {
      for (int64_t i = s * kTile; i < std::min(n, (s + 1) * kTile); ++i) {
        std::copy_n(block.get() + (i - s * kTile) * a.stride() + f * kTile, kTile, panels.strip(f) + i * kTile);
      }
    }
  });
  bring_into_range(team, panels, *std::max_element(largest.begin(), largest.end()));
  auto v = components(team, panels, groups);
  if (transposed) v = project(team, a, n, d, v);
  for (int64_t i = 0; i < n; ++i) {
    int64_t best = 0;
    for (int64_t g = 1; g < groups; ++g) {
      if (std::fabs(v(i, g)) > std::fabs(v(i, best))) best = g;  // strict: ties to the lowest group
    }
    labels[i] = usable[i] ? best : 0;
    loadings[i] = usable[i] ? std::fabs(v(i, best)) : 0.0f;
  }
}

// Principal semantic component analysis (PruneSID, section 3): each token belongs to the principal component of the
// tokens' Gram matrix on which it loads most. -> labels int64 [B, N], |loading| fp32 [B, N].
std::pair<Tensor, Tensor> psca(
    const Tensor& features, int64_t groups, const std::string& center, const OptionalTensor& mask) {
  const auto x = ready(features);
  const int64_t b = x.size(0), n = x.size(1), d = x.size(2);
  const Mask present(mask, n);
  auto labels = empty(x, {b, n}, ScalarType::Long);
  auto loadings = empty(x, {b, n}, ScalarType::Float);
  auto* label = data_out<int64_t>(labels);
  auto* loading = data_out<float>(loadings);
  with_features(x, [&](const auto* p) {
    Team::for_each_image(b, [&](int64_t image, Team& team) {
      psca_image(
          team, p + image * n * d, n, d, groups, center == "feature", [&](int64_t i) { return present(image, i); },
          label + image * n, loading + image * n);
    });
  });
  return {labels, loadings};
}

static std::tuple<Tensor, Tensor> psca_op(Tensor features, int64_t groups, std::string center) {
  checks::psca(features, groups, center);
  auto [labels, loadings] = psca(features, groups, center, std::nullopt);
  return {labels, loadings};
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) { m.impl("psca", LVTP_KERNEL("psca", &lvtp::cpu::psca_op)); }
