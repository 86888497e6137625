"""lvtp.jax: outside jit by DLPack, inside jit and vmap by XLA's custom calls or by a callback."""

import re
import subprocess
import sys

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_torch import DTYPES, example  # noqa: E402

import lvtp  # noqa: E402
import lvtp.jax  # noqa: E402

BUILT_CUDA = (lvtp.ops._LIBRARIES / f"liblvtp_jax_cuda{lvtp.ops._SUFFIX}").exists()
BUILT = (lvtp.ops._LIBRARIES / f"liblvtp_jax{lvtp.ops._SUFFIX}").exists()


@pytest.fixture(params=["callback", pytest.param("xla", marks=pytest.mark.skipif(not BUILT, reason="not built"))])
def calls(request, monkeypatch):
    if request.param == "xla":
        assert "cpu" in lvtp.jax.calls()
    else:
        monkeypatch.setattr(lvtp.jax, "calls", lambda: ())


def to_jax(value):
    return jnp.from_dlpack(value) if isinstance(value, torch.Tensor) else value


def cases(dtype=torch.float32, b=3):
    features, importance, k, _, mask = example("id_selection", dtype, b=b)
    labels = example("prune_sid", b=b)[5]
    return [
        ("id_selection", (features, importance, k)),
        ("id_selection", (features, importance.double().half(), k, 5.0, mask)),
        ("prune_sid", (features, importance, 12, 1)),
        ("prune_sid", (features, None, 12, 0, "token", None, mask)),
        ("prune_sid", (features, importance, 12, 0, "feature", labels.int(), None)),
    ]


def want(name, args):
    labels = args[5].long() if name == "prune_sid" and len(args) > 5 and args[5] is not None else None
    args = args if labels is None else (*args[:5], labels, *args[6:])
    return getattr(lvtp, name)(*args).int().numpy()


def jitted(name, args):
    """The function under jit, of its arrays alone."""
    places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]

    def function(*arrays):
        given = dict(zip(places, arrays, strict=True))
        return getattr(lvtp.jax, name)(*(given.get(i, a) for i, a in enumerate(args)))

    return jax.jit(function), [to_jax(args[i]) for i in places]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outside_jit(dtype):
    for name, args in cases(dtype):
        got = getattr(lvtp.jax, name)(*map(to_jax, args))
        assert isinstance(got, jax.Array)
        assert got.dtype == jnp.int32
        assert np.array_equal(got, want(name, args))


@pytest.mark.parametrize("module", [lvtp, lvtp.jax], ids=["lvtp", "lvtp.jax"])
def test_arrays_are_not_copied(module, monkeypatch):
    features, importance, *_ = map(to_jax, example("id_selection"))
    picks, seen = torch.arange(10, dtype=torch.int32).reshape(2, 5), []
    monkeypatch.setattr(lvtp.reference, "id_selection", lambda x, s, *rest: seen.extend((x, s)) or picks)
    with lvtp.use_backend("reference"):
        got = module.id_selection(features, importance, 5)
    assert [t.data_ptr() for t in seen] == [a.unsafe_buffer_pointer() for a in (features, importance)]
    assert got.unsafe_buffer_pointer() == picks.data_ptr()


def test_the_packages_own_functions_take_jax_arrays():
    features, importance, k, *_ = example("id_selection")
    got = lvtp.id_selection(to_jax(features), to_jax(importance), k)
    assert isinstance(got, jax.Array)
    assert np.array_equal(got, lvtp.id_selection(features, importance, k))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inside_jit(dtype):
    for name, args in cases(dtype):
        function, arrays = jitted(name, args)
        assert np.array_equal(function(*arrays), want(name, args)), (name, args)


@pytest.mark.usefixtures("calls")
def test_inside_vmap_of_jit():
    for name, args in cases(b=6):
        function, arrays = jitted(name, args)
        got = jax.vmap(function)(*(a.reshape(2, 3, *a.shape[1:]) for a in arrays))
        assert np.array_equal(got.reshape(6, -1), want(name, args)), name


