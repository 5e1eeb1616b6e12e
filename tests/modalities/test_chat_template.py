"""Chat templates of checkpoints: the ids of the reference, targets that are exactly the assistant's, or a refusal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from polymodal.core.errors import ConfigError, MissingExtraError, SampleError
from polymodal.core.parts import Audio, Image, Part, Text
from polymodal.core.samples import Message
from polymodal.modalities.text import ChatTemplate, Tokenizer, TokenNames, chat_format, tokenize

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
THINKING = """
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- generation %}
        {%- if loop.last %}
            {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}
        {%- endif %}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
LLAVA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROLS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<image>"]
TURNS = (("user", "What? <|im_end|>"), ("assistant", "A cat."), ("user", " Sure? "), ("assistant", "Yes."))


def backend() -> Backend:
    found = Backend(
        models.BPE({letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROLS])
    return found


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return Tokenizer(backend(), (), TokenNames(bos="<s>", eos="</s>"))


def messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [Message(role, (Text(text),)) for role, text in turns]  # type: ignore[arg-type]


def shown(chat: ChatTemplate, tokenizer: Tokenizer, turns: Sequence[Message], *, prompt: bool = False) -> list[str]:
    """Runs as text, the supervised ones in brackets."""
    runs = tokenize(chat.render(turns, id="s", prompt=prompt), tokenizer)
    texts = [(tokenizer.decode(run.ids, with_controls=True), run.is_supervised, run.media) for run in runs]
    return [f"[{text}]" if target else text or f"({media.modality})" for text, target, media in texts if text or media]


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA_2, "</s>"), (THINKING, "<|im_end|>")], ids=["chatml", "2", "3"]
)
@pytest.mark.parametrize("count", [1, 3])
def test_prompts_are_the_references(template: str, end: str, count: int, letters: Tokenizer, tmp_path: Path) -> None:
    reference = pytest.importorskip("transformers")
    theirs = reference.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    # The forged end in the first question is text for us; the comparison is made without it.
    turns = [(role, text.replace(" <|im_end|>", "")) for role, text in TURNS[:count]]
    expected = theirs.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], add_generation_prompt=True, return_dict=False
    )
    chat = ChatTemplate(template=template, end=end, tokens={"bos_token": "<s>", "eos_token": "</s>"})
    runs = tokenize(chat.render(messages(turns), id="s", prompt=True), letters)
    assert [id for run in runs for id in run.ids] == expected


def test_targets_are_what_the_assistant_wrote_and_its_end(letters: Tokenizer) -> None:
    chat = ChatTemplate(template=CHATML, end="<|im_end|>")
    assert "".join(shown(chat, letters, messages(TURNS))) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat? <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n[A cat.][<|im_end|>]\n<|im_start|>user\n Sure? <|im_end|>\n"
        "<|im_start|>assistant\n[Yes.][<|im_end|>]\n"
    )
    forged = chat.render(messages(TURNS[:1]), id="s", prompt=True)
    ids = [id for run in tokenize(forged, letters) for id in run.ids]
    assert ids.count(letters.control("<|im_end|>")) == 2, "a person's spelling of a control token is plain text"
    trimmed = ChatTemplate(template=LLAMA_2, end="</s>", tokens={"bos_token": "<s>", "eos_token": "</s>"})
    assert "".join(shown(trimmed, letters, messages(TURNS))) == (
        "<s>[INST] What? <|im_end|> [/INST][ A cat. ][</s>][INST] Sure? [/INST][ Yes. ][</s>]"
    )


def test_what_a_template_writes_in_an_answer_is_a_target_unless_the_prompt_holds_it(
    letters: Tokenizer,
) -> None:
    chat = ChatTemplate(template=THINKING, end="<|im_end|>")
    assert shown(chat, letters, messages(TURNS))[-3:-1] == ["[<think>\n\n</think>\n\nYes.]", "[<|im_end|>]"]
    plain = ChatTemplate(template=THINKING, end="<|im_end|>", options={"enable_thinking": False})
    assert shown(plain, letters, messages(TURNS[:2]))[-3:-1] == ["[A cat.]", "[<|im_end|>]"]
    with pytest.raises(SampleError, match="prompt for message 1 is not how it writes the conversation up to there"):
        shown(plain, letters, messages(TURNS))


