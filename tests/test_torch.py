"""The operators as citizens of torch: opcheck, compile, export, autograd, dispatch."""

import copy
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import lvtp

B, N, D = 2, 24, 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def example(name: str, dtype: torch.dtype = torch.float32, b: int = B, n: int = N) -> tuple:
    """Arguments of operator `name` that exercise its optional ones too."""
    g = torch.Generator().manual_seed(b * 1000 + n)
    features = torch.randn(b, n, D, generator=g).to(dtype)
    scores = torch.rand(b, n, generator=g)
    mask = torch.rand(b, n, generator=g) < 0.9
    labels = torch.randint(0, 3, (b, n), generator=g)
    similarity = lvtp.reference.cosine_similarity(features)
    return {
        "cosine_similarity": (features,),
        "mean_similarity": (features, mask),
        "greedy_suppression": (scores, similarity, 5, 20.0, mask),
        "cluster_nms": (scores, labels, similarity, 0.1, mask),
        "cluster_nms.per_image": (scores, labels, similarity, torch.rand(b, generator=g), None),
        "psca": (features, 4, "token"),
        "id_selection": (features, scores, 5, 20.0, mask),
        "prune_sid": (features, scores, 12, 1, "feature", labels, mask),
        "dynamic_budget": (features, b * 10, 1),
    }[name]


def operator(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.lvtp, packet), overload or "default")


