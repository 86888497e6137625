"""lmms-eval runs a task of two questions, made here, on a tiny random checkpoint, through the entry point of lvtp."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

if find_spec("lmms_eval") is None:  # importing it takes seconds
    pytest.skip("lmms-eval is not installed", allow_module_level=True)

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import lvtp

from .tiny import IMAGE_TOKEN, VOCABULARY
from .tiny_llava import build

KEEP = 5
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
TASK = """
task: two_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function code.images
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
# The second question is longer, so the batch is padded and its rows are not in the order of the questions.
QUESTIONS = ["w4 w5 w6", "w6 w7 w8 w9 w10 w11"]
CODE = """
from PIL import Image
def images(doc):
    return [Image.open(doc["photo"]).convert("RGB")]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    words = {"<pad>": 0, "system": 1, "user": 2, "assistant": 3, "<image>": IMAGE_TOKEN}
    words |= {f"w{i}": i for i in range(4, VOCABULARY) if i != IMAGE_TOKEN}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
        ),
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    model = build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    pixels = torch.randint(0, 256, (2, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i in range(2):
        Image.fromarray(pixels[i].numpy()).save(folder / f"{i}.png")
    return [folder / "0.png", folder / "1.png"]


def by_hand(checkpoint, photos, keep):
    """The answer to each question by itself, and how many tokens the language model read for it."""
    _, model, processor = checkpoint
    answers, read = [], []
    for question, photo in zip(QUESTIONS, photos, strict=True):
        prompt = f"system w99 user <image> {question} assistant"
        inputs = processor(text=prompt, images=Image.open(photo), return_tensors="pt")
        with lvtp.hf.prune(model, "prune_sid", keep, score="received") as pruning:
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        read.append(int(pruning.last.kept.sum()))
    return answers, read


def test_the_command_gives_the_answers_of_pruned_generation(checkpoint, photos, tmp_path):
    answers, read = by_hand(checkpoint, photos, KEEP)
    unpruned, _ = by_hand(checkpoint, photos, 1.0)
    assert read == [2 + 1 + KEEP + 3 + 1, 2 + 1 + KEEP + 6 + 1]
    assert all(pruned != whole for pruned, whole in zip(answers, unpruned, strict=True))

    expected = [answers[0], "something else"]  # half of them right
    rows = zip(QUESTIONS, expected, map(str, photos), strict=True)
    lines = [json.dumps({"question": q, "answer": a, "photo": p}) for q, a, p in rows]
    (tmp_path / "questions.json").write_text("\n".join(lines))
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "two_questions.yaml").write_text(TASK.format(questions=tmp_path / "questions.json"))
    arguments = f"pretrained={checkpoint[0]},method=prune_sid,keep={KEEP},score=received,system_prompt=w99"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "lvtp", "--model_args", arguments, "--tasks", "two_questions",
        "--include_path", str(tmp_path), "--batch_size", "2", "--device", "cpu", "--log_samples",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    # It may fail, write nothing and exit with 0.
    said = f"lmms-eval ended with {done.returncode} and said:\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    found = list((tmp_path / "out").rglob("*_samples_two_questions.jsonl"))
    assert len(found) == 1, said

    samples = sorted(map(json.loads, found[0].read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == answers
    assert [sample["token_counts"][0]["input_tokens"] for sample in samples] == read
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["two_questions"]["exact_match,none"] == 0.5


@pytest.fixture(scope="module")
def pruned_model(checkpoint):
    """From options to what lmms-eval gets."""
    import lvtp.lmms_eval  # takes seconds

    def build(**options):
        return lvtp.lmms_eval.PrunedModel(str(checkpoint[0]), "prune_sid", KEEP, device="cpu", **options)

    return build


def ask(model, photos, **settings):
    """The answers to a question about each photo, in one batch."""
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": Image.open(photo)}, {"type": "text", "text": question}],
            }
        ]
        for question, photo in zip(QUESTIONS, photos, strict=False)
    ]
    return [answer.text for answer in model._answer(conversations, {"max_new_tokens": 6, **settings})]


def test_answers_are_whole_without_the_restored_prompt(pruned_model, photos):
    wanted = ask(pruned_model(), photos)
    assert all(len(answer.split()) > 1 for answer in wanted)
    assert ask(pruned_model(restore_prompt=False), photos) == wanted


@pytest.mark.parametrize("restore_prompt", [True, False])
def test_answers_end_before_the_first_of_until(pruned_model, photos, restore_prompt):
    model = pruned_model(restore_prompt=restore_prompt)
    whole = ask(model, photos)
    words = whole[0].split()
    wanted = [answer.split(words[3])[0].split(words[2])[0] for answer in whole]
    assert ask(model, photos, until=[words[3], words[2]]) == wanted
    assert ask(model, photos, until=words[2]) == [answer.split(words[2])[0] for answer in whole]
    # What lmms-eval puts where a task names none.
    assert ask(model, photos, until=["\n\n"]) == ask(model, photos, until=None) == whole


def test_no_tokens_are_made_after_until(pruned_model, photos, monkeypatch):
    model = pruned_model()
    word = ask(model, photos[:1])[0].split()[1]
    lengths = []
    generate = model.model.generate

    def counted(**call):
        outputs = generate(**call)
        lengths.append(outputs.shape[1] - call["input_ids"].shape[1])
        return outputs

    monkeypatch.setattr(model.model, "generate", counted)
    ask(model, photos[:1], until=[word])
    assert lengths[0] <= 2
