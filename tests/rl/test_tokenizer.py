"""The small tokenizer: lossless, digits apart, deterministic, and a chat template that TRL can mask by."""

import json
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import is_chat_template_prefix_preserving, is_chat_template_stop_token_trained

from deltarl.rl.jobs import DataConfig
from deltarl.rl.problems import load_problems
from deltarl.rl.tokenizer import build_tokenizer

CONVERSATION = [
    {"role": "user", "content": "Compute 17+25."},
    {"role": "assistant", "content": "17+25=42. \\boxed{42}"},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You're welcome!"},
]


def training_texts():
    train = load_problems(DataConfig(train_size=300, heldout_size=1), 0).train
    return [text for problem in train for text in (problem.question, problem.solution)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(training_texts(), vocab_size=400)


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["", " ", " a  b\n\n\tc ", "½ of x² 日本 é e\u0301 🙂", "a , b . n't 's", "\x00\r\n"])
def test_awkward_texts_survive(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(deadline=None)
@given(number=st.integers(min_value=0))
def test_a_number_has_one_token_per_digit(tokenizer, number):
    assert len(tokenizer(str(number))["input_ids"]) == len(str(number))


def test_no_token_holds_two_digits_or_a_digit_and_more(tokenizer):
    for token in tokenizer.get_vocab():
        assert len(token) == 1 or not any(unicodedata.category(char) == "Nd" for char in token), token


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("<|im_start|>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<|im_start|>")]
    # Without merges there are 256 bytes and 3 special tokens; what was asked for is the upper bound.
    assert 259 < len(tokenizer) <= 400


def test_chat_form_and_its_cost(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nCompute 17+25.<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    # The frame: start, role, newline, end; newline, start, role, newline.
    assert len(ids) == 8 + len(tokenizer("Compute 17+25.")["input_ids"])


def test_prompt_is_a_token_prefix_of_prompt_and_answer(tokenizer):
    for end in (2, 4):
        prompt = tokenizer.apply_chat_template(CONVERSATION[: end - 1], add_generation_prompt=True, return_dict=True)
        whole = tokenizer.apply_chat_template(CONVERSATION[:end], return_dict=True)["input_ids"]
        assert whole[: len(prompt["input_ids"])] == prompt["input_ids"]
        assert whole[-1] == tokenizer.eos_token_id


def test_generation_marks_cover_the_answers_and_their_end(tokenizer):
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "17+25=42. \\boxed{42}<|im_end|>You're welcome!<|im_end|>"
    assert is_chat_template_stop_token_trained(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)


def test_same_texts_give_the_same_tokenizer_in_another_process():
    # Whatever is hashed with a seed of the process would show as another order of merges.
    texts = [
        f"{word}{i} {word}" for i, word in enumerate(["the", "then", "them", "these", "other", "mother", "father"] * 9)
    ]
    code = (
        "import sys, json\n"
        "from deltarl.rl.tokenizer import build_tokenizer\n"
        "print(build_tokenizer(json.loads(sys.argv[1])).backend_tokenizer.to_str())"
    )
    command = [sys.executable, "-c", code, json.dumps(texts)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert out.stdout.strip() == build_tokenizer(texts).backend_tokenizer.to_str()


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    for text in ["x=21/3=7. \\boxed{7}", " 日本  \n"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    rendered = loaded.apply_chat_template(CONVERSATION, tokenize=False)
    assert re.sub(r"<\|im_end\|>$", "", rendered).endswith("You're welcome!")
