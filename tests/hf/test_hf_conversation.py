"""Images after a filled cache: a later turn gives what the whole conversation gives, sent again and pruned at once."""

import copy

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache

import lvtp.hf

from .members import LLAVA, QWENS
from .oracle import relative_error
from .test_hf_generate import chunks

KEEP = 3
NEW = 4
ALONG = ("input_ids", "attention_mask", "mm_token_type_ids")

each_mode = pytest.mark.parametrize("positions", ["compact", "original"])


class Conversation:
    """What was said so far in every row of a batch, as the caller has it: nothing is pruned."""

    def __init__(self, member, rows="two_and_one"):
        self.member, self.rows, self.turns, self.columns = member, rows, [], {}

    def say(self, call):
        """Adds a turn; returns what runs along the conversation, and the turn's images."""
        self.turns.append(call)
        for name in ALONG if "mm_token_type_ids" in self.member.batch(self.rows) else ALONG[:2]:
            new = call.get(name, torch.zeros_like(call["input_ids"]))
            self.columns[name] = torch.cat([self.columns[name], new], dim=1) if name in self.columns else new
        return dict(self.columns), {name: value for name, value in call.items() if name not in ALONG}

    def branch(self):
        other = copy.copy(self)
        other.turns, other.columns = list(self.turns), dict(self.columns)
        return other

    def show(self, seed):
        return self.say(self.member.batch(self.rows, seed=seed))

    def tell(self, length=5):
        """A turn of text, padded in all rows but the first."""
        ids = torch.randint(2, 100, (len(self.member.batches[self.rows]), length))
        mask = torch.ones_like(ids)
        mask[1:, 0] = 0
        return self.say({"input_ids": ids, "attention_mask": mask})

    def answer(self, outputs):
        tokens = outputs.sequences[:, -NEW:]
        self.say({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})

    def oracle(self, positions):
        return self.member.assemble(self.whole(), KEEP, positions)

    def whole(self):
        """The arguments of one call."""
        shares = list(map(self.member.tiny.shares, self.member.batches[self.rows]))
        call = dict(self.columns)
        for name in sorted({name for turn in self.turns for name in turn} - set(ALONG)):  # images go row by row
            ends = [sum(share[name] for share in shares[: row + 1]) for row in range(len(shares))]
            shown = [turn[name] for turn in self.turns if name in turn]
            spans = zip([0, *ends], ends, strict=False)
            call[name] = torch.cat([images[start:end] for start, end in spans for images in shown])
        return call


def generate(model, *calls, **options):
    call = {name: value for part in calls for name, value in part.items()}
    return model.generate(**call, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **options)


def check(outputs, oracle, model):
    assert relative_error(outputs.logits[0], oracle.logits(model)[:, -1]) <= 1e-5
    assert torch.equal(outputs.sequences[:, -NEW:], oracle.greedy(model, NEW))


@each_mode
def test_images_in_every_turn(member, positions, cache_name):
    """The plain loop: what `generate` returned, and the next turn after it."""
    model, chat, cache = member.model, Conversation(member), None
    with lvtp.hf.prune(model, keep=KEEP, positions=positions) as pruning:
        for turn in range(3):
            columns, images = chat.show(seed=turn)
            outputs = generate(model, columns, images, **{cache_name: cache})
            assert torch.equal(outputs.sequences[:, :-NEW], columns["input_ids"])  # restored
            oracle, cache = chat.oracle(positions), outputs.past_key_values
            assert [row.nonzero().flatten().tolist() for row in pruning.last.kept] == oracle.kept
            assert pruning.last.next_position.tolist() == oracle.next_position
            chat.answer(outputs)
        columns, _ = chat.tell()
        text = generate(model, columns, **{cache_name: cache})
    check(outputs, oracle, model)
    check(text, chat.oracle(positions), model)


@each_mode
def test_a_row_without_new_tokens(member, positions):
    """One conversation of a batch pauses for two turns, which are masked in its row, and goes on with an image."""
    model, chat = member.model, Conversation(member)

    def silent():
        """The answer and what follows it are not there for the second row."""
        before = chat.columns["input_ids"].shape[1]
        chat.answer(outputs)
        columns, _ = chat.tell()
        columns["attention_mask"][1, before:] = 0
        return columns

    with lvtp.hf.prune(model, keep=KEEP, positions=positions):
        outputs = generate(model, *chat.show(seed=1))
        for _ in range(2):
            outputs = generate(model, silent(), past_key_values=outputs.past_key_values)
        silent()
        outputs = generate(model, *chat.show(seed=2), past_key_values=outputs.past_key_values)
    check(outputs, chat.oracle(positions), model)


