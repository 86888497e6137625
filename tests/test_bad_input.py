"""Every way to call an operator wrongly, once: the error names operator and argument, what that takes and what it got.

One table for every way to reach an operator, so that the compiled checks and their Python twin cannot drift apart.
"""

import contextlib

import pytest
import torch
from conftest import INTERPRETED

import lvtp

B, N, D = 2, 6, 4
NAN, INF = float("nan"), float("inf")


def valid(op, device):
    """A call that works, as keyword arguments in the order of the signature."""
    features = torch.ones(B, N, D, device=device)
    scores = torch.arange(B * N, dtype=torch.float32, device=device).view(B, N)
    labels = torch.zeros(B, N, dtype=torch.int64, device=device)
    similarity = torch.ones(B, N, N, device=device)
    return {
        "cosine_similarity": {"features": features},
        "mean_similarity": {"features": features, "mask": labels == 0},
        "greedy_suppression": {
            "scores": scores, "similarity": similarity, "k": 3, "gamma": 20.0, "mask": labels == 0,
        },
        "cluster_nms": {
            "scores": scores, "labels": labels, "similarity": similarity, "threshold": 0.5, "mask": labels == 0,
        },
        "psca": {"features": features, "groups": 2, "center": "feature"},
        "id_selection": {"features": features, "importance": scores, "k": 3, "gamma": 20.0, "mask": labels == 0},
        "prune_sid": {
            "features": features, "importance": scores, "n": 4, "reserved": 1, "center": "token", "labels": labels,
            "mask": labels == 0,
        },
        "dynamic_budget": {"features": features, "total": 8, "minimum": 1},
    }[op]  # fmt: skip


def tensor(*shape, dtype=torch.float32, device=None):
    """Made on the device under test, or on another one."""
    return lambda under_test: torch.zeros(shape, dtype=dtype, device=device or under_test)


def filled(value):
    return lambda under_test: torch.full((B, N), value, dtype=torch.int64, device=under_test)


FEATURES = [
    ("features", tensor(N, D), "[B, N, D]", "[6, 4]"),
    ("features", tensor(1, B, N, D), "[B, N, D]", "[1, 2, 6, 4]"),
    ("features", tensor(B, N, D, dtype=torch.float64), "float32, float16 or bfloat16", "float64"),
    ("features", tensor(B, N, D, dtype=torch.int64), "float32, float16 or bfloat16", "int64"),
    ("features", tensor(B, 0, D), "at least one token", "[2, 0, 4]"),
    ("features", tensor(B, N, 0), "at least one feature", "[2, 6, 0]"),
]
SCORES = [
    ("scores", tensor(N), "[B, N]", "[6]"),
    ("scores", tensor(B, N, 1), "[B, N]", "[2, 6, 1]"),
    ("scores", tensor(B, N, dtype=torch.int64), "floating-point", "int64"),
    ("scores", tensor(B, N, dtype=torch.bool), "floating-point", "bool"),
    ("scores", tensor(B, 0), "at least one token", "[2, 0]"),
]
SIMILARITY = [
    ("similarity", tensor(N, N), "[2, 6, 6]", "[6, 6]"),
    ("similarity", tensor(B, N, 5), "[2, 6, 6]", "[2, 6, 5]"),
    ("similarity", tensor(B, 7, N), "[2, 6, 6]", "[2, 7, 6]"),
    ("similarity", tensor(1, N, N), "[2, 6, 6]", "[1, 6, 6]"),
    ("similarity", tensor(B, N, N, dtype=torch.int64), "floating-point", "int64"),
    ("similarity", tensor(B, N, N, device="meta"), "on ", "meta"),
]
IMPORTANCE = [
    ("importance", tensor(N), "[2, 6]", "[6]"),
    ("importance", tensor(B, 5), "[2, 6]", "[2, 5]"),
    ("importance", tensor(1, N), "[2, 6]", "[1, 6]"),
    ("importance", tensor(B, N, 1), "[2, 6]", "[2, 6, 1]"),
    ("importance", tensor(B, N, dtype=torch.int64), "floating-point", "int64"),
    ("importance", tensor(B, N, device="meta"), "on ", "meta"),
]
LABELS = [
    ("labels", tensor(N, dtype=torch.int64), "[2, 6]", "[6]"),
    ("labels", tensor(B, 5, dtype=torch.int64), "[2, 6]", "[2, 5]"),
    ("labels", tensor(B, N, dtype=torch.int32), "int64", "int32"),
    ("labels", tensor(B, N), "int64", "float32"),
    ("labels", tensor(B, N, dtype=torch.int64, device="meta"), "on ", "meta"),
]
MASK = [
    ("mask", tensor(N, dtype=torch.bool), "[2, 6]", "[6]"),
    ("mask", tensor(B, 5, dtype=torch.bool), "[2, 6]", "[2, 5]"),
    ("mask", tensor(1, N, dtype=torch.bool), "[2, 6]", "[1, 6]"),
    ("mask", tensor(B, N, 1, dtype=torch.bool), "[2, 6]", "[2, 6, 1]"),
    ("mask", tensor(B, N), "bool", "float32"),
    ("mask", tensor(B, N, dtype=torch.uint8), "bool", "uint8"),
    ("mask", tensor(B, N, dtype=torch.bool, device="meta"), "on ", "meta"),
]
K = [("k", 0, "[1, 6]", "0"), ("k", -3, "[1, 6]", "-3"), ("k", 7, "[1, 6]", "7")]
GAMMA = [
    ("gamma", g, "finite and at least 0", t) for g, t in ((-1.0, "-1"), (NAN, "nan"), (INF, "inf"), (-INF, "-inf"))
]
CENTER = [("center", "mean", '"feature" or "token"', '"mean"'), ("center", "", '"feature" or "token"', '""')]