@pytest.mark.usefixtures("calls")
def test_gradients_flow_through_what_is_gathered():
    features, importance, k, *_ = map(to_jax, example("id_selection"))

    @jax.jit
    def loss(features):
        return lvtp.jax.take(features, lvtp.jax.id_selection(features, importance, k))[0].sum()

    assert jnp.count_nonzero(jnp.abs(jax.grad(loss)(features)).sum(-1)) == 2 * k


def test_take_gives_what_the_packages_own_does():
    features, keep = example("id_selection")[0], torch.tensor([[3, 0, -1], [-1, -1, -1]])
    want = [t.numpy() for t in lvtp.take(features, keep)]
    for call in (lvtp.jax.take, jax.jit(lvtp.jax.take)):
        for got, w in zip(call(to_jax(features), to_jax(keep.int())), want, strict=True):
            assert np.array_equal(got, w)
    for bad in (to_jax(keep.float()), to_jax(keep[:1])):
        with pytest.raises(RuntimeError, match="take: keep must be"):
            jax.jit(lvtp.jax.take)(to_jax(features), bad)


def eager_and_jitted(function):
    return [function, jax.jit(function)]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_labels_of_every_integer_dtype(dtype):
    features, importance, n, reserved, center, labels, _ = example("prune_sid")
    want = lvtp.prune_sid(features, importance, n, reserved, center, labels).numpy()
    for call in eager_and_jitted(lambda x, s, g: lvtp.jax.prune_sid(x, s, n, reserved, center, labels=g)):
        got = call(to_jax(features), to_jax(importance), jnp.asarray(labels.numpy(), dtype))
        assert np.array_equal(got, want)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_labels_that_are_no_integers_are_refused_by_name(dtype):
    features, importance, n, *_ = map(to_jax, example("prune_sid"))
    labels = jnp.full(importance.shape, 0.9, dtype)
    for call in eager_and_jitted(lambda x, s, g: lvtp.jax.prune_sid(x, s, n, labels=g)):
        with pytest.raises(RuntimeError, match=f"prune_sid: labels must be int64, got {dtype}"):
            call(features, importance, labels)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_named_backend_serves_inside_jit_too(backend, monkeypatch):
    served = []
    for name, args in cases():
        plain = getattr(lvtp.reference, name)

        def seen(features, *rest, plain=plain):
            served.append(features.device.type)
            return plain(features, *rest)

        monkeypatch.setattr(lvtp.reference, name, seen)
        function, arrays = jitted(name, args)
        with lvtp.use_backend(backend):
            got = function(*arrays)
        assert np.array_equal(got, want(name, args)), (name, args)
    assert ("cpu" in served) == (backend == "reference")


S = np.arange(24, dtype=np.float32)[None]
NO_ARRAYS = [
    (S[:, ::-1], ValueError, "must not run backwards"),
    (S.tolist(), TypeError, "got list"),
    (None, TypeError, "got NoneType"),
    (np.ma.array(S, mask=S > 3), TypeError, "got a masked array"),
    (S.astype(">f4"), ValueError, "dtype dtype('>f4')"),
]


@pytest.mark.parametrize(("importance", "error", "got"), NO_ARRAYS)
def test_what_is_no_array_that_torch_can_read_is_refused_by_name(importance, error, got):
    features = jnp.ones((1, 24, 4))
    for call in eager_and_jitted(lambda x: lvtp.jax.id_selection(x, importance, 2)):
        with pytest.raises(error) as raised:
            call(features)
        assert str(raised.value).startswith("id_selection: importance must ")
        assert got in str(raised.value)


def test_arrays_of_numpy_beside_jaxs():
    features, importance, mask = (example("id_selection")[i] for i in (0, 1, 4))
    want = lvtp.id_selection(features, importance, 5, mask=mask).numpy()
    for call in eager_and_jitted(lambda x: lvtp.jax.id_selection(x, importance.numpy(), 5, mask=mask.numpy())):
        assert np.array_equal(call(to_jax(features)), want)