@each_mode
def test_only_the_new_tokens_of_a_later_turn(member, positions):
    """Their mask covers the whole conversation."""
    model, chat = member.model, Conversation(member)
    with lvtp.hf.prune(model, keep=KEEP, positions=positions) as pruning:
        outputs = generate(model, *chat.show(seed=1))
        for turn in (2, 3):
            chat.answer(outputs)
            columns, images = chat.show(seed=turn)
            new = chat.turns[-1]["input_ids"].shape[1] + 1  # the last token of the answer is not cached yet
            call = {name: value[:, -new:] for name, value in columns.items()} | {
                "attention_mask": columns["attention_mask"]
            }
            outputs = generate(model, call, images, past_key_values=outputs.past_key_values)
            assert torch.equal(outputs.sequences[:, :-NEW], call["input_ids"])
            assert pruning.last.kept.shape == call["input_ids"].shape
    check(outputs, chat.oracle(positions), model)


@each_mode
@pytest.mark.parametrize("whole", [True, False])
def test_turns_over_the_pruned_sequences(member, positions, whole):
    model, chat = member.model, Conversation(member)
    with lvtp.hf.prune(model, keep=KEEP, positions=positions, restore_prompt=False):
        outputs = generate(model, *chat.show(seed=1))
        ids, mask = outputs.sequences, outputs.sequences != 0
        for turn in (2, 3):
            chat.answer(outputs)
            columns, images = chat.show(seed=turn)
            new = chat.turns[-1]["input_ids"].shape[1]
            call = {name: value[:, -new:] for name, value in columns.items()}
            call["input_ids"] = torch.cat([ids if whole else ids[:, -1:], call["input_ids"]], dim=1)
            call["attention_mask"] = torch.cat([mask, call["attention_mask"] != 0], dim=1).long()
            if "mm_token_type_ids" in call:
                call["mm_token_type_ids"] = pad(call["mm_token_type_ids"], (call["input_ids"].shape[1] - new, 0))
            outputs = generate(model, call, images, past_key_values=outputs.past_key_values)
            said = outputs.sequences if whole else torch.cat([ids[:, :-1], outputs.sequences], dim=1)
            ids, mask = said, said != 0
    check(outputs, chat.oracle(positions), model)


@pytest.mark.parametrize(
    ("filled_by", "positions"),
    [("generate", "compact"), ("generate", "original"), ("model", "original"), ("unpatched model", "compact")],
)
def test_images_after_cached_text(member, positions, filled_by):
    """A system prompt that is read once, and a copy of its cache for every conversation."""
    model, chat, cache, branches = member.model, Conversation(member), DynamicCache(), []
    columns, _ = chat.tell()
    with torch.no_grad():
        if filled_by == "unpatched model":
            model(**columns, position_ids=columns["attention_mask"].cumsum(1) - 1, past_key_values=cache)
        with lvtp.hf.prune(model, keep=KEEP, positions=positions):
            if filled_by == "model":
                cache = model(**columns, use_cache=True).past_key_values
            if filled_by == "generate":
                model.generate(**columns, past_key_values=cache, max_new_tokens=1)
            model.generate(**member.batch("padded"), max_new_tokens=1)  # whatever ran since does not matter
            for seed in (1, 2):
                branch = chat.branch()
                call = branch.show(seed=seed)
                branches.append((generate(model, *call, past_key_values=copy.deepcopy(cache)), branch))
    for outputs, branch in branches:
        check(outputs, branch.oracle(positions), model)


def test_copies_of_a_pruned_cache(member):
    model, chat, positions, branches = member.model, Conversation(member), "original", []
    with lvtp.hf.prune(model, keep=KEEP, positions=positions):
        outputs = generate(model, *chat.show(seed=1))
        chat.answer(outputs)
        for length in (3, 6):
            branch = chat.branch()
            later = generate(model, branch.tell(length)[0], past_key_values=copy.deepcopy(outputs.past_key_values))
            branches.append((later, branch))
    for outputs, branch in branches:
        check(outputs, branch.oracle(positions), model)