OPERATORS = (*lvtp.ops.OPS, "cluster_nms.per_image")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, dtype):
    args = example(name, dtype)
    torch.library.opcheck(operator(name), args)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_shapes_and_dtypes_match_the_kernel(name):
    args = example(name)
    real = operator(name)(*args)
    meta = operator(name)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for r, m in zip(*((t if isinstance(t, tuple) else (t,)) for t in (real, meta)), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_runs_on_tensors_without_values(name):
    """On the meta device, as FakeTensor, and under vmap."""
    args, function = example(name), getattr(lvtp.reference, name.partition(".")[0])
    places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    want = function(*args)

    def on(tensors):
        given = dict(zip(places, tensors, strict=True))
        return function(*(given.get(i, a) for i, a in enumerate(args)))

    mode = FakeTensorMode()
    with mode:
        fake = on([mode.from_tensor(args[i]) for i in places])
    for got in (fake, on([args[i].to("meta") for i in places])):
        for g, w in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
    twice = torch.vmap(lambda *tensors: on(tensors))(*(torch.stack((args[i], args[i])) for i in places))
    for got, w in zip(*((t if isinstance(t, tuple) else (t,)) for t in (twice, want)), strict=True):
        torch.testing.assert_close(got, torch.stack((w, w)))


@pytest.mark.parametrize("name", lvtp.ops.OPS)
def test_the_public_function_takes_the_operators_arguments_in_the_same_order(name):
    args = example(name)
    by_function, by_operator = getattr(lvtp, name)(*args), getattr(torch.ops.lvtp, name)(*args)
    torch.testing.assert_close(by_function, by_operator, rtol=0, atol=0)


def test_a_tensor_threshold_of_one_element_is_one_threshold_an_image():
    scores, labels, similarity, _, _ = example("cluster_nms", b=1)
    kept = [torch.ops.lvtp.cluster_nms(scores, labels, similarity, t) for t in (torch.tensor([0.1]), 0.1)]
    assert torch.equal(*kept)


class Selectors(torch.nn.Module):
    def forward(self, features, importance):
        ids = lvtp.id_selection(features, importance, 5)
        sid = lvtp.prune_sid(features, importance, 12, reserved=1)
        kept = features.gather(1, ids[..., None].expand(-1, -1, features.shape[-1]))
        return ids, sid, kept


def inputs(b: int, n: int) -> tuple:
    features, importance, *_ = example("id_selection", b=b, n=n)
    return features, importance


def test_compile_fullgraph_dynamic_without_recompiling_for_a_new_batch():
    torch._dynamo.reset()
    compiled = torch.compile(Selectors(), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b, n in ((2, 24), (3, 24), (7, 24), (2, 40), (5, 33)):
            for got, want in zip(compiled(*inputs(b, n)), Selectors()(*inputs(b, n)), strict=True):
                assert torch.equal(got, want)


# Every operator with counts, by one count k.
BY_COUNT = {
    "greedy_suppression": lambda x, s, k: lvtp.greedy_suppression(s, lvtp.cosine_similarity(x), k),
    "psca": lambda x, s, k: lvtp.psca(x, k),
    "id_selection": lambda x, s, k: lvtp.id_selection(x, s, k),
    "prune_sid": lambda x, s, k: lvtp.prune_sid(x, s, k, reserved=1),
    "prune_sid by loadings": lambda x, s, k: lvtp.prune_sid(x, None, 2 * k, reserved=k),
    "dynamic_budget": lambda x, s, k: lvtp.dynamic_budget(x, x.shape[0] * k),
    "dynamic_budget of one image": lambda x, s, k: lvtp.dynamic_budget(x, x.shape[1], k // 4),
}


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", BY_COUNT)
def test_one_graph_serves_every_number_of_tokens_and_every_count(name):
    def select(features, importance, k):
        return tuple(BY_COUNT[name](features, importance, count) for count in (k, features.shape[1] // 4))

    graphs = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(select, backend=graphs, fullgraph=True, dynamic=True)
    for n, k in zip(range(20, 100, 4), range(4, 24), strict=True):
        same(compiled(*inputs(2, n), k), select(*inputs(2, n), k))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", BY_COUNT)
def test_a_count_read_from_a_tensor_traces(name):
    torch._dynamo.reset()

    def read(features, importance, k):
        return BY_COUNT[name](features, importance, k.item())

    with torch._dynamo.config.patch(capture_scalar_outputs=True, error_on_recompile=True):
        compiled = torch.compile(read, backend="eager", fullgraph=True, dynamic=True)
        for k in map(torch.tensor, (4, 9, 12)):
            same(compiled(*inputs(2, 24), k), read(*inputs(2, 24), k))


@pytest.mark.parametrize("name", BY_COUNT)
def test_selecting_from_tokens_that_a_mask_chose_traces(name):
    torch._dynamo.reset()

    def chosen(features, importance, choice):
        features, importance = features[:, choice], importance[:, choice]
        return BY_COUNT[name](features, importance, features.shape[1] // 4)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=True):
        compiled = torch.compile(chosen, backend="eager", fullgraph=True, dynamic=True)
        for n in (16, 21, 24):
            choice = torch.arange(24) < n
            same(compiled(*inputs(2, 24), choice), chosen(*inputs(2, 24), choice))


def test_a_count_that_a_graph_finds_too_large_is_refused_by_the_operator():
    torch._dynamo.reset()
    compiled = torch.compile(BY_COUNT["id_selection"], backend="eager", fullgraph=True, dynamic=True)
    assert compiled(*inputs(2, 24), 5).shape == (2, 5)
    with pytest.raises(RuntimeError, match=r"id_selection: k must be in \[1, 24\], got 25"):
        compiled(*inputs(2, 24), 25)


def test_compile_fullgraph_on_a_named_backend():
    torch._dynamo.reset()
    with lvtp.use_backend("native"):
        compiled = torch.compile(Selectors(), fullgraph=True)
        for got, want in zip(compiled(*inputs(2, 24)), Selectors()(*inputs(2, 24)), strict=True):
            assert torch.equal(got, want)


def test_compile_raises_the_operators_own_error_for_a_bad_argument():
    torch._dynamo.reset()
    compiled = torch.compile(lambda f, s: lvtp.id_selection(f, s, 25), fullgraph=True)
    with pytest.raises(Exception, match=r"id_selection: k must be in \[1, 24\], got 25"):
        compiled(*inputs(2, 24))


def test_export_with_a_dynamic_batch():
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Selectors(), inputs(2, 24), dynamic_shapes=({0: batch}, {0: batch}))
    assert "lvtp.id_selection" in str(program.graph)
    for got, want in zip(program.module()(*inputs(5, 24)), Selectors()(*inputs(5, 24)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", BY_COUNT)
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_tokens_and_a_share_of_them(name, strict):
    class ByShare(torch.nn.Module):
        def forward(self, features, importance):
            return BY_COUNT[name](features, importance, features.shape[1] // 4)

    tokens = torch.export.Dim("tokens", min=16, max=4096)
    shapes = ({1: tokens}, {1: tokens})
    program = torch.export.export(ByShare(), inputs(2, 24), dynamic_shapes=shapes, strict=strict)
    for n in (16, 33, 100):
        same(program.module()(*inputs(2, n)), ByShare()(*inputs(2, n)))


class PrunedTower(torch.nn.Module):
    """A vision tower of one layer, both selectors by the attention of its CLS token, and a projector."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, D, kernel_size=4, stride=4)
        self.cls = torch.nn.Parameter(torch.randn(1, 1, D))
        self.attention = torch.nn.MultiheadAttention(D, 2, batch_first=True)
        self.projector = torch.nn.Linear(D, 8)

    def forward(self, pixels):  # [B, 3, H, W]
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1)
        x, attention = self.attention(x, x, x)
        features, importance = x[:, 1:], attention[:, 0, 1:]
        ids = lvtp.id_selection(features, importance, features.shape[1] // 4)
        sid = lvtp.prune_sid(features, importance, 12, reserved=1)
        kept = features.gather(1, ids[..., None].expand(-1, -1, D))
        return ids, sid, self.projector(kept)


@torch.no_grad()
def test_an_exported_tower_runs_from_python_and_cpp_without_lvtps_python_code(cpp_example, tmp_path):
    torch.manual_seed(0)
    tower, pixels = PrunedTower().eval(), torch.randn(5, 3, 16, 32)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 3: 4 * torch.export.Dim("columns", min=4, max=64)}
    program = torch.export.export(tower, (pixels[:2, :, :, :24],), dynamic_shapes=(sizes,))
    torch.export.save(program, tmp_path / "exported.pt2")
    program = torch.export.load(tmp_path / "exported.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    torch.save((pixels,), tmp_path / "in.pt")
    script = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.save(torch._inductor.aoti_load_package(sys.argv[4])(*torch.load(sys.argv[2])), sys.argv[3])
assert "lvtp" not in sys.modules
"""
    library = next(lvtp.ops._LIBRARIES.glob("liblvtp.*"))
    for caller in ((sys.executable, "-c", script, library), (cpp_example,)):
        subprocess.run([*caller, tmp_path / "in.pt", tmp_path / "out.pt", package], check=True, cwd=tmp_path)
        got, want = torch.load(tmp_path / "out.pt"), tower(pixels)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[2], want[2])


def test_a_cpp_program_selects_through_the_dispatcher_without_python(cpp_example, tmp_path):
    features, importance = inputs(3, 24)
    torch.save((features, importance), tmp_path / "in.pt")
    subprocess.run([cpp_example, tmp_path / "in.pt", tmp_path / "out.pt", "5"], check=True, env={})
    ids, sid = torch.load(tmp_path / "out.pt")
    assert torch.equal(ids, lvtp.id_selection(features, importance, 5))
    assert torch.equal(sid, lvtp.prune_sid(features, importance, 5))
    failed = subprocess.run([cpp_example, tmp_path / "in.pt", "out.pt", "25"], capture_output=True, text=True)
    assert "id_selection: k must be in [1, 24], got 25" in failed.stderr


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ldd"), reason="asks ldd")
@pytest.mark.parametrize("libraries", ["lvtp::lvtp_cuda", "lvtp::lvtp;lvtp::lvtp_cuda", "lvtp::lvtp_cuda;lvtp::lvtp"])
def test_a_cpp_program_linked_with_the_cuda_library_registers_every_operator_once(cpp_example, tmp_path, libraries):
    if not (lvtp.ops._LIBRARIES / "liblvtp_cuda.so").exists():
        pytest.skip("built without nvcc")
    # A torch without CUDA lacks functions that liblvtp_cuda calls for CUDA tensors alone.
    lenient = "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--unresolved-symbols=ignore-in-shared-libs"
    build = cpp_example.parent / "build"
    subprocess.run(["cmake", build, f"-DLVTP_LIBRARIES={libraries}", lenient], check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    loaded = subprocess.check_output(["ldd", build / "select_tokens"], text=True)
    assert sorted(re.findall(r"(liblvtp\w*)\.so =>", loaded)) == ["liblvtp", "liblvtp_cuda"]
    features, importance = inputs(3, 24)
    torch.save((features, importance), tmp_path / "in.pt")
    command = [build / "select_tokens", tmp_path / "in.pt", tmp_path / "out.pt", "5"]
    done = subprocess.run(command, check=True, env={}, capture_output=True, text=True)
    assert done.stderr == ""  # torch warns of a kernel, and throws at a schema, that is registered a second time
    assert torch.equal(torch.load(tmp_path / "out.pt")[0], lvtp.id_selection(features, importance, 5))


def test_indices_carry_no_gradient_and_gathering_with_them_does():
    features, importance = inputs(2, 24)
    features.requires_grad_()
    ids = lvtp.id_selection(features, importance, 5)
    assert not ids.requires_grad
    features.gather(1, ids[..., None].expand(-1, -1, D)).sum().backward()
    assert features.grad.abs().sum(-1).count_nonzero() == 10


def in_float64(name: str, mask: torch.Tensor):
    """The operator in the textbook's words, for features without bad tokens."""

    def cosine_similarity(x):
        unit = torch.nn.functional.normalize(x.double(), dim=-1)
        return unit @ unit.mT

    def mean_similarity(x):
        pairs = mask[:, :, None] & mask[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool)
        return torch.where(pairs, cosine_similarity(x), 0.0).sum((1, 2)) / pairs.sum((1, 2))

    return {"cosine_similarity": cosine_similarity, "mean_similarity": mean_similarity}[name]


DERIVATIVES = {
    "backward": lambda f, x, t: torch.autograd.grad(f(y := x.clone().requires_grad_()), y)[0],
    "twice": lambda f, x, t: torch.autograd.functional.hvp(f, x, t)[1],
    "forward": lambda f, x, t: torch.autograd.functional.jvp(f, x, t, strict=True)[1],
    "grad": lambda f, x, t: torch.func.grad(f)(x),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
    "jacrev": lambda f, x, t: torch.func.jacrev(f)(x),
    "hessian": lambda f, x, t: torch.func.hessian(f)(x),
    "grad of jvp": lambda f, x, t: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (t,))[1])(x),
    "compiled": lambda f, x, t: DERIVATIVES["backward"](torch.compile(f, backend="aot_eager", fullgraph=True), x, t),
    "compiled jvp": lambda f, x, t: torch.compile(
        lambda x, t: torch.func.jvp(lambda y: f(y) + 0 * y.sum(), (x,), (t,))[1], backend="aot_eager"
    )(x, t),
}


@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["cosine_similarity", "mean_similarity"])
def test_derivatives_of_every_kind_and_order(name, backend, kind):
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 2, 5, 4, generator=g)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    others = (mask,) if name == "mean_similarity" else ()
    weights = torch.rand(lvtp.reference.cosine_similarity(x).shape[: 3 - 2 * len(others)], generator=g).double()

    def weighted(f):
        return lambda y: (f(y) * weights).sum()

    if backend == "reference" and kind.startswith("compiled"):
        pytest.skip("the reference is not made to be traced")
    with lvtp.use_backend(backend):
        got = DERIVATIVES[kind](weighted(lambda y: getattr(lvtp, name)(y, *others)), x, t)
    assert got.abs().max() > 1e-3
    eager = {"compiled": "backward", "compiled jvp": "jvp"}.get(kind, kind)
    wanted = DERIVATIVES[eager](weighted(in_float64(name, mask)), x, t)
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["cosine_similarity", "mean_similarity"])
def test_tokens_without_direction_have_no_gradient(name, dtype):
    features = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    features[0, 1], features[0, 3, 2] = 0, torch.nan
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(lvtp, name)(features).square().sum(), features, create_graph=True)
    (gradient.square().sum() + gradient.sum()).backward()  # a penalty on the gradient
    assert gradient.isfinite().all()
    assert features.grad.dtype == dtype
    assert (features.grad[0] != 0).any(1).tolist() == [True, False, True, False, True]
    assert features.grad.isfinite().all()


def test_a_derivative_changes_the_value_by_roundings_alone():
    features, mask = example("mean_similarity", n=33)
    for name, others in (("cosine_similarity", ()), ("mean_similarity", (mask,))):
        value = getattr(torch.ops.lvtp, name)(features, *others)
        with_derivative = getattr(torch.ops.lvtp, name)(features.clone().requires_grad_(), *others)
        assert with_derivative.requires_grad
        torch.testing.assert_close(with_derivative.detach(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", [kind for kind in DERIVATIVES if not kind.startswith("compiled")])
def test_a_derivative_of_psca_is_refused(kind, backend):
    features, t = torch.randn(2, 2, 24, 16, generator=torch.Generator().manual_seed(0))
    with (
        lvtp.use_backend(backend),
        pytest.raises(RuntimeError, match=r"lvtp\.psca is not differentiable: .* detach its argument"),
    ):
        DERIVATIVES[kind](lambda x: lvtp.psca(x, 4)[1].sum(), features, t)


def test_groups_of_features_with_a_gradient_are_those_without_one():
    features = example("psca")[0]
    wanted = lvtp.psca(features, 4)
    with_gradient = features.clone().requires_grad_()
    same([t.detach() for t in lvtp.psca(with_gradient, 4)], list(wanted))

    def of_first_group(x):
        return torch.where(lvtp.psca(x, 4)[0] == 0, x.sum(-1), 0.0).sum()

    by_labels = torch.func.grad(of_first_group)(features)
    assert torch.equal(by_labels, (wanted[0] == 0)[..., None].expand_as(features).float())
    detached = torch.func.jvp(lambda x: lvtp.psca(x.detach(), 4)[1], (features,), (features,))
    same(detached, (wanted[1], torch.zeros_like(wanted[1])))


@pytest.mark.parametrize("select", [lambda x, s: lvtp.id_selection(x, s, 5), lambda x, s: lvtp.prune_sid(x, s, 8)])
def test_picks_are_the_same_inside_torch_func_and_their_features_have_tangents(select):
    features, importance = inputs(2, 24)
    kept = select(features, importance)
    tokens, tangents = torch.func.jvp(lambda x: lvtp.take(x, select(x, importance))[0], (features,), (2 * features,))
    same(tokens, lvtp.take(features, kept)[0])
    same(tangents, 2 * tokens)


def test_operators_deep_copy_in_a_module():
    features, importance = inputs(2, 24)
    module = copy.deepcopy(Selectors())
    assert torch.equal(module(features, importance)[0], Selectors()(features, importance)[0])


def test_use_backend_is_scoped_and_refuses_unknown_names():
    with lvtp.use_backend("reference"):
        with lvtp.use_backend("native"):
            assert lvtp.ops._backend.get() == "native"
        assert lvtp.ops._backend.get() == "reference"
    assert lvtp.ops._backend.get() == "auto"
    with pytest.raises(ValueError, match="auto, native, triton, reference"), lvtp.use_backend("cuda"):
        pass


def test_use_backend_holds_per_thread():
    seen = []
    with lvtp.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(lvtp.ops._backend.get()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_an_explicit_backend_that_cannot_serve_raises_and_says_why():
    features, importance = inputs(2, 24)
    with lvtp.use_backend("native"), pytest.raises(RuntimeError, match=r'backend "native" cannot run .* on meta'):
        lvtp.id_selection(features.to("meta"), importance.to("meta"), 5)
    with (
        lvtp.use_backend("triton"),
        pytest.raises(RuntimeError, match='backend "triton" cannot run id_selection on cpu'),
    ):
        lvtp.id_selection(features, importance, 5)


def test_lvtp_backend_sets_the_default_and_a_wrong_one_is_refused():
    def run(value):
        code = "import lvtp; print(lvtp.ops._backend.get())"
        env = {**os.environ, "LVTP_BACKEND": value}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert run("reference").stdout.strip() == "reference"
    assert "LVTP_BACKEND must be one of auto, native, triton, reference, got 'gpu'" in run("gpu").stderr


def test_devices_without_a_kernel_fall_back_to_the_reference():
    for name in lvtp.ops.OPS:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"lvtp::{name}", "CUDA")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lvtp::{name}", "CPU")
