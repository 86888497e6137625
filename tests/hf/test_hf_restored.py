"""What looks at the ids of `generate`: stopping criteria, logits processors and streamers have the original prompt."""

import functools

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import lvtp.hf

KEEP = 3
NEW = 6


class Recorder(StoppingCriteria):
    """Never stops."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class RecordingProcessor(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


class RecordingStreamer(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value.clone())

    def end(self):
        self.ended = True


def generate(member, inputs, restore_prompt=True, **kwargs):
    with lvtp.hf.prune(member.model, keep=KEEP, restore_prompt=restore_prompt):
        return member.model.generate(**inputs, **{"max_new_tokens": NEW, **kwargs})


@pytest.mark.parametrize("restore_prompt", [True, False])
def test_callers_see_the_sequences_that_are_returned(member, restore_prompt):
    inputs = member.batch("ragged")
    criterion, processor, streamed = Recorder(), RecordingProcessor(), RecordingStreamer()
    got = generate(
        member,
        inputs,
        restore_prompt,
        stopping_criteria=StoppingCriteriaList([criterion]),
        logits_processor=[processor],
        streamer=streamed,
    )
    start = got.shape[1] - NEW
    assert all(torch.equal(ids, got[:, : start + 1 + i]) for i, ids in enumerate(criterion.seen))
    assert all(torch.equal(ids, got[:, : start + i]) for i, ids in enumerate(processor.seen))
    assert len(criterion.seen) == len(processor.seen) == NEW
    assert torch.equal(streamed.seen[0], got[:, :start])
    assert torch.equal(torch.stack(streamed.seen[1:], dim=1), got[:, start:])
    assert streamed.ended


def test_callers_see_every_beam_and_sequence(member):
    inputs = member.batch("two_and_one")
    length = inputs["input_ids"].shape[1]
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}):
        criterion, processor, allowed, unpruned = Recorder(), RecordingProcessor(), [], []

        def allow(group, ids, seen):
            seen.append((group, ids[:length].tolist()))
            return list(range(2, 120))

        allow_unpruned = functools.partial(allow, seen=unpruned)
        member.model.generate(**inputs, max_new_tokens=NEW, prefix_allowed_tokens_fn=allow_unpruned, **options)
        generate(
            member,
            inputs,
            stopping_criteria=[criterion],
            logits_processor=[processor],
            prefix_allowed_tokens_fn=functools.partial(allow, seen=allowed),
            **options,
        )
        for ids in criterion.seen + processor.seen:
            times = len(ids) // 2
            assert times >= 3
            assert torch.equal(ids[:, :length], inputs["input_ids"].repeat_interleave(times, dim=0))
        assert sorted(allowed) == sorted(unpruned)


def test_a_criterion_stops_after_the_prompt(member):
    """One that knows the length of the prompt, as LLaVA's own for keywords does."""
    inputs = member.batch("single")
    length = inputs["input_ids"].shape[1]
    word = generate(member, inputs)[0, length + 2].item()

    def said(input_ids, scores):
        return torch.tensor([word in row[length:].tolist() for row in input_ids])

    got = generate(member, inputs, stopping_criteria=[said])
    assert word in got[0, length:].tolist()
    assert got.shape[1] <= length + 3


@pytest.mark.parametrize("num_beams", [1, 2])
def test_lengths_in_criteria_count_the_prompt(member, num_beams):
    inputs = member.batch("two_and_one")
    criterion = MaxLengthCriteria(inputs["input_ids"].shape[1] + 3)
    for _ in range(2):  # the caller's own stays as it was
        got = generate(member, inputs, stopping_criteria=[criterion], num_beams=num_beams)
        assert got.shape[1] == inputs["input_ids"].shape[1] + 3


def test_lengths_in_processors_count_the_prompt(member):
    inputs = member.batch("single")
    length = inputs["input_ids"].shape[1]
    eos = generate(member, inputs)[0, length].item()
    ends = {"eos_token_id": eos, "pad_token_id": 0}
    assert generate(member, inputs, **ends).shape[1] == length + 1
    processor = MinNewTokensLengthLogitsProcessor(length, 3, eos)
    assert generate(member, inputs, logits_processor=[processor], **ends)[0, length : length + 3].ne(eos).all()
    processor = ForcedEOSTokenLogitsProcessor(length + 2, eos)
    assert generate(member, inputs, logits_processor=[processor])[0, length + 1] == eos
    # Penalises what is new alone, so the first token is what it was.
    processor = RepetitionPenaltyLogitsProcessor(50.0, prompt_ignore_length=length)
    got = generate(member, inputs, logits_processor=[processor])
    assert got[0, length] == eos
    assert len(set(got[0, length:].tolist())) == NEW


def test_criteria_of_transformers_take_the_place_of_its_own(member):
    inputs = member.batch("single")
    length = inputs["input_ids"].shape[1]
    first, second = generate(member, inputs)[0, length : length + 2].tolist()
    got = generate(member, inputs, stopping_criteria=[EosTokenCriteria(second)], eos_token_id=first, pad_token_id=0)
    assert first == second or got.shape[1] == length + 2
