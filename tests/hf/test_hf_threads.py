"""One patched model, many threads: every call gets its own answer, and nothing is left behind."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lvtp.hf

from .members import INTERNVL, LLAVA, QWENS
from .tiny import footprint
from .tiny_llava import BATCHES, batch

THREADS, REQUESTS, KEEP = 8, 200, 5


@pytest.fixture(autouse=True)
def busy():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def compiled():
    """Whether torch.compile compiles."""
    runs = []
    torch.compiler.reset()

    def backend(graph, _):
        runs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    return bool(runs)


def in_threads(work, items):
    """`work` of every item, by THREADS threads that start together."""
    start = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS, initializer=start.wait) as pool:
        return list(pool.map(work, items))


def answer(model, pruning, inputs):
    """What a request gets, and what its thread is told that was kept."""
    with torch.no_grad():
        logits = model(**inputs).logits if len(inputs["input_ids"]) == 1 else model.generate(**inputs, max_new_tokens=1)
    return logits, pruning.last.kept, torch.cat(pruning.last.indices)


def same(got, wanted):
    return torch.equal(got[1], wanted[1]) and torch.equal(got[2], wanted[2]) and torch.allclose(got[0], wanted[0])


def check_requests(member, **options):
    """Forward calls, and `generate` where there are several prompts."""
    model, before = member.model, footprint(member.model)
    calls = [member.batch(rows, seed=seed) for seed in range(3) for rows in ("single", "single", "padded")]
    with lvtp.hf.prune(model, keep=KEEP, **options) as pruning:
        wanted = [answer(model, pruning, call) for call in calls]
        requests = [i % len(calls) for i in range(REQUESTS)]
        answers = in_threads(lambda i: answer(model, pruning, calls[i]), requests)
    assert not [i for i, got in zip(requests, answers, strict=True) if not same(got, wanted[i])]
    assert len({str(one) for one in wanted}) == 6  # the requests differ
    assert footprint(model) == before
    assert compiled()


def test_every_request_gets_its_own_answer(member):
    check_requests(member)


@pytest.mark.parametrize("member", [LLAVA, QWENS[1]], ids=lambda member: member.name)
def test_every_request_gets_its_own_answer_without_a_cache(member):
    """Each thread gives its own steps a mask."""
    model, before = member.model, footprint(member.model)
    calls = [member.batch("single", seed=seed) for seed in range(3)]
    with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP, positions="original"):

        def work(i):
            return model.generate(**calls[i % 3], max_new_tokens=3, use_cache=False)

        wanted = [work(i) for i in range(3)]
        assert all(torch.equal(got, wanted[i % 3]) for i, got in enumerate(in_threads(work, range(100))))
    assert footprint(model) == before


@pytest.mark.parametrize("member", [LLAVA, QWENS[1]], ids=lambda member: member.name)
def test_every_request_is_scored_by_its_own_prompt(member):
    check_requests(member, score="prompt")


@pytest.mark.parametrize("member", [LLAVA, INTERNVL, QWENS[1]], ids=lambda member: member.name)
def test_unpruned_calls_of_other_threads_stay_as_they_are(member):
    """`prepare` looks into the model while others run it."""
    model, inputs = member.model, member.batch("single")
    before = footprint(model)
    with torch.no_grad():
        wanted, pruned = model(**inputs).logits, lvtp.hf.prepare(model, inputs, keep=KEEP)["attention_mask"]

    @torch.no_grad()
    def work(i):
        if i % 2:
            return torch.equal(lvtp.hf.prepare(model, inputs, keep=KEEP, score="received")["attention_mask"], pruned)
        return torch.allclose(model(**inputs).logits, wanted)

    assert all(in_threads(work, range(64)))
    assert footprint(model) == before


def test_contexts_of_several_threads_on_one_model(model):
    """Each thread prunes by its own; one that has none, by those of the first."""
    inputs, before = batch(model, *BATCHES["single"]), footprint(model)

    @torch.no_grad()
    def work(keep):
        context = lvtp.hf.prune(model, keep=keep)
        with context as outer, lvtp.hf.prune(model, keep=keep + 1) as inner:
            model(**inputs)
            model.generate(**inputs, max_new_tokens=1)
        with context as again:
            model(**inputs)
        return outer.last, inner.last.counts, again.last.counts

    keeps = [1 + i % 7 for i in range(64)]
    assert in_threads(work, keeps) == [(None, (keep + 1,), (keep,)) for keep in keeps]
    assert footprint(model) == before
    with lvtp.hf.prune(model, keep=9) as first, lvtp.hf.prune(model, keep=3) as second:
        thread = threading.Thread(target=work, args=(5,))
        other = threading.Thread(target=lambda: model(**inputs))
        for one in (thread, other):
            one.start()
            one.join()
        assert first.last is None
        assert second.last.counts == (3,)
    assert footprint(model) == before


def test_a_context_left_in_another_thread_than_it_was_entered_in(model):
    inputs, before = batch(model, *BATCHES["single"]), footprint(model)
    context = lvtp.hf.prune(model, keep=KEEP)
    context.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(context.__exit__, None, None, None).result()
    assert footprint(model) == before
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_a_replica_of_data_parallel_is_pruned(model):
    """A shallow copy; a deep one is a model of its own."""
    inputs = batch(model, *BATCHES["single"])
    with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP):
        wanted = model(**inputs).logits
        assert torch.equal(copy.copy(model)(**inputs).logits, wanted)
        assert copy.deepcopy(model)(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_last_is_of_the_thread_that_asks(model):
    one, two = batch(model, *BATCHES["single"]), batch(model, *BATCHES["two_and_one"])
    with lvtp.hf.prune(model, keep=KEEP) as pruning:
        thread = threading.Thread(target=lambda: model(**two))
        thread.start()
        thread.join()
        assert pruning.last.counts == (KEEP,) * 3  # this thread has made no call
        model(**one)
        assert pruning.last.counts == (KEEP,)
        thread = threading.Thread(target=lambda: model(**two))
        thread.start()
        thread.join()
        assert pruning.last.counts == (KEEP,)


@pytest.mark.parametrize("fails", [False, True])
def test_the_compiler_is_left_as_it_was(model, fails):
    inputs = batch(model, *BATCHES["single"])

    def fail(_):
        raise KeyError("score")

    def work(i):
        try:
            lvtp.hf.prepare(model, inputs, keep=KEEP, score=fail if fails and i % 2 else "auto")
        except KeyError:
            return "failed"

    assert in_threads(work, range(32)).count("failed") == 16 * fails
    assert compiled()
