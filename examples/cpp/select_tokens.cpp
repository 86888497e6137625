// Selects tokens without Python. Linking lvtp::lvtp is all that makes torch's dispatcher know the operators.
//
//   select_tokens IN.pt OUT.pt 64           IN: torch.save((features, importance), ...); OUT: the picks of both
//   selectors select_tokens IN.pt OUT.pt MODEL.pt2    IN: the inputs of an AOTInductor package; OUT: a list of its
//   outputs

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

static std::vector<at::Tensor> select(const std::vector<at::Tensor>& in, int64_t k) {
  const at::Tensor &features = in.at(0), &importance = in.at(1);  // [B, N, D], [B, N]
  static const auto id_selection =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lvtp::id_selection", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, double, const std::optional<at::Tensor>&)>();
  static const auto prune_sid =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lvtp::prune_sid", "")
          .typed<at::Tensor(
              const at::Tensor&, const std::optional<at::Tensor>&, int64_t, int64_t, c10::string_view,
              const std::optional<at::Tensor>&, const std::optional<at::Tensor>&)>();
  return {
      id_selection.call(features, importance, k, 20.0, std::nullopt),
      prune_sid.call(features, importance, k, 0, "feature", std::nullopt, std::nullopt)};
}

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: select_tokens IN.pt OUT.pt (K | MODEL.pt2)\n";
    return 2;
  }
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> saved{std::istreambuf_iterator<char>(file), {}};
  const auto loaded = torch::jit::pickle_load(saved);
  std::vector<at::Tensor> in;
  for (const auto& value : loaded.toTupleRef().elements()) in.push_back(value.toTensor());

  const std::string what = argv[3];
  std::vector<at::Tensor> out;
  if (what.size() > 4 && what.substr(what.size() - 4) == ".pt2") {
    torch::inductor::AOTIModelPackageLoader model(what);
    out = model.run(in);
  } else {
    out = select(in, std::stoll(what));
  }
  const auto bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create({out.begin(), out.end()}));
  std::ofstream(argv[2], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return 0;
} catch (const std::exception& error) {
  std::cerr << "select_tokens: " << error.what() << "\n";
  return 1;
}