TABLE = {
    "cosine_similarity": FEATURES,
    "mean_similarity": [*FEATURES, *MASK],
    "greedy_suppression": [*SCORES, *SIMILARITY, *K, *GAMMA, *MASK],
    "cluster_nms": [
        *SCORES, *LABELS, *SIMILARITY, *MASK,
        ("threshold", tensor(3), "[2]", "[3]"),
        ("threshold", tensor(B, 1), "[2]", "[2, 1]"),
        ("threshold", tensor(B, dtype=torch.int64), "floating-point", "int64"),
        ("threshold", tensor(B, device="meta"), "on ", "meta"),
    ],
    "psca": [
        *FEATURES, *CENTER,
        ("groups", 0, "[1, 6]", "0"),
        ("groups", -1, "[1, 6]", "-1"),
        ("groups", 7, "[1, 6]", "7"),
    ],
    "id_selection": [*FEATURES, *IMPORTANCE, *K, *GAMMA, *MASK],
    "prune_sid": [
        *FEATURES, *IMPORTANCE, *CENTER, *LABELS, *MASK,
        ("n", 0, "at least 1", "0"),
        ("n", -5, "at least 1", "-5"),
        ("reserved", -1, "[0, 3]", "-1"),
        ("reserved", 4, "[0, 3]", "4"),
        ("importance", None, "given when labels are", "None"),
    ],
    "dynamic_budget": [
        *FEATURES,
        ("minimum", -1, "[0, 6]", "-1"),
        ("minimum", 7, "[0, 6]", "7"),
        ("total", 1, "[2, 12]", "1"),
        ("total", 13, "[2, 12]", "13"),
        ("total", -1, "[2, 12]", "-1"),
    ],
}  # fmt: skip

# Read on the CPU only: on a GPU, looking at a value would mean waiting for it.
LABEL_VALUES = [
    ("cluster_nms", -1, "[0, G)"),
    ("cluster_nms", -(2**40), "[0, G)"),
    ("prune_sid", -1, "[0, 1)"),
    ("prune_sid", 1, "[0, 1)"),
    ("prune_sid", 2**40, "[0, 1)"),
]

CALLERS = ("triton",) if INTERPRETED else ("native", "reference", "triton", "torch.ops")


