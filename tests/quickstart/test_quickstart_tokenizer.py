"""The word-level tokenizer covers the quickstart's texts and loads in transformers without torch."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.quickstart.language import CAPTION_INSTRUCTION, ExistenceQuestion, caption
from m3po_jax.quickstart.objects import OBJECTS
from m3po_jax.quickstart.tokenizer import build_tokenizer, save_tokenizer, vocabulary

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_vocabulary_is_padded_and_unique():
    assert len(vocabulary()) % 64 == 0 and len(set(vocabulary())) == len(vocabulary())
    assert vocabulary()[:5] == ("<unk>", "<s>", "</s>", "<image>", "<pad>")


def test_special_tokens(tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.image_token_id, tokenizer.pad_token_id, len(tokenizer)) == (3, 4, len(vocabulary()))
    assert tokenizer("a dog.</s>").input_ids == [1, *tokenizer.convert_tokens_to_ids(["a", "dog", "."]), 2]


@given(st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=6, unique=True))
def test_captions_round_trip(objects):
    built = build_tokenizer()
    text = caption(objects)
    ids = built.encode(text, add_special_tokens=False).ids
    assert 0 not in ids
    assert built.decode(ids) == text


def test_every_text_is_known(tokenizer):
    texts = [VICUNA.format(CAPTION_INSTRUCTION), f"<image>{caption(OBJECTS)}</s>", "<image>\na dog."]
    texts += [ExistenceQuestion(name, True, "random").instruction for name in OBJECTS]
    texts += ["Yes", "No", "yes", "no", "\nAnswer the question using a single word or phrase."]
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids, text
    assert len({tokenizer(word).input_ids[1] for word in ("Yes", "No", "yes", "no")}) == 4


def test_easy_vqa_is_known(tokenizer):
    easy_vqa = pytest.importorskip("easy_vqa")
    texts = {*easy_vqa.get_train_questions()[0], *easy_vqa.get_test_questions()[0], *easy_vqa.get_answers()}
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_line_feed_after_the_image_adds_nothing(tokenizer):
    assert tokenizer("USER: <image>\nDescribe").input_ids == tokenizer("USER: <image> Describe").input_ids
    assert tokenizer("\nDescribe", add_special_tokens=False).input_ids == [vocabulary().index("Describe")]


def test_loads_without_torch(tmp_path):
    save_tokenizer(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from transformers import AutoTokenizer\n"
        "print(*AutoTokenizer.from_pretrained(sys.argv[1])('a dog.').input_ids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [int(value) for value in done.stdout.split()] == build_tokenizer().encode("a dog.").ids