@each_mode
@pytest.mark.parametrize("masked", [True, False])
def test_turns_of_calls_of_the_model(member, positions, masked):
    rows = "two_and_one" if masked else "single"
    model, chat, cache = member.model, Conversation(member, rows), None
    with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP, positions=positions):
        for turn in range(3):
            columns, images = chat.tell() if turn == 0 else chat.show(seed=turn)
            new = chat.turns[-1]["input_ids"].shape[1]
            call = {name: value[:, -new:] for name, value in columns.items()}
            call["attention_mask"] = columns["attention_mask"] if masked else None
            outputs = model(**call, **images, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            if turn == 1:  # text between images
                columns, _ = chat.tell()
                text = {"input_ids": columns["input_ids"][:, -5:], "attention_mask": columns["attention_mask"]}
                outputs = model(**text, past_key_values=cache)
        wanted = model(**chat.whole())  # which numbers padding between turns, as the unpruned model does
    assert relative_error(outputs.logits[:, -1], wanted.logits[:, -1]) <= 1e-5


@pytest.mark.parametrize("kwargs", [{}, pytest.param({"prefill_chunk_size": 6}, marks=chunks)], ids=str)
def test_static_caches_and_chunks_in_later_turns(member, kwargs):
    model, chat = member.model, Conversation(member)
    with lvtp.hf.prune(model, keep=KEEP):
        cache = StaticCache(model.config.get_text_config(), max_cache_len=256)
        for turn in (1, 2):
            outputs = generate(model, *chat.show(seed=turn), past_key_values=cache, **kwargs)
            oracle = chat.oracle("original" if member in QWENS else "compact")
            chat.answer(outputs)
    check(outputs, oracle, model)


def test_prompts_as_embeddings_in_later_turns(member):
    model, chat = member.model, Conversation(member)
    with lvtp.hf.prune(model, keep=KEEP, positions="compact"):
        cache = None
        for turn in (1, 2):
            columns, images = chat.show(seed=turn)
            columns["inputs_embeds"] = model.get_input_embeddings()(columns.pop("input_ids")).detach()
            outputs = generate(model, columns, images, past_key_values=cache)
            oracle, cache = chat.oracle("compact"), outputs.past_key_values
            chat.answer(outputs)
    check(outputs, oracle, model)


def test_keeping_everything_in_later_turns(member):
    """The unpruned model. That counts positions on several axes for a conversation that is sent at once."""
    model, chat = member.model, Conversation(member, "single")
    first = chat.show(seed=1)
    answer = generate(model, *first)
    chat.answer(answer)
    later = chat.show(seed=2)
    if member in QWENS:
        call = dict(chat.columns)
        for name in first[1]:
            call[name] = torch.cat([first[1][name], later[1][name]])
        wanted = generate(model, call)
    else:
        wanted = generate(model, *later, past_key_values=answer.past_key_values)
    with lvtp.hf.prune(model, keep=member.everything):
        got = generate(model, *later, past_key_values=generate(model, *first).past_key_values)
    assert torch.equal(got.sequences, wanted.sequences)
    if member in QWENS:
        assert relative_error(got.logits[0], wanted.logits[0]) <= 1e-5
    else:
        assert all(map(torch.equal, got.logits, wanted.logits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text", "input_ids must begin with the prompt whose visual tokens were pruned in past_key_values"),
        ("short", "input_ids must hold new tokens after the"),
        ("rows", "input_ids must hold the 1 rows of past_key_values, got 2"),
        ("mask", "attention_mask must have .* columns"),
        ("old images", "one placeholder for each of the"),
        ("cropped", "past_key_values must hold all .* tokens of the prompt"),
    ],
)
def test_what_does_not_line_up_with_the_cache_raises(change, message):
    model, chat = LLAVA.model, Conversation(LLAVA, "single")
    with lvtp.hf.prune(model, keep=KEEP):
        first = chat.show(seed=1)
        outputs = generate(model, *first)
        chat.answer(outputs)
        columns, images = chat.show(seed=2)
        cache = outputs.past_key_values
        if change == "text":
            columns["input_ids"] = columns["input_ids"].roll(5, dims=1)
        elif change == "short":
            columns = {name: value[:, :9] for name, value in columns.items()}
        elif change == "rows":
            columns = {name: value.repeat(2, 1) for name, value in columns.items()}
        elif change == "mask":
            columns["attention_mask"] = torch.ones(1, columns["input_ids"].shape[1] + 1, dtype=torch.long)
        elif change == "old images":
            images = {name: torch.cat([first[1][name], value]) for name, value in images.items()}
        elif change == "cropped":
            cache.crop(2 - cache.get_seq_length())
        with pytest.raises(ValueError, match=message):
            model.generate(**columns, **images, past_key_values=cache)


def test_what_cannot_be_told_of_a_filled_cache_raises(member):
    model, chat = member.model, Conversation(member, "single")
    first = chat.show(seed=1)
    cache = generate(model, *first).past_key_values  # lvtp has not seen it
    columns, images = chat.show(seed=2)
    with pytest.raises(ValueError, match="past_key_values must be empty, got"):
        lvtp.hf.prepare(model, columns | images | {"past_key_values": cache}, keep=KEEP)
    with pytest.raises(ValueError, match="past_key_values must be empty, got"):
        lvtp.hf.info(model, columns | images | {"past_key_values": cache}, keep=KEEP)
    message = "position_ids must be given" if member in QWENS else "past_key_values must be empty with score='prompt'"
    with lvtp.hf.prune(model, keep=KEEP, score="prompt"), pytest.raises(ValueError, match=message):
        model.generate(**columns, **images, past_key_values=cache)