def caller(name, op):
    if name == "torch.ops":
        return getattr(torch.ops.lvtp, op), contextlib.nullcontext()
    if name == "lvtp.reference":
        return getattr(lvtp.reference, op), contextlib.nullcontext()
    return getattr(lvtp, op), lvtp.use_backend(name)


def assert_raises(name, op, arguments, argument, takes, got):
    function, backend = caller(name, op)
    with backend, pytest.raises(RuntimeError) as error:
        function(*arguments.values())
    assert type(error.value) is RuntimeError
    message = str(error.value).splitlines()[0]
    assert message.startswith(f"{op}: {argument} must be ")
    said_takes, said_got = message.rsplit(", got ", 1)
    assert takes in said_takes
    assert got in said_got


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize("op", TABLE)
def test_a_valid_call_is_accepted(name, op, device):
    function, backend = caller(name, op)
    with backend:
        function(*valid(op, device).values())


ROWS = [(op, *row) for op, rows in TABLE.items() for row in rows]


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize(
    ("op", "argument", "bad", "takes", "got"), ROWS, ids=[f"{op}-{argument}-{got}" for op, argument, _, _, got in ROWS]
)
def test_bad_argument(name, op, argument, bad, takes, got, device):
    arguments = valid(op, device)
    arguments[argument] = bad(device) if callable(bad) else bad
    assert_raises(name, op, arguments, argument, takes, got)


@pytest.mark.parametrize("name", [name for name in CALLERS if name != "triton"])
@pytest.mark.parametrize(("op", "value", "takes"), LABEL_VALUES)
def test_label_out_of_range(name, op, value, takes):
    arguments = valid(op, "cpu")
    arguments["labels"][1, 3] = value
    assert_raises(name, op, arguments, "labels", takes, str(value))
    arguments["mask"][1, 3] = False  # of padding, no value is looked at
    function, backend = caller(name, op)
    with backend:
        function(*arguments.values())


COUNTS = ["greedy_suppression-k", "psca-groups", "id_selection-k", "prune_sid-n", "prune_sid-reserved",
          "dynamic_budget-total", "dynamic_budget-minimum"]  # fmt: skip


NO_INTEGERS = [2.7, 2.0, True, None, "2", torch.tensor(2.0), torch.tensor(2, device="meta")]


@pytest.mark.parametrize("name", ["native", "reference", "lvtp.reference"])
@pytest.mark.parametrize("value", NO_INTEGERS, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_a_count_is_an_integer(name, count, value):
    op, _, argument = count.partition("-")
    function, held = caller(name, op)
    with held, pytest.raises(TypeError, match=f"^{op}: {argument} must be an integer, got"):
        function(*{**valid(op, "cpu"), argument: value}.values())


@pytest.mark.parametrize("name", [name for name in CALLERS if name != "triton"])
@pytest.mark.parametrize("op", TABLE)
def test_sparse_tensors_are_refused_by_name(name, op):
    arguments = valid(op, "cpu")
    for argument, t in arguments.items():
        if torch.is_tensor(t):
            assert_raises(name, op, {**arguments, argument: t.to_sparse()}, argument, "a dense tensor", "sparse_coo")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize(("op", "value"), [row[:2] for row in LABEL_VALUES])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_label_out_of_range_on_a_gpu_is_harmless(name, op, value):
    arguments = valid(op, "cuda")
    arguments["labels"][1, 3] = value
    function, backend = caller(name, op)
    with backend:
        result = function(*arguments.values())
    if op == "prune_sid":
        assert ((result >= 0) & (result < N)).all()


@pytest.mark.parametrize("op", TABLE)
def test_checks_come_before_the_empty_batch(backend, device, op):
    arguments = {
        key: t[:0] if torch.is_tensor(t) and t.dim() > 0 else t for key, t in valid(op, device).items()
    }  # fmt: skip
    if op == "dynamic_budget":
        arguments["total"] = 1  # no image could take it
    else:
        first = next(iter(arguments))
        arguments[first] = arguments[first][..., :0]
    with pytest.raises(RuntimeError, match=rf"^{op}: "):
        getattr(lvtp, op)(*arguments.values())
