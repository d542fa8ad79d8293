"""The prompts and the sampling parameters of `generate`."""

from __future__ import annotations

import copy
import io

import pytest

from tfclm.checkpoint.generation import sample
from tfclm.cli.arguments import parse
from tfclm.cli.prompts import read_prompt
from tfclm.errors import InputError
from tfclm.generate import GenerateSettings


def stdin(content: bytes) -> io.TextIOWrapper:
    """Standard input of a shell that is not set to UTF-8."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii")


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"The\n", "The"),
        (b"The\r\n", "The"),
        (b"The", "The"),
        (b"The\r", "The\r"),
        (b" a\nb\n\n", " a\nb\n"),
        (b"\n", ""),
        ("六".encode(), "六"),
    ],
)
def test_prompt_of_echo_has_no_newline(content: bytes, prompt: str):
    """The newline of `echo The |` in the prompt, whose continuation is another; or more taken away than that one."""
    assert read_prompt(None, stdin(content)) == prompt


def test_prompt_that_is_not_utf8():
    """A traceback for a file in another encoding, or for such bytes in the shell's arguments."""
    with pytest.raises(InputError, match="standard input is not UTF-8"):
        read_prompt(None, stdin(b"caf\xe9"))
    with pytest.raises(InputError, match="`prompt` is not UTF-8"):
        read_prompt("caf\udce9", stdin(b""))


def test_prompt_is_taken_literally():
    """A prompt of "none" that makes the command wait for standard input, and an empty one that does."""
    for prompt in ("none", "", " x\n"):
        settings = parse(GenerateSettings, [f"--prompt={prompt}"], prog="generate", description="")
        assert read_prompt(settings.prompt, stdin(b"not this")) == prompt


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), float("-inf"), 1e-40, 1e40, -1.0])
def test_temperature_out_of_range(make_model, tokenizer, temperature: float):
    """A division by nearly nothing, and text drawn from logits that are no numbers."""
    with pytest.raises(InputError, match=r"`temperature` .* 0 \(greedy\) or a number from 1e-6 to 1e6"):
        sample(make_model(), tokenizer, "The", temperature=temperature)


@pytest.mark.parametrize("top_p", [float("nan"), float("inf"), 0.0, 1.1])
def test_top_p_out_of_range(make_model, tokenizer, top_p: float):
    """A comparison with no number, which holds for no token."""
    with pytest.raises(InputError, match=r"`top_p` .* above 0 and up to 1"):
        sample(make_model(), tokenizer, "The", top_p=top_p)


def test_temperature_at_its_bounds_gives_text(make_model, tokenizer):
    """A range that is wider than what float32 can divide by: the coldest is greedy, the hottest any token."""
    model = make_model()
    greedy = sample(model, tokenizer, "The", temperature=0, max_new_tokens=5)
    assert sample(model, tokenizer, "The", temperature=1e-6, max_new_tokens=5) == greedy
    assert len(sample(model, tokenizer, "The", temperature=1e6, max_new_tokens=5)) > len("The")


def test_empty_prompt_begins_with_bos(make_model, tokenizer):
    """A BOS of id 0 that is taken for none, so that the text begins with EOS."""
    model = make_model()
    tokenizer.eos_token = "e"
    assert tokenizer.bos_token_id == 0 != tokenizer.eos_token_id
    ids = model.generate([[0]], attention_mask=[[1]], do_sample=False, max_new_tokens=5, pad_token_id=0)[0]
    assert sample(model, tokenizer, "", temperature=0, max_new_tokens=5) == tokenizer.decode(ids, True)


def test_empty_prompt_without_a_token_to_begin_with(make_model, tokenizer):
    """A traceback, where a tokenizer has neither BOS nor EOS."""
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="the prompt is empty"):
        sample(make_model(), tokenizer, "")
    assert sample(make_model(), tokenizer, "The", max_new_tokens=3).startswith("The")


# generation_config.json


class Ids:
    """A tokenizer that shows tokens as their ids: text that is tokenized again need not give the same ones."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text):
        return self.tokenizer(text)

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(number)) for number in ids)


def greedy(model, tokenizer, **settings) -> list[int]:
    """Ten tokens after "The", with these settings in the generation_config."""
    model.generation_config = copy.deepcopy(model.generation_config)
    before = vars(model.generation_config).copy()
    vars(model.generation_config).update({"eos_token_id": None} | settings)
    try:
        ids = sample(model, Ids(tokenizer), "The", temperature=0, max_new_tokens=10).split()
    finally:
        vars(model.generation_config).update(before)
    return [int(number) for number in ids[len(tokenizer("The")["input_ids"]) :]]


def test_a_minimum_length_keeps_the_text_from_ending(make_model, tokenizer):
    """A ValueError for `min_length` above the maximum or beside two EOS, and `min_new_tokens` ignored."""
    model = make_model()
    prompt = len(tokenizer("The")["input_ids"])
    ends = [greedy(model, tokenizer)[0], 511]
    assert greedy(model, tokenizer, eos_token_id=ends) == ends[:1]
    for minimum, least in (
        ({"min_length": prompt + 5}, 5),
        ({"min_new_tokens": 5}, 5),
        ({"min_length": 500}, 10),
        ({"min_new_tokens": 500}, 10),
    ):
        tokens = greedy(model, tokenizer, eos_token_id=ends, **minimum)
        assert len(tokens) >= least
        assert not set(ends) & set(tokens[:least])


def test_settings_of_the_output_form_and_nulls_change_nothing(make_model, tokenizer):
    """A traceback where `generate` returns an object of many parts, or nothing, as for null in place of one beam."""
    model = make_model()
    plain = greedy(model, tokenizer)
    for settings in (
        {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
        {"num_beams": None, "num_return_sequences": None, "min_length": None, "repetition_penalty": None},
        {"use_cache": False},
        {"max_length": 2},
        {"repetition_penalty": 1},
    ):
        assert greedy(model, tokenizer, **settings) == plain


def test_penalties_are_obeyed(make_model, tokenizer):
    """A repetition penalty lost on the way, or refused for being a whole number."""
    model = make_model()
    assert len(set(greedy(model, tokenizer))) < 10
    assert len(set(greedy(model, tokenizer, repetition_penalty=1000))) == 10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 4}, "num_beams 4, which generate does not support"),
        ({"penalty_alpha": 0.6}, "penalty_alpha 0.6"),
        ({"min_p": 0.1}, "min_p 0.1"),
        ({"stop_strings": ["."]}, "stop_strings"),
        ({"num_return_sequences": 3}, "num_return_sequences 3"),
        ({"eos_token_id": [0, 512]}, "eos_token_id 512: give a token id"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>': give a token id"),
        ({"min_length": "5"}, "min_length '5': give a number of tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: give a number above 0"),
        ({"bad_words_ids": [[]]}, "generation_config.json has a value that cannot be used"),
    ],
)
def test_settings_that_are_not_done_are_refused(settings, words, make_model, tokenizer):
    """A setting that PyTorch's `generate` obeys ignored without a word, or a traceback of TensorFlow's."""
    with pytest.raises(InputError, match=r"generation_config\.json") as caught:
        greedy(make_model(), tokenizer, **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