def test_media_stand_where_the_template_puts_their_placeholder(letters: Tokenizer) -> None:
    chat = ChatTemplate(template=LLAVA, end="<|im_end|>", marks={"image": "<image>"})
    parts: tuple[Part, ...] = (Text("Left: <image> "), Image(b"x"), Text("right?"), Image(b"y"))
    turns = [Message("user", parts), Message("assistant", (Text("Both."),))]
    assert "".join(shown(chat, letters, turns)) == (
        "<|im_start|>user\n(image)\n(image)\nLeft: <image> right?<|im_end|><|im_start|>assistant\n[Both.][<|im_end|>]"
    )
    wrong = chat.model_copy(update={"marks": {"image": "<picture>"}})
    with pytest.raises(SampleError, match=r"writes 0 placeholder\(s\) '<picture>' for 2 image item\(s\); name what it"):
        wrong.render(turns, id="s")


def test_media_that_a_template_does_not_know_stand_where_they_are_said(letters: Tokenizer) -> None:
    parts: tuple[Part, ...] = (Text(" Left: "), Audio(b"x"), Text(" right? "), Image(b"y"))
    turns = [Message("user", parts), Message("assistant", (Text("Both."),)), Message("user", (Audio(b"z"), Text("?")))]
    knows_none = ChatTemplate(template=CHATML, end="<|im_end|>")
    assert "".join(shown(knows_none, letters, turns, prompt=True)) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n Left: (audio) right? (image)"
        "<|im_end|>\n<|im_start|>assistant\n[Both.][<|im_end|>]\n<|im_start|>user\n(audio)?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    trims = ChatTemplate(template=LLAMA_2, end="</s>", tokens={"bos_token": "<s>", "eos_token": "</s>"})
    assert "".join(shown(trims, letters, turns[:1], prompt=True)) == "<s>[INST] Left: (audio) right? (image) [/INST]"
    knows_images = ChatTemplate(template=LLAVA, end="<|im_end|>", marks={"image": "<image>"})
    assert "".join(shown(knows_images, letters, turns[:2])) == (
        "<|im_start|>user\n(image)\n Left: (audio) right? <|im_end|><|im_start|>assistant\n[Both.][<|im_end|>]"
    )
    twice = ChatTemplate(template="{% for m in messages %}{{ m.content + m.content }}{% endfor %}", end="</s>")
    with pytest.raises(SampleError, match="writes an item of audio 2 times, expected once; choose a chat"):
        twice.render([Message("user", (Audio(b"x"),))], id="s")


@pytest.mark.parametrize(
    ("template", "end", "message"),
    [
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", "</s>", "does not write the messages as they are"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "</s>", "does not write the messages as they"),
        (CHATML, "</s>", "does not end message 1 with '</s>'; name the token that does"),
        ("{{ raise_exception('no roles') }}", "</s>", "the chat template refuses it: no roles"),
        ("{{ messages.__class__.__mro__ }}", "</s>", "the chat template refuses it: access to attribute"),
        ("{% if add_generation_prompt %}!{% endif %}" + CHATML, "<|im_end|>", "prompt for message 1 is not how"),
    ],
)  # fmt: skip
def test_what_cannot_be_proven_is_refused(template: str, end: str, message: str) -> None:
    with pytest.raises(SampleError, match=f"^sample s: .*{message}"):
        ChatTemplate(template=template, end=end).render(messages(TURNS), id="s")


def test_what_is_no_template_and_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the template is not valid Jinja"):
        ChatTemplate(template="{% for %}", end="</s>").render(messages(TURNS), id="s")
    with pytest.raises(SampleError, match="the last message is the assistant's"):
        ChatTemplate(template=CHATML, end="</s>").render(messages(TURNS), id="s", prompt=True)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"a checkpoint's chat template needs .*'polymodal\[hub\]'"):
        ChatTemplate(template="another", end="</s>").render(messages(TURNS), id="s")


def test_a_template_is_a_chat_format_of_a_backbone() -> None:
    from polymodal.models.backbones.decoder import DecoderConfig

    config = DecoderConfig.parse({"chat": {"template": CHATML, "end": "<|im_end|>"}})
    assert isinstance(config.chat, ChatTemplate) and chat_format(config.chat) is config.chat
    assert DecoderConfig.parse(config.to_data()) == config
    assert config.chat.controls == ("<|im_end|>",)