def test_counts_and_numbers():
    features, importance, *_ = map(to_jax, example("id_selection"))
    want = lvtp.jax.id_selection(features, importance, 5, 7.0)
    for call in eager_and_jitted(lambda x, s: lvtp.jax.id_selection(x, s, np.int64(5), np.float32(7))):
        assert np.array_equal(call(features, importance), want)
    for call in eager_and_jitted(lambda x, s: lvtp.jax.id_selection(x, s, 5.7)):
        with pytest.raises(TypeError, match=r"id_selection: k must be an integer, got 5\.7"):
            call(features, importance)
    with pytest.raises(TypeError, match=r"id_selection: k must be an integer, got .*Tracer"):
        jax.jit(lambda k: lvtp.jax.id_selection(features, importance, k))(5)
    with pytest.raises(TypeError, match=r"id_selection: gamma must be a number, got .*Tracer"):
        jax.jit(lambda gamma: lvtp.jax.id_selection(features, importance, 5, gamma))(7.0)


def test_the_packages_own_functions_inside_jit_point_to_these():
    features, importance, *_ = map(to_jax, example("id_selection"))
    for function in (lambda x, s: lvtp.id_selection(x, s, 5), lambda x, s: lvtp.take(x, s)):
        with pytest.raises(TypeError, match=r": features must be .* inside jax\.jit, grad or vmap call lvtp\.jax"):
            jax.jit(function)(features, importance)


def test_bad_arguments_are_named_when_they_are_traced():
    features, importance, *_ = map(to_jax, example("id_selection"))
    with pytest.raises(RuntimeError, match=r"id_selection: k must be in \[1, 24\], got 25"):
        jax.jit(lambda f, s: lvtp.jax.id_selection(f, s, 25))(features, importance)


@pytest.mark.skipif(not BUILT, reason="liblvtp_jax was not built")
def test_a_label_out_of_range_fails_the_custom_call():
    features, importance, *_ = map(to_jax, example("id_selection"))
    labels = jnp.full(importance.shape, 7, jnp.int32)
    with pytest.raises(Exception, match=r"prune_sid: labels must be in \[0, 3\), got 7"):
        jax.block_until_ready(
            jax.jit(lambda f, s, x: lvtp.jax.prune_sid(f, s, 12, labels=x))(features, importance, labels)
        )


@pytest.mark.skipif(not BUILT_CUDA, reason="liblvtp_jax_cuda was not built")
@pytest.mark.parametrize(("platform", "suffix"), [("cpu", ""), ("cuda", "_cuda")])
def test_what_is_lowered_for_a_platform_calls_its_handler(platform, suffix):
    for name, args in cases():
        function, arrays = jitted(name, args)
        text = function.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
        assert set(re.findall(r"custom_call @(\w+)", text)) == {f"lvtp_{name}{suffix}"}


def gpus():
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["outside jit", "jit", "vmap of jit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_devices(dtype, way):
    if not gpus():
        pytest.skip("JAX has no CUDA device")
    assert "cuda" in lvtp.jax.calls()
    for name, args in cases(dtype, b=6):
        function, arrays = jitted(name, args)
        arrays = [jax.device_put(a, gpus()[0]) for a in arrays]
        if way == "vmap of jit":
            got = jax.vmap(function)(*(a.reshape(2, 3, *a.shape[1:]) for a in arrays)).reshape(6, -1)
        elif way == "jit":
            got = function(*arrays)
        else:
            given = iter(arrays)
            got = getattr(lvtp.jax, name)(*(next(given) if isinstance(a, torch.Tensor) else a for a in args))
        assert got.devices() == {gpus()[0]}
        assert np.array_equal(got, want(name, args)), (name, args)


def test_importing_lvtp_does_not_import_jax():
    script = "import lvtp, sys; print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"
