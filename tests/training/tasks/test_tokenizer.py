"""The stage that learns CLIP's byte-pair merges."""

from random import Random

from training.tasks.tokenizer import END, SMALLEST_VOCABULARY, START, train_tokenizer


def captions() -> list[str]:
    """Texts in which many pairs of letters occur equally often."""
    random = Random(0)
    words = ["".join(random.choices("abcdefgh", k=random.randint(2, 6))) for _ in range(300)]
    return [" ".join(random.choices(words, k=6)) for _ in range(400)]


def test_equal_captions_give_equal_tokenizers() -> None:
    first, *others = (train_tokenizer(captions(), 900).get_vocab() for _ in range(6))
    assert len(first) == 900
    assert all(other == first for other in others)


def test_the_special_tokens_come_last_and_few_captions_make_a_small_vocabulary() -> None:
    assert len(train_tokenizer([""], SMALLEST_VOCABULARY)) == SMALLEST_VOCABULARY
    tokenizer = train_tokenizer(["a cat"], 600)
    assert len(tokenizer) == SMALLEST_VOCABULARY + 2  # "ca", "cat</w>"
    assert tokenizer.convert_tokens_to_ids([START, END]) == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer.tokenize("A cat") == ["a</w>", "cat</w>"]
